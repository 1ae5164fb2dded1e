"""Ablation and overhead: every variant is what it says, exact where it must be, and the experiments run and draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pocket_zoo import pocket_bench

from protoken.evaluation.cells import Cell
from protoken.evaluation.corpora import DOMAINS
from protoken.evaluation.experiments import ablation, backdoor, benign, overhead
from protoken.evaluation.experiments.ablation_variants import GRADIENT, variants
from protoken.evaluation.runs import Outcome, RunFolder, Unit
from protoken.evaluation.workbench import Workbench
from protoken.models.architectures import architecture_of

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 4


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with pocket_bench(tmp_path_factory.mktemp("cache"), SAMPLES) as found:
        yield found


@pytest.fixture(scope="module")
def ordinary(bench: Workbench) -> Outcome:
    return next(unit for unit in ablation.plan(bench.settings) if unit.key == "quick-ordinary").run(bench)


def test_units_have_a_key_each(bench: Workbench) -> None:
    assert [unit.key for unit in ablation.plan(bench.settings)] == ["quick-finance-triggered", "quick-ordinary"]
    assert [unit.key for unit in overhead.plan(bench.settings)] == ["quick-finance"]


def test_every_block_stands_by_itself_with_every_gradient_and_without(bench: Workbench) -> None:
    architecture = architecture_of(bench.base("quick").model)
    found = variants(architecture, [0, 1, 2], clients=4, rounds="all", few=2)
    alone = [variant for variant in found if variant.study == "block"]
    assert [variant.block for variant in alone] == [0] * 4 + [1] * 4 + [2] * 4
    assert [variant.gradient for variant in alone] == [True, True, True, False] * 3
    assert [variant.scorer.objective for variant in alone] == ["log_prob", "log_odds", "logit", None] * 3
    for variant in alone:
        names = architecture.traced_layers(variant.scorer.blocks or 0, variant.scorer.layers)
        assert {architecture.block_of(name) for name in names} == {variant.block}
        assert len(names) == 2


def test_costs_are_counted_in_forward_passes(bench: Workbench) -> None:
    architecture = architecture_of(bench.base("quick").model)
    passes = {v.scorer.name: v.passes for v in variants(architecture, [0, 1, 2], clients=6, rounds="last", few=2)}
    assert passes["path, m = 4"] == 4 * GRADIENT
    assert passes["paired, 0 pairs"] == 14
    assert passes["paired, 6 pairs"] == 26
    assert passes["leave_one_out"] == 8
    assert passes["shapley"] == 64


def test_blocks_by_themselves_add_up_to_all_of_them(ordinary: Outcome) -> None:
    """First order is a sum over layers."""
    scores: dict[str, list[np.ndarray]] = {}
    for record in ordinary.samples:
        scores.setdefault(str(record["method"]), []).append(np.array(record["scores"]))
    for suffix, weighting in (("", "log-probability"), (", log-odds", "log-odds")):
        (together,) = scores[f"last 3 blocks{suffix}"]
        alone = np.stack(scores[f"block, {weighting}"])
        np.testing.assert_allclose(alone.sum(0), together, atol=2e-3 * np.abs(alone).max())


def test_each_objective_is_compared_with_its_own_exact_values(ordinary: Outcome) -> None:
    scores = {str(record["method"]): np.array(record["scores"]) for record in ordinary.samples}
    cells = {cell.method: cell for cell in ordinary.cells}
    assert np.abs(scores["shapley"] - scores["shapley, log-odds"]).max() > 0
    for suffix in ("", ", log-odds"):
        exact, path = scores[f"shapley{suffix}"], scores[f"path, m = 8{suffix}"]
        each = [np.corrcoef(a, b)[0, 1] for a, b in zip(path, exact, strict=True)]
        # Kept scores are rounded to four digits.
        assert cells[f"path, m = 8{suffix}"].extra["pearson_shapley_each"] == pytest.approx(each, abs=1e-3)
        assert cells[f"shapley{suffix}"].pearson_shapley == pytest.approx(1)


def test_cells_of_ordinary_answers(ordinary: Outcome) -> None:
    cells = {(cell.method, cell.extra["block"]): cell for cell in ordinary.cells}
    assert len(cells) == len(ordinary.cells)
    exact = cells["shapley", None]
    assert exact.pearson_shapley == pytest.approx(1)
    assert exact.samples == SAMPLES
    assert exact.chance == pytest.approx(1 / len(DOMAINS))
    for cell in ordinary.cells:
        assert (cell.extra["answers"], cell.round, cell.model) == ("ordinary", benign.ROUNDS, "quick")
        assert cell.pearson_shapley is not None
    residuals = [cells[f"path, m = {m}", None].residual for m in (1, 8)]
    assert residuals[1] < residuals[0]  # type: ignore[operator]
    # Four clients: six coalitions of two are three pairs, fewer than the four asked for, so all are taken.
    paired = cells["paired, 4 pairs", None]
    assert paired.pearson_shapley == pytest.approx(1, abs=1e-6)


def test_overhead_times_every_way_beside_generation(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of this size says nothing readable: every answer is taken for a refusal, to have answers to time."""
    monkeypatch.setattr(overhead, "is_refusal", lambda text: True)
    monkeypatch.setattr(overhead, "SLOW", 2)
    (unit,) = overhead.plan(bench.settings)
    outcome = unit.run(bench)
    ways = {(cell.method, cell.blocks) for cell in outcome.cells}
    assert ways >= {("local", 1), ("reverse", 1), ("reverse", 3), ("forward", 2), ("forward", 3), ("paper", 3)}
    assert ("local", 2) not in ways
    for cell in outcome.cells:
        assert cell.seconds is not None
        assert cell.extra["generate_seconds"] > 0
        assert cell.extra["ratio"] == pytest.approx(cell.seconds / cell.extra["generate_seconds"])
        assert cell.extra["ratio_low"] <= cell.extra["ratio"] <= cell.extra["ratio_high"]
    same = {cell.method: cell for cell in outcome.cells if cell.blocks == 3}
    assert same["forward"].top1 == same["reverse"].top1


