"""What the caller chose, and what will be done about it before anything runs.

options.py   the choices, checked
plan.py      layers, way and backend, and why; by cost.py (work) and memory.py (bytes), both over sizes.py
"""
