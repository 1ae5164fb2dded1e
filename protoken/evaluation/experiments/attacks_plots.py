"""Pictures of the attacks: attacks down, methods across."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protoken.evaluation.cells import Cell
from protoken.evaluation.plots import figure, save
from protoken.evaluation.runs import RunFolder


def grids(run: RunFolder) -> Path:
    """Left: how often a culprit is named for the backdoor. Right: what share of ordinary answers the dishonest get."""
    cells = [cell for cell in run.cells() if cell.top1 is not None and cell.extra.get("attack") != "gauge"]
    made, axes = figure(11.5, 5.2, columns=2)
    blame = [cell for cell in cells if cell.extra.get("goal") == "blame"]
    share = [cell for cell in cells if cell.extra.get("goal") == "share"]
    _table(made, axes[0, 0], blame, lambda c: c.top1, "a culprit is named for the backdoor, %", "RdYlGn")
    _table(
        made, axes[0, 1], share, lambda c: c.extra["attacker_share_each"], "share of ordinary answers, %", "RdYlGn_r"
    )
    return save(made, run.folder / "attacks.png")


def _table(
    made: Any, axis: Any, cells: Sequence[Cell], value: Callable[[Cell], float | None], title: str, colours: str
) -> None:
    attacks = list(dict.fromkeys(str(cell.extra["attack"]) for cell in cells))
    methods = list(dict.fromkeys(cell.method for cell in cells))
    table = np.full((len(attacks), len(methods)), np.nan)
    for row, attack in enumerate(attacks):
        for column, method in enumerate(methods):
            found = [value(c) for c in cells if c.extra["attack"] == attack and c.method == method]
            numbers = [number for number in found if number is not None]
            if numbers:
                table[row, column] = 100 * float(np.mean(numbers))
                axis.text(column, row, f"{table[row, column]:.0f}", ha="center", va="center", fontsize=8)
    if table.size:
        axis.imshow(table, cmap=colours, vmin=0, vmax=100, aspect="auto", alpha=0.8)
    axis.set_xticks(range(len(methods)), methods, rotation=40, ha="right", fontsize=7)
    axis.set_yticks(range(len(attacks)), attacks, fontsize=8)
    axis.set_title(title, fontsize=9)
