"""One shard, from the first byte to the last: size, header, binding, layout, hash and finiteness of every tensor.

A shard of a kind met before (templates.py) takes no parsing: one comparison of its header, one hash per tensor, and one
look for NaN and infinity over all tensors of a dtype together.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from protoken.errors import LedgerFormatError
from protoken.ledger import codecs
from protoken.ledger.round_files import RoundFiles
from protoken.ledger.rounds import Round, check_binding, check_layout
from protoken.ledger.shards import ShardIndex, ShardRef, check_hash, parse_header, read_open
from protoken.ledger.tensors import is_finite

# Larger shards are read tensor by tensor.
ONE_PIECE = 64 << 20
# Bytes of a tensor whose hash is worth remembering.
_FEW = 32
_NUMBERS = {"F64": np.float64, "F32": np.float32}
# Dtype -> (integer of its size, the bits that are all set in NaN and infinity). F8_E4M3 has no infinity.
_NOT_FINITE: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F),
}


class ShardChecker(RoundFiles):
    """Checks shards of one round; a context manager that threads may share."""

    def __enter__(self) -> ShardChecker:
        super().__enter__()
        return self

    def check(self, ref: ShardRef, client: str | None) -> int:
        """Bytes of the shard. LedgerFormatError, LedgerError when anything is not as it was committed."""
        handle = self.open(ref)
        try:
            data, start = self.beginning(handle, ref, ONE_PIECE)
            body = bytes(data[8:start])
            if client is None or not self._is_known(body, data, ref, client):
                self._check_parsed(handle, body, data, ref, client)
        finally:
            os.close(handle)
        return ref.size

    def _is_known(self, body: bytes, data: memoryview, ref: ShardRef, client: str) -> bool:
        """Whether the shard is good and of a kind met before; what is wrong with it, the other way says."""
        start = 8 + len(body)
        if len(data) < ref.size or self.round.client(client).quarantined is not None:
            return False
        for kind in self.kinds(ref, start):
            hashes = [_sha256(data[start + part.begin : start + part.end]) for part in kind.parts.values()]
            if kind.fits(body, client, hashes):
                runs = kind.runs
                return all(bytes_finite(data[start + begin : start + end], dtype) for dtype, begin, end in runs)
        return False

    def _check_parsed(self, handle: int, body: bytes, data: memoryview, ref: ShardRef, client: str | None) -> None:
        quarantined = client is not None and self.round.client(client).quarantined is not None
        index = self._parsed(body, ref, client, quarantined)
        for name, entry in index.entries.items():
            if len(data) == ref.size:
                view = data[entry.begin : entry.end]
                check_hash(view, index.file, name, entry.sha256)
                finite = quarantined or bytes_finite(view, entry.dtype)
            else:
                tensor = read_open(self.files, handle, index, name)
                finite = quarantined or is_finite(tensor)
            if not finite:
                raise LedgerFormatError(index.file, expected=f"finite numbers in {name}", got="NaN or infinity")

    def _parsed(self, body: bytes, ref: ShardRef, client: str | None, quarantined: bool) -> ShardIndex:
        index = parse_header(body, replace(ref, file=self.name(ref)))
        check_binding(index, self.round.manifest, self.round.base_hash, client)
        if not quarantined:
            check_content(self.round, index, whole=ref.file != "residual.safetensors")
            self.learn(index, body, client)
        return index


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


def _sha256(data: memoryview) -> str:
    return _of_few(bytes(data)) if len(data) <= _FEW else hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=256)
def _of_few(data: bytes) -> str:
    """Scales of factors are the same eight bytes in shard after shard."""
    return hashlib.sha256(data).hexdigest()
