"""The folder of a run: what was asked for, every finished unit, and the results put together from them.

    <out>/<experiment>/
        run.json             settings, seed, versions and machine, of when the run began
        units/<key>.json     one file per finished unit: its cells, and its samples' scores
        results.json         all cells; see cells.py
        *.png                plots

A unit appears whole or not at all and is never computed again: a run that was killed goes on where it stood.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protoken.errors import ArgumentError, TraceFormatError
from protoken.evaluation.cells import SCHEMA, Cell
from protoken.machine import machine
from protoken.versions import versions

if TYPE_CHECKING:
    from protoken.evaluation.workbench import Workbench

_KEY = re.compile(r"[A-Za-z0-9._-]{1,120}")


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    models, domains   names of zoo.MODELS and corpora.DOMAINS
    corpus            None for our own generator, a JSONL file or folder, or "hub:<dataset>"
    seed              of corpora, partitions, pretraining and clients' batches
    samples           prompts a cell
    quick             one small configuration, for trying things out
    """

    models: tuple[str, ...]
    domains: tuple[str, ...]
    corpus: str | None = None
    seed: int = 0
    samples: int = 100
    quick: bool = False

    def fixed(self) -> dict[str, Any]:
        """What all units of one run share; models and domains may be added to a run later."""
        corpus = None if self.corpus is None else Path(self.corpus).name
        return {"corpus": corpus, "seed": self.seed, "samples": self.samples, "quick": self.quick}


@dataclass(frozen=True)
class Outcome:
    """What a unit found: its cells, and, for plots and for whoever wants to look closer, its samples."""

    cells: Sequence[Cell] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    note: str = ""


@dataclass(frozen=True)
class Unit:
    """The smallest piece of work that is kept: `key` names its file and nothing else may have that name."""

    key: str
    run: Callable[[Workbench], Outcome] = field(repr=False)

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise ArgumentError("key", expected="1 to 120 of letters, digits, dot, dash and underscore", got=self.key)


class RunFolder:
    """A run on disk.

    Raises:
        ArgumentError: the folder holds a run with other settings.
        TraceFormatError: a file of the run cannot be read.
    """

    def __init__(self, folder: Path, experiment: str, settings: Settings) -> None:
        self.folder, self.experiment, self.settings = folder, experiment, settings
        (folder / "units").mkdir(parents=True, exist_ok=True)
        record = folder / "run.json"
        if not record.exists():
            _write(record, {**self._header(), "machine": machine()})
        self._record = self._checked(_read(record))

    def has(self, unit: Unit) -> bool:
        """Whether the unit was finished, now or in an earlier run."""
        return self._file(unit.key).exists()

    def save(self, unit: Unit, outcome: Outcome) -> None:
        """Keep a finished unit; it appears whole or not at all."""
        record = {
            "schema": SCHEMA,
            "unit": unit.key,
            "note": outcome.note,
            "cells": [cell.to_dict() for cell in outcome.cells],
            "samples": list(outcome.samples),
        }
        _write(self._file(unit.key), record)

    def outcomes(self) -> list[tuple[str, Outcome]]:
        """Every finished unit by key, in the order of the keys."""
        return [(file.stem, self._outcome(file)) for file in sorted((self.folder / "units").glob("*.json"))]

    def cells(self) -> list[Cell]:
        """Every finished unit's cells."""
        return [cell for _, outcome in self.outcomes() for cell in outcome.cells]

    def write_results(self) -> Path:
        """results.json from what is there so far."""
        found = self.folder / "results.json"
        notes = {key: outcome.note for key, outcome in self.outcomes() if outcome.note}
        cells = [cell.to_dict() for cell in self.cells()]
        _write(found, {**self._record, "notes": notes, "cells": cells})
        return found

    def _header(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "experiment": self.experiment,
            "settings": self.settings.fixed(),
            "versions": versions(),
        }

    def _checked(self, record: Any) -> dict[str, Any]:
        stored = record.get("settings") if isinstance(record, dict) else None
        if stored is None or stored != self.settings.fixed() or record.get("experiment") != self.experiment:
            raise ArgumentError(
                "out",
                expected=f"a new folder, or one with a run of {self.experiment} with {self.settings.fixed()}",
                got=f"{self.folder} with {stored}",
                remedy="Choose another --out, or ask for the same settings to go on with that run",
            )
        return dict(record)

    def _file(self, key: str) -> Path:
        return self.folder / "units" / f"{key}.json"

    def _outcome(self, file: Path) -> Outcome:
        record = _read(file)
        cells = record.get("cells") if isinstance(record, dict) else None
        if not isinstance(cells, list) or not isinstance(record.get("samples"), list):
            raise TraceFormatError(
                str(file), expected="a unit with cells and samples", got="something else", remedy=f"Remove {file}"
            )
        read = [Cell.from_dict(cell, f"{file.name}, cell {n}") for n, cell in enumerate(cells)]
        return Outcome(read, record["samples"], str(record.get("note", "")))


def read_results(file: Path) -> tuple[dict[str, Any], list[Cell]]:
    """A results.json: its header, and its cells.

    Raises:
        TraceFormatError: it is not one.
    """
    record = _read(file)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or not isinstance(record.get("cells"), list):
        raise TraceFormatError(str(file), expected=f"results of schema {SCHEMA}", got="something else")
    cells = [Cell.from_dict(cell, f"{file.name}, cell {n}") for n, cell in enumerate(record["cells"])]
    return {name: value for name, value in record.items() if name != "cells"}, cells


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceFormatError(
            str(file), expected="a JSON file of a run", got=str(error), remedy=f"Remove {file} to compute it again"
        ) from error


def _write(file: Path, record: Mapping[str, Any]) -> None:
    """Whole or not at all; a list has an item a line, so that files of many cells stay small and can be compared."""
    fields = [f"{json.dumps(name)}: {_lines(value)}" for name, value in record.items()]
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")
    os.replace(aside, file)


def _lines(value: Any) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value) + "\n]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
