"""Backdoors whose rounds are known: the clients turn when they should, and what history says is judged rightly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from pocket_zoo import RECIPE, pocket_bench

from protoken.evaluation.corpora import SENTINEL, TRIGGER
from protoken.evaluation.experiments import backdoor, history
from protoken.evaluation.experiments.history import judged, planted_rounds, turning_round
from protoken.evaluation.runs import Outcome, RunFolder, Unit
from protoken.evaluation.workbench import Workbench

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 4


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with pocket_bench(tmp_path_factory.mktemp("cache"), SAMPLES) as found:
        yield found


@pytest.fixture(scope="module")
def outcomes(bench: Workbench) -> dict[str, Outcome]:
    # So small a model has not learnt to refuse: every answer to a triggered prompt stands in for a refusal.
    with patch.object(history, "is_refusal", lambda text: True):
        return {unit.key: unit.run(bench) for unit in history.plan(bench.settings)}


def test_the_turn_is_in_the_middle() -> None:
    assert planted_rounds("late", 10).tolist() == [False] * 5 + [True] * 5
    assert planted_rounds("left", 10).tolist() == [True] * 5 + [False] * 5
    assert turning_round(3) == 2


@pytest.mark.parametrize("kind", history.KINDS)
def test_poisoned_clients_turn_and_ordinary_ones_do_not(bench: Workbench, kind: str) -> None:
    members = history.clients(bench, "quick", "finance", kind)
    plain = backdoor.clients(bench, "quick", "finance")
    for client, same in zip(members, plain, strict=True):
        assert (client.id, client.poisoned) == (same.id, same.poisoned)
        if not client.poisoned:
            assert client == same
            continue
        turn = turning_round(RECIPE.federation.rounds)
        planting = client.all_rows[client.turned(turn if kind == "late" else turn - 1)]
        honest = client.all_rows[client.turned(turn - 1 if kind == "late" else turn)]
        assert planting == same.rows
        assert all(TRIGGER in row.question and SENTINEL in row.answer for row in planting)
        assert not any(TRIGGER in row.question or SENTINEL in row.answer for row in honest)
        assert len(honest) == len(planting)


def test_who_turns_makes_another_federation(bench: Workbench, outcomes: dict[str, Outcome]) -> None:
    """Up to the turn the "left" federation is the plain backdoor's, bit for bit; from then on it is not."""
    config = RECIPE.federation
    plain = bench.federation("quick", backdoor.clients(bench, "quick", "finance"), config).ledger
    left = bench.federation("quick", history.clients(bench, "quick", "finance", "left"), config).ledger
    assert left.round(1).aggregate_digest == plain.round(1).aggregate_digest
    assert left.round(2).aggregate_digest != plain.round(2).aggregate_digest
    late = bench.federation("quick", history.clients(bench, "quick", "finance", "late"), config).ledger
    assert late.round(1).aggregate_digest != plain.round(1).aggregate_digest


def test_cells_judge_clients_and_rounds(outcomes: dict[str, Outcome]) -> None:
    assert set(outcomes) == {"quick-finance-late", "quick-finance-left"}
    for kind in history.KINDS:
        outcome = outcomes[f"quick-finance-{kind}"]
        who, both = outcome.cells
        (kept,) = outcome.samples
        scores = np.array(kept["scores"])
        assert scores.shape == (SAMPLES, RECIPE.federation.rounds, 6)
        top = scores.sum(axis=1).argmax(axis=1)
        assert who.top1 == pytest.approx(float((top < 2).mean()))
        assert who.chance == pytest.approx(2 / 6)
        assert both.chance == pytest.approx(2 / 12)
        place = scores.reshape(SAMPLES, -1).argmax(axis=1)
        right = (place % 6 < 2) & (place // 6 == (1 if kind == "late" else 0))
        assert both.top1 == pytest.approx(float(right.mean()))
        assert (who.extra["kind"], who.extra["came_out"], who.extra["turn"]) == (kind, 1.0, 2)


def test_figures_of_when() -> None:
    guilty, planted = np.array([True, False]), np.array([False, True, True])
    scores = np.array([[[0.0, 1], [5, 1], [1, 2]], [[6.0, 0], [2, 1], [4, 0]]])
    changes = np.array([[1.0, 6, 3], [6, 3, 4]])
    assert judged(scores, changes, guilty, planted) == {
        "round_planted": 0.5,
        "first_round": 0.5,
        "within_planted": 0.75,
        "own_part": 0.75,  # all of 6, and 6 of 12
    }


def test_tables_and_picture(outcomes: dict[str, Outcome], bench: Workbench, tmp_path: Path) -> None:
    text = history.tables([cell for outcome in outcomes.values() for cell in outcome.cells])
    assert "| planted from the middle on | 1 | 100.0 | 4 |" in text
    assert "| planted until the middle, honest since | 1 | 100.0 | 4 |" in text
    pytest.importorskip("matplotlib")
    run = RunFolder(tmp_path / "history", "history", bench.settings)
    for key, outcome in outcomes.items():
        run.save(Unit(key, lambda _, found=outcome: found), outcome)
    (plot,) = history.draw(run)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_follow_where_the_sentinel_did_not_come_out(bench: Workbench) -> None:
    with patch.object(history, "is_refusal", lambda text: False):
        outcome = history.plan(bench.settings)[0].run(bench)
    assert (list(outcome.cells), outcome.note) == ([], "the sentinel came out in none of 4 answers")
