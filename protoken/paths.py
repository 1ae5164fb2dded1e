"""Paths that callers name, and what is written there.

A new file renamed to where another one was takes the place of links and devices as well: a link would lose what it
points to, and for root /dev/null would become an ordinary file. So links are followed, and what is no regular file
(a device, a pipe, /dev/stdout) is written to as it stands.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from protoken.errors import ArgumentError


def path_of(argument: str, path: str | os.PathLike[str]) -> str:
    """The path as text. ArgumentError for what is none, and for text that no file can be called."""
    found = path if isinstance(path, str) else os.fspath(path) if isinstance(path, os.PathLike) else None
    if not isinstance(found, str):
        raise ArgumentError(argument, expected="a path: text or a pathlib.Path", got=f"a {type(path).__name__}")
    try:
        os.fsencode(found)
    except UnicodeEncodeError:
        possible = False
    else:
        possible = found != "" and "\0" not in found
    if not possible:
        raise ArgumentError(argument, expected="a path that a file can have", got=ascii(found))
    return found


def file_to_read(argument: str, path: str | os.PathLike[str], expected: str) -> str:
    """The same of a file to be read. ArgumentError for a folder, and for a pipe, which would be waited for."""
    found = path_of(argument, path)
    if os.path.exists(found) and not os.path.isfile(found):
        raise ArgumentError(argument, expected=expected, got=f"{found}, which is no regular file")
    return found


def write_text(path: str, text: str) -> None:
    """Write a file in place, as UTF-8. OSError names it, also where the disk is full."""
    with _naming(path), open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_whole(
    path: str, write: Callable[[str], object], write_in_place: Callable[[str], object] | None = None
) -> None:
    """Let `write` fill a file beside `path`, which then takes its name: `path` appears whole or not at all.

    What is no regular file, or open already, is written to by `write_in_place` (None: by `write`, too). A file keeps
    its rights; a new one gets those that open() would give it, whatever `write` does.
    """
    with _naming(path):
        # What a shell has opened goes on being written to by others, be it a file or not.
        opened = os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))
        if opened or (os.path.exists(path) and not os.path.isfile(path)):
            (write_in_place or write)(path)
            return
        target = os.path.realpath(path)
        partial = f"{target}.{secrets.token_hex(4)}.partial"
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        try:
            rights = os.stat(target if os.path.exists(target) else partial).st_mode
            write(partial)
            if os.stat(partial).st_mode != rights:
                os.chmod(partial, stat.S_IMODE(rights))
            os.replace(partial, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # A failed write knows no name, and a failed rename that of the file beside: the caller knows only his own.
        if error.errno is None or error.filename == path:
            raise
        raise OSError(error.errno, error.strerror, path) from error
