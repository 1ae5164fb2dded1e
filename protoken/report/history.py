"""A history, drawn: when the answer was learnt and from whom, as a table in the terminal and as a page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.text import Text

from protoken.report.fitting import Column as Cells
from protoken.report.fitting import Fitted
from protoken.report.page import rendered, style
from protoken.report.palette import COLOURS, GREY, colour_slots
from protoken.report.sections import OBJECTIVES, slot_name
from protoken.report.view import gaps_note, number_format, percent
from protoken.report.visible import name, pieces, visible

if TYPE_CHECKING:
    from protoken.history import History

SHOWN = 8
"""Clients with a column of their own; the others share one."""


@dataclass(frozen=True)
class Column:
    """Contributions of one client, or of all the others together: text and tint (0 to 1) per round, and the total."""

    client: str
    slot: int | None
    total: str
    cells: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class HistoryView:
    """What there is to show. Per round: its number, f after it, its change with a bar (left, width) in percent."""

    before: str
    rows: tuple[tuple[int, str, str, tuple[float, float], bool, str], ...]
    columns: tuple[Column, ...]
    zero: float
    lede: str


def history_view(found: History, shown: int = SHOWN) -> HistoryView:
    """Texts, bars and tints of a history, with so many clients on their own; names are already harmless."""
    order = [found.client_ids.index(client) for client, _ in found.ranking]
    slots = colour_slots(found.client_ids, [client for client, _ in found.ranking])
    own, rest = (order, []) if len(order) <= shown + 1 else (order[:shown], order[shown:])
    number = number_format(found.scores.reshape(-1))
    most = max(float(found.scores.max()), 0.0) or 1.0

    def column(label: str, slot: int | None, scores: Any) -> Column:
        cells = tuple((number(score), float(np.clip(score / most, 0.0, 1.0))) for score in scores)
        return Column(label, slot, number(float(scores.sum())), cells)

    columns = [column(name(found.client_ids[k]), slots[found.client_ids[k]], found.scores[:, k]) for k in own]
    if rest:
        columns.append(column(f"{len(rest)} others", None, found.scores[:, rest].sum(axis=1)))
    values, changes = found.values.sum(axis=1), found.changes
    low, high = min(0.0, float(changes.min())), max(0.0, float(changes.max()))
    width = (high - low) or 1.0
    value, change = number_format(values), number_format(changes)
    bars = [((min(0.0, c) - low) / width * 100, abs(c) / width * 100) for c in changes.tolist()]
    rows = tuple(
        (r, value(v), change(c), (round(left, 2), round(size, 2)), c < 0, f"{residual:+.2g}")
        for r, v, c, (left, size), residual in zip(
            found.rounds, values[1:].tolist(), changes.tolist(), bars, found.residuals.tolist(), strict=True
        )
    )
    return HistoryView(value(float(values[0])), rows, tuple(columns), round(-low / width * 100, 2), finding(found))


@dataclass(frozen=True)
class HistoryTable:
    """For rich: one line per round, the clients in the order of their totals, as many as there is room for."""

    found: History

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for shown in range(SHOWN, 0, -1):
            view = history_view(self.found, shown)
            table = _table(view)
            if table.fits(options.max_width):
                break
        yield Text(view.lede)
        if self.found.gaps:
            yield Text(gaps_note(self.found.gaps))
        yield Text()
        yield table
        about = f"{OBJECTIVES[self.found.objective]} of the whole answer under that round's model, in {self.found.unit}"
        yield Text(f"After: {about}. {_accounting(self.found)}", "dim")


def _table(view: HistoryView) -> Fitted:
    before, total = Style(dim=True), Style(bold=True)
    afters = [Text(view.before, before), *(Text(row[1]) for row in view.rows), Text()]
    rounds = [Text("before", before), *(Text(str(row[0])) for row in view.rows), Text("sum", total)]
    columns = [
        Cells("round", rounds, right=True),
        Cells("after", afters, right=True),
        Cells("change", [Text(), *(Text(row[2]) for row in view.rows), Text()], right=True, drop=1),
    ]
    for column in view.columns:
        style = Style(color=_colour(column.slot))
        cells = [Text(text, style + Style(bold=tint >= 0.5) if tint >= 0.1 else before) for text, tint in column.cells]
        cells = [Text(), *cells, Text(column.total, total)]
        columns.append(Cells(column.client, cells, right=True, heading_style=style))
    return Fitted(columns, gap=1)


def history_html(found: History, path: str | os.PathLike[str] | None = None) -> str:
    """The page as a str, also written to ``path`` if given. It requests nothing and runs no script."""
    view = history_view(found)
    context = {
        "title": "protoken history: " + " ".join(name(found.response.strip())[:60].split()),
        "style": style(),
        "lede": view.lede,
        "gaps": gaps_note(found.gaps),
        "prompt": list(pieces(found.prompt.strip("\n"))),
        "answer": list(pieces(found.response.strip("\n"))),
        "objective": OBJECTIVES[found.objective],
        "unit": found.unit,
        "before": view.before,
        "rows": view.rows,
        "columns": [(c.client, slot_name(c.slot), c.total, c.cells) for c in view.columns],
        "zero": view.zero,
        "accounting": _accounting(found),
        "nodes": "its midpoint" if found.nodes == 1 else f"{found.nodes} points of it",
        "facts": [(label, visible(text)) for label, text in (("Model", found.model), ("Ledger", found.ledger)) if text],
    }
    return rendered("history.html.jinja", context, path)


def finding(found: History) -> str:
    """The finding in a few sentences, true whether the answer became likelier as a whole or not."""
    changes = found.changes
    best = int(np.argmax(changes))
    number = number_format([*changes, *found.totals])
    (first, total), *others = found.ranking
    if changes[best] <= 0:
        return "No round made this answer likelier."
    text = f"Round {found.rounds[best]} did most for this answer: {number(float(changes[best]))} {found.unit}"
    text += f"; all rounds together changed it by {number(float(changes.sum()))}. " if len(found.rounds) > 1 else ". "
    if total <= 0:
        return text + "No client raised it as a whole."
    text += f"Of the clients, {name(first)} raised it most, by {number(total)}"
    if others and others[0][1] > 0:
        text += f", then {name(others[0][0])} by {number(others[0][1])}"
    return text + "."


def _accounting(found: History) -> str:
    """What the scores leave of the whole change."""
    whole, left = float(found.changes.sum()), float(found.residuals.sum())
    size = max(float(np.abs(found.totals).sum()), abs(whole), float(np.finfo(np.float64).tiny))
    return (
        f"Clients account for {number_format([whole])(whole - left)} of {number_format([whole])(whole)} {found.unit}; "
        f"what is left is {percent(min(abs(left) / size, 1.0))} of the scores' size. More nodes make it smaller."
    )


def _colour(slot: int | None) -> str:
    return GREY[1] if slot is None else COLOURS[slot][1]
