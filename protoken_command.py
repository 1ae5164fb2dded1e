"""The first lines of the command `protoken`: Ctrl-C ends it without a word while the package is being imported.

That takes seconds, and an interrupted import would print the traceback of whatever library was being read. This stands
outside the package, since everything inside imports the package first.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Entry point of the script; `protoken.cli.main` does the rest."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from protoken.cli import main as command

    signal.signal(signal.SIGINT, before)
    command()
