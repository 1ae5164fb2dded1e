"""Cells as tables: on the terminal after a run, and as Markdown for docs/results.md. Nothing is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from protoken.evaluation.cells import Cell
from protoken.evaluation.metrics import wilson_interval
from protoken.evaluation.runs import read_results


def show_cells(console: Console, cells: Sequence[Cell]) -> None:
    """A run's cells, summed up over rounds: one line per model, domain and method."""
    table = Table(*_COLUMNS, box=None, header_style="dim")
    for row in summary_rows(cells, lambda c: (c.model, c.domain, c.method)):
        table.add_row(*row)
    console.print(table)


_COLUMNS = ("model", "domain", "method", "cells", "samples", "top-1 %", "lowest %", "chance %", "AUROC", "seconds")


def summary_rows(cells: Iterable[Cell], key: Callable[[Cell], tuple[str, ...]]) -> list[list[str]]:
    """One row per key over all its cells with samples.

    Columns after the key: cells, samples, top-1 over all samples with its Wilson interval, top-1 of the worst cell,
    chance, the lowest AUROC of a cell, median seconds' mean.
    """
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if cell.samples and cell.top1 is not None:
            groups.setdefault(key(cell), []).append(cell)
    return [[*name, *_summary(group)] for name, group in groups.items()]


def _summary(group: Sequence[Cell]) -> list[str]:
    samples = sum(cell.samples for cell in group)
    hits = sum((cell.top1 or 0.0) * cell.samples for cell in group)
    low, high = wilson_interval(min(hits, samples), samples)
    aurocs = [cell.auroc for cell in group if cell.auroc is not None]
    seconds = [cell.seconds for cell in group if cell.seconds is not None]
    return [
        str(len(group)),
        str(samples),
        f"{100 * hits / samples:.2f} ({100 * low:.1f} to {100 * high:.1f})",
        f"{100 * min(cell.top1 or 0.0 for cell in group):.1f}",
        f"{100 * fmean(cell.chance or 0.0 for cell in group):.1f}",
        f"{min(aurocs):.4f}" if aurocs else "",
        f"{fmean(seconds):.3f}" if seconds else "",
    ]


def markdown(files: Sequence[Path]) -> str:
    """Tables of runs, one section a file."""
    parts = []
    for file in files:
        header, cells = read_results(file)
        parts.append(f"### {header['experiment']}\n")
        parts.append(table(_COLUMNS, summary_rows(cells, lambda c: (c.model, c.domain, c.method))))
    return "\n".join(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
