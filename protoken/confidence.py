"""How sure is a trace of the client it names? (When to name none: verdict.py.)

    intervals(trace)        per client an interval of its total and the probability of being on top: bootstrap
    Calibration.fit(...)    from a trace's margin to the probability that the named client is right

Saved traces are enough: no model and no ledger is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from protoken.arguments import check_count, check_rate, finite, generator_of, listed
from protoken.errors import ArgumentError
from protoken.results import Trace
from protoken.results.checks import Array, vector

_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class ClientInterval:
    """A client's total with its bootstrap interval, in the trace's unit, and how often resamples put it on top."""

    client: str
    total: float
    low: float
    high: float
    top_probability: float


def intervals(
    trace: Trace, *, confidence: float = 0.95, draws: int = 1000, block: int | None = None, seed: int = 0
) -> list[ClientInterval]:
    """Percentile intervals of the totals, resampling the response's tokens; in the trace's order of clients.

    Neighbouring tokens are not independent, so runs of `block` tokens are drawn (circular moving blocks; by default
    the cube root of T). It says how much the total rests on few tokens, not how true the method is. Where the trace has
    standard errors (sampled Shapley), their normal intervals are returned, since they are what is uncertain there.

    Raises:
        ArgumentError: no tokens, a totals-only trace without standard errors, or a parameter out of range.
    """
    check_trace(trace)
    check_rate("confidence", confidence)
    check_count("draws", draws, 1)
    generator = generator_of(seed)
    if trace.standard_errors is not None:
        sampled = trace.totals + trace.standard_errors * generator.standard_normal((draws, len(trace.totals)))
        reach = NormalDist().inv_cdf((1 + confidence) / 2) * trace.standard_errors
        low, high = trace.totals - reach, trace.totals + reach
    else:
        sampled = resampled_totals(trace, draws, block, generator)
        tail = (1 - confidence) / 2
        low, high = np.quantile(sampled, [tail, 1 - tail], axis=0)
    top = _tops(sampled) / draws
    return [
        ClientInterval(client, float(trace.totals[k]), float(low[k]), float(high[k]), float(top[k]))
        for k, client in enumerate(trace.client_ids)
    ]


def top_rates(trace: Trace, *, draws: int = 1000, seed: int = 0) -> Array | None:
    """How often each client is on top of resampled totals [K], as in `intervals`; None where nothing can be resampled.

    In pieces of draws: a federation of thousands takes no [draws, K].
    """
    check_trace(trace)
    check_count("draws", draws, 1)
    generator = generator_of(seed)
    clients = len(trace.totals)
    piece = max(1, _NUMBERS_AT_ONCE // clients)
    tops = np.zeros(clients)
    if trace.standard_errors is not None:
        for start in range(0, draws, piece):
            noise = generator.standard_normal((min(piece, draws - start), clients))
            tops += _tops(trace.totals + trace.standard_errors * noise)
    elif trace.token_scores is not None and len(trace.token_scores) > 1:
        taken = _taken(len(trace.token_scores), draws, None, generator)
        for start in range(0, draws, piece):
            tops += _tops(taken[start : start + piece] @ trace.token_scores)
    else:
        return None
    return tops / draws


def _tops(totals: Array) -> Array:
    """How many rows [n, K] each client is on top of, [K]."""
    return np.bincount(totals.argmax(axis=1), minlength=totals.shape[1]).astype(np.float64)


def resampled_totals(trace: Trace, draws: int, block: int | None, generator: np.random.Generator) -> Array:
    """Totals of `draws` resampled responses, [draws, K]."""
    scores = trace.token_scores
    if scores is None or not len(scores):
        raise ArgumentError(
            "trace",
            expected="scores of at least one token",
            got="totals only" if scores is None else "an empty response",
            remedy='Trace with way="local" or way="forward"',
        )
    totals: Array = _taken(len(scores), draws, block, generator) @ scores
    return totals


def _taken(count: int, draws: int, block: int | None, generator: np.random.Generator) -> Array:
    """How often each draw takes each token, [draws, T]: runs of `block` tokens, circular, T tokens in all.

    Times the scores [T, K] these are the resampled totals; the drawn scores themselves would be [draws, T, K].
    """
    length = max(1, round(count ** (1 / 3))) if block is None else block
    check_count("block", length, 1, count)
    starts = generator.integers(0, count, size=(draws, math.ceil(count / length)))
    rows = (starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, :count] % count
    rows += np.arange(draws)[:, None] * count
    return np.bincount(rows.reshape(-1), minlength=draws * count).reshape(draws, count).astype(np.float64)


def traces_of(argument: str, traces: Iterable[Trace]) -> list[Trace]:
    """The traces as a list.

    Raises:
        ArgumentError: one trace in the place of several, or what is no trace.
    """
    found = listed(argument, traces, "a list of protoken.Trace")
    wrong = [one for one in found if not isinstance(one, Trace)]
    if wrong:
        raise ArgumentError(argument, expected="a list of protoken.Trace", got=f"one with a {type(wrong[0]).__name__}")
    return list(found)


def check_trace(trace: Trace) -> None:
    """ArgumentError for what is no trace."""
    if not isinstance(trace, Trace):
        raise ArgumentError("trace", expected="a protoken.Trace", got=f"a {type(trace).__name__}")


def margin(trace: Trace) -> float:
    """(best - second best) / sum_k |S_k|, from 0 to 1: how clearly one client leads; 1 for a single client."""
    check_trace(trace)
    return margin_of(trace.totals)


def margin_of(totals: Array) -> float:
    """The same from totals [K]."""
    ranked = np.sort(totals)[::-1]
    size = float(np.abs(ranked).sum())
    if len(ranked) == 1:
        return 1.0
    return float(ranked[0] - ranked[1]) / size if size else 0.0


@dataclass(frozen=True)
class Calibration:
    """P(named client is right) = 1 / (1 + exp(-(slope * margin + intercept))); `samples` it was fitted on.

    Source: Platt (1999), with his smoothed targets, so that a perfect sample does not claim certainty.
    """

    slope: float
    intercept: float
    samples: int

    def __post_init__(self) -> None:
        for name in ("slope", "intercept"):
            object.__setattr__(self, name, finite(name, getattr(self, name)))

    @staticmethod
    def fit(margins: ArrayLike, correct: ArrayLike) -> Calibration:
        """Logistic regression by Newton's method on held-out traces whose responsible clients are known.

        The slope is kept at 0 or more: a clearer lead never means less confidence.

        Raises:
            ArgumentError: fewer than 10 samples, lengths that differ, or what is no finite number.
        """
        x, y = vector("margins", margins), np.asarray(correct, dtype=bool)
        if x.shape != y.shape or len(x) < 10:
            raise ArgumentError(
                "margins", expected="10 or more, one outcome each", got=f"{x.shape} beside outcomes {y.shape}"
            )
        positives, negatives = int(y.sum()), int((~y).sum())
        target = np.where(y, (positives + 1) / (positives + 2), 1 / (negatives + 2))
        slope, intercept = _logistic(x, target)
        if slope < 0:
            mean = float(target.mean())
            slope, intercept = 0.0, math.log(mean / (1 - mean))
        return Calibration(slope, intercept, len(x))

    def probability(self, found: Trace | float) -> float:
        """That the client a trace (or a margin) names is right."""
        value = margin(found) if isinstance(found, Trace) else finite("found", found)
        logit = self.slope * value + self.intercept
        return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _logistic(x: Array, target: Array) -> tuple[float, float]:
    """Slope and intercept that minimise cross-entropy, with a ridge too small to matter but against separation."""
    scale = float(np.abs(x).max()) or 1.0
    design = np.stack([x / scale, np.ones_like(x)], axis=1)
    weights, ridge = np.zeros(2), 1e-6 * np.eye(2)

    def loss(w: Array) -> float:
        logits = design @ w
        return float((np.logaddexp(0, logits) - target * logits).sum() + 0.5 * w @ ridge @ w)

    for _ in range(100):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -500, 500)))
        gradient = design.T @ (chance - target) + ridge @ weights
        hessian = design.T @ (design * (chance * (1 - chance))[:, None]) + ridge
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(weights - size * step) > loss(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    return float(weights[0] / scale), float(weights[1])
