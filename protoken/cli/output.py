"""What the command prints, whatever is at the other end: another encoding than UTF-8, a full disk, a closed pipe."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from contextlib import suppress
from typing import IO

from rich.cells import cell_len

# Of the same width, in ASCII.
_PLAINLY = str.maketrans("·■━╍…⟨⟩↵⇥", "-#=~~<>/>")
# What is wrong with the disk and not with the program.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
CLOSED_PIPE = 128 + 13
"""As a process that SIGPIPE ended: 1 would say that a ledger is not sound."""


def take_any_encoding() -> None:
    """Let stdout and stderr print what their encoding lacks by something alike, or by question marks."""
    codecs.register_error("plainly", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plainly")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAINLY)
    return "".join(c if c.isascii() else "?" * cell_len(c) for c in text), error.end


def give_up(stream: IO[str] | None) -> None:
    """Send what is left to nowhere: the interpreter would try again when it ends, and complain."""
    if stream is not None:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
