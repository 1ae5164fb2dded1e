"""Tables in terminals of every width: figures whole or not at all, and what is missing named."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from results_cases import make
from rich.console import Console, RenderableType
from rich.text import Text

from protoken.history import History
from protoken.report.fitting import Column, Fitted
from protoken.report.history import history_view

NUMBER = re.compile(r"[+-]?\d[\d.,e+-]*\S*")
WIDTHS = (*range(30, 121, 4), 79, 80)


def printed(what: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return str(text)


def lines_of_clients(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r" *\d+ ■  ", line)]


def ranked(width: int, clients: int = 12, top: int | None = 10) -> str:
    file = io.StringIO()
    make(clients=clients).show(Console(file=file, width=width, color_system=None), top=top)
    return file.getvalue()


@pytest.mark.parametrize("top", [10, 3, 0, None])
def test_the_ranking_is_whole_at_every_width(top: int | None) -> None:
    wide = {word for line in lines_of_clients(ranked(200, top=top)) for word in NUMBER.findall(line)}
    for width in WIDTHS:
        text = ranked(width, top=top)
        lines = lines_of_clients(text)
        assert len(lines) == (12 if top is None else top)
        assert {word for line in lines for word in NUMBER.findall(line)} <= wide
        assert any(line.rstrip().endswith(" weight") for line in text.splitlines()) or "no room for" in text
        if width >= 80:
            assert "━" in "".join(lines) or top == 0


def test_shares_go_last_and_never_without_a_word() -> None:
    assert all("%" in line for line in lines_of_clients(ranked(33)))
    narrow = ranked(24)
    assert "no room for share, mean weight" in " ".join(narrow.split())
    assert all("…" not in line for line in lines_of_clients(narrow))


def history(clients: int) -> History:
    random = np.random.default_rng(0)
    names = tuple(f"a-clinic-with-a-long-name-{k}" for k in range(clients))
    return History(
        rounds=(1, 2, 3, 4),
        client_ids=names,
        tokens=("a", "b"),
        values=random.normal(size=(5, 2)) * 30,
        scores=random.normal(size=(4, clients)) * 3,
        residuals=random.normal(size=4) * 0.1,
        objective="log_odds",
        nodes=1,
    )


@pytest.mark.parametrize("clients", [1, 2, 9, 40])
def test_a_history_is_whole_at_every_width(clients: int) -> None:
    found = history(clients)
    known = {str(number) for number in found.rounds}
    for shown in range(1, 9):
        view = history_view(found, shown)
        known |= {view.before, *(text for row in view.rows for text in (row[1], row[2]))}
        known |= {text for column in view.columns for text in (column.total, *(cell for cell, _ in column.cells))}
    for width in (*WIDTHS, 200):
        lines = [line for line in printed(found, width).splitlines() if re.match(r" *([1-4]|before|sum) ", line)]
        assert len(lines) == 6
        assert {word for line in lines for word in line.split()} - {"before", "sum"} <= known


def test_names_give_way_to_figures_and_a_figure_that_is_cut_shows_it() -> None:
    table = Fitted([Column("number", [Text("1234567890")]), Column("name", [Text("x" * 40)], breaks=True)])
    text = printed(table, 16)
    assert text.count("x") == 40
    assert "1234567890" in text
    assert "1234…" in printed(table, 7)
