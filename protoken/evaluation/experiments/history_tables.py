"""The table of history: who and when, beside what is known of both."""

from __future__ import annotations

from collections.abc import Sequence

from protoken.evaluation.cells import Cell
from protoken.evaluation.report import groups, mean, samples_of, table, top1_of

KINDS = {"late": "planted from the middle on", "left": "planted until the middle, honest since"}


def history_tables(cells: Sequence[Cell]) -> str:
    """A row per kind, models and domains pooled."""
    rows = []
    for (kind,), own in groups(cells, lambda c: (str(c.extra["kind"]),)).items():
        who = [cell for cell in own if cell.method == "history: client"]
        both = [cell for cell in own if cell.method == "history: client and round"]
        shares = [
            mean((100 * cell.extra[name] for cell in who), 1)
            for name in ("came_out", "round_planted", "first_round", "within_planted", "own_part")
        ]
        came_out, *when = shares
        chance = mean((100 * (cell.chance or 0.0) for cell in both), 1)
        said = [came_out, str(samples_of(who)), top1_of(who), top1_of(both), chance, *when]
        rest = [mean((cell.auroc for cell in both), 4)]
        rest += [mean((cell.residual for cell in who), 3), mean((cell.seconds for cell in who), 3)]
        rows.append([KINDS[kind], str(len(who)), *said, *rest])
    columns = (
        "backdoor", "federations", "came out, %", "answers", "poisoned client on top over all rounds, %",
        "top client-and-round is a poisoned one, %", "chance %", "round that did most is one of planting, %",
        "it is the first of these, %", "poisoned client on top of a round of planting, %",
        "poisoned clients' scores in these rounds, %", "AUROC over clients and rounds", "residual / change, median",
        "seconds an answer",
    )  # fmt: skip
    return table(columns, rows)
