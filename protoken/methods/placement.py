"""Where the nodes of a path integral go: pieces of the path, and Gauss-Legendre nodes in each of them.

    integral_0^1 f'(a) da ~ sum over pieces [p, q] of (q - p) sum_i w_i f'(p + a_i (q - p))

f_t itself is cheap along the path, a forward pass and no gradient. So it is looked at first: at the eighths of the
path, then half-way into every step whose middle a cubic spline s_t through the others missed, and into those beside it,
the worst first, until the spline follows f or has seen it at LOOKS positions. Of all ways to cut the path at these
positions and to share out m nodes among the pieces the one is taken that would integrate s' best, and of all m, where
none is asked for, the first from 2 to 8 whose error is below ENOUGH:

    cost of a piece with k nodes = (|sum_t e_t| + sum_t |e_t|) / sum_t |f_t(1) - f_t(0)|
    e_t = its k-point rule applied to s_t', less s_t(q) - s_t(p)

Tokens are looked at one by one since their errors cancel in the sum, and so could hide in it; clients' scores follow
the tokens. Each piece costs PIECE on top, so that a smooth path keeps the plain m-point rule. The positions depend on
start and G alone, and every client is integrated by the same rule: whatever holds of the integral for any client, a
split one, an idle one, holds of the sum.

Source: Gauss-Legendre rules on pieces; the cut by dynamic programming, as in Bellman, On the approximation of curves by
line segments using dynamic programming (1961).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from protoken.errors import ArgumentError
from protoken.methods.spline import Array, Spline

LOOKS = 31
"""At how many positions between the ends f is looked at, at most."""
FINEST = 2.0**-9
"""The shortest step between two of them."""
ACCURATE = 1e-4
"""How far a spline may be from f before it is given another position, as a share of sum_t |f_t(1) - f_t(0)|."""
PIECE = 5
"""What a further piece must save, in units of UNIT."""
UNIT = 1e-4
"""Costs are whole multiples of this share of the change: rounding of f decides nothing."""
ENOUGH = 10
"""Cost, without that of pieces, from which on no more nodes are taken, in units of UNIT."""
FEWEST, ASKED_FOR = 2, 8
"""Nodes, where nobody says how many: at least, and at most."""
LEAST = 0.01
"""A change below this many nats counts as so many: rounding of single precision need not be followed."""
MOST_NODES = 32
"""More need no help."""


@dataclass(frozen=True)
class Nodes:
    """Positions and weights of a rule on [0, 1]; how many pieces it has, and what f took to place it.

    evaluations   forward passes at positions between the ends
    """

    positions: list[float]
    weights: list[float]
    pieces: int = 1
    evaluations: int = 0


def gauss_legendre(nodes: int) -> tuple[list[float], list[float]]:
    """Positions and weights of the m-point rule on [0, 1]; exact for polynomials up to degree 2m - 1.

    Raises:
        ArgumentError: not a whole number of 1 or more.
    """
    if isinstance(nodes, bool) or not isinstance(nodes, int) or not 1 <= nodes <= 256:
        raise ArgumentError("nodes", expected="a whole number from 1 to 256", got=nodes)
    x, w = np.polynomial.legendre.leggauss(nodes)
    return ((x + 1) / 2).tolist(), (w / 2).tolist()


def placed(value: Callable[[float], Tensor], start: Tensor, end: Tensor, nodes: int | None) -> Nodes:
    """m nodes where f needs them, or as many as it needs.

    Args:
        value: f_t [T] at a position between 0 and 1.
        start, end: f_t [T] at 0 and 1.
        nodes: m. A single node has nowhere else to go, and more than MOST_NODES need no help: these are the plain
            rule. So is that of an f which is no number somewhere. None: from FEWEST to ASKED_FOR, as few as will do.
    """
    most = ASKED_FOR if nodes is None else nodes
    plain = Nodes(*gauss_legendre(most))
    seen = {0.0: _numbers(start), 1.0: _numbers(end)}
    scale = max(float(np.abs(seen[1.0] - seen[0.0]).sum()), LEAST)
    if not 1 < most <= MOST_NODES or not np.isfinite(scale):
        return plain
    if not _look(value, seen, scale):
        return plain
    spline = Spline(sorted(seen))
    costs = _costs(spline, _table(spline, seen), most, scale)
    cuts = _cuts(costs, most)
    enough = most
    if nodes is None:
        errors = {m: sum(costs[piece] - PIECE for piece in cuts[m]) for m in range(FEWEST, most)}
        enough = next((m for m, error in errors.items() if error <= ENOUGH), most)
    pieces = cuts[enough]
    positions, weights = _rule(pieces, spline.knots)
    return Nodes(positions, weights, len(pieces), len(seen) - 2)


def _numbers(value: Tensor) -> Array:
    numbers: Array = value.double().cpu().numpy()
    return numbers


def _look(value: Callable[[float], Tensor], seen: dict[float, Array], scale: float) -> bool:
    """Fill `seen` with f where a spline needs it; whether f was a number everywhere."""
    for position in (0.25, 0.5, 0.75):
        seen[position] = _numbers(value(position))
    finite = all(np.isfinite(row).all() for row in seen.values())
    # How much the spline misses in a step, by where the step begins: nobody knows it of the first four.
    misses = dict.fromkeys((0.0, 0.25, 0.5, 0.75), np.inf)
    failed: list[tuple[float, float, float]] = []
    while len(seen) - 2 < LOOKS and finite:
        spline = Spline(sorted(seen))
        steps = [(_need(p, q, misses[p], failed), p, q) for p, q in pairwise(spline.knots.tolist())]
        need, p, q = max(steps, key=lambda step: (step[0], -step[1]))
        if need <= ACCURATE * scale:
            break
        middle = (p + q) / 2
        guess = (spline.values(np.array([middle])) @ _table(spline, seen))[0]
        seen[middle] = _numbers(value(middle))
        finite = bool(np.isfinite(seen[middle]).all())
        # Halving the step divides a cubic spline's error by sixteen.
        misses[p] = misses[middle] = float(np.abs(guess - seen[middle]).sum()) / 16
        if misses[p] > ACCURATE * scale:
            failed.append((misses[p], p, q))
    return finite


def _need(p: float, q: float, missed: float, failed: list[tuple[float, float, float]]) -> float:
    """How much a look into the step [p, q] is needed: for what it missed, or for a failure beside it.

    A spline may be right half-way by chance. So a step rests only when it is less than half of any that failed beside
    it.
    """
    if q - p <= FINEST:
        return 0.0
    return max([missed, *(other for other, a, b in failed if 2 * (q - p) >= b - a and (p == b or q == a))])


def _table(spline: Spline, seen: dict[float, Array]) -> Array:
    """f at the knots, [knots, T]."""
    return np.stack([seen[position] for position in spline.knots.tolist()])


def _costs(spline: Spline, table: Array, nodes: int, scale: float) -> Array:
    """Of every piece [i, j] of the knots with k = 1 to m nodes, in UNITs, [i, j, k]; infinite where there is none."""
    size = len(spline.knots)
    i, j = np.triu_indices(size, 1)
    start, length = spline.knots[i], spline.knots[j] - spline.knots[i]
    ends = np.eye(size)[j] - np.eye(size)[i]
    costs = np.full((size, size, nodes + 1), np.inf)
    for k in range(1, nodes + 1):
        own, share = (np.array(numbers) for numbers in gauss_legendre(k))
        slopes = spline.slopes((start[:, None] + own * length[:, None]).ravel()).reshape(len(i), k, size)
        # e of every piece as a linear map of the values at the knots.
        errors = np.einsum("pkn,k,p->pn", slopes, share, length) - ends
        found = np.zeros(len(i))
        total = np.zeros(len(i))
        for column in range(0, table.shape[1], 256):
            each = errors @ table[:, column : column + 256]
            found += np.abs(each).sum(1)
            total += each.sum(1)
        costs[i, j, k] = np.round((found + np.abs(total)) / (scale * UNIT)) + PIECE
    return costs


def _cuts(costs: Array, nodes: int) -> dict[int, list[tuple[int, int, int]]]:
    """By m, from 1 to `nodes`: the cheapest pieces (i, j, k) from the first knot to the last whose k add up to m."""
    size = len(costs)
    best = np.full((size, nodes + 1), np.inf)
    best[0, 0] = 0
    before = np.zeros((size, nodes + 1, 2), dtype=int)
    for total in range(1, nodes + 1):
        for k in range(1, total + 1):
            through = best[:, total - k, None] + costs[:, :, k]
            i = through.argmin(0)
            least = through[i, np.arange(size)]
            better = least < best[:, total]
            best[better, total] = least[better]
            before[better, total, 0], before[better, total, 1] = i[better], k
    cuts = {}
    for total in range(1, nodes + 1):
        pieces, j, left = [], size - 1, total
        while j:
            i, k = (int(number) for number in before[j, left])
            pieces.append((i, j, k))
            j, left = i, left - k
        cuts[total] = pieces[::-1]
    return cuts


def _rule(pieces: list[tuple[int, int, int]], knots: Array) -> tuple[list[float], list[float]]:
    positions: list[float] = []
    weights: list[float] = []
    for i, j, k in pieces:
        own, share = gauss_legendre(k)
        length = float(knots[j] - knots[i])
        positions += [float(knots[i]) + a * length for a in own]
        weights += [w * length for w in share]
    return positions, weights
