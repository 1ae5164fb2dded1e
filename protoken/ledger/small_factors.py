"""Factors of a small shard that is in memory whole: taken out together, with one copy and one look at all numbers.

Adapters of a thousand clients over a hundred rounds are a hundred thousand shards of a few kilobytes. To read each
tensor by itself, as round_files.py does, takes longer than to hash them; this is the same in fewer steps. Whatever is
not as it should be, or only unusual, is left to the other way, which also says what is wrong.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from protoken.ledger import codecs
from protoken.ledger.templates import HeaderTemplate
from protoken.ledger.tensors import USUAL, LowRank


@dataclass(frozen=True)
class FactorPlan:
    """Where the factors of some parameters lie in all shards of a kind.

    Attributes:
        begin, end: the fp32 numbers that all of them lie in, in bytes after the header.
        scales: (begin, end) of each parameter's scale.
        views: (rows, columns, offset in numbers from ``begin``) of a and b, one parameter after the other.
        hashed: (begin, end, number of the hash) of everything taken.
    """

    begin: int
    end: int
    scales: tuple[tuple[int, int], ...]
    views: tuple[tuple[int, int, int], ...]
    hashed: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(kind: HeaderTemplate, parameters: Sequence[str]) -> FactorPlan | None:
        """None unless all are factors in fp32 with little between them: what is copied is kept as long as they are.

        The layouts of these parameters in this kind were checked before.
        """
        if not parameters or any(kind.layouts[name][0] not in ("lora", "lowrank") for name in parameters):
            return None
        scales = [kind.parts[name + codecs.SCALE] for name in parameters]
        factors = [kind.parts[name + suffix] for name in parameters for suffix in (codecs.FACTOR_A, codecs.FACTOR_B)]
        begin, end = min(part.begin for part in factors), max(part.end for part in factors)
        taken = sum(part.end - part.begin for part in factors)
        if any(part.dtype != "F32" or part.begin % 4 for part in factors) or 2 * taken <= end - begin:
            return None
        # Tensors in between are of the same dtype, since shards are laid out by it; if not, their bytes are looked at
        # as fp32 and at worst send the shard the other way.
        return FactorPlan(
            begin,
            end,
            tuple((part.begin, part.end) for part in scales),
            tuple((part.shape[0], part.shape[1], (part.begin - begin) // 4) for part in factors),
            tuple((part.begin, part.end, part.number) for part in (*scales, *factors)),
        )

    def take(self, data: memoryview, start: int, hashes: Sequence[str] | None) -> list[LowRank] | None:
        """The factors of a shard whose header ends at ``start``; their hashes are checked unless these are None.

        None when a hash is another, when numbers may not be finite or their products not fit fp32, and where the shard
        does not lie on a multiple of four bytes.
        """
        if start % 4:
            return None
        for begin, end, number in self.hashed if hashes is not None else ():
            if hashlib.sha256(data[start + begin : start + end]).hexdigest() != hashes[number]:  # type: ignore[index]
                return None
        scales = [struct.unpack("<d", data[start + begin : start + end])[0] for begin, end in self.scales]
        numbers = torch.frombuffer(data[start + self.begin : start + self.end], dtype=torch.float32).clone()
        # As LowRank.finite: the sum of all squares bounds ||b|| ||a|| of each.
        if not (float(torch.dot(numbers, numbers)) <= USUAL and all(abs(scale) <= USUAL for scale in scales)):
            return None
        views = [numbers.as_strided((rows, columns), (columns, 1), offset) for rows, columns, offset in self.views]
        return [LowRank(views[2 * n], views[2 * n + 1], scale) for n, scale in enumerate(scales)]
