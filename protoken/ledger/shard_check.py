"""One shard, from the first byte to the last: size, header, binding, layout, hash and finiteness of every tensor.

A ledger of many small shards is bound by the interpreter, not by the disk. So shards of one folder are opened by its
descriptor, a shard is read in one piece, and a set of names, layouts and shapes that was found good once is looked up
the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import replace
from typing import Any

import numpy as np

from protoken.errors import LedgerError, LedgerFormatError
from protoken.ledger import codecs
from protoken.ledger.rounds import Round, check_binding, check_layout, folder
from protoken.ledger.shards import ShardIndex, ShardRef, parse_header, read_index, read_open
from protoken.ledger.tensors import is_finite

# Larger shards are read tensor by tensor.
ONE_PIECE = 64 << 20
_NUMBERS = {"F64": np.float64, "F32": np.float32}
# Dtype -> (integer of its size, the bits that are all set in NaN and infinity). F8_E4M3 has no infinity.
_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F),
}


class ShardChecker:
    """Checks shards of one round; a context manager that threads may share."""

    def __init__(self, round_: Round) -> None:
        self._round, self._files = round_, round_.cache.files
        self._place = folder(round_.number)
        self._seen: set[Any] = set()
        self._open = contextlib.ExitStack()
        self._folders: dict[str, int] = {}

    def __enter__(self) -> ShardChecker:
        with contextlib.suppress(LedgerError):  # a missing folder is found again, and reported, at its first shard
            for inner in ("", "clients"):
                self._folders[inner] = self._open.enter_context(self._files.folder(f"{self._place}/{inner}".strip("/")))
        return self

    def __exit__(self, *error: object) -> None:
        self._folders.clear()
        self._open.close()

    def check(self, ref: ShardRef, client: str | None) -> int:
        """Bytes of the shard. LedgerFormatError, LedgerError when anything is not as it was committed."""
        quarantined = client is not None and self._round.client(client).quarantined is not None
        whole = ref.file != "residual.safetensors"
        placed = replace(ref, file=f"{self._place}/{ref.file}")
        if ref.size > ONE_PIECE:
            self._check_large(placed, client, quarantined, whole)
            return ref.size
        data = self._read_whole(ref, placed.file)
        length = int.from_bytes(data[:8], "little")
        if length > ref.size - 8:
            raise LedgerFormatError(placed.file, expected="a header inside the file", got=f"{length} bytes of header")
        found = hashlib.sha256(data[: 8 + length]).hexdigest()
        if found != ref.sha256:
            raise LedgerFormatError(placed.file, expected=f"a header with hash {ref.sha256}", got=found)
        index = parse_header(bytes(data[8 : 8 + length]), placed)
        self._check_index(index, client, quarantined, whole)
        for name, entry in index.entries.items():
            view = data[entry.begin : entry.end]
            if hashlib.sha256(view).hexdigest() != entry.sha256:
                raise LedgerFormatError(placed.file, expected=f"{name!a} with hash {entry.sha256}", got="other bytes")
            if not quarantined and not bytes_finite(view, entry.dtype):
                raise LedgerFormatError(placed.file, expected=f"finite numbers in {name}", got="NaN or infinity")
        return ref.size

    def _read_whole(self, ref: ShardRef, name: str) -> memoryview:
        files, (inner, _, leaf) = self._files, ref.file.rpartition("/")
        known = self._folders.get(inner)
        handle = files.open_read(name) if known is None else files.open_leaf(known, leaf, name)
        try:
            size = files.size(handle)
            if size != ref.size:
                raise LedgerFormatError(name, expected=f"{ref.size} bytes", got=size)
            data = memoryview(bytearray(size))
            files.read_into(handle, data, 0, name)
            return data
        finally:
            os.close(handle)

    def _check_index(self, index: ShardIndex, client: str | None, quarantined: bool, whole: bool) -> None:
        check_binding(index, self._round.manifest, self._round.base_hash, client)
        if quarantined:
            return
        shape = (
            whole,
            tuple((name, entry.dtype, entry.shape) for name, entry in index.entries.items()),
            tuple(index.info["layout"].items()),
        )
        if shape not in self._seen:
            check_content(self._round, index, whole=whole)
            self._seen.add(shape)

    def _check_large(self, ref: ShardRef, client: str | None, quarantined: bool, whole: bool) -> None:
        index = read_index(self._files, ref)
        self._check_index(index, client, quarantined, whole)
        handle = self._files.open_read(ref.file)
        try:
            for name in index.entries:
                tensor = read_open(self._files, handle, index, name)
                if not quarantined and not is_finite(tensor):
                    raise LedgerFormatError(ref.file, expected=f"finite numbers in {name}", got="NaN or infinity")
        finally:
            os.close(handle)


def check_shard(round_: Round, ref: ShardRef, client: str | None) -> int:
    """Check one shard of a round; returns its size. LedgerFormatError when anything is wrong with it."""
    with ShardChecker(round_) as checker:
        return checker.check(ref, client)


def check_content(round_: Round, index: ShardIndex, *, whole: bool) -> None:
    """Exactly the parts of the round's parameters, no more; a residual may hold some of them only."""
    wanted: set[str] = set()
    for parameter, spec in round_.parameters.items():
        if whole or parameter in index.info["layout"]:
            layout = check_layout(index, parameter, spec)
            wanted.update(parameter + s for s in codecs.expected_parts(layout, spec.shape, index.file))
    if wanted != set(index.entries):
        extra = sorted(set(index.entries) - wanted)
        raise LedgerFormatError(index.file, expected="tensors of the parameters only", got=ascii(extra)[:160])


def bytes_finite(data: memoryview, dtype: str) -> bool:
    """Whether numbers of this dtype, as they lie on disk, hold no NaN and no infinity."""
    if dtype in _NUMBERS:
        return bool(np.isfinite(np.frombuffer(data, dtype=_NUMBERS[dtype])).all())
    if dtype not in _NOT_FINITE:
        return True
    kind, mask = _NOT_FINITE[dtype]
    bits = np.frombuffer(data, dtype=kind)
    return not bool((np.bitwise_and(bits, kind(mask)) == kind(mask)).any())
