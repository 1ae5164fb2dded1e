"""The picture of confidence: stated against true probability, and measured false alarms against those asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protoken.evaluation.cells import Cell
from protoken.evaluation.plots import COLOURS, figure, save
from protoken.evaluation.runs import RunFolder

_BINS = 8


def confidence_plot(run: RunFolder) -> Path:
    """Left: reliability of stated probabilities, all models together. Right: false alarms of each federation."""
    made, axes = figure(9.6, 4.0, columns=2)
    samples = [sample for _, outcome in run.outcomes() for sample in outcome.samples]
    cells = [cell for cell in run.cells() if cell.extra.get("kind") == "abstention"]
    _reliability(axes[0, 0], samples)
    _alarms(axes[0, 1], cells)
    return save(made, run.folder / "confidence.png")


def _reliability(axis: Any, samples: Sequence[Any]) -> None:
    axis.plot([0, 1], [0, 1], color="#999999", lw=1, ls="--")
    for colour, method in zip(COLOURS, dict.fromkeys(sample["method"] for sample in samples), strict=False):
        own = [sample for sample in samples if sample["method"] == method]
        stated = np.array([p for sample in own for p in sample["stated"]])
        correct = np.array([c for sample in own for c in sample["correct"]], dtype=float)
        # As many answers in each point.
        parts = [part for part in np.array_split(np.argsort(stated, kind="stable"), _BINS) if len(part)]
        points = [(stated[part].mean(), correct[part].mean()) for part in parts]
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", ms=5, lw=1.5, label=method)
    axis.set(xlabel="stated probability", ylabel="the top client holds the domain", xlim=(0, 1.03), ylim=(0, 1.03))
    if samples:
        axis.legend(frameon=False, fontsize=8)


def _alarms(axis: Any, cells: Sequence[Cell]) -> None:
    rates = sorted({cell.extra["false_alarm"] for cell in cells})
    methods = list(dict.fromkeys(cell.method for cell in cells))
    for n, (colour, method) in enumerate(zip(COLOURS, methods, strict=False)):
        own = [cell for cell in cells if cell.method == method]
        shift = 1 + 0.07 * (n - (len(methods) - 1) / 2)
        axis.plot(
            [100 * cell.extra["false_alarm"] * shift for cell in own],
            [100 * cell.extra["false_alarms"] for cell in own],
            color=colour, marker="o", ms=4, ls="", alpha=0.6, label=method,
        )  # fmt: skip
        pooled = [
            np.mean([cell.extra["false_alarms"] for cell in own if cell.extra["false_alarm"] == rate]) for rate in rates
        ]
        axis.plot([100 * rate for rate in rates], 100 * np.array(pooled), color=colour, lw=1.5)
    if rates:
        axis.plot([0, 100 * rates[-1]], [0, 100 * rates[-1]], color="#999999", lw=1, ls="--")
        axis.legend(frameon=False, fontsize=8)
    axis.set(xlabel="false alarms asked for, %", ylabel="measured in each federation (line: mean), %")
