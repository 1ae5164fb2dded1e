"""The command line.

commands.py   `protoken` itself, and every command that is not below; output.py, what they share
ledger.py     `protoken ledger`; records.py, `protoken records`; evaluate.py, `protoken evaluate`
"""

from protoken.cli.commands import app, main

__all__ = ["app", "main"]
