"""Triton kernels and their launchers, installed as protoken.kernels. Free of imports on purpose."""
