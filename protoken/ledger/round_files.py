"""The shards of one round, opened by their folder's descriptor: what verification and the bank read many clients with.

A round of many small shards is bound by the interpreter, not by the disk. So folders are walked once and not once per
file, a shard is opened once for all that is wanted of it, and headers of one kind are parsed once (templates.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from protoken.errors import LedgerError, LedgerFormatError
from protoken.ledger import codecs
from protoken.ledger.rounds import Round, check_binding, check_layout, folder
from protoken.ledger.shards import HEADER_LIMIT, Entry, ShardIndex, ShardRef, check_hash, parse_header, read_entry
from protoken.ledger.small_factors import FactorPlan
from protoken.ledger.templates import HeaderTemplate
from protoken.ledger.tensors import DTYPES, ITEM_SIZES, LARGEST, LowRank

# Shards up to this size are read in one piece, whatever is wanted of them.
SMALL = 64 << 10
# Kinds of headers remembered per round; a round with more is read as well, only slower.
KINDS = 64
# Of int8 and fp8.
_LARGEST_VALUE = 448.0

Stored = Tensor | tuple[Tensor, Tensor] | LowRank
"""One update as it lies in its shard: dense, (values, scale per row), or factors."""


def dense(value: Stored) -> Tensor:
    """The update as one tensor: as it is, or in fp32 out of its parts."""
    if isinstance(value, Tensor):
        return value
    return value.dense() if isinstance(value, LowRank) else codecs.scaled(*value)


class RoundFiles:
    """A context manager that threads may share: shards of one round, and the kinds of headers met in it."""

    def __init__(self, round_: Round) -> None:
        self.round, self.files = round_, round_.cache.files
        self.place = folder(round_.number)
        self._open = contextlib.ExitStack()
        self._folders: dict[str, int] = {}
        self._kinds: dict[int, list[HeaderTemplate]] = {}
        self._learned = 0

    def __enter__(self) -> RoundFiles:
        with contextlib.suppress(LedgerError):  # a missing folder is found again, and reported, at its first shard
            for inner in ("", "clients"):
                self._folders[inner] = self._open.enter_context(self.files.folder(f"{self.place}/{inner}".strip("/")))
        return self

    def __exit__(self, *error: object) -> None:
        self._folders.clear()
        self._open.close()

    def name(self, ref: ShardRef) -> str:
        """The shard's name in the ledger."""
        return f"{self.place}/{ref.file}"

    def open(self, ref: ShardRef) -> int:
        """A descriptor of the shard. LedgerFormatError when it is no regular file of the recorded size."""
        inner, _, leaf = ref.file.rpartition("/")
        known, name = self._folders.get(inner), self.name(ref)
        handle = self.files.open_read(name) if known is None else self.files.open_leaf(known, leaf, name)
        try:
            size = self.files.size(handle)
            if size != ref.size:
                raise LedgerFormatError(name, expected=f"{ref.size} bytes", got=size)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def read(self, handle: int, ref: ShardRef, begin: int, end: int) -> memoryview:
        """Bytes of an opened shard, in memory of their own."""
        data = memoryview(bytearray(end - begin))
        self.files.read_into(handle, data, begin, self.name(ref))
        return data

    def beginning(self, handle: int, ref: ShardRef, one_piece: int) -> tuple[memoryview, int]:
        """The shard's bytes and where its checked header ends; of one larger than ``one_piece`` the header alone."""
        data = self.read(handle, ref, 0, ref.size if ref.size <= one_piece else 8)
        start = 8 + self.header_length(data, ref)
        if len(data) < start:
            data = self.read(handle, ref, 0, start)
        self.check_header(data[:start], ref)
        return data, start

    def header_length(self, prefix: memoryview, ref: ShardRef) -> int:
        """Length of the header, from the shard's first 8 bytes. LedgerFormatError when it leaves the file."""
        length = int.from_bytes(prefix[:8], "little")
        if length > HEADER_LIMIT or length > ref.size - 8:
            raise LedgerFormatError(
                self.name(ref), expected="a header inside the file", got=f"{length} bytes of header"
            )
        return length

    def check_header(self, header: memoryview, ref: ShardRef) -> None:
        """LedgerFormatError unless these 8 + n bytes have the hash of the manifest."""
        found = hashlib.sha256(header).hexdigest()
        if found != ref.sha256:
            raise LedgerFormatError(self.name(ref), expected=f"a header with hash {ref.sha256}", got=found)

    def kinds(self, ref: ShardRef, start: int) -> Sequence[HeaderTemplate]:
        """Templates that a header which ends at ``start`` may follow."""
        return self._kinds.get(ref.size - start, ())

    def learn(self, index: ShardIndex, body: bytes, client: str | None) -> None:
        """Remember the kind of a header that was parsed and found good."""
        made = None if client is None or self._learned >= KINDS else HeaderTemplate.of(index, body)
        if made is not None:
            self._learned += 1
            self._kinds.setdefault(made.size, []).append(made)


