"""Shards: safetensors files that can be checked tensor by tensor.

Layout (all of it valid safetensors):

    8 bytes    length n of the header, little-endian
    n bytes    JSON: {"__metadata__": {"protoken": INFO}, NAME: {"dtype", "shape", "data_offsets"}, ...},
               padded with spaces to a multiple of 8
    the rest   the tensors, one after the other, without a hole

INFO is JSON in a string (safetensors allows strings only): {"sha256": {NAME: hash of the tensor's bytes},
...more}. The hash of a shard is SHA-256 of its first 8 + n bytes. These hold the hash of every tensor, so it
fixes every byte of the file, and one tensor can be read and checked without reading the others.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from protoken.errors import LedgerError, LedgerFormatError
from protoken.ledger import strictjson
from protoken.ledger.files import FileLayer
from protoken.ledger.tensors import DTYPES, ITEM_SIZES, byte_view, dtype_name, require_memory

HEADER_LIMIT = 16 << 20
MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class ShardRef:
    """What a manifest says of a shard."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a shard; begin and end are offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A checked header."""

    file: str
    size: int
    entries: dict[str, Entry]
    info: dict[str, Any]


def encode_shard(tensors: Mapping[str, Tensor], info: Mapping[str, object]) -> tuple[bytes, list[memoryview]]:
    """Header and pieces of a shard, ready to write: widest dtype first (so all are aligned), then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    pieces = [byte_view(tensors[name]) for name in order]
    hashes = {name: hashlib.sha256(piece).hexdigest() for name, piece in zip(order, pieces, strict=True)}
    text = strictjson.dump({**info, "sha256": hashes}).decode("ascii").rstrip("\n")
    header: dict[str, object] = {"__metadata__": {"protoken": text}}
    offset = 0
    for name, piece in zip(order, pieces, strict=True):
        header[name] = {
            "dtype": dtype_name(tensors[name], name),
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(piece)],
        }
        offset += len(piece)
    body = strictjson.dump(header).rstrip(b"\n")
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body, pieces


def read_index(files: FileLayer, ref: ShardRef) -> ShardIndex:
    """Read and check a shard's header against its size and hash. LedgerFormatError when anything is off."""
    handle = files.open_read(ref.file)
    try:
        _check_size(files, handle, ref)
        prefix = bytearray(8)
        files.read_into(handle, memoryview(prefix), 0, ref.file)
        length = int.from_bytes(prefix, "little")
        if length > HEADER_LIMIT or length > ref.size - 8:
            raise LedgerFormatError(ref.file, expected="a header inside the file", got=f"{length} bytes of header")
        body = bytearray(length)
        files.read_into(handle, memoryview(body), 8, ref.file)
    finally:
        os.close(handle)
    found = hashlib.sha256(bytes(prefix) + body).hexdigest()
    if found != ref.sha256:
        raise LedgerFormatError(ref.file, expected=f"a header with hash {ref.sha256}", got=found)
    return parse_header(bytes(body), ref)


def parse_header(body: bytes, ref: ShardRef) -> ShardIndex:
    """Check a header's JSON: known dtypes, sizes that fit shapes, tensors without hole or overlap to the file's end."""
    header = strictjson.load(body, limit=HEADER_LIMIT, what=ref.file)
    start = 8 + len(body)
    try:
        info = strictjson.load(
            header.pop("__metadata__")["protoken"].encode("ascii"), limit=HEADER_LIMIT, what=ref.file
        )
        hashes = info["sha256"]
        entries = {name: _entry(ref, name, header[name], start, hashes[name]) for name in header}
        if len(hashes) != len(entries):
            raise LedgerFormatError(ref.file, expected="one hash per tensor", got=f"{len(hashes)} hashes")
        good = all(isinstance(layout, str) for layout in info["layout"].values())
        if not good or not all(isinstance(bound, float) for bound in info["bound"].values()):
            raise LedgerFormatError(ref.file, expected="names of layouts and numbers for bounds", got="others")
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise LedgerFormatError(ref.file, expected="a shard of a ledger", got=f"no {str(error)!a}") from error
    end = start
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.begin != end:
            raise LedgerFormatError(
                ref.file,
                expected=f"a tensor at byte {end}",
                got=f"one at {entry.begin}: a hole or an overlap",
            )
        end = entry.end
    if end != ref.size:
        raise LedgerFormatError(ref.file, expected=f"tensors up to byte {ref.size}", got=f"up to {end}")
    return ShardIndex(ref.file, ref.size, entries, info)


def read_tensor(files: FileLayer, index: ShardIndex, name: str, *, check: bool = True) -> Tensor:
    """One tensor by pread; its hash is checked unless told otherwise."""
    handle = files.open_read(index.file)
    try:
        _check_size(files, handle, index)
        return read_open(files, handle, index, name, check=check)
    finally:
        os.close(handle)


def read_open(files: FileLayer, handle: int, index: ShardIndex, name: str, *, check: bool = True) -> Tensor:
    """The same from a shard that is open already."""
    return read_entry(files, handle, index.file, name, index.entries[name], check=check)


def read_entry(files: FileLayer, handle: int, file: str, name: str, entry: Entry, *, check: bool = True) -> Tensor:
    """The same of a tensor whose place is known; ``file`` and ``name`` are for messages."""
    try:
        require_memory(entry.shape, ITEM_SIZES[entry.dtype])
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    except (LedgerError, RuntimeError) as error:
        raise LedgerFormatError(file, expected="a tensor that fits in memory", got=entry.shape) from error
    view = byte_view(tensor)
    files.read_into(handle, view, entry.begin, file)
    if check:
        check_hash(view, file, name, entry.sha256)
    return tensor


def check_hash(data: memoryview, file: str, name: str, sha256: str) -> None:
    """LedgerFormatError unless the bytes of a tensor have this hash."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise LedgerFormatError(
            file,
            expected=f"{name!a} with hash {sha256}",
            got="other bytes",
            remedy="The file was changed after its commit: restore it from a copy.",
        )


def _entry(ref: ShardRef, name: str, spec: Any, start: int, sha256: Any) -> Entry:
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    good = (
        len(spec) == 3
        and isinstance(dtype, str)
        and dtype in DTYPES
        and isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(n) is int and 0 <= n < 1 << 62 for n in [*shape, *offsets])
        and isinstance(sha256, str)
        and offsets[1] - offsets[0] == prod(shape) * ITEM_SIZES[dtype]
    )
    if not good:
        raise LedgerFormatError(
            ref.file,
            expected=f"dtype, shape and matching offsets for {ascii(name)[:80]}",
            got=ascii(spec)[:160],
        )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1], sha256)


def _check_size(files: FileLayer, handle: int, ref: ShardRef | ShardIndex) -> None:
    size = files.size(handle)
    if size != ref.size:
        raise LedgerFormatError(ref.file, expected=f"{ref.size} bytes", got=size)
