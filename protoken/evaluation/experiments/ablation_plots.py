"""Pictures of the ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from protoken.evaluation.cells import Cell
from protoken.evaluation.experiments.ablation_tables import KINDS, OBJECTIVES
from protoken.evaluation.plots import COLOURS, figure, save
from protoken.evaluation.runs import RunFolder


def blocks_alone(run: RunFolder) -> Path:
    """Top-1 accuracy of each block by itself: with every objective's gradient, and without; models averaged."""
    cells = [cell for cell in run.cells() if cell.extra.get("study") == "block" and cell.top1 is not None]
    made, axes = figure(7.6, 3.4, columns=2)
    for axis, kind in zip(axes[0], KINDS, strict=True):
        own = [cell for cell in cells if cell.extra["answers"] == kind]
        for colour, method in zip(COLOURS, sorted({cell.method for cell in own}), strict=False):
            numbers = sorted({int(cell.extra["block"]) for cell in own})
            found = [
                [100 * (c.top1 or 0) for c in own if c.method == method and c.extra["block"] == n] for n in numbers
            ]
            label = method.removeprefix("block, ")
            axis.plot(numbers, [float(np.mean(v)) for v in found], color=colour, marker="o", ms=4, label=label)
            for number, values in zip(numbers, found, strict=True):
                axis.plot([number] * len(values), values, color=colour, marker=".", ms=3, ls="", alpha=0.5)
        if own:
            axis.axhline(
                100 * float(np.mean([c.chance for c in own if c.chance is not None])), color="#999999", ls="--"
            )
            axis.set_xticks(sorted({int(cell.extra["block"]) for cell in own}))
        axis.set(xlabel="the only traced block", title=f"{kind} answers", ylim=(0, 103))
    axes[0, 0].set(ylabel="top client is responsible, %")
    if axes[0, 0].lines:
        axes[0, 0].legend(frameon=False, fontsize=8)
    return save(made, run.folder / "blocks.png")


def cost_curve(run: RunFolder) -> Path:
    """Pearson correlation with exact Shapley values, median and tenth percentile, against seconds per answer."""
    known = [c for c in run.cells() if c.pearson_shapley is not None and c.seconds is not None]
    cells = [c for c in known if c.extra["study"] != "block" and not c.method.startswith("shapley")]
    methods = list(dict.fromkeys(_plain(cell) for cell in cells))
    made, axes = figure(9.6, 7.2, rows=len(OBJECTIVES), columns=2)
    for line, (objective, name) in zip(axes, OBJECTIVES.items(), strict=True):
        for axis, kind in zip(line, KINDS, strict=True):
            own = [c for c in cells if c.extra["answers"] == kind and c.extra["objective"] == objective]
            for n, method in enumerate(methods):
                group = [cell for cell in own if _plain(cell) == method]
                if group:
                    _point(axis, group, method, COLOURS[n % len(COLOURS)])
            axis.set(xscale="log", yscale="log", title=f"{kind} answers, {name}", xlabel="seconds per answer")
            axis.xaxis.set_minor_formatter("")
            axis.axhline(0.02, color="#999999", ls="--", lw=1)
        line[0].set(ylabel="1 - Pearson with exact Shapley\n(median, up to the tenth percentile)")
    if methods:
        drawn = [pair for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
        once = {label: handle for handle, label in drawn}
        made.legend(once.values(), once.keys(), frameon=False, fontsize=8, loc="outside right center")
    return save(made, run.folder / "cost.png")


def _plain(cell: Cell) -> str:
    return cell.method.removesuffix(", log-odds")


def _point(axis: Any, group: list[Cell], method: str, colour: str) -> None:
    seconds = float(np.mean([cell.seconds for cell in group if cell.seconds is not None]))
    median, low = _agreement(group)
    shape = {"path": "s", "paired": "D", "leave": "^"}.get(method.split(",")[0].split("_")[0], "o")
    axis.plot([seconds], [1 - median], label=method, color=colour, marker=shape, ls="", ms=5)
    axis.plot([seconds, seconds], [1 - median, 1 - low], color=colour, lw=1, alpha=0.6)


def _agreement(group: list[Cell]) -> tuple[float, float]:
    """The models' mean of the median and of the tenth percentile; kept off 1, which has no place on a log scale."""
    median = float(np.mean([cell.pearson_shapley or 0.0 for cell in group]))
    lows = [cell.extra.get("pearson_shapley_p10") for cell in group]
    low = float(np.mean([value for value in lows if value is not None]))
    return min(median, 1 - 1e-6), min(low, 1 - 1e-6)
