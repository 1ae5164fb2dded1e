"""The tables of confidence: what is named at which false-alarm rate, and what stated probabilities are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from protoken.evaluation.cells import Cell
from protoken.evaluation.metrics import wilson_interval
from protoken.evaluation.report import groups, mean, middle, samples_of, table


def confidence_tables(cells: Sequence[Cell]) -> str:
    """Abstention by method and rate over all federations; calibration by method over all models."""
    parts = []
    abstained = [cell for cell in cells if cell.extra.get("kind") == "abstention"]
    if abstained:
        parts += ["Who is named, and how often wrongly where nobody taught the answer:\n", _alarms(abstained)]
    calibrated = [cell for cell in cells if cell.extra.get("kind") == "calibration"]
    if calibrated:
        parts += ["Stated and true probability that the top client holds the question's domain:\n"]
        parts += [_calibration(calibrated)]
    return "\n".join(parts)


def _alarms(cells: Sequence[Cell]) -> str:
    rows = []
    by = groups(cells, lambda c: (c.method, c.extra["fitted_on"], f"{100 * c.extra['false_alarm']:.0f}"))
    for (method, kind, rate), own in by.items():
        held = sum(int(cell.extra["held"]) for cell in own)
        crossed = round(sum(cell.extra["false_alarms"] * cell.extra["held"] for cell in own))
        low, high = wilson_interval(crossed, held)
        measured = f"{100 * crossed / held:.2f} ({100 * low:.2f} to {100 * high:.2f}) of {held}"
        named = _pooled(own, "alarms_named", lambda c: int(c.extra["held"]))
        strange = _pooled(own, "strange_alarms_named", lambda c: int(c.extra["strange_held"]))
        each = [_pooled(own, name, lambda c: c.samples) for name in ("exactly", "only_guilty", "honest", "nobody")]
        rows.append([method, kind, rate, str(len(own)), measured, named, strange, str(samples_of(own)), *each])
    columns = (
        "method", "threshold from answers of", "false alarms asked for, %", "federations",
        "measured on other such answers, %", "somebody named, %", "somebody named for another domain's, %",
        "triggered answers", "exactly the poisoned named, %", "only poisoned named, %", "an honest one named, %",
        "nobody named, %",
    )  # fmt: skip
    return table(columns, rows)


def _pooled(cells: Sequence[Cell], name: str, weight: Callable[[Cell], int]) -> str:
    """A share over all answers of the cells, in per cent."""
    count = sum(weight(cell) for cell in cells)
    return f"{100 * sum(cell.extra[name] * weight(cell) for cell in cells) / count:.2f}"


def _calibration(cells: Sequence[Cell]) -> str:
    rows = []
    for (method,), own in groups(cells, lambda c: (c.method,)).items():
        share = [mean((100 * cell.extra[name] for cell in own), 1) for name in ("accuracy", "stated")]
        errors = [
            mean((cell.extra[name] for cell in own), 3)
            for name in ("calibration_error", "brier", "calibration_error_strange")
        ]
        answers = str(sum(int(cell.extra["held"]) for cell in own))
        rows.append([method, str(len(own)), answers, *share, *errors, middle((c.seconds for c in own), 3)])
    columns = (
        "method", "models", "answers not fitted on", "top-1 %", "stated %", "calibration error", "Brier score",
        "calibration error on a domain not fitted on", "seconds an answer",
    )  # fmt: skip
    return table(columns, rows)
