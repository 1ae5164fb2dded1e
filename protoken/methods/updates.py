"""The clients' updates of whole parameters, dense and in memory: by these, replaying methods move the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from protoken.errors import ProtokenWarning
from protoken.ledger import Ledger, Round, lineage_gaps
from protoken.ledger.round_files import RoundReader, dense
from protoken.models.parameters import own_names


@dataclass(frozen=True)
class Updates:
    """What K clients changed in the chosen parameters.

    Attributes:
        clients: K ids; quarantined updates are left out, their effect is part of the change alone.
        weights: fp64 [K]: rho_k of the one round, or 1 where weighted deltas were summed over several rounds.
        rounds: the rounds covered.
        names: the parameters that move, as the ledger records them.
        parameters: recorded name -> the model's own name for it (PEFT wraps and renames).
        deltas: per client name -> delta_k as stored (one round) or sum_r rho_k^r delta_k^r in fp32 (several).
        change: name -> the rounds' changes summed, fp32.
        gaps: rounds that do not start where the one before ended.
    """

    clients: tuple[str, ...]
    weights: Tensor
    rounds: tuple[int, ...]
    names: tuple[str, ...]
    parameters: Mapping[str, str]
    deltas: tuple[Mapping[str, Tensor], ...]
    change: Mapping[str, Tensor]
    gaps: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The model's parameters by the names of their layers: "….weight" left out, "….bias" and others kept."""
        own = (self.parameters[name] for name in self.names)
        return tuple(name.removesuffix(".weight").removesuffix(".base_layer") for name in own)


def read_updates(ledger: Ledger, model: nn.Module, rounds: Sequence[int], names: Sequence[str]) -> Updates:
    """The updates of `rounds` to the parameters `names`.

    Raises:
        LayerError: a round holds no such parameter.
        LedgerMismatchError: the model has no such parameter, or one of another shape.
    """
    records = [ledger.round(number) for number in rounds]
    own = own_names(records, model, names)
    if len(records) == 1:
        (record,) = records
        weights = participants(record)
        each = dict(deltas(record, weights, names))
        return Updates(
            clients=tuple(weights),
            weights=torch.tensor(list(weights.values()), dtype=torch.float64),
            rounds=tuple(rounds),
            names=tuple(names),
            parameters=own,
            deltas=tuple(each[client] for client in weights),
            change={name: record.change(name) for name in names},
        )
    totals = _lineages(records, names)
    clients = tuple(sorted(totals))
    return Updates(
        clients=clients,
        weights=torch.ones(len(clients), dtype=torch.float64),
        rounds=tuple(rounds),
        names=tuple(names),
        parameters=own,
        deltas=tuple(totals[client] for client in clients),
        change={name: _sum(record.change(name) for record in records) for name in names},
        gaps=warned_of_gaps(records, names),
    )


def _sum(changes: Iterable[Tensor]) -> Tensor:
    """In fp32, one round's in memory at a time."""
    rest = iter(changes)
    total = next(rest).float().clone()
    for change in rest:
        total.add_(change)
    return total


def warned_of_gaps(records: Sequence[Round], names: Sequence[str]) -> tuple[int, ...]:
    """`lineage_gaps` of the rounds, said aloud: the path over them does not begin at a model that was."""
    found = lineage_gaps(records, names)
    if found:
        rounds = ", ".join(map(str, found))
        # Python shows a warning of the same words once: the run's name makes another federation's another.
        warnings.warn(
            f"round {rounds} of the ledger (run {records[0].manifest.run[:8]}) does not start from the weights that "
            "the round before ended with: what changed in between is in nobody's update. Scores and changes are those "
            "of the recorded rounds; the models before it are taken without what changed in between",
            ProtokenWarning,
            stacklevel=2,
        )
    return found


def participants(record: Round) -> dict[str, float]:
    """Aggregation weights by client, of the updates that can be read."""
    return {client.client: client.weight for client in record.clients if client.quarantined is None}


def _lineages(records: Sequence[Round], names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """sum_r rho_k^r delta_k^r in fp32, by client and name."""
    totals: dict[str, dict[str, Tensor]] = {}
    for record in records:
        weights = participants(record)
        for client, own in deltas(record, weights, names):
            total = totals.setdefault(client, {name: torch.zeros(delta.shape) for name, delta in own.items()})
            for name, delta in own.items():
                total[name].add_(delta.float(), alpha=weights[client])
    return totals


def deltas(record: Round, clients: Iterable[str], names: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Clients and their updates by name, one after the other: each shard is opened once for all its parameters."""
    with RoundReader(record) as reader:
        for client in clients:
            stored = reader.stored(client, names)
            yield client, {name: dense(value) for name, value in zip(names, stored, strict=True)}
