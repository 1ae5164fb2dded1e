"""A layer's updates added up over rounds: one running sum per client, whatever the number of rounds.

    sum_r rho_k^r delta_k^r

Factors stay factors, concatenated, while they are smaller than the matrix; then, and for all other layouts, the sum is
one dense matrix in fp32. So a client's sum never takes more than its layer and one update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from protoken.banks.layer_bank import LayerBank, Stored
from protoken.ledger import Ledger, LowRank, Round
from protoken.ledger.round_files import RoundReader, dense
from protoken.ledger.round_files import Stored as Value
from protoken.ledger.rounds import add_factors
from protoken.models.adapters import AveragedApart, Pair, Recorded, Split
from protoken.models.layers import Layer, device_of


class RunningSum:
    """sum_i w_i D_i of one layer: a single term with weight 1 as it is, else factors or a dense matrix in fp32."""

    __slots__ = ("_layer", "_rank", "_terms", "_total")

    def __init__(self, layer: Layer) -> None:
        self._layer, self._rank = layer, 0
        self._terms: list[tuple[float, Stored]] = []
        self._total: Tensor | None = None

    def add(self, weight: float, stored: Stored) -> None:
        """Take in one more term."""
        if self._total is not None:
            self._add_dense(self._total, weight, stored)
            return
        self._terms.append((weight, stored))
        self._rank += 0 if stored.factors is None else stored.factors.rank
        if (len(self._terms) == 1 and weight == 1.0) or self._is_thin():
            return
        self._total = self._dense()
        self._terms.clear()

    def found(self) -> Stored:
        """The sum; zeros of nothing."""
        if len(self._terms) == 1 and self._terms[0][0] == 1.0:
            return self._terms[0][1]
        if self._terms:
            factors = [(weight, stored.factors) for weight, stored in self._terms if stored.factors is not None]
            a = torch.cat([f.a.float() for _, f in factors])
            b = torch.cat([f.b.float() * (weight * f.scale) for weight, f in factors], dim=1)
            return Stored(factors=LowRank(a, b))
        return Stored(self._dense() if self._total is None else self._total)

    def _is_thin(self) -> bool:
        rows, columns = self._layer.rows, self._layer.columns
        thin = self._rank * (rows + columns) < rows * columns
        return thin and all(stored.factors is not None for _, stored in self._terms)

    def _dense(self) -> Tensor:
        total = torch.zeros(self._layer.shape)
        for weight, stored in self._terms:
            self._add_dense(total, weight, stored)
        return total

    def _add_dense(self, total: Tensor, weight: float, stored: Stored) -> None:
        if stored.factors is not None:
            add_factors(total, _upright(stored.factors, self._layer), weight)
        else:
            dense = stored.matrix(self._layer.transposed)
            total.add_(dense.mT if self._layer.transposed else dense, alpha=weight)


class LayerSums:
    """One layer's running sums: of each chosen client, and of the change if that is wanted."""

    def __init__(self, layer: Layer, clients: Sequence[str], ledger: Ledger, at_round: int, change: bool) -> None:
        self.layer, self.sums = layer, {client: RunningSum(layer) for client in clients}
        self.changed = RunningSum(layer) if change else None
        self._ledger, self._at_round = ledger, at_round
        self._apart: dict[Pair, AveragedApart] = {}

    def updates(self) -> LayerBank:
        """The clients' sums, in their order, on the layer's device."""
        return self._bank([own.found() for own in self.sums.values()])

    def change(self) -> LayerBank:
        """The change, as the update of one."""
        assert self.changed is not None
        return self._bank([self.changed.found()])

    def add_changes(self, record: Round, names: Recorded) -> list[Split]:
        """One round's change, and its splits of factors averaged apart. Rounds come from the last to the first."""
        for pair in names.pairs:
            if pair not in self._apart:
                self._apart[pair] = AveragedApart(self._ledger, self.layer, pair, self._at_round)
        splits = [self._apart[pair].at(record) for pair in names.pairs]
        if self.changed is not None:
            if names.direct is not None:
                lowrank = record.parameters[names.direct].form == "lowrank"
                change = record.change_factors(names.direct) if lowrank else record.change(names.direct)
                self.changed.add(1.0, _stored(change, self.layer))
            for split in splits:
                self.changed.add(1.0, Stored(factors=split.change))
        return splits

    def add_client(
        self, client: str, weight: float, names: Recorded, splits: Sequence[Split], values: Mapping[str, Value]
    ) -> None:
        """One client's part in that round, out of what lies in its shard."""
        own = self.sums[client]
        if names.direct is not None:
            own.add(weight, _stored(values[names.direct], self.layer))
        for pair, split in zip(names.pairs, splits, strict=True):
            own.add(weight, Stored(factors=split.contribution(dense(values[pair.a]), dense(values[pair.b]))))

    def _bank(self, found: Sequence[Stored]) -> LayerBank:
        device = device_of(self.layer)
        here = [stored.to(device) for stored in found]
        return LayerBank.of(here, transposed=self.layer.transposed, experts=self.layer.experts)


def add_round(record: Round, sums: Sequence[LayerSums], recorded: Sequence[Recorded], *, weighted: bool) -> None:
    """Add one round to the sums of some layers: each client's shard is opened once for all of them.

    Args:
        recorded: of each layer its names in this round.
        weighted: updates times their aggregation weights; as they are if not.
    """
    weights = {c.client: c.weight if weighted else 1.0 for c in record.usable if c.client in sums[0].sums}
    splits = [own.add_changes(record, names) for own, names in zip(sums, recorded, strict=True)]
    parameters = list(dict.fromkeys(parameter for names in recorded for parameter in names.names))
    with RoundReader(record) as reader:
        for client, weight in weights.items():
            values = dict(zip(parameters, reader.stored(client, parameters), strict=True))
            for own, names, split in zip(sums, recorded, splits, strict=True):
                own.add_client(client, weight, names, split, values)


def _stored(value: Value, layer: Layer) -> Stored:
    if isinstance(value, LowRank):
        return Stored(factors=_upright(value, layer))
    return Stored(value) if isinstance(value, Tensor) else Stored(*value)


def _upright(factors: LowRank, layer: Layer) -> LowRank:
    """Factors as [O, I]: of a weight that lies as (in, out), delta^T = s A^T B^T. The other way round as well."""
    return LowRank(factors.b.T, factors.a.T, factors.scale) if layer.transposed else factors
