"""A cell: one figure of an experiment with everything that is needed to read it. The schema of results.json.

    results.json   {"schema": 1, "experiment": ..., "settings": {...}, "versions": {...}, "cells": [{...}, ...]}

Every cell has all of `KEYS`; what was not measured is null. An experiment may add keys of its own beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from protoken.errors import ArgumentError, TraceFormatError
from protoken.evaluation.metrics import Array, auroc, average_precision, pearson, precision_at, quantile, spearman, top1

SCHEMA = 1


@dataclass(frozen=True)
class Cell:
    """One row of the results; N samples, K clients.

    experiment, model, domain, method   what was measured
    blocks             traced blocks, counted from the last one; None: all that the ledger records
    round              the round whose global model answered
    samples            N
    top1, low, high    how often the top client is responsible, with its 95 % Wilson interval
    chance             what naming a client at random is worth
    auroc, average_precision   over the clients of each sample, averaged over samples
    pearson_shapley, pearson_loo   correlation over clients with exact Shapley values and leave-one-out, the median
    residual           |residual| / |change| of the scores, the median
    seconds            per response for the attribution, generation not included, the median
    extra              the experiment's own figures
    """

    experiment: str
    model: str
    domain: str
    method: str
    blocks: int | None
    round: int | None
    samples: int
    top1: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    chance: float | None = None
    auroc: float | None = None
    average_precision: float | None = None
    pearson_shapley: float | None = None
    pearson_loo: float | None = None
    residual: float | None = None
    seconds: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """One flat object in JSON's types, numbers to six digits; NaN becomes null."""
        own = {name: _plain(getattr(self, name)) for name in KEYS}
        clash = set(own) & set(self.extra)
        if clash:
            raise ArgumentError("extra", expected="keys that are not a cell's own", got=sorted(clash))
        return {**own, **{name: _plain(value) for name, value in self.extra.items()}}

    @staticmethod
    def from_dict(record: Any, what: str = "cell") -> Cell:
        """A cell that was read back.

        Raises:
            TraceFormatError: a key is missing or has another type.
        """
        if not isinstance(record, dict):
            raise TraceFormatError(what, expected="an object", got=type(record).__name__)
        for name, allowed in _TYPES.items():
            value = record.get(name, ...)
            if value is ... or not isinstance(value, allowed) or isinstance(value, bool):
                raise TraceFormatError(
                    what, expected=f'"{name}" of type {allowed}', got=record.get(name, "no such key")
                )
        own = {name: record[name] for name in KEYS}
        return Cell(**own, extra={name: value for name, value in record.items() if name not in own})


KEYS = tuple(f.name for f in fields(Cell) if f.name != "extra")
_NUMBER = (int, float, type(None))
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("experiment", "model", "domain", "method"), (str,)),
    **dict.fromkeys(("blocks", "round"), (int, type(None))),
    "samples": (int,),
    **dict.fromkeys(KEYS[KEYS.index("top1") :], _NUMBER),
}


def make_cell(
    scores: ArrayLike,
    responsible: ArrayLike,
    *,
    shapley: ArrayLike | None = None,
    leave_one_out: ArrayLike | None = None,
    residuals: Sequence[float] = (),
    seconds: Sequence[float] = (),
    extra: Mapping[str, Any] | None = None,
    **what: Any,
) -> Cell:
    """A cell from the scores [N, K] of N samples and the clients that are responsible, [K] or [N, K].

    Args:
        shapley, leave_one_out: reference values [M, K] of the same clients in the same order, of the first M samples.
        residuals, seconds: per sample.
        what: experiment, model, domain, method, blocks and round.

    `extra` is completed by precision_at_poisoned (precision at the number of responsible clients), auroc_pooled (over
    all pairs of sample and client), spearman_shapley, pearson_shapley_p10, pearson_shapley_each (every sample's),
    residual_p90 and residual_worst.
    """
    table = np.asarray(scores, dtype=np.float64)
    if not table.size:
        return Cell(samples=0, extra=dict(extra or {}), **what)
    truth = np.broadcast_to(np.asarray(responsible, dtype=bool), table.shape)
    found = top1(table, truth)
    both = [k for k in range(len(table)) if 0 < truth[k].sum() < truth.shape[1]]
    more: dict[str, Any] = {
        "precision_at_poisoned": _mean([precision_at(table[k], truth[k], int(truth[k].sum())) for k in both]),
        "auroc_pooled": auroc(table.ravel(), truth.ravel()),
        "residual_p90": quantile(list(residuals), 0.9),
        "residual_worst": quantile(list(residuals), 1.0),
        "clients": table.shape[1],
    }
    against: dict[str, Any] = {}
    if shapley is not None:
        pairs = _pairs(table, shapley)
        correlations = [pearson(a, b) for a, b in pairs]
        against["pearson_shapley"] = quantile(correlations, 0.5)
        more["pearson_shapley_p10"] = quantile(correlations, 0.1)
        more["pearson_shapley_each"] = [round(value, 4) for value in correlations]
        more["spearman_shapley"] = quantile([spearman(a, b) for a, b in pairs], 0.5)
        more["reference_samples"] = len(pairs)
    if leave_one_out is not None:
        against["pearson_loo"] = quantile([pearson(a, b) for a, b in _pairs(table, leave_one_out)], 0.5)
    return Cell(
        samples=found.samples,
        top1=found.value,
        top1_low=found.low,
        top1_high=found.high,
        chance=found.chance,
        auroc=_mean([auroc(table[k], truth[k]) for k in both]),
        average_precision=_mean([average_precision(table[k], truth[k]) for k in both]),
        residual=quantile(list(residuals), 0.5),
        seconds=quantile(list(seconds), 0.5),
        extra={**more, **(extra or {})},
        **against,
        **what,
    )


def _pairs(table: Array, reference: ArrayLike) -> list[tuple[Array, Array]]:
    """Scores and reference values of the samples that have both."""
    return list(zip(table, np.asarray(reference, dtype=np.float64), strict=False))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        # Six digits are more than any figure here is good for, and keep the file small.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
