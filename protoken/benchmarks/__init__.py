"""Measurements behind `protoken bench`.

overhead.py    what tracing adds to generation; overhead_cases.py, the ways that are timed
kernels.py     the ops against torch's own ways; kernel_cases.py, shapes, banks and these ways
turns.py       several ways timed side by side; measuring.py, where a call runs, its seconds and memory
"""
