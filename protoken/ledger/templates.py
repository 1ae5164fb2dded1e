"""Headers of one kind, recognised without parsing them.

Shards of one round mostly differ in client, hashes and stated errors alone. Once a header was parsed and checked, its
template says byte for byte what another client's header must be, given that header's own hashes and errors. A header
that is exactly this parses to the same dtypes, shapes and offsets and has the same binding, so nothing is left to
check in it; any other goes through the parser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protoken.errors import LedgerFormatError
from protoken.ledger import strictjson
from protoken.ledger.shards import HEADER_LIMIT, Entry, ShardIndex

if TYPE_CHECKING:
    from protoken.ledger.small_factors import FactorPlan

# Neither can stand in a run, a client, a parameter or a hash.
_MARK, _BOUND_MARK = "#", "%"
_HASH = 64
_BOUND = r'\\"[A-Za-z0-9_.-]+\\":[0-9.eE+-]+'
_BOUNDS = re.compile(r"\{" + _BOUND + "(," + _BOUND + r")*\}")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor: begin and end count from the end of the header, the hash is the number-th in it."""

    number: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class HeaderTemplate:
    """What all headers of a kind have in common.

    Attributes:
        index: the checked header that it was made from.
        parts: the tensors by name, in the order of their hashes.
        runs: (dtype, begin, end) of neighbours of one dtype, counted as in Part.
        size: bytes after the header.
        before: what stands before the stated errors.
        pieces: what stands between errors and client, client and first hash, one hash and the next, and after the last.
        offsets: where each hash begins, from the end of the client's name.
        layouts: parameter -> (layout, suffixes of its parts), of those asked for so far.
        plans: how sets of parameters are taken out together, of those asked for so far.
    """

    index: ShardIndex
    parts: dict[str, Part]
    runs: tuple[tuple[str, int, int], ...]
    size: int
    before: str
    pieces: tuple[str, ...]
    offsets: tuple[int, ...]
    layouts: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict, compare=False)
    plans: dict[tuple[str, ...], FactorPlan | None] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(index: ShardIndex, body: bytes) -> HeaderTemplate | None:
        """From a header that was parsed and checked; None unless its bytes are the canonical ones."""
        start = 8 + len(body)
        parts = {
            name: Part(number, entry.dtype, entry.shape, entry.begin - start, entry.end - start)
            for number, (name, entry) in enumerate(sorted(index.entries.items()))
        }
        before, found, after = _marked(index, parts).partition(_BOUND_MARK)
        pieces = tuple(after.split(_MARK))
        if not found or _BOUND_MARK in after or _MARK in before or len(pieces) != len(parts) + 2:
            return None
        # From the end of the client's name to each hash.
        offsets, at = [], 0
        for piece in pieces[1:-1]:
            at += len(piece)
            offsets.append(at)
            at += _HASH
        made = HeaderTemplate(index, parts, _runs(parts), index.size - start, before, pieces, tuple(offsets))
        hashes = made.match(body, str(index.info["client"]))
        own = [index.entries[name].sha256 for name in parts]
        return made if hashes == own else None

    def entry(self, name: str, start: int, hashes: list[str]) -> Entry:
        """One tensor of a shard whose header ends at ``start`` and holds these hashes."""
        part = self.parts[name]
        return Entry(part.dtype, part.shape, start + part.begin, start + part.end, hashes[part.number])

    def match(self, body: bytes, client: str) -> list[str] | None:
        """The tensors' hashes, if this is the header of that client's shard of the same kind; else None."""
        text = body.decode("ascii", "replace")
        base = text.find(self.pieces[0], len(self.before)) + len(self.pieces[0]) + len(client)
        hashes = [text[base + at : base + at + _HASH] for at in self.offsets]
        # Letters and digits only: nothing in a hash ends its string or begins another field.
        return hashes if "".join(hashes).isalnum() and self.fits(body, client, hashes) else None

    def fits(self, body: bytes, client: str, hashes: Sequence[str]) -> bool:
        """Whether this is the header of that client's shard of the same kind with tensors of these hashes."""
        text, start = body.decode("ascii", "replace"), len(self.before)
        bounds = text[start : max(text.find(self.pieces[0], start), start)]
        wanted = [self.before, bounds, self.pieces[0], client, self.pieces[1]]
        for sha256, piece in zip(hashes, self.pieces[2:], strict=True):
            wanted += (sha256, piece)
        whole = "".join(wanted)
        same = whole + " " * (-len(whole) % 8) == text
        return same and len(text) <= HEADER_LIMIT and (bounds == "{}" or _are_bounds(bounds))


def _marked(index: ShardIndex, parts: dict[str, Part]) -> str:
    """The canonical header with a mark for every variable piece."""
    info = {**index.info, "client": _MARK, "bound": _BOUND_MARK, "sha256": dict.fromkeys(parts, _MARK)}
    header: dict[str, object] = {"__metadata__": {"protoken": strictjson.dump(info).decode("ascii").rstrip("\n")}}
    for name, part in parts.items():
        header[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [part.begin, part.end]}
    text = strictjson.dump(header).decode("ascii").rstrip("\n")
    return text.replace(f'\\"bound\\":\\"{_BOUND_MARK}\\"', f'\\"bound\\":{_BOUND_MARK}')


def _runs(parts: dict[str, Part]) -> tuple[tuple[str, int, int], ...]:
    runs: list[tuple[str, int, int]] = []
    for part in sorted(parts.values(), key=lambda part: (part.begin, part.end)):
        if runs and runs[-1][0] == part.dtype:
            runs[-1] = (part.dtype, runs[-1][1], part.end)
        else:
            runs.append((part.dtype, part.begin, part.end))
    return tuple(runs)


def _are_bounds(text: str) -> bool:
    """Whether it is {parameter: number} in JSON inside a JSON string, as a parser would take it."""
    if not _BOUNDS.fullmatch(text):
        return False
    try:
        found = strictjson.load(text.replace('\\"', '"').encode("ascii"), limit=HEADER_LIMIT, what="bound")
    except LedgerFormatError:
        return False
    return all(isinstance(bound, float) for bound in found.values())
