"""Where the nodes of a path integral go: pieces of the path, and Gauss-Legendre nodes in each of them.

    integral_0^1 f'(a) da ~ sum over pieces [p, q] of (q - p) sum_i w_i f'(p + a_i (q - p))

f_t itself is cheap along the path, a forward pass and no gradient. So it is looked at in 8, 16 or 32 equal steps, as
many as its cubic spline s_t needs to follow it, and of all ways to cut the path at these positions and to share out m
nodes among the pieces the one is taken that would integrate s' best:

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
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ArgumentError

Array = NDArray[np.float64]

STEPS = (4, 8, 16, 32)
ACCURATE = 1e-4
"""How far a spline may be from f before it is given more steps, as a share of sum_t |f_t(1) - f_t(0)|."""
PIECE = 5
"""What a further piece must save, in units of UNIT."""
UNIT = 1e-4
"""Costs are whole multiples of this share of the change: rounding of f decides nothing."""
LEAST = 0.1
"""A change below this many nats counts as so many: what is below rounding need not be followed."""


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


def placed(value: Callable[[float], Tensor], start: Tensor, end: Tensor, nodes: int) -> Nodes:
    """m nodes where f needs them.

    Args:
        value: f_t [T] at a position between 0 and 1.
        start, end: f_t [T] at 0 and 1.
        nodes: m. A single node has nowhere else to go, and more than 32 need no help: these are the plain rule.
    """
    plain = Nodes(*gauss_legendre(nodes))
    known = {0.0: start.double().cpu().numpy(), 1.0: end.double().cpu().numpy()}
    scale = max(float(np.abs(known[1.0] - known[0.0]).sum()), LEAST)
    if not 1 < nodes <= STEPS[-1] or not np.isfinite(scale):
        return plain
    coarse: Array | None = None
    for steps in STEPS:
        here = [j / steps for j in range(steps + 1)]
        for position in here:
            if position not in known:
                known[position] = value(position).double().cpu().numpy()
        table = np.stack([known[position] for position in here])
        if not np.isfinite(table).all():
            return plain
        # Halving the step divides a cubic spline's error by sixteen.
        missed = (
            np.inf if coarse is None else float(np.abs(_between(steps // 2) @ coarse - table[1::2]).sum(1).max()) / 16
        )
        if missed <= ACCURATE * scale:
            break
        coarse = table
    pieces = _cut(_costs(table, steps, nodes, scale), nodes)
    positions, weights = _rule(pieces, steps)
    return Nodes(positions, weights, len(pieces), len(known) - 2)


def _costs(table: Array, steps: int, nodes: int, scale: float) -> Array:
    """Of every piece [i, j] of the steps with k = 1 to m nodes, in UNITs, [i, j, k]; infinite where there is none."""
    i, j = np.triu_indices(steps + 1, 1)
    errors = np.zeros((nodes, len(i)))
    total = np.zeros((nodes, len(i)))
    rules = _errors(steps, nodes)  # [m, pieces, steps + 1]
    for column in range(0, table.shape[1], 256):
        each = rules @ table[:, column : column + 256]
        errors += np.abs(each).sum(-1)
        total += each.sum(-1)
    costs = np.full((steps + 1, steps + 1, nodes + 1), np.inf)
    costs[i, j, 1:] = np.round((errors + np.abs(total)) / (scale * UNIT)).T + PIECE
    return costs


def _cut(costs: Array, nodes: int) -> list[tuple[int, int, int]]:
    """The cheapest pieces (i, j, k) from the first position to the last whose k add up to m."""
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
    pieces, j, left = [], size - 1, nodes
    while j:
        i, k = (int(number) for number in before[j, left])
        pieces.append((i, j, k))
        j, left = i, left - k
    return pieces[::-1]


def _rule(pieces: list[tuple[int, int, int]], steps: int) -> tuple[list[float], list[float]]:
    positions: list[float] = []
    weights: list[float] = []
    for i, j, k in pieces:
        own, share = gauss_legendre(k)
        positions += [(i + a * (j - i)) / steps for a in own]
        weights += [w * (j - i) / steps for w in share]
    return positions, weights


@lru_cache(maxsize=64)
def _errors(steps: int, nodes: int) -> Array:
    """e of every piece with k = 1 to m nodes as a linear map of the steps' values, [m, pieces, steps + 1]."""
    i, j = np.triu_indices(steps + 1, 1)
    exact = np.eye(steps + 1)[j] - np.eye(steps + 1)[i]
    found = []
    for k in range(1, nodes + 1):
        own, share = (np.array(numbers) for numbers in gauss_legendre(k))
        slopes = _slopes((i[:, None] + own * (j - i)[:, None]).ravel(), steps).reshape(len(i), k, steps + 1)
        # A step is the unit of length here: a slope per step times a piece's steps.
        found.append(np.einsum("pkn,k,p->pn", slopes, share, (j - i).astype(float)) - exact)
    return np.stack(found)


@lru_cache(maxsize=16)
def _curvatures(steps: int) -> Array:
    """Second derivatives of the cubic spline through the steps' values, not-a-knot, [steps + 1, steps + 1]."""
    left = np.zeros((steps + 1, steps + 1))
    right = np.zeros((steps + 1, steps + 1))
    for row in range(1, steps):
        left[row, row - 1 : row + 2] = 1, 4, 1
        right[row, row - 1 : row + 2] = 6, -12, 6
    left[0, :3] = left[-1, -3:] = 1, -2, 1
    return np.asarray(np.linalg.solve(left, right), dtype=np.float64)


def _slopes(at: Array, steps: int) -> Array:
    """The spline's slope per step at positions in steps, as a linear map of the values, [positions, steps + 1]."""
    curvatures, one = _curvatures(steps), np.eye(steps + 1)
    i = np.clip(at.astype(int), 0, steps - 1)
    v = (at - i)[:, None]
    u = 1 - v
    found: Array = one[i + 1] - one[i] + curvatures[i + 1] * (3 * v * v - 1) / 6 - curvatures[i] * (3 * u * u - 1) / 6
    return found


@lru_cache(maxsize=16)
def _between(steps: int) -> Array:
    """The spline half-way between the steps, as a linear map of the steps' values, [steps, steps + 1]."""
    curvatures, one = _curvatures(steps), np.eye(steps + 1)
    return (one[1:] + one[:-1]) / 2 - (curvatures[1:] + curvatures[:-1]) / 16
