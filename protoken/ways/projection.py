"""From relevance to scores: one op call projects every client's update of every traced layer.

Scores are rho_k <g_t, delta_k x_t> (local way) or rho_k <M, delta_k> (reverse way), summed over layers; what the
round changed, <g_t, (G - G_prev) x_t>, is projected the same way, and the difference is the residual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from protoken.banks.bank import Bank, BankInParts
from protoken.banks.layer_bank import LayerBank, scores, totals
from protoken.ways.relevance import LocalRelevance, ReverseRelevance


@dataclass(frozen=True)
class Scores:
    """Attribution of one response; fp64, on the CPU.

    Attributes:
        tokens: [T, K], or None for totals only.
        layer_totals: [L, K], or None where layers were not told apart.
        change_tokens: <(G - G_prev) x_t, g_t>, [T], or None.
        change: its sum over tokens and layers.
        objective: f_t, [T].
        residual_tokens, residual: what the weighted updates leave of the change.
        standard_errors: of the totals, [K], where they were sampled.
        settings: what the method chose and counted, for the record.
        layer_tokens: [T, L, K], where layers were told apart for each token.
        positions: [S, K], each position's part in the totals, over the P - 1 + T positions that were seen.
    """

    tokens: Tensor | None
    layer_totals: Tensor | None
    change_tokens: Tensor | None
    change: float
    objective: Tensor
    residual_tokens: Tensor | None
    residual: float
    standard_errors: Tensor | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    layer_tokens: Tensor | None = None
    positions: Tensor | None = None

    @property
    def totals(self) -> Tensor:
        """[K], summed over layers and tokens."""
        if self.layer_totals is not None:
            return self.layer_totals.sum(0)
        assert self.tokens is not None
        return self.tokens.sum(0)

    @staticmethod
    def of_weighted_deltas(
        tokens: Tensor | None,
        layer_totals: Tensor | None,
        change_tokens: Tensor | None,
        change: float,
        objective: Tensor,
        layer_tokens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Scores:
        """Scores that are contributions rho_k <delta_k x, g>, so that the residual is what they leave of the change."""
        per_token = None
        if tokens is not None and change_tokens is not None:
            per_token = change_tokens - tokens.sum(1)
        scores = Scores(tokens, layer_totals, change_tokens, change, objective, per_token, 0.0)
        scores = replace(scores, layer_tokens=layer_tokens, positions=positions)
        return replace(scores, residual=change - float(scores.totals.sum()))

    def noting(self, *, standard_errors: Tensor | None = None, **settings: Any) -> Scores:
        """The same scores with more settings that they came from, and with standard errors where there are any."""
        errors = self.standard_errors if standard_errors is None else standard_errors
        return replace(self, standard_errors=errors, settings={**self.settings, **settings})

    @staticmethod
    def empty(layers: int, clients: int) -> Scores:
        """Of a response without tokens."""
        nothing = torch.zeros(0, dtype=torch.float64)
        zeros = torch.zeros(layers, clients, dtype=torch.float64)
        return Scores(nothing.reshape(0, clients), zeros, nothing, 0.0, nothing, nothing, 0.0)


def project_local(
    relevance: LocalRelevance, bank: Bank | BankInParts, layers: Sequence[str], backend: str, *, by_layer: bool = False
) -> Scores:
    """Scores of every token and client, from x [T, I] and g [T, O] per layer; `by_layer` keeps the layers apart."""
    xs = [relevance.x[name] for name in layers]
    grads = [relevance.grad[name] for name in layers]
    routes = [relevance.routes.get(name) for name in layers]

    def project(banks: Sequence[LayerBank]) -> Tensor:
        return scores(banks, xs, grads, routes, backend).double()

    found, changed = _over_parts(bank, layers, project)
    by_client = found * bank.weights[:, None]
    return Scores.of_weighted_deltas(
        tokens=by_client.sum(0).T.contiguous(),
        layer_totals=by_client.sum(2),
        change_tokens=changed[:, 0].sum(0),
        change=float(changed.sum()),
        objective=relevance.objective.double().cpu(),
        layer_tokens=by_client.permute(2, 0, 1).contiguous() if by_layer else None,
    )


def project_reverse(
    relevance: ReverseRelevance, bank: Bank | BankInParts, layers: Sequence[str], backend: str
) -> Scores:
    """Totals of every client over the response, from M = sum_t g_t x_t^T per layer."""
    matrices = [relevance.gradient_matrix[name] for name in layers]

    def project(banks: Sequence[LayerBank]) -> Tensor:
        return totals(banks, matrices, backend).double()

    found, changed = _over_parts(bank, layers, project)
    return Scores.of_weighted_deltas(
        tokens=None,
        layer_totals=found * bank.weights,
        change_tokens=None,
        change=float(changed.sum()),
        objective=relevance.objective.double().cpu(),
    )


def _over_parts(
    bank: Bank | BankInParts, layers: Sequence[str], project: Callable[[Sequence[LayerBank]], Tensor]
) -> tuple[Tensor, Tensor]:
    """What `project` finds of all clients, [L, K, ...], and of the change, [L, 1, ...]."""
    found = []
    changed: Tensor | None = None
    for part in bank.parts(layers):
        found.append(project([part.layers[name] for name in layers]))
        if part.changes:
            changed = project([part.changes[name] for name in layers])
    assert changed is not None
    return torch.cat(found, 1), changed
