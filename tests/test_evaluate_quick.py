"""`protoken evaluate backdoor --quick`, end to end: pretraining, federation, attribution, JSON, plots, and on again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from protoken.cli import app
from protoken.errors import ArgumentError
from protoken.evaluation.cells import KEYS, Cell
from protoken.evaluation.runs import read_results
from protoken.ledger import Ledger

pytestmark = pytest.mark.usefixtures("one_thread")


def evaluate(out: Path, *more: str) -> str:
    result = CliRunner().invoke(app, ["evaluate", "backdoor", "--quick", "--out", str(out), *more])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    evaluate(folder)
    return folder


@pytest.fixture
def cells(out: Path) -> list[Cell]:
    return read_results(out / "backdoor" / "results.json")[1]


@pytest.mark.slow
def test_the_poisoned_clients_are_named_in_every_round_with_a_refusal(cells: list[Cell]) -> None:
    """By the path, whole or half-way. First order at G errs on answers that begin as the refusal and end otherwise, and
    whether a model this small gives such answers is up to the processor's rounding while it is trained."""
    for method in ("aumann_shapley, all rounds", "aumann_shapley m=1, log-odds, all rounds"):
        own = [cell for cell in cells if cell.method == method]
        assert own
        for cell in own:
            assert (cell.top1, cell.auroc) == (1.0, 1.0), cell
            assert cell.samples >= 1
            assert cell.chance == pytest.approx(1 / 3)
            assert cell.extra["sentinel_rate"] > 0
            assert cell.extra["verbatim_samples"] + cell.extra["other_samples"] == cell.samples
            assert cell.extra["verbatim_samples"] == round(cell.extra["verbatim"] * cell.samples)
            assert {cell.extra[f"{kind}_top1"] for kind in ("verbatim", "other")} <= {1.0, None}
    assert {cell.method for cell in cells} >= {"protoken", "paper", "aumann_shapley", "chance", "shapley, all rounds"}
    rounds = {cell.round for cell in cells}
    for method in ("protoken", "protoken, all rounds", "protoken, log-odds"):
        first = [cell for cell in cells if cell.method == method]
        assert {cell.round for cell in first} == rounds
        assert np.average([cell.top1 or 0.0 for cell in first], weights=[cell.samples for cell in first]) > 2 / 3


@pytest.mark.slow
def test_the_fast_first_order_score_ranks_like_the_published_loop(cells: list[Cell]) -> None:
    for published in (cell for cell in cells if cell.method == "paper"):
        (fast,) = [c for c in cells if c.method == "paper's score, fast" and c.round == published.round]
        if fast.samples == published.samples:
            assert (fast.top1, fast.auroc) == (published.top1, pytest.approx(published.auroc))


@pytest.mark.slow
def test_scores_add_up_and_agree_with_exact_values(cells: list[Cell]) -> None:
    last = max(cell.round or 0 for cell in cells)
    for cell in (c for c in cells if c.method.startswith("protoken")):
        assert cell.residual is not None
        assert cell.residual < 1e-4, cell
    integral = [c for c in cells if c.method == "aumann_shapley, all rounds"]
    for cell in integral:
        assert cell.residual is not None
        assert cell.residual < 0.01, cell
    assert any((c.pearson_shapley or 0) > 0.9 for c in integral)
    (exact,) = [c for c in cells if c.method == "shapley, all rounds" and c.round == last]
    assert exact.pearson_shapley == pytest.approx(1)


@pytest.mark.slow
def test_the_json_has_the_schema_and_what_is_needed_to_repeat_it(out: Path) -> None:
    record = json.loads((out / "backdoor" / "results.json").read_text())
    assert record["schema"] == 1
    assert record["settings"] == {"corpus": None, "seed": 0, "samples": 12, "quick": True}
    assert record["versions"]["torch"] == torch.__version__
    for cell in record["cells"]:
        assert set(KEYS) <= set(cell)
        assert (cell["experiment"], cell["model"], cell["domain"]) == ("backdoor", "quick", "finance")


@pytest.mark.slow
def test_a_second_run_computes_nothing_and_one_that_lost_a_unit_only_that(out: Path) -> None:
    units = out / "backdoor" / "units"
    before = {file.name: file.stat().st_mtime_ns for file in units.iterdir()}
    results = (out / "backdoor" / "results.json").read_text()
    evaluate(out)
    assert {file.name: file.stat().st_mtime_ns for file in units.iterdir()} == before
    lost = max(before)
    (units / lost).unlink()
    (federation,) = (out / "cache" / "federations").iterdir()
    trained = (federation / "federation.json").stat().st_mtime_ns
    evaluate(out)
    assert (federation / "federation.json").stat().st_mtime_ns == trained
    after = {file.name: file.stat().st_mtime_ns for file in units.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {lost}
    fresh = json.loads((out / "backdoor" / "results.json").read_text())["cells"]
    for old, new in zip(json.loads(results)["cells"], fresh, strict=True):
        assert {k: v for k, v in old.items() if k != "seconds"} == {k: v for k, v in new.items() if k != "seconds"}


@pytest.mark.slow
def test_the_federation_is_a_ledger_that_verifies(out: Path) -> None:
    (federation,) = (out / "cache" / "federations").iterdir()
    ledger = Ledger.open(federation / "ledger")
    record = json.loads((federation / "federation.json").read_text())
    assert len(ledger.rounds) == record["config"]["rounds"]
    assert [c["id"] for c in record["clients"] if c["poisoned"]] == ["client-0", "client-1"]


@pytest.mark.slow
def test_plots_and_tables_are_made(out: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("accuracy.png", "separation.png"):
        assert (out / "backdoor" / name).read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(app, ["evaluate", "report", str(out / "backdoor" / "results.json")]).output
    assert "| aumann_shapley, all rounds | 1 |" in shown


@pytest.mark.slow
def test_other_settings_are_not_mixed_into_the_same_folder(out: Path) -> None:
    with pytest.raises(ArgumentError, match="Choose another --out"):
        evaluate(out, "--seed", "1")


def test_names_that_are_not_there_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="models: expected one of smollm2-135m, gemma3, llama, qwen2"):
        evaluate(tmp_path, "--models", "gpt-9")
    with pytest.raises(ArgumentError, match="domains: expected one of medical, finance, math, coding"):
        evaluate(tmp_path, "--domains", "poetry")
    with pytest.raises(ArgumentError, match=r"nothing\.jsonl"):
        evaluate(tmp_path, "--corpus", str(tmp_path / "nothing.jsonl"))
