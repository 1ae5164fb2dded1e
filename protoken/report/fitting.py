"""A table for terminals of any width: figures stand whole or not at all.

A terminal that is too narrow gets fewer columns, and is told which ones it has no room for. Names may be broken, and so
may headings.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

PIECE, HEAD = 12, 8
"""Names, and words of a heading, are not broken into shorter pieces."""


@dataclass(frozen=True, eq=False)
class Column:
    """Cells below a heading. ``breaks``: they are names; ``drop``: the highest are left out first, 0 never."""

    heading: str
    cells: Sequence[Text]
    breaks: bool = False
    drop: int = 0
    right: bool = False
    style: str | Style = ""
    heading_style: str | Style = "dim"

    @property
    def content(self) -> int:
        """Width of the cells, at least."""
        longest = max((cell.cell_len for cell in self.cells), default=0)
        return min(longest, PIECE) if self.breaks else longest

    def broken(self) -> str:
        """The heading in lines as long as the cells, if they can be."""
        word = max(map(cell_len, self.heading.split()), default=1)
        return "\n".join(textwrap.wrap(self.heading, max(self.content, min(word, HEAD))))


@dataclass(frozen=True)
class Fitted:
    """The table of those columns that there is room for, and which ones there is none for."""

    columns: Sequence[Column]
    title: Text | None = None
    gap: int = 2

    def fits(self, width: int) -> bool:
        """Whether there is room for every column."""
        return self._needed(self.columns, [column.broken() for column in self.columns]) <= width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        kept = list(self.columns)
        while not replace(self, columns=kept).fits(options.max_width):
            last = max(kept, key=lambda column: column.drop)
            if not last.drop:
                break
            kept.remove(last)
        headings = [column.heading for column in kept]
        if self._needed(kept, headings) > options.max_width:
            headings = [column.broken() for column in kept]
        table = Table(title=self.title, title_justify="left", box=None, padding=(0, self.gap, 0, 0), pad_edge=False)
        for heading, column in zip(headings, kept, strict=True):
            table.add_column(
                Text(heading),
                justify="right" if column.right else "left",
                style=column.style,
                header_style=column.heading_style,
                overflow="fold" if column.breaks else "ellipsis",
                no_wrap=not column.breaks,
            )
        for row in zip(*(column.cells for column in kept), strict=True):
            table.add_row(*row)
        yield table
        missing = ", ".join(column.heading for column in self.columns if column not in kept and column.heading)
        if missing:
            yield Text(f"no room for {missing}", style="dim")

    def _needed(self, columns: Sequence[Column], headings: Sequence[str]) -> int:
        """The least width at which no figure is cut."""
        pairs = zip(columns, headings, strict=True)
        widths = [max([column.content, *map(cell_len, heading.split("\n"))]) for column, heading in pairs]
        return sum(widths) + self.gap * (len(columns) - 1)
