"""The clients' updates of the traced layers, laid out for the kernels.

A bank holds, per layer, K deltas of shape [O, I] as views (mapped from the ledger where they can be), the K
aggregation weights, and the change G - G_prev that the deltas must add up to. Its clients are in the ledger's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import ArgumentError, LayerError, LedgerMismatchError
from .ledger import Ledger, Round

Rounds = int | str | Sequence[int]


@dataclass(frozen=True)
class Bank:
    """Deltas of K clients over L layers.

    Attributes:
        clients: K ids.
        weights: what a client's raw score is multiplied by, fp64 [K]: rho_k of the one round, or 1 where the deltas
            were weighted and summed over several rounds.
        deltas: per layer K tensors [O, I], in the dtype of the ledger.
        change: per layer G - G_prev, fp32 [O, I].
        rounds: the rounds it covers.
    """

    clients: tuple[str, ...]
    weights: Tensor
    deltas: dict[str, list[Tensor]]
    change: dict[str, Tensor]
    rounds: tuple[int, ...]


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


def build_bank(ledger: Ledger, model: nn.Module, layers: Sequence[str], rounds: Sequence[int]) -> Bank:
    """Lay out the updates of `rounds` for the `layers` of `model`.

    One round: its deltas as stored, with its aggregation weights. Several: per client sum_r rho_k^r delta_k^r in
    fp32, with weight 1, which gives lineage scores at the price of one round and covers clients absent from the last.

    Raises:
        LayerError: the ledger holds no delta of a layer.
        LedgerMismatchError: a delta has another shape than the model's layer.
    """
    records = [ledger.round(number) for number in rounds]
    for layer in layers:
        for record in records:
            _check_layer(record, model, layer)
    if len(records) == 1:
        return _one_round(records[0], model, layers)
    return _summed_rounds(records, model, layers)


def _one_round(record: Round, model: nn.Module, layers: Sequence[str]) -> Bank:
    clients = tuple(client.client for client in record.clients)
    deltas = {
        layer: [_as_matrix(model, layer, record.delta(client, f"{layer}.weight")) for client in clients]
        for layer in layers
    }
    change = {layer: _as_matrix(model, layer, record.change(f"{layer}.weight")) for layer in layers}
    weights = torch.tensor([client.weight for client in record.clients], dtype=torch.float64)
    return Bank(clients, weights, deltas, change, (record.number,))


def _summed_rounds(records: Sequence[Round], model: nn.Module, layers: Sequence[str]) -> Bank:
    clients = tuple(sorted({client.client for record in records for client in record.clients}))
    deltas: dict[str, list[Tensor]] = {}
    change: dict[str, Tensor] = {}
    for layer in layers:
        name = f"{layer}.weight"
        total = [torch.zeros(records[0].parameters[name].shape) for _ in clients]
        for record in records:
            for client in record.clients:
                total[clients.index(client.client)].add_(record.delta(client.client, name).float(), alpha=client.weight)
        deltas[layer] = [_as_matrix(model, layer, delta) for delta in total]
        change[layer] = _as_matrix(
            model, layer, torch.stack([record.change(name).float() for record in records]).sum(0)
        )
    numbers = tuple(record.number for record in records)
    return Bank(clients, torch.ones(len(clients), dtype=torch.float64), deltas, change, numbers)


def _check_layer(record: Round, model: nn.Module, layer: str) -> None:
    name = f"{layer}.weight"
    if name not in record.parameters:
        raise LayerError(
            "layers",
            expected=f"layers whose deltas round {record.number} of the ledger holds: {_layers_of(record)}",
            got=layer,
            remedy="Trace one of those, or record this layer when committing rounds",
        )
    ours, theirs = tuple(model.get_parameter(name).shape), tuple(record.parameters[name].shape)
    if ours != theirs:
        raise LedgerMismatchError("ledger", expected=f"{name} of the model's shape {ours}", got=theirs)


def _layers_of(record: Round) -> str:
    names = [name.removesuffix(".weight") for name in record.parameters]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _as_matrix(model: nn.Module, layer: str, parameter: Tensor) -> Tensor:
    """[O, I]: Conv1D keeps its weight as (in, out), so its delta is read through a transposed view."""
    return parameter.T if isinstance(model.get_submodule(layer), Conv1D) else parameter
