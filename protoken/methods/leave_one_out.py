"""Leave one client out: how much less likely is this very response if the client had not taken part?

    s[k, t] = f_t(G) - f_t(G without k)

reaggregate=True   G without k = FedAvg of the others, their weights scaled up to sum to 1: what the server would have
                   made of the round. A client that did nothing still has an effect, since the others gain its weight.
                   Where a server optimiser's round does not record the weights, as below; the settings say so.
reaggregate=False  G without k = G - rho_k delta_k: the last term of the Shapley sum alone; a client that did nothing
                   scores exactly 0.

Scores are per token. Over the clients they do not add up to the change; the difference, their interaction, is the
trace's residual. Cost: K + 2 forward passes over the moving blocks, and one pass over the clients' bytes; over several
rounds that differ in participants or weights also K copies of the moving parameters in memory.
Limits: two clients who taught the same thing cover for each other, and neither gets a score; the others' updates are
those they computed with the absent client in earlier rounds.

Source: the counterfactual of the FedAvg formula (McMahan et al., arXiv 1602.05629).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from protoken.ledger import Ledger, Round
from protoken.ledger.rules import shares
from protoken.methods.game import Game
from protoken.methods.updates import Updates, deltas, participants
from protoken.methods.weights import gain
from protoken.ways.projection import Scores


def leave_one_out_scores(game: Game, ledger: Ledger, *, reaggregate: bool = True) -> Scores:
    """Scores [T, K] of the response, one client absent at a time."""
    updates = game.updates
    end = game.value_at_end()
    columns = []
    reaggregate = reaggregate and all(shares(ledger.round(number)) is not None for number in updates.rounds)
    for shift in _shifts(updates, ledger, reaggregate):
        moved = {name: value + shift[name].to(value) for name, value in game.end.items()}
        columns.append(end - game.value_at(moved))
    change = end - game.value_at_start()
    scores = Scores.of_weighted_deltas(
        tokens=torch.stack(columns, dim=1),
        layer_totals=None,
        change_tokens=change,
        change=float(change.sum()),
        objective=end,
    )
    return scores.noting(reaggregate=reaggregate, evaluations=len(columns) + 2)


def _shifts(updates: Updates, ledger: Ledger, reaggregate: bool) -> Iterator[dict[str, Tensor]]:
    """`shift_without` of each client in turn, every update being read once.

    With A_r = sum_j rho_j delta_j a round without k is shifted by c (A_r - rho_k delta_k) - rho_k delta_k, where c is
    the others' `gain`, or 0. Where all rounds have the same participants at the same weights, c is one number, and the
    clients' sums over the rounds are all that is needed.
    """
    records = [ledger.round(number) for number in updates.rounds]
    weights = [participants(record) for record in records]
    gains = [_gains(record, reaggregate) for record in records]
    if all(own == weights[0] for own in weights) and all(own == gains[0] for own in gains):
        own = updates.weights.tolist()
        total = _weighted_sum(updates, updates.deltas, own)
        for client, delta, weight in zip(updates.clients, updates.deltas, own, strict=True):
            yield {name: _shift(total[name], delta[name], weight, gains[0][client]) for name in updates.names}
        return
    shifts = {client: {n: torch.zeros(updates.change[n].shape) for n in updates.names} for client in updates.clients}
    for record, present, gained in zip(records, weights, gains, strict=True):
        each = dict(deltas(record, present, updates.names))
        total = _weighted_sum(updates, list(each.values()), list(present.values()))
        for client, delta in each.items():
            for name in updates.names:
                shifts[client][name].add_(_shift(total[name], delta[name], present[client], gained[client]))
    for client in updates.clients:
        yield shifts.pop(client)


def _weighted_sum(
    updates: Updates, each: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    found = {name: torch.zeros(updates.change[name].shape) for name in updates.names}
    for delta, weight in zip(each, weights, strict=True):
        for name, value in delta.items():
            found[name].add_(value.float(), alpha=weight)
    return found


def _gains(record: Round, reaggregate: bool) -> dict[str, float]:
    """By client what the others gain without it."""
    known = shares(record) if reaggregate else None
    return {client: 0.0 if known is None else gain(known, {client}) for client in participants(record)}


def _shift(total: Tensor, delta: Tensor, weight: float, gain: float) -> Tensor:
    return total * gain - delta.float() * (weight * (1 + gain))
