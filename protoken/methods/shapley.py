"""Shapley values of the game v(S) = f(start + sum_{k in S} rho_k delta_k): the truth that other methods are held to.

    phi_k = sum over S without k of |S|! (K - |S| - 1)! / K! * (v(S + k) - v(S))

exact        2^K forward passes, up to K = 8 by default.
permutation  above: the mean marginal contribution over random orders. Each order is walked in both directions; the
             pair is exact for a game of pairwise interactions, so only third and higher orders are left as noise.
             Standard errors come from the spread between the pairs; coalitions met twice are evaluated once.

What it answers: what each client adds to the response's log-probability, averaged over who else is there.
Scores are per token, since v is: sum_k phi_k = v(all) - v(none) holds for every token.
Cost: 2^K, or up to 2 (K - 1) per pair, forward passes over the moving blocks.
Limits: 2^K; a coalition that never was is what the server would have made of updates computed with everybody there.

Source: Shapley (1953); dividends, Harsanyi (1963); paired orders, Mitchell et al., arXiv 2104.12199 (antithetic
sampling).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from protoken.errors import ArgumentError
from protoken.methods.coalitions import Coalitions, Value
from protoken.methods.game import Game
from protoken.ways.projection import Scores

EXACT_UP_TO = 8
DEFAULT_PAIRS = 16


def shapley_scores(game: Game, *, pairs: int | None = None, seed: int = 0) -> Scores:
    """Shapley values per token; with standard errors of the totals when they are sampled.

    Args:
        pairs: sampled orders, each with its reverse; None for exact values up to EXACT_UP_TO clients and DEFAULT_PAIRS
            above.
        seed: of the orders.

    Returns:
        Scores whose `change` is f(G) - f(start); the residual is f(G) - v(all), the server's own.
    """
    coalitions = Coalitions(game)
    count = len(coalitions.players)
    if pairs is None and count <= EXACT_UP_TO:
        return coalitions.scores(exact_shapley(coalitions, count), None, pairs=0)
    orders = DEFAULT_PAIRS if pairs is None else pairs
    tokens, errors = sampled_shapley(coalitions, count, orders, seed)
    return coalitions.scores(tokens, errors, pairs=orders)


def exact_shapley(value: Value, count: int) -> Tensor:
    """Values of K = `count` players from all 2^K coalitions, fp64 [T, K].

    Raises:
        ArgumentError: more than 20 players.
    """
    _check_count(count)
    table = torch.stack([value(mask) for mask in range(1 << count)])  # [2^K, T]
    factor = [math.factorial(s) * math.factorial(count - s - 1) / math.factorial(count) for s in range(count)]
    columns = []
    for k in range(count):
        without = [mask for mask in range(1 << count) if not (mask >> k) & 1]
        weights = torch.tensor([factor[mask.bit_count()] for mask in without], dtype=table.dtype)
        columns.append(weights @ (table[[mask | 1 << k for mask in without]] - table[without]))
    return torch.stack(columns, dim=1) if columns else torch.zeros(table.shape[1], 0, dtype=table.dtype)


def shapley_by_order(value: Value, count: int) -> Tensor:
    """Exact values in parts, by how many clients act together: fp64 [K, T, K], order n at index n - 1.

        part[n, k] = sum over S with k, |S| = n, of m(S) / n,    m(S) = sum over T within S of (-1)^(|S| - |T|) v(T)

    m(S) is what the clients of S do only all together (Harsanyi's dividend). The parts sum to the exact values; the
    first is what each client does alone, the second what pairs do beyond that.

    Raises:
        ArgumentError: more than 20 players.
    """
    _check_count(count)
    dividends = [value(mask).clone() for mask in range(1 << count)]
    for k in range(count):
        for mask in range(1 << count):
            if (mask >> k) & 1:
                dividends[mask] -= dividends[mask ^ 1 << k]
    parts = torch.zeros(count, len(dividends[0]), count, dtype=torch.float64)
    for mask in range(1, 1 << count):
        order = mask.bit_count()
        for k in range(count):
            if (mask >> k) & 1:
                parts[order - 1, :, k] += dividends[mask] / order
    return parts


def sampled_shapley(value: Value, count: int, pairs: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Estimates [T, K] from `pairs` random orders and their reverses, and standard errors of the totals [K].

    The errors are None for a single pair, whose spread cannot be seen.

    Raises:
        ArgumentError: no pair.
    """
    if pairs < 1:
        raise ArgumentError("pairs", expected="1 or more", got=pairs)
    if not count:
        return torch.zeros(len(value(0)), 0, dtype=torch.float64), None
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(pairs):
        order = torch.randperm(count, generator=generator).tolist()
        estimates.append((_marginals(value, order) + _marginals(value, order[::-1])) / 2)
    found = torch.stack(estimates)  # [pairs, T, K]
    if pairs == 1:
        return found[0], None
    spread = found.sum(1).std(0, correction=1)
    return found.mean(0), spread / math.sqrt(pairs)


def _check_count(count: int) -> None:
    if not 0 <= count <= 20:
        raise ArgumentError(
            "clients", expected="at most 20 for exact Shapley values", got=count, remedy="Sample orders"
        )


def _marginals(value: Value, order: list[int]) -> Tensor:
    """Each player's marginal contribution when they join in this order, [T, K]."""
    before, mask = value(0), 0
    columns: list[Tensor] = [before] * len(order)
    for k in order:
        mask |= 1 << k
        after = value(mask)
        columns[k] = after - before
        before = after
    return torch.stack(columns, dim=1)
