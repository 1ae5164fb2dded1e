"""Triton kernels, one file per op; imported by `protoken.dispatch` when first needed, so nothing is imported here."""
