"""Aumann-Shapley values: the clients' updates integrated along the straight path from start to G.

    phi_k = rho_k * integral_0^1 < delta_k, df/dW at start + a (G - start) > da
          ~ rho_k * < delta_k, sum_i w_i grad_i >        m nodes a_i with weights w_i: Gauss-Legendre, on pieces of the
                                                         path where f moves unevenly (placement.py)

All clients are projected onto the same averaged gradient, read once. By construction and up to quadrature:
completeness (sum_k phi_k + the residual's share = f(G) - f(start)), an absent client is 0, equal updates score
equally, layers add up, and a client split in two scores as the sum of its parts.

What it answers: how the change of the response's log-probability divides among updates that all grow together.
Cost: m forward and backward passes over the response (per token: m * K forward-mode passes), two forward passes for
the completeness residual and 7 to 31 to place the nodes (none for m = 1), one pass over the clients' bytes, and one
gradient of the moving parameters in memory.
Limits: an interaction that needs one client complete and another absent is not on the diagonal; a large residual says
that m is too small or that the server did more than a weighted mean.

Source: Aumann and Shapley, Values of Non-Atomic Games (1974); as integrated gradients, arXiv 1703.01365.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protoken.methods.game import Game
from protoken.methods.placement import placed
from protoken.ops import client_totals, client_totals_reference
from protoken.ways.projection import Scores


def aumann_shapley_scores(
    game: Game, nodes: int | None = None, *, per_token: bool = False, backend: str = "auto"
) -> Scores:
    """Scores of the response, per layer (reverse way) or per token (forward way).

    Args:
        nodes: m, gradients taken along the path; None: from 2 to 8, as many as the path's shape asks for.
        per_token: scores [T, K] by forward mode in place of totals by layer [L, K].
        backend: who projects; see `protoken.trace`.

    Returns:
        Scores whose `change` is f(G) - f(start) and whose `residual` is what the clients leave of it: the server's
        own residual and the quadrature's error.
    """
    start, end = game.value_at_start(), game.value_at_end()
    change = end - start
    rule = placed(lambda along: game.value_at(game.on_path(along)), start, end, nodes)
    if per_token:
        tokens, totals = _tokens(game, rule.positions, rule.weights), None
    else:
        tokens, totals = None, _totals(game, rule.positions, rule.weights, backend)
    scores = Scores.of_weighted_deltas(
        tokens=tokens,
        layer_totals=totals,
        change_tokens=change if per_token else None,
        change=float(change.sum()),
        objective=end,
    )
    count = len(rule.positions)
    return scores.noting(nodes=count, evaluations=2 + rule.evaluations, gradients=count, pieces=rule.pieces)


def averaged_gradient(game: Game, positions: list[float], weights: list[float]) -> dict[str, Tensor]:
    """sum_i w_i * gradient at start + a_i (G - start), by parameter, in fp32 or fp64."""
    total: dict[str, Tensor] = {}
    for position, weight in zip(positions, weights, strict=True):
        _, grads = game.gradient(game.on_path(position))
        for name, grad in grads.items():
            if name in total:
                total[name].add_(grad, alpha=weight)
            else:
                total[name] = grad * weight
    return total


def project(game: Game, gradient: dict[str, Tensor], backend: str = "auto") -> Tensor:
    """< delta_k, gradient > by parameter and client, fp64 [L, K]: without the aggregation weights."""
    updates = game.updates
    rows = []
    for name in updates.names:
        matrix = _as_matrix(gradient[name])
        bank = [_as_matrix(delta[name].to(matrix.device)) for delta in updates.deltas]
        if matrix.dtype == torch.float64:
            rows.append(client_totals_reference(matrix, torch.stack(bank)))
        else:
            rows.append(client_totals(matrix, bank, backend=backend).double())
    return torch.stack(rows).cpu()


def _totals(game: Game, positions: list[float], weights: list[float], backend: str) -> Tensor:
    return project(game, averaged_gradient(game, positions, weights), backend) * game.updates.weights


def _tokens(game: Game, positions: list[float], weights: list[float]) -> Tensor:
    updates = game.updates
    scores = torch.zeros(game.response.new_tokens, len(updates.clients), dtype=torch.float64)
    for position, weight in zip(positions, weights, strict=True):
        here = game.on_path(position)
        for k, delta in enumerate(updates.deltas):
            scores[:, k] += weight * game.tangent(here, delta)
    return scores * updates.weights


def _as_matrix(tensor: Tensor) -> Tensor:
    """The op's [O, I] view of any parameter: vectors as one row, stacked experts as more rows."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(-1, tensor.shape[-1])
