"""The clients' updates of the traced layers, in the layout of the ledger.

A bank holds per layer K updates, the K aggregation weights, and the change G - G_prev that the updates must add up to.
Its clients are in the ledger's order. Low-rank updates stay factors, quantised ones stay integers with a scale per row;
see layer_bank.py for how they are scored.

A small bank is read once and kept. A large one is read from the ledger a few clients at a time whenever it is needed,
so that memory does not grow with the number of clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn

from .adapters import Recorded, pair_factors, recorded_as
from .errors import ArgumentError, LedgerMismatchError
from .layer_bank import LayerBank, Stored
from .layers import Layer, device_of, layer_of
from .ledger import Ledger, LowRank, Round

Rounds = int | str | Sequence[int]
T = TypeVar("T")


@dataclass(frozen=True)
class Bank:
    """Updates of K clients over L layers.

    Attributes:
        clients: K ids.
        weights: what a client's raw score is multiplied by, fp64 [K]: rho_k of the one round, or 1 where the deltas
            were weighted and summed over several rounds.
        layers: per layer the K updates as they are stored.
        changes: per layer G - G_prev, as the update of one.
        rounds: the rounds it covers.
    """

    clients: tuple[str, ...]
    weights: Tensor
    layers: dict[str, LayerBank]
    changes: dict[str, LayerBank]
    rounds: tuple[int, ...]

    def parts(self, layers: Sequence[str]) -> Iterator[Bank]:
        """The bank of these layers in runs of clients, the last with the changes: here, all of it at once."""
        yield self

    @property
    def deltas(self) -> Mapping[str, list[Tensor]]:
        """Per layer K dense matrices [O, I] (experts: [E, O, I]), made when asked for and not kept."""
        return _Made(self.layers, LayerBank.matrices)

    @property
    def change(self) -> Mapping[str, Tensor]:
        """Per layer the dense change, likewise."""
        return _Made(self.changes, lambda bank: bank.matrices()[0])

    def with_change(self, layer: str) -> LayerBank:
        """The layer's updates and, last, its change if this part of the bank has it."""
        own = self.layers[layer]
        both = [*own.updates, *(self.changes[layer].updates if layer in self.changes else ())]
        return LayerBank.of(both, transposed=own.transposed, experts=own.experts)


class LedgerBank:
    """The updates of `rounds` for some layers of a model, in a ledger; read when asked for.

    One round: its deltas as stored, with its aggregation weights. Several: per client sum_r rho_k^r delta_k^r in
    fp32, with weight 1, which gives lineage scores at the price of one round and covers clients absent from the last.
    Updates under quarantine are left out: what they did is part of the residual. Each update comes to the device where
    its layer computes. Holds no reference to the model.

    Args:
        at_round: the round whose aggregate the model holds, the ledger's last if None; only needed for adapters whose
            factors were averaged apart.

    Raises:
        LayerError: the ledger holds no update of a layer.
        LedgerMismatchError: an update has another shape than the model's layer.
    """

    def __init__(
        self,
        ledger: Ledger,
        model: nn.Module,
        layers: Sequence[str],
        rounds: Sequence[int],
        at_round: int | None = None,
    ) -> None:
        self.ledger, self.layers, self.rounds = ledger, tuple(layers), tuple(rounds)
        self.at_round = ledger.round("last" if at_round is None else at_round).number
        self.records = [ledger.round(number) for number in rounds]
        self.clients = _participants(self.records)
        self.kept: Bank | None = None
        own = {c.client: c.weight for c in self.records[0].clients}
        weights = [own[c] if len(self.records) == 1 else 1.0 for c in self.clients]
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self._recorded = {name: self._find(model, layer_of(model, name)) for name in layers}
        self._bytes: dict[str, int] = {}

    def read(self, model: nn.Module, layers: Sequence[str], clients: slice | None = None, change: bool = True) -> Bank:
        """Read the updates of a run of clients (None: all) for some of the layers, and the layers' changes."""
        some = clients or slice(0, len(self.clients))
        chosen = self.clients[some]
        found = {
            name: _layer(
                self.ledger,
                layer_of(model, name),
                self.records,
                self._recorded[name],
                chosen,
                self.at_round,
                change,
            )
            for name in layers
        }
        return Bank(
            chosen,
            self.weights[some],
            {name: updates for name, (updates, _) in found.items()},
            {name: changed for name, (_, changed) in found.items() if changed is not None},
            self.rounds,
        )

    def whole(self, model: nn.Module) -> Bank:
        """All of it, read at the first call and kept."""
        if self.kept is None:
            self.kept = self.read(model, self.layers)
        return self.kept

    def client_bytes(self, model: nn.Module, layer: str) -> int:
        """Bytes of the largest client's update of a layer in memory."""
        if layer not in self._bytes:
            shape = layer_of(model, layer).shape
            dense = 4 * prod(shape)
            found = [0]
            for record, names in zip(self.records, self._recorded[layer], strict=True):
                present = [c.client for c in record.clients if c.quarantined is None]
                direct = [record.stored_bytes(c, names.direct) for c in present] if names.direct else [0]
                # Factors that were averaged apart become factors of twice the rank, in fp32.
                apart = sum(8 * prod(record.parameters[n].shape) for pair in names.pairs for n in (pair.a, pair.b))
                found.append(max(direct, default=0) + apart)
            self._bytes[layer] = max(found) if len(self.records) == 1 else max(dense, *found)
        return self._bytes[layer]

    def _find(self, model: nn.Module, layer: Layer) -> list[Recorded]:
        found = []
        for record in self.records:
            recorded = recorded_as(model, layer, record.parameters, f"round {record.number} of the ledger")
            check_shape(record, layer, recorded)
            found.append(recorded)
        return found


