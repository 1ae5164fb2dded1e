"""Was the attribution right? Metrics of scores against known responsible clients and against reference values.

Small exact implementations with the conventions of scikit-learn and SciPy, ties included, so that neither is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from protoken.errors import ArgumentError, NonFiniteError, ShapeError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Top1:
    """How often the highest scorer is responsible.

    value       fraction of samples; a tie for the top counts by the fraction of the tied that are responsible
    low, high   Wilson interval
    chance      what naming a client at random is worth
    samples     how many
    """

    value: float
    low: float
    high: float
    chance: float
    samples: int


def top1(scores: ArrayLike, responsible: ArrayLike, *, confidence: float = 0.95) -> Top1:
    """Top-1 accuracy over N samples: scores [N, K], responsible [K] or [N, K] booleans."""
    table = _finite("scores", scores, 2)
    truth = np.asarray(responsible, dtype=bool)
    truth = np.broadcast_to(truth, table.shape) if truth.ndim == 1 and truth.shape == table.shape[1:] else truth
    if truth.shape != table.shape:
        raise ShapeError("responsible", expected=f"[K] or [N, K] for scores {table.shape}", got=truth.shape)
    best = table == table.max(axis=1, keepdims=True)
    hits = (best & truth).sum(axis=1) / best.sum(axis=1)
    low, high = wilson_interval(float(hits.sum()), len(table), confidence=confidence)
    return Top1(float(hits.mean()), low, high, float(truth.mean(axis=1).mean()), len(table))


def wilson_interval(successes: float, samples: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); (0, 1) without samples.

    Raises:
        ArgumentError: more successes than samples, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ArgumentError("confidence", expected="between 0 and 1", got=confidence)
    if samples < 0 or not 0 <= successes <= samples:
        raise ArgumentError("successes", expected=f"0 to samples = {samples}", got=successes)
    if samples == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / samples
    centre = (p + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * math.sqrt(p * (1 - p) / samples + z * z / (4 * samples * samples)) / (1 + z * z / samples)
    # At p = 0 and 1 the bound is exactly 0 or 1; rounding must not say otherwise.
    return (0.0 if successes == 0 else max(centre - half, 0.0)), (
        1.0 if successes == samples else min(centre + half, 1.0)
    )


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a positive outscores a negative, ties counting half (Mann-Whitney); NaN without both classes."""
    values, truth = _labelled(scores, labels)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return math.nan
    ranks = midranks(values)
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """sum_n (R_n - R_{n-1}) P_n over the distinct scores as thresholds, as in scikit-learn; NaN without positives."""
    values, truth = _labelled(scores, labels)
    if not truth.any():
        return math.nan
    order = np.argsort(-values, kind="stable")
    hits = np.cumsum(truth[order])
    # Equal scores pass a threshold together: only the last of each group is a threshold.
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    precision, recall = hits[last] / (last + 1), hits[last] / truth.sum()
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def precision_at(scores: ArrayLike, labels: ArrayLike, k: int) -> float:
    """Fraction of responsible clients among the k highest; a tie at the border counts by its expected value."""
    values, truth = _labelled(scores, labels)
    if not 1 <= k <= len(values):
        raise ArgumentError("k", expected=f"1 to {len(values)}", got=k)
    border = np.sort(values)[-k]
    above, tied = values > border, values == border
    places = k - int(above.sum())
    return float((truth[above].sum() + places * truth[tied].mean()) / k)


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Correlation coefficient; NaN if either side is constant."""
    x, y = _finite("a", a, 1), _finite("b", b, 1)
    if x.shape != y.shape:
        raise ShapeError("b", expected=f"as long as a, {x.shape}", got=y.shape)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    # Scaled first: squares of very large or small scores would over- or underflow.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Correlation of midranks; NaN if either side is constant."""
    return pearson(midranks(_finite("a", a, 1)), midranks(_finite("b", b, 1)))


def midranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Array = (ends - (counts - 1) / 2)[inverse]
    return ranks


def calibration_error(probabilities: ArrayLike, correct: ArrayLike, *, bins: int = 10) -> float:
    """Expected calibration error: mean |accuracy - confidence| over equal-width bins, weighted by their samples.

    Source: Naeini et al. 2015; Guo et al., arXiv 1706.04599.
    """
    stated, truth = _labelled(probabilities, correct, name="probabilities")
    if ((stated < 0) | (stated > 1)).any():
        raise ArgumentError("probabilities", expected="numbers from 0 to 1", got=(stated.min(), stated.max()))
    if not len(stated):
        return math.nan
    place = np.minimum((stated * bins).astype(int), bins - 1)
    error = 0.0
    for index in range(bins):
        inside = place == index
        if inside.any():
            error += inside.mean() * abs(truth[inside].mean() - stated[inside].mean())
    return float(error)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear-interpolation quantile of the finite values; NaN without any. For medians and tenth percentiles."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.quantile(finite, q)) if finite else math.nan


def _labelled(scores: ArrayLike, labels: ArrayLike, name: str = "scores") -> tuple[Array, NDArray[np.bool_]]:
    values, truth = _finite(name, scores, 1), np.asarray(labels, dtype=bool)
    if truth.shape != values.shape:
        raise ShapeError("labels", expected=f"as long as {name}, {values.shape}", got=truth.shape)
    return values, truth


def _finite(name: str, values: ArrayLike, axes: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != axes or (axes == 2 and 0 in array.shape):
        raise ShapeError(name, expected=f"{axes} axes" + (", none empty" if axes == 2 else ""), got=array.shape)
    if not np.isfinite(array).all():
        raise NonFiniteError(name, expected="finite numbers", got="NaN or infinity")
    return array
