"""Federations that fill the ledger by themselves. Nothing here is imported unless you ask for it.

flower.py            wrap a strategy in one line
flower_messages.py   what its clients' replies hold
flower_rules.py      what its strategies do to updates, as contributions that add up
"""
