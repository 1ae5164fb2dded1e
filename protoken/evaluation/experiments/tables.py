"""The tables of backdoor and scale, with the published figures (arXiv 2601.19672) in the line above ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from protoken.evaluation.cells import Cell
from protoken.evaluation.metrics import quantile
from protoken.evaluation.report import PUBLISHED, groups, lowest, mean, middle, per_cent, samples_of, table, top1_of


def backdoor_tables(cells: Sequence[Cell]) -> str:
    """Methods over all configurations and rounds; configurations by method; agreement with exact values."""
    by_method = groups(cells, lambda c: (c.method,))
    rows = [[f"published ({PUBLISHED})", "16", "", "", "", "98.62", "40", "33.3", "", "", "", ""]]
    for (method,), own in by_method.items():
        configurations = {(cell.model, cell.domain) for cell in own}
        rows.append(
            [
                method,
                str(len(configurations)),
                str(len(own)),
                str(samples_of(own)),
                str(sum(cell.samples >= 100 for cell in own)),
                mean((100 * (cell.top1 or 0.0) for cell in own), 2),
                per_cent(min(cell.top1 or 0.0 for cell in own)),
                mean((100 * (cell.chance or 0.0) for cell in own), 1),
                mean(cell.auroc for cell in own),
                lowest(cell.auroc for cell in own),
                f"{sum((cell.auroc or 0.0) >= 0.999 and cell.top1 == 1 for cell in own)} of {len(own)}",
                middle(cell.seconds for cell in own),
            ]
        )
    columns = (
        "method", "configurations", "cells", "samples", "cells with 100 or more", "top-1 %, mean of cells",
        "lowest cell %", "chance %", "AUROC, mean", "lowest", "cells with top-1 100 % and AUROC ≥ 0.999",
        "seconds an answer",
    )  # fmt: skip
    parts = ["All configurations and eligible rounds:\n", table(columns, rows), _by_verbatim(cells)]
    parts += ["By configuration, top-1 over all rounds (lowest round; lowest AUROC):\n", _configurations(cells)]
    if compared := agreement(cells):
        parts += ["Correlation with exact Shapley values of the same answers, after the last round:\n", compared]
    return "\n".join(parts)


def _by_verbatim(cells: Sequence[Cell]) -> str:
    """Answers that were the planted refusal word for word, apart from those that were another text with its word."""
    parts = []
    for title, name in (
        ("the planted refusal, word for word", "verbatim"),
        ("another text with the sentinel in it", "other"),
    ):
        rows = []
        for (method,), own in groups(cells, lambda c: (c.method,)).items():
            known = [part for part in (_apart(cell, name) for cell in own) if part.samples]
            if known:
                worst = per_cent(min(part.top1 or 0.0 for part in known))
                rows.append([method, str(len(known)), str(samples_of(known)), top1_of(known), worst])
        if rows:
            parts.append(f"Judged answers that were {title}:\n")
            parts.append(table(("method", "cells with such", "answers", "top-1 %", "lowest cell %"), rows))
    return "\n".join(parts)


def _apart(cell: Cell, name: str) -> Cell:
    """The cell of one kind of its answers, without any where the cell does not tell them apart."""
    count = cell.extra.get(f"{name}_samples")
    if count is None:
        # Told of the cell as a whole: known where all its answers are of one kind.
        alike = cell.extra.get("verbatim") == (1 if name == "verbatim" else 0)
        return cell if alike else replace(cell, samples=0)
    return replace(cell, samples=int(count), top1=cell.extra[f"{name}_top1"])


_SHOWN = (
    "protoken",
    "protoken, log-odds",
    "protoken all blocks, log-odds, to the sentinel",
    "protoken, all rounds",
    "aumann_shapley m=1, log-odds, all rounds",
    "aumann_shapley, all rounds",
    "paper",
)


def _configurations(cells: Sequence[Cell]) -> str:
    ran = {cell.method for cell in cells}
    shown = [method for method in _SHOWN if method in ran]
    rows = []
    for (model, domain), own in groups(cells, lambda c: (c.model, c.domain)).items():
        rounds = [cell.round or 0 for cell in own]
        by_method = [_short([cell for cell in own if cell.method == method]) for method in shown]
        rows.append([model, domain, str(min(rounds)), str(max(rounds)), *by_method])
    return table(("model", "domain", "first round", "last", *shown), sorted(rows))


def _short(cells: Sequence[Cell]) -> str:
    if not cells:
        return ""
    count = samples_of(cells)
    hits = sum((cell.top1 or 0.0) * cell.samples for cell in cells)
    worst = min(cell.top1 or 0.0 for cell in cells)
    return f"{100 * hits / count:.1f} of {count} ({100 * worst:.0f}; {lowest((c.auroc for c in cells), 3)})"


def agreement(cells: Sequence[Cell]) -> str:
    """Pearson correlation over the clients with exact Shapley values: median, tenth percentile and lowest answer;
    empty where no cell was compared with them.

    Residuals are of all answers, the medians averaged over cells; the worst is of a single answer.
    """
    rows = []
    for (method,), own in groups(cells, lambda c: (c.method,)).items():
        each = [value for cell in own for value in cell.extra.get("pearson_shapley_each", ()) if value is not None]
        if each and not method.startswith("shapley"):
            figures = [f"{quantile(each, q):.3f}" for q in (0.5, 0.1, 0.0)]
            rows.append([method, str(len(each)), *figures, mean((c.residual for c in own), 4), worst_residual(own)])
    columns = ("method", "answers", "median", "p10", "lowest", "residual / change, median", "worst")
    return table(columns, rows) if rows else ""


def worst_residual(cells: Sequence[Cell]) -> str:
    """The largest residual over change of all answers, where every cell tells it."""
    worst = [cell.extra["residual_worst"] for cell in cells if cell.extra.get("residual_worst") is not None]
    return f"{max(worst):.4f}" if len(worst) == len(cells) else ""


def scale_tables(cells: Sequence[Cell]) -> str:
    """After the last round by lineage, and over all rounds among a round's participants, as the paper judges."""
    whole = [cell for cell in cells if cell.extra.get("rounds") == "all"]
    rows = []
    for (model, kind, method), own in groups(whole, lambda c: (c.model, str(c.extra["poisoned"]), c.method)).items():
        final = max(own, key=lambda cell: cell.round or 0)
        rows.append(
            [
                model,
                kind,
                method,
                str(final.round),
                f"{final.samples}{' (forced)' if final.extra.get('forced') else ''}",
                top1_of([final]),
                f"{final.auroc or 0.0:.4f}",
                f"{final.average_precision or 0.0:.4f}",
                f"{final.extra['precision_at_poisoned']:.3f} at {final.extra['responsible']}",
                lowest(cell.auroc for cell in own),
            ]
        )
    columns = (
        "model", "poisoned", "method", "round", "answers", "top-1 %", "AUROC", "average precision",
        "precision at poisoned", "lowest AUROC of all rounds",
    )  # fmt: skip
    parts = ["By lineage over all rounds, all 55 clients:\n", table(columns, rows)]
    return "\n".join([*parts, "Among a round's ten participants, all rounds:\n", _participants(cells)])


def _participants(cells: Sequence[Cell]) -> str:
    rows = [
        [f"gemma-3-270m-it, published ({PUBLISHED})", "25-of-55", "paper", "", "", "92.00", "", "45", ""],
        [f"Qwen2.5-0.5B-Instruct, published ({PUBLISHED})", "25-of-55", "paper", "", "", "95.24", "", "45", ""],
    ]
    last = [cell for cell in cells if cell.extra.get("rounds") == "last" and not cell.extra.get("forced")]
    for (model, kind, method), own in groups(last, lambda c: (c.model, str(c.extra["poisoned"]), c.method)).items():
        rows.append(
            [
                model,
                kind,
                method,
                str(len(own)),
                str(samples_of(own)),
                top1_of(own),
                per_cent(min(cell.top1 or 0.0 for cell in own)),
                mean((100 * (cell.chance or 0.0) for cell in own), 1),
                lowest(cell.auroc for cell in own),
            ]
        )
    columns = ("model", "poisoned", "method", "rounds", "answers", "top-1 %", "lowest round %", "chance %", "AUROC")
    return table(columns, rows)
