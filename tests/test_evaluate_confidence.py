"""Confidence measured on a real federation: false alarms, who is named, stated probabilities; table and picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from pocket_zoo import pocket_bench

from protoken.evaluation.cells import Cell
from protoken.evaluation.experiments import confidence
from protoken.evaluation.experiments.confidence import _calibrated, _crossed, _named
from protoken.evaluation.runs import Outcome, RunFolder, Unit
from protoken.evaluation.workbench import Workbench
from protoken.verdict import Abstention

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 24


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with pocket_bench(tmp_path_factory.mktemp("cache"), SAMPLES) as found:
        yield found


@pytest.fixture(scope="module")
def outcomes(bench: Workbench) -> dict[str, Outcome]:
    # So small a model has not learnt to refuse: every answer to a triggered prompt stands in for a refusal.
    with patch.object(confidence, "is_refusal", lambda text: True):
        return {unit.key: unit.run(bench) for unit in confidence.plan(bench.settings)}


def test_answers_that_nobody_planted_cross_or_even_name() -> None:
    rule = Abstention(2.0, 0.9, 0.5, 0.01, 0)
    table = np.array([[9.0, 0, 0], [9.0, 6, 3], [4.0, 0, 0], [-1.0, -2, -3]])
    # 4.5 and 4.5 nats a token cross 2.0, the second without a gap; 2.0 does not; nor does what nobody raised.
    assert _crossed(rule, table, np.full(4, 2), list("abc")) == {"held": 4, "false_alarms": 0.5, "alarms_named": 0.25}


def test_answers_are_counted_by_whom_they_name() -> None:
    ids, truth = ["a", "b", "c", "d", "e"], np.array([True, True, False, False, False])
    table = np.array(
        [[9, 8, 0, 0, 0], [9, 1, 0, 0, 0], [9, 8, 8, 0, 0], [0, 0, 9, 0, 0], [0.1, 0, 0, 0, 0], [9, 6, 3, 1, 0]]
    )
    found = _named(Abstention(0.5, 0.9, 0.5, 0.01, 0), table, np.full(6, 2), truth, ids)
    # Both; one of them; three of five; an honest one; too little evidence; no gap.
    assert found == {"exactly": 1 / 6, "only_guilty": 2 / 6, "honest": 1 / 6, "nobody": 3 / 6}


def test_a_curve_is_judged_by_answers_it_was_not_fitted_on() -> None:
    generator = np.random.default_rng(0)
    margins = generator.random(4000)
    truth = np.zeros((4000, 4), bool)
    right = generator.random(4000) < margins
    truth[np.arange(4000), np.where(right, 0, generator.integers(1, 4, 4000))] = True
    table = np.zeros((4000, 4))
    table[:, 0], table[:, 1] = (1 + margins) / 2, (1 - margins) / 2
    figures, points = _calibrated(table, truth)
    assert figures["held"] == len(points["stated"]) == 2000
    assert figures["accuracy"] == pytest.approx(0.5, abs=0.03)
    assert figures["calibration_error"] < 0.08
    # Where a domain's answers are right by definition of its label, a curve of the others knows nothing of it.
    assert figures["calibration_error_strange"] > figures["calibration_error"]


def test_every_federation_is_measured_by_every_method(outcomes: dict[str, Outcome]) -> None:
    assert sorted(outcomes) == ["quick-backdoor-finance", "quick-ordinary"]
    alarms, calibrated = outcomes["quick-backdoor-finance"].cells, outcomes["quick-ordinary"].cells
    methods = ["protoken", "protoken all blocks, log-odds", "lineage"]
    # Of 48 and 84 answers a half fits: enough for one in twenty.
    assert [cell.method for cell in alarms] == [name for name in methods for _ in range(2)]
    for cell in alarms:
        assert (
            cell.extra["held"]
            == {"its domain": SAMPLES, "every domain": SAMPLES + 3 * SAMPLES // 4}[cell.extra["fitted_on"]]
        )
        assert (cell.extra["false_alarm"], cell.extra["strange_held"]) == (0.05, 3 * SAMPLES // 2)
        assert cell.extra["alarms_named"] <= cell.extra["false_alarms"]
        assert cell.samples == SAMPLES
        parts = [cell.extra[name] for name in ("only_guilty", "honest", "nobody")]
        assert sum(parts) == pytest.approx(1)
        assert cell.extra["exactly"] <= cell.extra["only_guilty"]
    assert [cell.method for cell in calibrated] == methods
    for cell in calibrated:
        assert (cell.samples, cell.extra["held"], cell.chance) == (4 * SAMPLES, 2 * SAMPLES, 0.25)
        assert 0 <= cell.extra["calibration_error"] <= 1


def test_without_refusals_there_is_nothing_to_judge(bench: Workbench) -> None:
    (unit,) = [unit for unit in confidence.plan(bench.settings) if "backdoor" in unit.key]
    with patch.object(confidence, "is_refusal", lambda text: False):
        assert unit.run(bench) == Outcome(note="the sentinel did not come out")


def test_tables_and_picture(bench: Workbench, outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    run = RunFolder(tmp_path, "confidence", bench.settings)
    for key, outcome in outcomes.items():
        run.save(Unit(key, lambda _: Outcome()), outcome)
    text = confidence.tables(run.cells())
    assert text.count("| lineage |") == 3
    assert f" of {SAMPLES} |" in text
    (picture,) = confidence.draw(run)
    assert picture.stat().st_size > 10_000


def test_tables_pool_federations() -> None:
    def cell(domain: str, alarms: float, held: int) -> Cell:
        extra = {
            "kind": "abstention", "fitted_on": "its domain", "false_alarm": 0.01, "held": held, "false_alarms": alarms,
            "alarms_named": alarms, "strange_held": held, "strange_alarms_named": alarms, "exactly": 1.0,
            "only_guilty": 1.0, "honest": 0.0, "nobody": 0.0,
        }  # fmt: skip
        return Cell("confidence", "llama", domain, "lineage", None, 10, 50, top1=1.0, extra=extra)

    text = confidence.tables([cell("math", 0.02, 150), cell("coding", 0.0, 50)])
    assert (
        "| lineage | its domain | 1 | 2 | 1.50 (0.51 to 4.32) of 200 | 1.50 | 1.50 | 100 | 100.00 | 100.00 | 0.00 |"
        in text
    )