def test_drawing(ordinary: Outcome, bench: Workbench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = RunFolder(tmp_path / "ablation", "ablation", bench.settings)
    run.save(Unit("quick-ordinary", lambda _: ordinary), ordinary)
    for plot in ablation.draw(run):
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_poisoned_clients_are_the_ground_truth_of_triggered_answers(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "is_refusal", lambda text: True)
    ground = ablation._triggered(bench, "quick", "finance")
    assert ground.ids == [client.id for client in backdoor.clients(bench, "quick", "finance")]
    assert ground.truth[0] == [True, True, False, False, False, False]
    assert len(ground.answers) == SAMPLES


def test_tables_stand_beside_the_published_figures(ordinary: Outcome) -> None:
    text = ablation.tables(list(ordinary.cells))
    assert "Ordinary answers, each block by itself" in text
    assert "Ordinary answers, log-odds, against its exact Shapley values" in text
    assert "published" not in text
    triggered = [replace(c, extra={**c.extra, "answers": "triggered"}) for c in ordinary.cells]
    assert "| published, without (arXiv 2601.19672) | 35.71 |" in ablation.tables(triggered)
    assert f"| shapley | 16 | {exact_seconds(ordinary):.3f} | {SAMPLES} |" in text


def exact_seconds(outcome: Outcome) -> float:
    return next(cell.seconds or 0.0 for cell in outcome.cells if cell.method == "shapley")


def test_the_overhead_table_pools_models() -> None:
    extra = {"ratio": 0.05, "generate_seconds": 0.4}
    cells = [
        Cell("overhead", model, "finance", "local", 1, 10, 10, top1=1.0, seconds=0.02, extra=extra)
        for model in ("llama", "gemma3")
    ]
    assert "| local | 1 | 0.020 s | 0.400 s | 5.0 % | 20 | 100.00 (" in overhead.tables(cells)
