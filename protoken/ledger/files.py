"""Every file operation of the ledger, in one small object.

Names are relative to the ledger's folder, with "/" between parts. Each part is opened by its parent's descriptor
without following links, so a symlink anywhere below the folder is an error and never a way out of it. Regular files
must have one name only: with a second hard link somebody outside could rewrite what is called immutable.

Reads go through pread into memory of ours, after fstat: a file that shrinks under a mapping kills the process
with SIGBUS, a short pread is an exception. The page cache is the same either way.

All changes pass through ``_change``, the one place where tests inject faults and where OSError becomes DurabilityError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from protoken.errors import CommitConflict, DurabilityError, LedgerError, LedgerFormatError
from protoken.paths import path_of

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO for reading would wait for its writer for ever.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CHUNK = 1 << 26


class FileLayer:
    """File operations below one folder.

    ``sync=False`` skips fsync: only for throw-away ledgers in tests and benchmarks; a crash may then lose anything.
    """

    def __init__(self, root: str | os.PathLike[str], *, sync: bool = True) -> None:
        self.root = Path(path_of("ledger", root))
        self.syncs = sync

    # ---- reading -------------------------------------------------------------------------------------------

    def open_read(self, name: str) -> int:
        """A descriptor of a regular file with a single name. LedgerFormatError for anything else."""
        with self._parent(name) as (folder, leaf):
            return self.open_leaf(folder, leaf, name)

    def open_leaf(self, folder: int, leaf: str, name: str) -> int:
        """The same in a folder that is open already (see `folder`); ``name`` is for the message."""
        try:  # as in _reading, of which a context manager per small shard would be felt
            handle = os.open(leaf, _FILE, dir_fd=folder)
        except OSError as error:
            raise _unreadable(name, error) from error
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise LedgerFormatError(name, expected="a regular file", got="another kind of file")
            # None at all is HEAD of a moment ago: replaced between open and here, still whole, still ours to read.
            if status.st_nlink > 1:
                raise LedgerFormatError(
                    name,
                    expected="a file with one name",
                    got=f"{status.st_nlink} hard links",
                    remedy="Copy the ledger instead of hard-linking it.",
                )
        except BaseException:
            os.close(handle)
            raise
        return handle

    def size(self, handle: int) -> int:
        """Bytes of the open file, as it is now."""
        return os.fstat(handle).st_size

    def read_into(self, handle: int, buffer: memoryview, offset: int, name: str) -> None:
        """Fill the buffer from ``offset``; LedgerFormatError when the file ends before."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(handle, [buffer[done : done + _CHUNK]], offset + done)
            except OSError as error:
                raise _unreadable(name, error) from error
            if count == 0:
                raise LedgerFormatError(
                    name,
                    expected=f"{offset + len(buffer)} bytes",
                    got=f"{offset + done} (the file was cut short)",
                )
            done += count

    def read(self, name: str, limit: int) -> bytes:
        """The whole file, if it has at most ``limit`` bytes."""
        handle = self.open_read(name)
        try:
            size = self.size(handle)
            if size > limit:
                raise LedgerFormatError(name, expected=f"at most {limit} bytes", got=size)
            data = bytearray(size)
            self.read_into(handle, memoryview(data), 0, name)
            return bytes(data)
        finally:
            os.close(handle)

    def size_of(self, name: str) -> int:
        """Bytes of a regular file by name."""
        handle = self.open_read(name)
        try:
            return self.size(handle)
        finally:
            os.close(handle)

    def exists(self, name: str) -> bool:
        """Whether there is anything of this name, links included."""
        try:
            with self._parent(name) as (folder, leaf):
                os.stat(leaf, dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, LedgerFormatError):
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder ("" is the ledger's own); empty when there is no such folder."""
        try:
            with self.folder(folder) as handle, _reading(folder):
                return sorted(os.listdir(handle))
        except LedgerFormatError:
            if not self.exists(folder):
                return []
            raise

    # ---- changing ------------------------------------------------------------------------------------------

    def _change(self, operation: str, name: str, action: Callable[[], T]) -> T:
        """Run one change of the file system; the seam for fault injection."""
        try:
            return action()
        except OSError as error:
            raise DurabilityError(
                name,
                expected=f"{operation} to succeed",
                got=error.strerror or str(error),
                remedy=f"{remedy_of(error)}, open the ledger again, write what it lacks.",
            ) from error

    def make_root(self) -> None:
        """Make the ledger's own folder and those above it, unless they are there."""
        self._change("mkdir", str(self.root), lambda: self.root.mkdir(parents=True, exist_ok=True))

    def sync_above(self) -> None:
        """Make the ledger's own name durable in the folder above it."""

        def sync() -> None:
            handle = os.open(self.root.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

        self._change("fsync of the folder above", str(self.root), sync if self.syncs else lambda: None)

    def make_folder(self, name: str) -> None:
        with self._parent(name) as (folder, leaf):
            self._change("mkdir", name, lambda: os.mkdir(leaf, 0o777, dir_fd=folder))

    def create(self, name: str) -> int:
        """A descriptor of a new file; an existing one is an error."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._parent(name) as (folder, leaf):
            return self._change("create", name, lambda: os.open(leaf, flags, 0o666, dir_fd=folder))

    def write(self, handle: int, data: Buffer, name: str) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            piece = view[:_CHUNK]
            count = self._change("write", name, lambda piece=piece: os.write(handle, piece))  # type: ignore[misc]
            view = view[count:]

    def sync(self, handle: int, name: str) -> None:
        self._change("fsync", name, lambda: os.fsync(handle) if self.syncs else None)

    def sync_folder(self, name: str) -> None:
        """Make the names in a folder durable ("" is the ledger's own)."""
        with self.folder(name) as handle:
            self._change("fsync of the folder", name, lambda: os.fsync(handle) if self.syncs else None)

    def rename(self, old: str, new: str) -> None:
        """Atomic; replaces a file of the new name."""
        with self._parent(old) as (folder, leaf), self._parent(new) as (new_folder, new_leaf):
            self._change("rename", new, lambda: os.rename(leaf, new_leaf, src_dir_fd=folder, dst_dir_fd=new_folder))

    def remove(self, name: str) -> None:
        """Remove a file, a link or a whole folder; links inside are removed, not followed."""
        with self._parent(name) as (folder, leaf):
            try:
                mode = os.stat(leaf, dir_fd=folder, follow_symlinks=False).st_mode
            except FileNotFoundError:
                return
            if not stat.S_ISDIR(mode):
                self._change("unlink", name, lambda: os.unlink(leaf, dir_fd=folder))
                return
        for inner in self.names(name):
            self.remove(f"{name}/{inner}")
        with self._parent(name) as (folder, leaf):
            self._change("rmdir", name, lambda: os.rmdir(leaf, dir_fd=folder))

    def write_file(self, name: str, data: Buffer, *more: Buffer) -> None:
        """Create, write, fsync. The folder's own fsync is the caller's."""
        handle = self.create(name)
        try:
            for piece in (data, *more):
                self.write(handle, piece, name)
            self.sync(handle, name)
        finally:
            os.close(handle)

    def replace_file(self, name: str, data: bytes) -> None:
        """Replace a file atomically and durably; readers see the old bytes or the new ones."""
        temporary = f"{name}.new"
        self.remove(temporary)
        self.write_file(temporary, data)
        self.rename(temporary, name)
        self.sync_folder(name.rpartition("/")[0])

    def lock(self, name: str) -> int:
        """Hold the ledger for writing until the descriptor is closed or the process ends.

        CommitConflict when another writer holds it. The kernel drops the lock of a killed process.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self._parent(name) as (folder, leaf):
            handle = self._change("lock", name, lambda: os.open(leaf, flags, 0o666, dir_fd=folder))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Somebody may have removed the file between open and flock; a lock on it would lock nobody
                # out.
                same = os.stat(leaf, dir_fd=folder, follow_symlinks=False).st_ino == os.fstat(handle).st_ino
            except OSError as error:
                os.close(handle)
                if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.ENOENT):
                    raise _conflict(self.root) from error
                raise DurabilityError(name, expected="a lock", got=error.strerror or str(error)) from error
        if not same:
            os.close(handle)
            raise _conflict(self.root)
        return handle

    # ---- walking -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def folder(self, name: str) -> Iterator[int]:
        """Descriptor of a folder, reached part by part without following links."""
        with _reading(name or str(self.root)):
            handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in _parts(name):
                with _reading(name):
                    inner = os.open(part, _FOLDER, dir_fd=handle)
                os.close(handle)
                handle = inner
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _parent(self, name: str) -> Iterator[tuple[int, str]]:
        folder, _, leaf = name.rpartition("/")
        if not leaf or leaf in (".", ".."):
            raise LedgerFormatError("name", expected="a relative path inside the ledger", got=ascii(name))
        with self.folder(folder) as handle:
            yield handle, leaf


def remedy_of(error: object) -> str:
    """What to do about a file system that refused."""
    forbidden = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
    return "Get the right to write there" if forbidden else "Free space or mend the disk"


def _parts(name: str) -> list[str]:
    if not name:
        return []
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise LedgerFormatError("name", expected="a relative path inside the ledger", got=ascii(name))
    return parts


def _conflict(root: Path) -> CommitConflict:
    return CommitConflict(
        "ledger",
        expected="no other writer",
        got=f"{str(root)!a} is locked",
        remedy="Wait until the other writer has committed, open the ledger again, then write.",
    )


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> LedgerError:
    if isinstance(error, FileNotFoundError):
        return LedgerFormatError(
            name,
            expected="a file of the ledger",
            got="nothing there",
            remedy="Name the folder that holds ledger.json and rounds; if it does, the ledger is incomplete",
        )
    kinds = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG, errno.EMLINK)
    if error.errno in kinds:
        return LedgerFormatError(name, expected="regular files and folders without links", got=error.strerror)
    return LedgerError(name, expected="a readable file", got=error.strerror or str(error))