@dataclass(frozen=True)
class BankInParts:
    """A ledger's bank that is read `count` clients at a time, and forgotten again."""

    bank: LedgerBank
    model: nn.Module
    count: int

    @property
    def clients(self) -> tuple[str, ...]:
        return self.bank.clients

    @property
    def weights(self) -> Tensor:
        return self.bank.weights

    @property
    def rounds(self) -> tuple[int, ...]:
        return self.bank.rounds

    def parts(self, layers: Sequence[str]) -> Iterator[Bank]:
        """The bank of these layers in runs of clients, the last with the changes."""
        total = len(self.clients)
        for start in range(0, total, self.count):
            stop = min(start + self.count, total)
            yield self.bank.read(self.model, layers, slice(start, stop), change=stop == total)


class _Made(Mapping[str, T]):
    """A mapping whose values are computed at each look."""

    def __init__(self, banks: Mapping[str, LayerBank], make: Callable[[LayerBank], T]) -> None:
        self._banks, self._make = banks, make

    def __getitem__(self, layer: str) -> T:
        return self._make(self._banks[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self._banks)

    def __len__(self) -> int:
        return len(self._banks)


def select_rounds(ledger: Ledger, rounds: Rounds, last: int) -> tuple[int, ...]:
    """Resolve "last", "all", one number or a sequence of them against a ledger, up to the model's own round.

    Raises:
        UnknownRoundError: a number is not in the ledger.
        ArgumentError: another word, no round at all, or a round after the model's own.
    """
    known = [r for r in ledger.rounds if r <= last]
    if rounds == "last":
        chosen: Sequence[int] = [last]
    elif rounds == "all":
        chosen = known
    elif isinstance(rounds, str):
        raise ArgumentError("rounds", expected='"last", "all", a number or a sequence of numbers', got=rounds)
    else:
        chosen = [rounds] if isinstance(rounds, int) else list(rounds)
    for number in chosen:
        ledger.round(number)
        if number > last:
            raise ArgumentError("rounds", expected=f"rounds up to the model's own, {last}", got=number)
    if not chosen:
        raise ArgumentError("rounds", expected="at least one round", got=rounds)
    return tuple(sorted(set(chosen)))


def build_bank(
    ledger: Ledger, model: nn.Module, layers: Sequence[str], rounds: Sequence[int], at_round: int | None = None
) -> Bank:
    """Lay out the updates of `rounds` for the `layers` of `model`; see `LedgerBank`, whose whole this is."""
    return LedgerBank(ledger, model, layers, rounds, at_round).read(model, layers)


def _participants(records: Sequence[Round]) -> tuple[str, ...]:
    """Everybody with a usable update: in the order of the one round, or sorted."""
    usable = [client.client for record in records for client in record.clients if client.quarantined is None]
    return tuple(usable) if len(records) == 1 else tuple(sorted(set(usable)))


def _layer(
    ledger: Ledger,
    layer: Layer,
    records: Sequence[Round],
    recorded: Sequence[Recorded],
    clients: Sequence[str],
    at_round: int,
    change: bool,
) -> tuple[LayerBank, LayerBank | None]:
    """A layer's updates of these clients and, if wanted, its change."""
    updates: dict[str, list[tuple[float, Stored]]] = {client: [] for client in clients}
    changes: list[tuple[float, Stored]] = []
    for record, names in zip(records, recorded, strict=True):
        present = [c for c in record.clients if c.quarantined is None and c.client in updates]
        weights = {c.client: c.weight if len(records) > 1 else 1.0 for c in present}
        if names.direct is not None:
            for client, weight in weights.items():
                updates[client].append((weight, _stored(record, client, names.direct, layer)))
            if change:
                changes.append((1.0, _stored_change(record, names.direct, layer)))
        for pair in names.pairs:
            contributions, changed = pair_factors(ledger, layer, pair, record.number, at_round, weights)
            for client, weight in weights.items():
                updates[client].append((weight, Stored(factors=contributions[client])))
            changes.append((1.0, Stored(factors=changed)))
    make = partial(LayerBank.of, transposed=layer.transposed, experts=layer.experts)
    device = device_of(layer)
    found = make([_summed(updates[client], layer).to(device) for client in clients])
    return found, make([_summed(changes, layer).to(device)]) if change else None


def _stored(record: Round, client: str, parameter: str, layer: Layer) -> Stored:
    """One update as it lies in the ledger."""
    layout = record.layout(client, parameter)
    if layout in ("lora", "lowrank"):
        return Stored(factors=_upright(LowRank(*record.factors(client, parameter)), layer))
    if layout in ("int8", "fp8"):
        values, scale = record.quantised(client, parameter)
        return Stored(values, scale)
    return Stored(record.delta(client, parameter))


def _stored_change(record: Round, parameter: str, layer: Layer) -> Stored:
    if record.parameters[parameter].form == "lowrank":
        return Stored(factors=_upright(record.change_factors(parameter), layer))
    return Stored(record.change(parameter))


def _upright(factors: LowRank, layer: Layer) -> LowRank:
    """Factors as [O, I]: of a weight that lies as (in, out), delta^T = s A^T B^T."""
    return LowRank(factors.b.T, factors.a.T, factors.scale) if layer.transposed else factors


def _summed(terms: Sequence[tuple[float, Stored]], layer: Layer) -> Stored:
    """sum_i w_i D_i: one term as it is, factors as wider factors while that is smaller, all else dense in fp32."""
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    factors = [(weight, stored.factors) for weight, stored in terms if stored.factors is not None]
    rank = sum(f.rank for _, f in factors)
    if terms and len(factors) == len(terms) and rank * (layer.rows + layer.columns) < layer.rows * layer.columns:
        a = torch.cat([f.a.float() for _, f in factors])
        b = torch.cat([f.b.float() * (weight * f.scale) for weight, f in factors], dim=1)
        return Stored(factors=LowRank(a, b))
    total = torch.zeros(layer.shape)
    for weight, stored in terms:
        dense = stored.matrix(layer.transposed)
        total.add_(dense.mT if layer.transposed else dense, alpha=weight)
    return Stored(total)


def check_shape(record: Round, layer: Layer, recorded: Recorded) -> None:
    """LedgerMismatchError when the round's parameter has another shape than the model's layer."""
    if recorded.direct is None:
        return
    theirs = tuple(record.parameters[recorded.direct].shape)
    if layer.shape != theirs:
        table = layer.columns if layer.kind == "embedding" else layer.rows
        vocabulary = layer.kind == "embedding" or (theirs[-1] == layer.columns and layer.name.endswith("head"))
        raise LedgerMismatchError(
            "ledger",
            expected=f"{recorded.direct} of the model's shape {layer.shape}",
            got=theirs,
            remedy=f"The model has {table} tokens, the federation's had {theirs[0]}: were the embeddings resized, "
            "or is this another tokenizer's model?"
            if vocabulary
            else "It was written for another model",
        )
