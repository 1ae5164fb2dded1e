"""Printing to a stream whose encoding lacks some of our characters: something alike of the same width, or "?"."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.cells import cell_len

# Of the same width, in ASCII.
_PLAINLY = str.maketrans("·■━╍…⟨⟩↵⇥", "-#=~~<>/>")


def take_any_encoding(stream: IO[str] | None) -> str | None:
    """Let ``stream`` print everything from now on.

    Returns:
        How it met what its encoding lacks before, for `reconfigure`; None where it cannot be changed.
    """
    if not hasattr(stream, "reconfigure"):
        return None
    changed: Any = stream
    before = str(changed.errors)
    changed.reconfigure(errors="plainly")
    return before


@contextmanager
def any_encoding(stream: IO[str] | None) -> Iterator[None]:
    """Let ``stream`` print everything meanwhile; afterwards it is as it was."""
    before = take_any_encoding(stream)
    try:
        yield
    finally:
        if before is not None:
            changed: Any = stream
            changed.reconfigure(errors=before)


def _plainly(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAINLY)
    return "".join(c if c.isascii() else "?" * cell_len(c) for c in text), error.end


codecs.register_error("plainly", _plainly)
