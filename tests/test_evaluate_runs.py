"""A run's folder: finished units are kept, nothing is computed twice, damaged or foreign files are named."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from protoken.errors import ArgumentError, TraceFormatError
from protoken.evaluation import harness
from protoken.evaluation.cells import Cell
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit, read_results

SETTINGS = Settings(models=("llama",), domains=("math",), samples=2)


def cell(number: int) -> Cell:
    return Cell("counting", "llama", "math", "protoken", None, number, samples=2, top1=0.5, extra={"n": number})


class Counting:
    """An experiment of five units that notes which of them run; one can be made to fail."""

    DEFAULTS = SETTINGS

    def __init__(self, fail_at: int | None = None) -> None:
        self.ran: list[int] = []
        self.fail_at = fail_at

    def plan(self, settings: Settings) -> list[Unit]:
        return [Unit(f"unit-{n}", partial(self.unit, n)) for n in range(5)]

    def unit(self, number: int, bench: object) -> Outcome:
        if number == self.fail_at:
            raise KeyboardInterrupt
        self.ran.append(number)
        return Outcome([cell(number)], [{"scores": [number]}], f"note {number}")

    def draw(self, run: RunFolder) -> list[Path]:
        return []


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    found = Counting()
    monkeypatch.setattr(harness, "experiment_of", lambda name: found)
    return found


def run(out: Path, settings: Settings = SETTINGS) -> list[Cell]:
    return harness.run_experiment("counting", settings, out, console=Console(quiet=True))


def test_a_run_that_was_interrupted_goes_on_where_it_stood(tmp_path: Path, counting: Counting) -> None:
    counting.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert counting.ran == [0, 1, 2]
    counting.fail_at = None
    cells = run(tmp_path)
    assert counting.ran == [0, 1, 2, 3, 4]
    assert cells == [cell(n) for n in range(5)]
    assert run(tmp_path) == cells
    assert counting.ran == [0, 1, 2, 3, 4]


def test_results_hold_settings_versions_notes_and_every_cell(tmp_path: Path, counting: Counting) -> None:
    run(tmp_path)
    header, cells = read_results(tmp_path / "counting" / "results.json")
    assert cells == [cell(n) for n in range(5)]
    assert header["experiment"] == "counting"
    assert header["settings"] == {"corpus": None, "seed": 0, "samples": 2, "quick": False}
    assert {"python", "torch", "transformers"} <= set(header["versions"])
    assert header["machine"]["cores"] >= 1
    assert header["notes"]["unit-2"] == "note 2"


def test_a_folder_with_other_settings_is_not_mixed_with_these(tmp_path: Path, counting: Counting) -> None:
    run(tmp_path)
    other = Settings(models=("llama",), domains=("math",), samples=3)
    with pytest.raises(ArgumentError, match="Choose another --out"):
        run(tmp_path, other)
    more = Settings(models=("llama", "qwen2"), domains=("math", "coding"), samples=2)
    assert len(run(tmp_path, more)) == 5


@pytest.mark.parametrize("text", ["", "[]", '{"cells": 1}', '{"cells": [{}], "samples": []}', "\xff"])
def test_a_damaged_unit_is_named_and_not_read(tmp_path: Path, counting: Counting, text: str) -> None:
    run(tmp_path)
    file = tmp_path / "counting" / "units" / "unit-3.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(TraceFormatError, match=r"unit-3\.json"):
        run(tmp_path)
    file.unlink()
    assert len(run(tmp_path)) == 5
    assert counting.ran.count(3) == 2


def test_a_unit_is_named_like_a_file_and_like_nothing_else() -> None:
    for key in ("", "a/b", "../up", "x" * 121, "ünit", "a b"):
        with pytest.raises(ArgumentError, match="key"):
            Unit(key, lambda bench: Outcome())


def test_unfinished_writing_leaves_no_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "r", "counting", SETTINGS)
    unit = Unit("one", lambda bench: Outcome())

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("protoken.evaluation.runs.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        folder.save(unit, Outcome([cell(1)]))
    assert not folder.has(unit)
    assert folder.cells() == []


def test_results_of_another_schema_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    for record in ({"schema": 99, "cells": []}, {"schema": 1}, []):
        file.write_text(json.dumps(record))
        with pytest.raises(TraceFormatError, match=r"results\.json"):
            read_results(file)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (Settings(models=("gpt5",), domains=("math",)), "models"),
        (Settings(models=("llama",), domains=("poetry",)), "domains"),
    ],
)
def test_unknown_models_and_domains_are_named_before_anything_is_done(
    tmp_path: Path, settings: Settings, named: str
) -> None:
    with pytest.raises(ArgumentError, match=named):
        harness.run_experiment("backdoor", settings, tmp_path, console=Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_unknown_experiments_are_named() -> None:
    with pytest.raises(ArgumentError, match="backdoor"):
        harness.experiment_of("frontdoor")


def test_every_experiment_offers_what_the_harness_needs() -> None:
    for name in harness.EXPERIMENTS:
        experiment = harness.experiment_of(name)
        for settings in (experiment.DEFAULTS, harness.quick_settings(name)):
            units = experiment.plan(settings)
            assert units
            assert len({unit.key for unit in units}) == len(units)
