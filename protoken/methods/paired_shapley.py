"""Shapley values by a regression over coalitions and their complements: nearly the truth for about 3 K evaluations.

    minimise sum_S w_S (v(S) - v(none) - sum_{k in S} phi_k)^2    subject to    sum_k phi_k = v(all) - v(none)

with w_S = (K - 1) / (C(K, s) s (K - s)), s = |S|; over all coalitions its solution are the Shapley values. Here S are
every client alone, everybody but one, and n sampled coalitions of other sizes, each with its complement. A coalition
and its complement together cancel what pairs of clients add, so that without any sample (n = 0) a game of
pairwise interactions is solved exactly, at 2 K + 2 evaluations; the samples are for interactions of three and more.

What it answers: the same as `shapley`. Scores are per token and complete by construction; standard errors of the totals
are jackknife estimates over the sampled pairs. Cost: 2 K + 2 + 2 n forward passes over the moving blocks, n = K unless
chosen. Limits: with few samples what three or more clients do together is shared out evenly.

Source: Lundberg and Lee, arXiv 1705.07874 (the regression); Covert and Lee, arXiv 2012.01536 (pairs).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from protoken.errors import ArgumentError
from protoken.methods.coalitions import Coalitions, Value
from protoken.methods.game import Game
from protoken.ways.projection import Scores


def paired_shapley_scores(game: Game, *, pairs: int | None = None, seed: int = 0) -> Scores:
    """Shapley values per token by `paired_shapley`: `pairs` sampled coalitions with their complements, K if None."""
    coalitions = Coalitions(game)
    count = len(coalitions.players)
    sampled = count if pairs is None else pairs
    tokens, errors = paired_shapley(coalitions, count, sampled, seed)
    return coalitions.scores(tokens, errors, pairs=sampled)


def paired_shapley(value: Value, count: int, pairs: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Estimates [T, K] for K = `count` players, and standard errors of the totals [K].

    The errors are 0 where every coalition was taken, and None for fewer than two sampled pairs.

    Raises:
        ArgumentError: fewer than no pairs.
    """
    if pairs < 0:
        raise ArgumentError("pairs", expected="0 or more", got=pairs)
    everybody = (1 << count) - 1
    none, whole = value(0), value(everybody)
    if count < 2:
        return (whole - none)[:, None].expand(-1, count), torch.zeros(count, dtype=torch.float64)
    edge = [1 << k for k in range(count)]
    sampled, complete = _sample(count, pairs, seed)
    masks = sorted({*edge, *(everybody ^ mask for mask in edge)})
    rows = [(mask, _kernel(count, mask.bit_count())) for mask in masks]
    middle = sum(_kernel(count, s) * math.comb(count, s) for s in range(2, count - 1))

    def fit(chosen: list[int]) -> Tensor:
        inside = list(rows)
        for mask in chosen:
            # Sampled in proportion to the kernel, so each stands for an equal part of the middle's mass.
            weight = _kernel(count, mask.bit_count()) if complete else middle / (2 * len(chosen))
            inside += [(mask, weight), (everybody ^ mask, weight)]
        return _constrained(inside, count, value, none, whole)

    found = fit(sampled)
    if complete:
        return found, torch.zeros(count, dtype=torch.float64)
    if len(sampled) < 2:
        return found, None
    without = torch.stack([fit(sampled[:i] + sampled[i + 1 :]).sum(0) for i in range(len(sampled))])
    share = (len(sampled) - 1) / len(sampled)
    return found, ((without - without.mean(0)).square().sum(0) * share).sqrt()


def _kernel(count: int, size: int) -> float:
    return (count - 1) / (math.comb(count, size) * size * (count - size))


def _sample(count: int, pairs: int, seed: int) -> tuple[list[int], bool]:
    """Distinct coalitions of 2 to K - 2 members, one of each complementary pair; and whether these are all."""
    everybody = (1 << count) - 1
    sizes = range(2, count - 1)
    there = sum(math.comb(count, size) for size in sizes) // 2
    if pairs >= there:
        # The one without the last player stands for its pair.
        return [m for m in range(1 << (count - 1)) if 2 <= m.bit_count() <= count - 2] if there else [], True
    mass = torch.tensor([1 / (size * (count - size)) for size in sizes])
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, None] = {}
    while len(found) < pairs:
        size = sizes[int(torch.multinomial(mass, 1, generator=generator))]
        members = torch.randperm(count, generator=generator)[:size].tolist()
        mask = sum(1 << k for k in members)
        found[min(mask, everybody ^ mask)] = None
    return list(found), False


def _constrained(rows: list[tuple[int, float]], count: int, value: Value, none: Tensor, whole: Tensor) -> Tensor:
    """The weighted least squares under completeness, for all tokens at once: [T, K]."""
    design = torch.tensor([[(mask >> k) & 1 for k in range(count)] for mask, _ in rows], dtype=torch.float64)
    weights = torch.tensor([weight for _, weight in rows], dtype=torch.float64)
    gains = torch.stack([value(mask) - none for mask, _ in rows])  # [rows, T]
    normal = design.T @ (design * weights[:, None])
    ones = torch.ones(count, 1, dtype=torch.float64)
    solved = torch.linalg.solve(normal, torch.cat([design.T @ (gains * weights[:, None]), ones], dim=1))
    free, direction = solved[:, :-1], solved[:, -1:]
    excess = (free.sum(0) - (whole - none)) / direction.sum()
    values: Tensor = (free - direction * excess).T
    return values
