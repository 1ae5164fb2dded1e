"""Federations that fill the ledger by themselves: `flower`. Nothing here is imported unless you ask for it."""
