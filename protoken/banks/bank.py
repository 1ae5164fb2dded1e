"""The clients' updates of the traced layers, in the layout of the ledger.

A bank holds per layer K updates, the K aggregation weights, and the change G - G_prev that the updates must add up to.
Its clients are in the ledger's order. Low-rank updates stay factors, quantised ones stay integers with a scale per row;
see layer_bank.py for how they are scored.

A small bank is read once and kept. A large one is read from the ledger a few clients at a time whenever it is needed,
so that memory does not grow with the number of clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from protoken.banks.layer_bank import LayerBank
from protoken.banks.lineage_sums import LayerSums, add_round
from protoken.errors import ArgumentError, LedgerMismatchError
from protoken.ledger import Ledger, Round
from protoken.ledger.ledger import slice_of
from protoken.models.adapters import Recorded, acting, recorded_as
from protoken.models.layers import Layer, layer_of

Rounds = int | str | slice | Sequence[int]
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

    Attributes:
        acting: per layer what acted there when it was made (`adapters.acting`); it holds for that alone.

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
        self.acting = tuple(acting(layer_of(model, name)) for name in layers)
        self.kept: Bank | None = None
        self._recorded: dict[str, list[Recorded]] = {name: [] for name in layers}
        self._bytes = dict.fromkeys(layers, 0)
        self._known: Set[str] = frozenset()
        usable: dict[str, float] = {}
        for record in map(ledger.round, self.rounds):
            self._look_at(record, model)
            usable |= {client.client: client.weight for client in record.usable}
        one = len(self.rounds) == 1
        self.clients = tuple(usable if one else sorted(usable))
        self.weights = torch.tensor([usable[c] if one else 1.0 for c in self.clients], dtype=torch.float64)

    def read(self, model: nn.Module, layers: Sequence[str], clients: slice | None = None, change: bool = True) -> Bank:
        """Read the updates of a run of clients (None: all) for some of the layers, and the layers' changes.

        Round by round, from the last to the first; a round is forgotten once its part of the sums is added.
        """
        some = clients or slice(0, len(self.clients))
        chosen = self.clients[some]
        sums = [LayerSums(layer_of(model, name), chosen, self.ledger, self.at_round, change) for name in layers]
        weighted = len(self.rounds) > 1
        for place in reversed(range(len(self.rounds))):
            recorded = [self._recorded[name][place] for name in layers]
            add_round(self.ledger.round(self.rounds[place]), sums, recorded, weighted=weighted)
        return Bank(
            chosen,
            self.weights[some],
            {name: own.updates() for name, own in zip(layers, sums, strict=True)},
            {name: own.change() for name, own in zip(layers, sums, strict=True) if change},
            self.rounds,
        )

    def whole(self, model: nn.Module) -> Bank:
        """All of it, read at the first call and kept."""
        if self.kept is None:
            self.kept = self.read(model, self.layers)
        return self.kept

    def client_bytes(self, model: nn.Module, layer: str) -> int:
        """Bytes of the largest client's update of a layer in memory."""
        dense = 4 * prod(layer_of(model, layer).shape)
        return self._bytes[layer] if len(self.rounds) == 1 else max(dense, self._bytes[layer])

    def _look_at(self, record: Round, model: nn.Module) -> None:
        """Under which names a round records the layers, and how many bytes one client's update of each takes.

        Of shards of equal size in a round the first one's header is read: they are laid out alike.
        """
        alike = {client.shard.size: client.client for client in reversed(record.usable)}
        for name in self.layers:
            layer, found = layer_of(model, name), self._recorded[name]
            if found and record.parameters.keys() == self._known:
                names = found[-1]
            else:
                names = recorded_as(model, layer, record.parameters, f"round {record.number} of the ledger")
            check_shape(record, layer, names)
            found.append(names)
            direct = [record.stored_bytes(c, names.direct) for c in alike.values()] if names.direct else []
            # Factors that were averaged apart become factors of twice the rank, in fp32.
            apart = sum(8 * prod(record.parameters[n].shape) for pair in names.pairs for n in (pair.a, pair.b))
            self._bytes[name] = max(self._bytes[name], max(direct, default=0) + apart)
        self._known = record.parameters.keys()


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
    """Resolve "last", "all", one number, several or a slice against a ledger, up to the model's own round.

    A slice is one of the tuple of rounds, as in `Ledger.select`: slice(-3, None) are the last three.

    Raises:
        UnknownRoundError: a number is not in the ledger.
        ArgumentError: another word, no round at all, or a round after the model's own.
    """
    known = [r for r in ledger.rounds if r <= last]
    if isinstance(rounds, str):
        words = {"last": known[-1:], "all": known}
        if rounds not in words:
            raise ArgumentError(
                "rounds", expected='"last", "all", a number, a slice or a sequence of numbers', got=rounds
            )
        chosen = words[rounds]
    elif isinstance(rounds, slice):
        chosen = list(slice_of(known, rounds))
    else:
        given: Any = rounds
        several = isinstance(given, Iterable) and getattr(given, "ndim", None) != 0
        chosen = [ledger.round(number).number for number in (given if several else [given])]
    for number in chosen:
        if number > last:
            raise ArgumentError("rounds", expected=f"rounds up to the model's own, {last}", got=number)
    if not chosen:
        raise ArgumentError("rounds", expected=f"at least one round of {len(known)}", got=rounds)
    return tuple(sorted(set(chosen)))


def require_usable(ledger: Ledger, rounds: Sequence[int]) -> None:
    """ArgumentError where none of the rounds has an update that can be used: there is nobody to attribute to."""
    records = [ledger.round(number) for number in rounds]
    if not any(record.usable for record in records):
        count = sum(len(record.clients) for record in records)
        raise ArgumentError(
            "rounds",
            expected="a round with an update that can be used",
            got=f"{list(rounds)}, whose {count} updates are all quarantined",
            remedy='Ask about other rounds; rounds="all" leaves such ones to the residual',
        )


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
