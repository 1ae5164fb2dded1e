"""Tables come from the JSON: pooled figures, and a document whose marked places are filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protoken.errors import ArgumentError
from protoken.evaluation.cells import Cell
from protoken.evaluation.report import sections, table, write_into

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def cell(method: str, number: int, top1: float, samples: int, **extra: Any) -> Cell:
    return Cell(
        "backdoor", "llama", "math", method, None, number, samples, top1=top1, chance=1 / 3, auroc=top1, extra=extra
    )


def results(folder: Path, cells: list[Cell], experiment: str = "backdoor") -> Path:
    file = folder / f"{experiment}.json"
    record = {
        "schema": 1,
        "experiment": experiment,
        "settings": {"corpus": None, "seed": 0, "samples": 4, "quick": False},
        "versions": {"torch": "2", "transformers": "5"},
        "machine": {"processor": "CPU", "cores": 2, "threads": 1},
        "cells": [cell.to_dict() for cell in cells],
    }
    file.write_text(json.dumps(record))
    return file


def test_the_backdoor_table_pools_cells_beside_the_published_line(tmp_path: Path) -> None:
    cells = [
        cell("protoken", 2, 1.0, 30),
        cell("protoken", 3, 0.5, 10),
        cell("aumann_shapley", 3, 1.0, 4, pearson_shapley_each=[0.5, 0.9, None]),
        cell("paper", 3, 0.0, 0),
    ]
    text = sections([results(tmp_path, cells)])["backdoor"]
    assert "| published (arXiv 2601.19672) | 16 |  |  |  | 98.62 | 40 | 33.3 |" in text
    assert "| protoken | 1 | 2 | 40 | 0 | 75.00 | 50.0 | 33.3 | 0.7500 | 0.5000 | 1 of 2 |" in text
    assert "| llama | math | 2 | 3 | 87.5 of 40 (50; 0.500) |" in text
    assert "| aumann_shapley | 2 | 0.700 | 0.540 | 0.500 |" in text
    assert "| paper | 1 |" not in text


def test_answers_are_told_apart_one_by_one_or_where_a_cell_has_one_kind_alone(tmp_path: Path) -> None:
    cells = [
        cell(
            "protoken", 2, 0.6, 10, verbatim=0.8, verbatim_samples=8, verbatim_top1=0.75, other_samples=2, other_top1=0
        ),
        cell("protoken", 3, 0.5, 4, verbatim=1.0),
        cell("protoken", 4, 0.5, 100, verbatim=0.5),
        cell("protoken", 5, 1.0, 6, verbatim=0.0),
    ]
    text = sections([results(tmp_path, cells)])["backdoor"]
    assert "| protoken | 1 | 4 | 120 | 1 |" in text
    refusals, others = text.partition("another text with the sentinel in it:")[::2]
    assert "| protoken | 2 | 12 | 66.67 (39.1 to 86.2) | 50.0 |" in refusals
    assert "| protoken | 2 | 8 | 75.00 (40.9 to 92.9) | 0.0 |" in others


def test_the_worst_residual_is_shown_where_every_cell_tells_it(tmp_path: Path) -> None:
    each = {"pearson_shapley_each": [0.5]}
    cells = [
        cell("aumann_shapley", 2, 1.0, 1, residual_worst=0.02, **each),
        cell("aumann_shapley", 3, 1.0, 1, residual_worst=0.5, **each),
        cell("protoken", 2, 1.0, 1, residual_worst=0.02, **each),
        cell("protoken", 3, 1.0, 1, **each),
    ]
    text = sections([results(tmp_path, cells)])["backdoor"]
    assert "| aumann_shapley | 2 | 0.500 | 0.500 | 0.500 |  | 0.5000 |" in text
    assert "| protoken | 2 | 0.500 | 0.500 | 0.500 |  |  |" in text


def test_a_document_is_filled_between_its_marks_again_and_again(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- report: backdoor -->\nold\n<!-- end -->\nafter\n")
    found = sections([results(tmp_path, [cell("protoken", 2, 1.0, 3)])])
    for _ in range(2):
        write_into(document, found)
        text = document.read_text()
        assert text.startswith("before\n<!-- report: backdoor -->\n1 cells; corpus: our own generator; seed 0; CPU,")
        assert text.endswith("<!-- end -->\nafter\n")
        assert "old" not in text
        assert text.count("published (arXiv") == 1
    with pytest.raises(ArgumentError, match="report: scale"):
        write_into(document, {"scale": "x"})


def test_a_folder_of_documents_is_filled_where_the_mark_is_or_not_at_all(tmp_path: Path) -> None:
    for name in ("backdoor", "scale"):
        (tmp_path / f"{name}.md").write_text(f"<!-- report: {name} -->\nold\n<!-- end -->\n")
    with pytest.raises(ArgumentError, match="report: benign"):
        write_into(tmp_path, {"backdoor": "new\n", "benign": "new\n"})
    assert "old" in (tmp_path / "backdoor.md").read_text()
    write_into(tmp_path, {"backdoor": "new\n"})
    assert (tmp_path / "backdoor.md").read_text() == "<!-- report: backdoor -->\nnew\n<!-- end -->\n"
    assert (tmp_path / "scale.md").read_text() == "<!-- report: scale -->\nold\n<!-- end -->\n"


def test_the_published_tables_are_those_of_the_published_runs(tmp_path: Path) -> None:
    pages = {page.name: page.read_text(encoding="utf-8") for page in RESULTS.glob("*.md")}
    assert sum(text.count("<!-- report: ") for text in pages.values()) == len(list(RESULTS.glob("*.json"))) > 0
    for name, text in pages.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    write_into(tmp_path, sections(sorted(RESULTS.glob("*.json"))))
    assert {page.name: page.read_text(encoding="utf-8") for page in tmp_path.glob("*.md")} == pages


def test_tables_and_columns_of_what_was_not_run_are_left_out(tmp_path: Path) -> None:
    text = sections([results(tmp_path, [cell("protoken", 2, 1.0, 3)])])["backdoor"]
    assert "Correlation" not in text
    assert "| model | domain | first round | last | protoken |\n" in text


@pytest.mark.parametrize(("rows", "folded"), [(30, False), (31, True)])
def test_long_tables_are_folded_away(rows: int, folded: bool) -> None:
    text = table(("a", "b"), [[str(n), "x"] for n in range(rows)])
    assert text.count("\n| ") == rows + (1 if folded else 0)
    assert ("<details>" in text, "</details>" in text) == (folded, folded)
    if folded:
        # Markdown inside HTML needs its empty lines.
        assert f"<summary>{rows} rows</summary>\n\n| a | b |" in text
        assert text.endswith("|\n\n</details>\n")


def test_a_second_run_of_an_experiment_has_a_place_of_its_own(tmp_path: Path) -> None:
    first = results(tmp_path, [cell("protoken", 2, 1.0, 30)])
    second = first.with_name("backdoor-seed-1.json")
    second.write_text(first.read_text().replace('"seed": 0', '"seed": 1'))
    plain = first.with_name("results.json")
    plain.write_text(first.read_text())
    found = sections([first, second])
    assert list(found) == ["backdoor", "backdoor-seed-1"]
    assert "seed 1;" in found["backdoor-seed-1"]
    assert list(sections([plain])) == ["backdoor"]
