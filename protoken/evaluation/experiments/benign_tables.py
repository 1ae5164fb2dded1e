"""The tables of ordinary answers: who is on top, of all answers and of right ones; agreement with exact values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protoken.evaluation.cells import Cell
from protoken.evaluation.experiments.tables import worst_residual
from protoken.evaluation.metrics import quantile
from protoken.evaluation.report import groups, mean, middle, per_cent, samples_of, table, top1_of

SUBSETS = ("all", "right", "word for word", "learnt")
_SHOWN = (
    "shapley",
    "paired_shapley, 0 pairs",
    "leave_one_out",
    "aumann_shapley",
    "aumann_shapley, last round",
    "protoken all blocks",
    "protoken",
    "protoken, last round",
    "shapley, log-odds",
    "aumann_shapley, log-odds",
    "aumann_shapley m=1, log-odds",
    "aumann_shapley, log-odds, last round",
    "protoken all blocks, log-odds",
    "protoken all blocks, log-odds, last round",
)


def benign_tables(cells: Sequence[Cell]) -> str:
    """All answers by method; the right ones; by domain; agreement with exact values; who acts together."""
    whole = [cell for cell in cells if _subset(cell) == "all"]
    parts = ["All answers:\n", _methods(whole), "Right answers, top-1 %:\n", _right(cells)]
    parts += ["By domain of the question, top-1 % of all answers, all models:\n", _domains(whole)]
    parts += ["Correlation with exact Shapley values of the same answers and rounds:\n", _agreement(whole)]
    parts += ["Exact values by how many clients act together, median share:\n", _orders(whole)]
    return "\n".join(parts)


def _subset(cell: Cell) -> str:
    return str(cell.extra.get("answers", "all"))


def _sizes(cell: Cell) -> str:
    return str(cell.extra["sizes"])


def _methods(cells: Sequence[Cell]) -> str:
    rows = []
    for (sizes, method), own in groups(cells, lambda c: (_sizes(c), c.method)).items():
        rows.append(
            [
                sizes,
                method,
                str(len({cell.model for cell in own})),
                str(samples_of(own)),
                top1_of(own),
                per_cent(min(cell.top1 or 0.0 for cell in own)),
                mean((100 * (cell.chance or 0.0) for cell in own), 1),
                mean((cell.auroc for cell in own), 3),
                middle(cell.seconds for cell in own),
            ]
        )
    columns = ("clients", "method", "models", "answers", "top-1 %", "lowest cell %", "chance %", "AUROC", "seconds")
    return table(columns, rows)


def _right(cells: Sequence[Cell]) -> str:
    """A line per federation, model and kind of answers, a column per method, models together last."""
    rows = []
    for sizes in dict.fromkeys(map(_sizes, cells)):
        here = [cell for cell in cells if _sizes(cell) == sizes]
        models = list(dict.fromkeys(cell.model for cell in here))
        for models_shown in [*([m] for m in models), *([models] if len(models) > 1 else [])]:
            for name in SUBSETS:
                own = [cell for cell in here if _subset(cell) == name and cell.model in models_shown]
                counted = [cell for cell in own if cell.method == "shapley"]
                if counted:
                    label = models_shown[0] if len(models_shown) == 1 else "together"
                    shown = [_top1([cell for cell in own if cell.method == method]) for method in _SHOWN]
                    rows.append([sizes, label, name, str(samples_of(counted)), *shown])
    return table(("clients", "model", "answers", "number", *_SHOWN), rows)


def _top1(cells: Sequence[Cell]) -> str:
    counted = [cell for cell in cells if cell.samples]
    hits = sum((cell.top1 or 0.0) * cell.samples for cell in counted)
    return f"{100 * hits / samples_of(counted):.1f}" if counted else ""


def _domains(cells: Sequence[Cell]) -> str:
    domains = sorted({cell.domain for cell in cells})
    rows = []
    for (sizes, method), own in groups(cells, lambda c: (_sizes(c), c.method)).items():
        rows.append([sizes, method, *(_top1([cell for cell in own if cell.domain == domain]) for domain in domains)])
    return table(("clients", "method", *domains), rows)


def _agreement(cells: Sequence[Cell]) -> str:
    """Pearson correlation over the clients: median, tenth percentile and lowest answer."""
    rows = []
    for (sizes, method), own in groups(cells, lambda c: (_sizes(c), c.method)).items():
        each = [value for cell in own for value in cell.extra.get("pearson_shapley_each", ()) if value is not None]
        if each and not method.startswith("shapley"):
            figures = [f"{quantile(each, q):.3f}" for q in (0.5, 0.1, 0.0)]
            rows.append(
                [sizes, method, str(len(each)), *figures, mean((c.residual for c in own), 4), worst_residual(own)]
            )
    columns = ("clients", "method", "answers", "median", "p10", "lowest", "residual / change, median", "worst")
    return table(columns, rows)


def _orders(cells: Sequence[Cell]) -> str:
    """Medians of cells, averaged over cells: what clients do alone, in pairs, in threes, ..."""
    rows = []
    exact = [cell for cell in cells if cell.method == "shapley" and cell.extra.get("order_shares")]
    for (sizes, model), own in groups(exact, lambda c: (_sizes(c), c.model)).items():
        shares = np.mean([cell.extra["order_shares"] for cell in own], axis=0)
        rows.append(
            [sizes, model, *(f"{100 * share:.0f} %" for share in shares[:3]), f"{100 * shares[3:].sum():.0f} %"]
        )
    return table(("clients", "model", "alone", "pairs", "threes", "more"), rows)
