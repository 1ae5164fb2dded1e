"""Pictures of the ablation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from protoken.evaluation.cells import Cell
from protoken.evaluation.plots import COLOURS, figure, save
from protoken.evaluation.runs import RunFolder

KINDS = ("triggered", "ordinary")


def blocks_alone(run: RunFolder) -> Path:
    """Top-1 accuracy of each block by itself: with the gradient of either objective, and without; models averaged."""
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
    cells = [cell for cell in run.cells() if cell.pearson_shapley is not None and cell.seconds is not None]
    made, axes = figure(9.6, 4.2, columns=2)
    for axis, kind in zip(axes[0], KINDS, strict=True):
        own = [c for c in cells if c.extra["answers"] == kind and c.extra["study"] != "block" and c.method != "shapley"]
        methods = list(dict.fromkeys(cell.method for cell in own))
        for n, method in enumerate(methods):
            group = [cell for cell in own if cell.method == method]
            seconds = float(np.mean([cell.seconds for cell in group if cell.seconds is not None]))
            median, low = _agreement(group)
            marker = "s" if method.startswith(("path", "paired")) else "o"
            style = {"color": COLOURS[n % len(COLOURS)], "marker": marker, "ls": "", "ms": 5}
            axis.plot([seconds], [1 - median], label=method, **style)
            axis.plot([seconds, seconds], [1 - median, 1 - low], color=style["color"], lw=1, alpha=0.6)
        axis.set(xscale="log", yscale="log", title=f"{kind} answers", xlabel="seconds per answer")
        axis.axhline(0.02, color="#999999", ls="--", lw=1)
    axes[0, 0].set(ylabel="1 - Pearson with exact Shapley\n(median, up to the tenth percentile)")
    axes[0, 1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(made, run.folder / "cost.png")


def _agreement(group: list[Cell]) -> tuple[float, float]:
    """The models' mean of the median and of the tenth percentile; kept off 1, which has no place on a log scale."""
    median = float(np.mean([cell.pearson_shapley or 0.0 for cell in group]))
    lows = [cell.extra.get("pearson_shapley_p10") for cell in group]
    low = float(np.mean([value for value in lows if value is not None]))
    return min(median, 1 - 1e-6), min(low, 1 - 1e-6)
