"""Measurements behind `protoken bench`."""
