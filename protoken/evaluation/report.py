"""Cells as tables: on the terminal after a run, and as Markdown for docs/results. Nothing is typed by hand.

An experiment's module may bring `tables(cells) -> str`; the others get one line per model, domain and method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from protoken.errors import ArgumentError
from protoken.evaluation.cells import Cell
from protoken.evaluation.metrics import wilson_interval
from protoken.evaluation.runs import read_results

PUBLISHED = "arXiv 2601.19672"
_FOLDED = 30  # rows
_COLUMNS = ("model", "domain", "method", "cells", "samples", "top-1 %", "lowest %", "chance %", "AUROC", "seconds")


def show_cells(console: Console, cells: Sequence[Cell]) -> None:
    """A run's cells, summed up over rounds: one line per model, domain and method."""
    shown = Table(*_COLUMNS, box=None, header_style="dim")
    for row in overview(cells):
        shown.add_row(*row)
    console.print(shown)


def overview(cells: Iterable[Cell]) -> list[list[str]]:
    """One row of `_COLUMNS` per model, domain and method, over all its cells with samples."""
    return [[*key, *_summary(group)] for key, group in groups(cells, lambda c: (c.model, c.domain, c.method)).items()]


def groups(cells: Iterable[Cell], key: Callable[[Cell], tuple[str, ...]]) -> dict[tuple[str, ...], list[Cell]]:
    """Cells with samples and a top-1 by key, in the order in which the keys first come."""
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if cell.samples and cell.top1 is not None:
            found.setdefault(key(cell), []).append(cell)
    return found


def samples_of(group: Sequence[Cell]) -> int:
    """Samples of all cells together."""
    return sum(cell.samples for cell in group)


def top1_of(group: Sequence[Cell]) -> str:
    """Top-1 over all samples of the cells in per cent, with its Wilson interval."""
    count = samples_of(group)
    hits = min(sum((cell.top1 or 0.0) * cell.samples for cell in group), count)
    low, high = wilson_interval(hits, count)
    return f"{100 * hits / count:.2f} ({100 * low:.1f} to {100 * high:.1f})"


def lowest(values: Iterable[float | None], digits: int = 4) -> str:
    """The lowest of what was measured."""
    known = [value for value in values if value is not None]
    return f"{min(known):.{digits}f}" if known else ""


def mean(values: Iterable[float | None], digits: int = 4) -> str:
    """The mean of what was measured."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.{digits}f}" if known else ""


def middle(values: Iterable[float | None], digits: int = 3) -> str:
    """The median of what was measured: seconds of a shared machine have outliers."""
    known = [value for value in values if value is not None]
    return f"{median(known):.{digits}f}" if known else ""


def per_cent(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return "" if value is None else f"{100 * value:.{digits}f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a long one is folded away, so that the page can be read past it."""
    body = ["| " + " | ".join(row) + " |" for row in rows]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]
    if len(body) > _FOLDED:
        lines = [f"<details><summary>{len(body)} rows</summary>", "", *lines, "", "</details>"]
    return "\n".join(lines) + "\n"


def sections(files: Sequence[Path]) -> dict[str, str]:
    """Tables of runs, with what is needed to know what was run, by the file's name; results.json by its experiment."""
    from protoken.evaluation.harness import experiment_of

    found = {}
    for file in files:
        header, cells = read_results(file)
        name = str(header["experiment"])
        own = getattr(experiment_of(name), "tables", None)
        shown = own(cells) if own is not None else table(_COLUMNS, overview(cells))
        found[name if file.stem == "results" else file.stem] = f"{_heading(header, cells)}\n{shown}"
    return found


def write_into(into: Path, found: Mapping[str, str]) -> None:
    """Put each section between `<!-- report: <name> -->` and `<!-- end -->` of a Markdown file, or of the one file in a
    folder that has its marks. Nothing is written unless every section has a place.

    Raises:
        ArgumentError: a section has no such place.
    """
    files = sorted(into.glob("*.md")) if into.is_dir() else [into]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    for name, section in found.items():
        for file, text in texts.items():
            before, mark, rest = text.partition(f"<!-- report: {name} -->\n")
            _, end, after = rest.partition("<!-- end -->")
            if mark and end:
                texts[file] = f"{before}{mark}{section}{end}{after}"
                break
        else:
            raise ArgumentError("into", expected=f"<!-- report: {name} --> and <!-- end -->", got=into)
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")


def _heading(header: dict[str, Any], cells: Sequence[Cell]) -> str:
    settings, machine, versions = header["settings"], header["machine"], header["versions"]
    corpus = settings["corpus"] or "our own generator"
    return (
        f"{len(cells)} cells; corpus: {corpus}; seed {settings['seed']}; {machine['processor']}, "
        f"{machine['threads']} of {machine['cores']} cores; torch {versions['torch']}, "
        f"transformers {versions['transformers']}.\n"
    )


def _summary(group: Sequence[Cell]) -> list[str]:
    return [
        str(len(group)),
        str(samples_of(group)),
        top1_of(group),
        per_cent(min(cell.top1 or 0.0 for cell in group)),
        mean((100 * (cell.chance or 0.0) for cell in group), 1),
        lowest(cell.auroc for cell in group),
        middle(cell.seconds for cell in group),
    ]
