"""The picture of confidence: stated against true probability, and who is named against false alarms."""

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
    """Left: reliability of stated probabilities, all models together. Right: each federation, a point."""
    made, axes = figure(9.6, 4.0, columns=2)
    samples = [sample for _, outcome in run.outcomes() for sample in outcome.samples]
    cells = [cell for cell in run.cells() if cell.extra.get("fitted_on") == "its domain"]
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
    methods = list(dict.fromkeys(cell.method for cell in cells))
    for colour, method in zip(COLOURS, methods, strict=False):
        own = [cell for cell in cells if cell.method == method and cell.extra["false_alarm"] == min(_rates(cells))]
        points = [(100 * cell.extra["false_alarms"], 100 * cell.extra["exactly"]) for cell in own]
        # Federations that fall on each other stay visible.
        shift = 0.8 * (np.arange(len(points)) - len(points) / 2)
        axis.plot(
            [x for x, _ in points], [y + d for (_, y), d in zip(points, shift, strict=True)],
            color=colour, marker="o", ms=5, ls="", alpha=0.6, label=method,
        )  # fmt: skip
    if cells:
        axis.axvline(100 * min(_rates(cells)), color="#999999", lw=1, ls="--")
        axis.legend(frameon=False, fontsize=8, loc="center right")
    axis.set(
        xlabel="false alarms measured, % (dashed: asked for)", ylabel="exactly the poisoned clients named, %",
        xlim=(-0.3, None), ylim=(-8, 108),
    )  # fmt: skip


def _rates(cells: Sequence[Cell]) -> set[float]:
    return {float(cell.extra["false_alarm"]) for cell in cells}
