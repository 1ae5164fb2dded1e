"""The game as a function of who takes part: what exact, sampled and paired Shapley values ask for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from protoken.methods.game import Game
from protoken.ways.projection import Scores

Value = Callable[[int], Tensor]
"""v of a coalition given as a bit mask, fp64 [T]."""


class Coalitions:
    """v over the clients that changed anything; each coalition is evaluated once.

    A client without any update is a null player: its value is exactly 0, and leaving it out halves an exact game.
    """

    def __init__(self, game: Game) -> None:
        self.game, self.memo = game, {0: game.value_at_start()}
        updates = game.updates
        self.players = [
            k
            for k, delta in enumerate(updates.deltas)
            if updates.weights[k] and any(bool(tensor.any()) for tensor in delta.values())
        ]

    def __call__(self, mask: int) -> Tensor:
        """v of the players in a bit mask, fp64 [T]."""
        if mask not in self.memo:
            members = torch.zeros(len(self.game.updates.clients))
            members[[k for place, k in enumerate(self.players) if (mask >> place) & 1]] = 1
            self.memo[mask] = self.game.coalition(members)
        return self.memo[mask]

    def scores(self, tokens: Tensor, errors: Tensor | None, *, pairs: int) -> Scores:
        """The players' values [T, players], put back among all clients."""
        clients = len(self.game.updates.clients)
        every = torch.zeros(len(tokens), clients, dtype=torch.float64)
        every[:, self.players] = tokens
        spread = None
        if errors is not None:
            spread = torch.zeros(clients, dtype=torch.float64)
            spread[self.players] = errors
        end = self.game.value_at_end()
        change = end - self(0)
        found = Scores.of_weighted_deltas(
            tokens=every, layer_totals=None, change_tokens=change, change=float(change.sum()), objective=end
        )
        return found.noting(standard_errors=spread, pairs=pairs, evaluations=len(self.memo) + 1)