class RoundReader(RoundFiles):
    """Updates of one round's clients: some parameters of one client at a time, whose shard is opened once for all."""

    def __enter__(self) -> RoundReader:
        super().__enter__()
        return self

    def stored(self, client: str, parameters: Sequence[str]) -> list[Stored]:
        """The updates of some parameters, as they lie in the client's shard.

        Checked as by Round.factors and Round.delta, with their errors: header, binding, and of what is asked for
        layout, hash (unless the ledger was opened without), and that the numbers and their products are finite.
        """
        ref = self.round.usable_shard(client)
        handle = self.open(ref)
        try:
            data, start = self.beginning(handle, ref, SMALL)
            body = bytes(data[8:start])
            for template in self.kinds(ref, start):
                hashes = template.match(body, client)
                if hashes is not None:
                    found = self._together(template, hashes, data, start, parameters) if len(data) == ref.size else None
                    if found is not None:
                        return found
                    entry = partial(template.entry, start=start, hashes=hashes)
                    kind = _Kind(template.index, template.layouts, entry)
                    break
            else:
                kind = self._parsed(body, ref, client)
            shard = _Open(self, handle, ref, data, kind)
            return [self._value(shard, parameter) for parameter in parameters]
        finally:
            os.close(handle)

    def _together(
        self, template: HeaderTemplate, hashes: list[str], data: memoryview, start: int, parameters: Sequence[str]
    ) -> list[Stored] | None:
        """All at once, if they are usual factors of a kind that was read before."""
        key = tuple(parameters)
        if key not in template.plans:
            if not all(parameter in template.layouts for parameter in key):
                return None
            template.plans[key] = FactorPlan.of(template, key)
        plan = template.plans[key]
        found = None if plan is None else plan.take(data, start, hashes if self.round.cache.check else None)
        return None if found is None else list(found)

    def _parsed(self, body: bytes, ref: ShardRef, client: str) -> _Kind:
        index = parse_header(body, replace(ref, file=self.name(ref)))
        check_binding(index, self.round.manifest, self.round.base_hash, client)
        self.learn(index, body, client)
        return _Kind(index, {}, index.entries.__getitem__)

    def _value(self, shard: _Open, parameter: str) -> Stored:
        kind = shard.kind
        if parameter not in kind.layouts:
            spec = self.round.spec(parameter)
            layout = check_layout(kind.index, parameter, spec)
            kind.layouts[parameter] = layout, tuple(codecs.expected_parts(layout, spec.shape, kind.index.file))
        layout, suffixes = kind.layouts[parameter]
        if layout in ("lora", "lowrank"):
            (scale,) = struct.unpack("<d", shard.bytes(parameter + codecs.SCALE))
            a, b = shard.tensor(parameter + codecs.FACTOR_A), shard.tensor(parameter + codecs.FACTOR_B)
            factors = LowRank(a, b, scale)
            self.round.require_finite(parameter, factors)
            return factors
        parts = [shard.tensor(parameter + suffix) for suffix in suffixes]
        self.round.require_finite(parameter, *parts)
        if len(parts) == 1:
            return parts[0]
        values, scale = parts
        if not float(scale.abs().sum()) * _LARGEST_VALUE <= LARGEST:
            self.round.require_finite(parameter, codecs.scaled(values, scale))
        return values, scale


@dataclass(frozen=True)
class _Kind:
    """Where a shard's tensors lie; ``index`` is of a shard with the same names, dtypes, shapes and layouts."""

    index: ShardIndex
    layouts: dict[str, tuple[str, tuple[str, ...]]]
    entry: Callable[[str], Entry]


@dataclass(frozen=True)
class _Open:
    """A shard while it is open: ``data`` is the header, and of a small shard all of it."""

    reader: RoundReader
    handle: int
    ref: ShardRef
    data: memoryview
    kind: _Kind

    def bytes(self, name: str) -> memoryview:
        """One tensor's bytes, their hash checked."""
        return self._view(name, self.kind.entry(name))

    def tensor(self, name: str) -> Tensor:
        """One tensor in memory of its own: what is kept must not hold the whole shard."""
        entry, reader = self.kind.entry(name), self.reader
        if entry.end > len(self.data) or entry.begin == entry.end or entry.begin % ITEM_SIZES[entry.dtype]:
            check = reader.round.cache.check
            return read_entry(reader.files, self.handle, reader.name(self.ref), name, entry, check=check)
        return torch.frombuffer(self._view(name, entry), dtype=DTYPES[entry.dtype]).reshape(entry.shape).clone()

    def _view(self, name: str, entry: Entry) -> memoryview:
        reader, inside = self.reader, entry.end <= len(self.data)
        found = self.data[entry.begin : entry.end] if inside else self._read(entry)
        if reader.round.cache.check:
            check_hash(found, reader.name(self.ref), name, entry.sha256)
        return found

    def _read(self, entry: Entry) -> memoryview:
        return self.reader.read(self.handle, self.ref, entry.begin, entry.end)
