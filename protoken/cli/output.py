"""What the command prints, whatever is at the other end: a full disk, a closed pipe."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import IO

# What is wrong with the disk and not with the program.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
CLOSED_PIPE = 128 + 13
"""As a process that SIGPIPE ended: 1 would say that a ledger is not sound."""


def give_up(stream: IO[str] | None) -> None:
    """Send what is left to nowhere: the interpreter would try again when it ends, and complain."""
    if stream is not None:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
