"""Metrics against their definitions, and against values computed with scikit-learn 1.9.1 and SciPy 1.17.1."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protoken.errors import ArgumentError, NonFiniteError, ShapeError
from protoken.evaluation.metrics import (
    auroc,
    average_precision,
    calibration_error,
    midranks,
    pearson,
    precision_at,
    quantile,
    spearman,
    top1,
    wilson_interval,
)

# Scores with ties, so that the conventions for them are seen.
cases = st.lists(st.tuples(st.integers(-3, 3).map(float), st.booleans()), min_size=2, max_size=14)


@given(cases)
def test_auroc_is_the_probability_to_outscore(case: list[tuple[float, bool]]) -> None:
    scores, labels = zip(*case, strict=True)
    up = [s for s, y in case if y]
    down = [s for s, y in case if not y]
    found = auroc(scores, labels)
    if not up or not down:
        assert math.isnan(found)
        return
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(up, down)]
    assert found == pytest.approx(sum(wins) / len(wins))
    assert auroc([-s for s in scores], labels) == pytest.approx(1 - found)


@given(cases)
def test_average_precision_sums_over_distinct_thresholds(case: list[tuple[float, bool]]) -> None:
    scores, labels = zip(*case, strict=True)
    found = average_precision(scores, labels)
    if not any(labels):
        assert math.isnan(found)
        return
    expected, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        kept = [y for s, y in case if s >= threshold]
        recall = sum(kept) / sum(labels)
        expected += (recall - before) * sum(kept) / len(kept)
        before = recall
    assert found == pytest.approx(expected)


@given(cases, st.integers(1, 14))
def test_precision_at_k_is_the_mean_over_ways_to_break_ties(case: list[tuple[float, bool]], k: int) -> None:
    scores, labels = zip(*case, strict=True)
    k = min(k, len(case))
    generator = np.random.default_rng(0)
    order = np.argsort(-np.array(scores), kind="stable")
    border = np.array(scores)[order[k - 1]]
    sure = [labels[i] for i in order if scores[i] > border]
    tied = [labels[i] for i in order if scores[i] == border]
    draws = [sum(sure) + sum(generator.permutation(tied)[: k - len(sure)]) for _ in range(400)]
    assert precision_at(scores, labels, k) == pytest.approx(np.mean(draws) / k, abs=0.15)


def test_values_of_scikit_learn_and_scipy() -> None:
    scores = [0.1, 0.4, 0.35, 0.8, 0.4, 0.2, 0.9]
    labels = [0, 0, 1, 1, 1, 0, 1]
    other = [2.0, 1.0, 1.0, 5.0, 3.0, 2.0, 9.0]
    assert auroc(scores, labels) == pytest.approx(REFERENCE["auroc"], abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(REFERENCE["average_precision"], abs=1e-12)
    assert pearson(scores, other) == pytest.approx(REFERENCE["pearson"], abs=1e-12)
    assert spearman(scores, other) == pytest.approx(REFERENCE["spearman"], abs=1e-12)


REFERENCE = {
    "auroc": 0.875,
    "average_precision": 0.8875,
    "pearson": 0.8441114172776129,
    "spearman": 0.6330541649476574,
}


@pytest.mark.parametrize(
    ("successes", "samples", "expected"),
    # R's binom.confint(method = "wilson") and the closed form at the ends.
    [
        (8, 10, (0.4901625, 0.9433178)),
        (0, 10, (0.0, 0.2775328)),
        (10, 10, (0.7224672, 1.0)),
        (50, 100, (0.4038315, 0.5961685)),
    ],
)
def test_wilson_interval(successes: int, samples: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(successes, samples) == pytest.approx(expected, abs=1e-7)


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_interval_holds_the_rate(successes: int, samples: int) -> None:
    successes = min(successes, samples)
    low, high = wilson_interval(successes, samples)
    assert 0 <= low <= successes / samples <= high <= 1
    assert low < high


def test_top1_counts_ties_by_their_share_and_shows_chance() -> None:
    scores = [[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0]]
    found = top1(scores, [True, False, False, False])
    assert found.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert found.chance == 0.25
    assert found.samples == 3
    assert found.low < found.value < found.high
    both = top1(scores, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
    assert (both.value, both.high, both.chance) == (1.0, 1.0, 0.5)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_correlations_of_straight_and_monotone_lines(scale: float) -> None:
    x = np.array([1.0, 2.0, 3.0, 5.0]) * scale
    assert pearson(x, 3 * x) == pytest.approx(1)
    assert pearson(x, -x) == pytest.approx(-1)
    assert spearman(x, np.exp(x / x.max())) == pytest.approx(1)
    assert math.isnan(pearson(x, np.ones(4)))


def test_midranks_share_ties() -> None:
    assert midranks(np.array([10.0, 20.0, 10.0, 30.0, 20.0, 20.0])).tolist() == [1.5, 4, 1.5, 6, 4, 4]


def test_calibration_error() -> None:
    assert calibration_error([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0)
    assert calibration_error([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1]) == pytest.approx(1)
    assert calibration_error([0.95] * 10 + [0.15] * 10, [1] * 9 + [0] + [1] * 5 + [0] * 5) == pytest.approx(0.2)
    assert math.isnan(calibration_error([], []))


def test_quantile_leaves_out_what_is_undefined() -> None:
    assert quantile([1.0, math.nan, 3.0], 0.5) == 2.0
    assert math.isnan(quantile([], 0.5))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: auroc([1.0, math.nan], [0, 1]), NonFiniteError),
        (lambda: auroc([1.0, 2.0], [0, 1, 1]), ShapeError),
        (lambda: pearson([1.0, 2.0], [1.0]), ShapeError),
        (lambda: top1([[1.0, 2.0]], [True, False, True]), ShapeError),
        (lambda: top1(np.zeros((0, 3)), [True, False, True]), ShapeError),
        (lambda: precision_at([1.0, 2.0], [0, 1], 3), ArgumentError),
        (lambda: calibration_error([1.5], [1]), ArgumentError),
        (lambda: wilson_interval(3, 2), ArgumentError),
        (lambda: wilson_interval(1, 2, confidence=1.0), ArgumentError),
    ],
)
def test_what_makes_no_sense_is_refused(call, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()
