"""The ablation's tables, with the published figures (arXiv 2601.19672, RQ2) in the line above ours."""

from __future__ import annotations

from collections.abc import Sequence

from protoken.evaluation.cells import Cell
from protoken.evaluation.metrics import quantile
from protoken.evaluation.report import PUBLISHED, groups, mean, samples_of, table, top1_of

KINDS = ("triggered", "ordinary")
OBJECTIVES = {"log_prob": "log-probability", "log_odds": "log-odds"}


def ablation_tables(cells: Sequence[Cell]) -> str:
    """Blocks by themselves, blocks together, and agreement with exact values against cost."""
    parts = []
    for kind in KINDS:
        own = [cell for cell in cells if cell.extra.get("answers") == kind]
        if own:
            parts += [f"{kind.capitalize()} answers, each block by itself, top-1 %:\n", _alone(own, kind)]
            parts += _agreement(own, kind)
    return "\n".join(parts)


def _agreement(cells: Sequence[Cell], kind: str) -> list[str]:
    """A table per objective: exact values of one say nothing of the other's."""
    parts = []
    for objective, name in OBJECTIVES.items():
        own = [c for c in cells if c.extra.get("study") != "block" and c.extra.get("objective") == objective]
        if own:
            parts += [f"{kind.capitalize()} answers, {name}, against its exact Shapley values, by cost:\n", _cost(own)]
    return parts


def _alone(cells: Sequence[Cell], kind: str) -> str:
    own = [cell for cell in cells if cell.extra.get("study") == "block"]
    numbers = sorted({int(cell.extra["block"]) for cell in own})
    rows = []
    if kind == "triggered":
        empty = [""] * (len(numbers) + 1)
        rows += [[f"published, with gradient ({PUBLISHED})", "66.34", *empty]]
        rows += [[f"published, without ({PUBLISHED})", "35.71", *empty]]
    for (method,), some in groups(own, lambda c: (c.method,)).items():
        each = [[cell for cell in some if cell.extra["block"] == number] for number in numbers]
        singles = [mean((100 * (c.top1 or 0.0) for c in group), 1) for group in each]
        rows.append([method.removeprefix("block, "), top1_of(some), *singles, _chance(some)])
    return table(("weighting", "all blocks' mean", *(f"block {number}" for number in numbers), "chance %"), rows)


def _chance(cells: Sequence[Cell]) -> str:
    return mean((100 * (cell.chance or 0.0) for cell in cells), 1)


def _cost(cells: Sequence[Cell]) -> str:
    """Pooled over models: every answer's correlation, and the residual as a part of the change."""
    rows = []
    for (method,), some in groups(cells, lambda c: (c.method,)).items():
        each = [v for cell in some for v in cell.extra.get("pearson_shapley_each", ()) if v is not None]
        passes = {int(cell.extra["forward_passes"]) for cell in some if cell.extra.get("forward_passes") is not None}
        rows.append(
            [
                method.removesuffix(", log-odds"),
                ", ".join(str(number) for number in sorted(passes)),
                mean((cell.seconds for cell in some), 3),
                str(samples_of(some)),
                top1_of(some),
                *(f"{quantile(each, q):.3f}" for q in (0.5, 0.1, 0.0)),
                mean((cell.residual for cell in some), 5),
                _worst(some),
            ]
        )
    columns = (
        "method", "forward passes", "seconds", "answers", "top-1 %", "Pearson, median", "p10", "lowest",
        "residual / change, median", "worst",
    )  # fmt: skip
    return table(columns, rows)


def _worst(cells: Sequence[Cell]) -> str:
    known = [cell.extra["residual_worst"] for cell in cells if cell.extra.get("residual_worst") is not None]
    return f"{max(known):.5f}" if known else ""
