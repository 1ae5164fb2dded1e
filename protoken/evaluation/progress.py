"""Progress bars of a run, and a line per finished unit where there is no terminal to draw bars on."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


class Bars:
    """Two bars: units of the run, and steps of what is being done right now. Silent outside its `with`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._units = self._bars.add_task("units", total=None, note="")
        self._steps = self._bars.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def unit(self, key: str, done: int, total: int) -> None:
        """The unit that is being worked on."""
        self._bars.update(self._units, description=escape(key), completed=done, total=total)

    def step(self, text: str, done: int, total: int, note: str = "") -> None:
        """Where the present piece of work stands."""
        self._bars.update(
            self._steps, description=escape(text), completed=done, total=total, note=escape(note), visible=True
        )

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(Text(line, "dim"), soft_wrap=True)
