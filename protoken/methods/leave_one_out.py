"""Leave one client out: how much less likely is this very response if the client had not taken part?

    s[k, t] = f_t(G) - f_t(G without k)

reaggregate=True   G without k = FedAvg of the others, their weights scaled up to sum to 1: what the server would have
                   made of the round. A client that did nothing still has an effect, since the others gain its weight.
reaggregate=False  G without k = G - rho_k delta_k: the last term of the Shapley sum alone; a client that did nothing
                   scores exactly 0.

Scores are per token. Over the clients they do not add up to the change; the difference, their interaction, is the
trace's residual. Cost: K + 2 forward passes over the moving blocks, and K passes over the clients' bytes.
Limits: two clients who taught the same thing cover for each other, and neither gets a score; the others' updates are
those they computed with the absent client in earlier rounds.

Source: the counterfactual of the FedAvg formula (McMahan et al., arXiv 1602.05629).
"""

from __future__ import annotations

import torch

from ..ledger import Ledger
from ..projection import Scores
from .game import Game
from .weights import shift_without


def leave_one_out_scores(game: Game, ledger: Ledger, *, reaggregate: bool = True) -> Scores:
    """Scores [T, K] of the response, one client absent at a time."""
    updates = game.updates
    end = game.value_at_end()
    columns = []
    for client in updates.clients:
        shift = shift_without(ledger, updates.rounds, updates.names, {client}, reaggregate=reaggregate)
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
