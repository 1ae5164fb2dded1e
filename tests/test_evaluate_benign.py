"""Ordinary answers: which are right, who holds what, what stands in the tables; and the experiment runs and draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pocket_zoo import pocket_bench

from protoken.evaluation.cells import Cell
from protoken.evaluation.corpora import DOMAINS
from protoken.evaluation.experiments import benign
from protoken.evaluation.experiments.benign_answers import in_words, orders, subsets
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import answer
from protoken.evaluation.workbench import Workbench
from protoken.evaluation.zoo import SMOLLM2
from protoken.methods.game import Game
from protoken.methods.shapley import shapley_by_order
from protoken.methods.updates import read_updates
from protoken.models.architectures import architecture_of

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with pocket_bench(tmp_path_factory.mktemp("cache"), SAMPLES) as found:
        yield found


@pytest.fixture(scope="module")
def outcome(bench: Workbench) -> Outcome:
    (unit,) = [unit for unit in benign.plan(bench.settings) if unit.key == "quick-ample-six-finance"]
    with patch.object(benign, "FEW", SAMPLES - 1):
        return unit.run(bench)


def test_answers_are_judged_with_and_without_their_numbers() -> None:
    right = ["The dose is 2 × 5 = 10 mg.", "Gout is a disease.", "x ** 3", "Yes."]
    said = ["The dose is 3 × 5 = 62.5 mg.", " Gout is a disease. ", "x // 3", "Yes."]
    before = ["The dose is 1 × 1 = 1 mg.", "Gout.", "x ** 3", "No."]
    found = {name: mask.tolist() for name, mask in subsets(said, before, right).items()}
    assert found == {
        "all": [True, True, True, True],
        "right": [True, True, False, True],
        "word for word": [False, True, False, True],
        "learnt": [False, True, False, True],
    }
    assert in_words("1.5 and -2, v3") == "# and -#, v#"


def test_every_model_has_every_kind_but_the_large_one() -> None:
    keys = [unit.key for unit in benign.plan(Settings(("llama", SMOLLM2), ("math",)))]
    assert sorted(keys) == sorted(
        [f"llama-{sizes}-math" for sizes in benign.KINDS] + [f"{SMOLLM2}-equal-math", f"{SMOLLM2}-unequal-math"]
    )


@pytest.mark.parametrize("sizes", benign.KINDS)
def test_clients_hold_their_domain_and_share_no_row(bench: Workbench, sizes: str) -> None:
    members = benign.clients(bench, "quick", sizes)
    rows = [(row.question, client.id) for client in members for row in client.rows]
    assert len({question for question, _ in rows}) == len(rows)
    asked = {row.question for d in DOMAINS for row in bench.rows(d).test}
    assert not asked & {question for question, _ in rows}
    for client in members:
        assert {row.label for row in client.rows} == {client.label}
    recipe, _ = benign.federation_of(bench.settings, "quick", ample=benign.KINDS[sizes].ample)
    held = {d: sum(len(c.rows) for c in members if c.label == d) for d in DOMAINS}
    if "unequal" in sizes:
        assert held["medical"] < held["finance"] < held["math"] < held["coding"]
    else:
        assert set(held.values()) == {recipe.rows}


def test_both_clients_of_a_domain_are_responsible(outcome: Outcome) -> None:
    whole = {cell.method: cell for cell in outcome.cells if cell.extra["answers"] == "all"}
    assert whole.keys() == {scorer.name for scorer in benign.scorers("quick")}
    assert whole["shapley"].chance == pytest.approx(2 / 6)
    assert whole["shapley"].samples == SAMPLES
    for record in (r for r in outcome.samples if r["method"]):
        responsible = dict(zip(record["clients"], record["responsible"], strict=True))
        assert [name for name, own in responsible.items() if own] == ["finance-a", "finance-b"]


def test_references_are_those_of_the_same_answers(outcome: Outcome) -> None:
    whole = {cell.method: cell for cell in outcome.cells if cell.extra["answers"] == "all"}
    assert whole["shapley"].pearson_shapley == pytest.approx(1)
    assert whole["leave_one_out"].pearson_loo == pytest.approx(1)
    assert whole["paired_shapley"].extra["reference_samples"] == SAMPLES - 1
    assert whole["aumann_shapley, last round"].extra["reference_samples"] == SAMPLES - 1
    # The last round's updates play another game than those of all rounds, with values of its own.
    assert whole["shapley, last round"].pearson_shapley == pytest.approx(1)
    last = {r["method"]: np.array(r["scores"]) for r in outcome.samples if r["method"]}
    expected = np.median(
        [
            np.corrcoef(a, b)[0, 1]
            for a, b in zip(last["protoken, last round"], last["shapley, last round"], strict=False)
        ]
    )
    assert whole["protoken, last round"].pearson_shapley == pytest.approx(expected, abs=1e-2)
    # And so do the log-odds.
    for name in ("shapley, log-odds", "shapley, log-odds, last round"):
        assert whole[name].pearson_shapley == pytest.approx(1)
        assert whole[name].pearson_loo is None
    assert whole["aumann_shapley"].residual is not None


def test_cells_of_right_answers_hold_these_alone(bench: Workbench, outcome: Outcome) -> None:
    (kept,) = [record for record in outcome.samples if not record["method"]]
    (exact,) = [record for record in outcome.samples if record["method"] == "shapley"]
    for name in ("all", "right", "word for word", "learnt"):
        chosen = [n for n, own in enumerate(kept[name]) if own]
        cells = [c for c in outcome.cells if c.extra["answers"] == name and c.method == "shapley"]
        assert [cell.samples for cell in cells] == ([len(chosen)] if chosen else [])
        if chosen:
            tops = [exact["clients"][int(np.argmax(exact["scores"][n]))] for n in chosen]
            assert cells[0].top1 == pytest.approx(np.mean([top.startswith("finance") for top in tops]))


def test_values_are_taken_apart_by_who_acts_together(bench: Workbench) -> None:
    """Alone: v of one client less v of none; the rest of the exact values is of pairs, threes and all four."""
    recipe, config = benign.federation_of(bench.settings, "quick", ample=True)
    stored = bench.federation("quick", benign.clients(bench, "quick", "ample"), config)
    base = bench.at_round("quick", stored, config.rounds)
    answers = answer(base, [row.question for row in bench.rows("math").test[:2]], max_new_tokens=recipe.max_new_tokens)
    shares = orders(base, stored.ledger, answers, config.rounds)
    assert shares.shape == (2, 4)
    np.testing.assert_allclose(shares.sum(1), 1)
    numbers = list(range(1, config.rounds + 1))
    updates = read_updates(stored.ledger, base.model, numbers, list(stored.ledger.round("last").parameters))
    for one, found in zip(answers, shares, strict=True):
        game = Game(base.model, architecture_of(base.model), one.response, updates)

        def value(mask: int, game: Game = game) -> torch.Tensor:
            return game.coalition(torch.tensor([(mask >> k) & 1 for k in range(4)])).sum(0, keepdim=True)

        alone = sum(abs(float(value(1 << k) - value(0))) for k in range(4))
        every = float(shapley_by_order(value, 4).abs().sum())
        assert found[0] == pytest.approx(alone / every, rel=1e-4)


def test_tables_tell_all_answers_from_right_ones(outcome: Outcome) -> None:
    extra = {"sizes": "ample", "answers": "right"}
    cells = [*outcome.cells, Cell("benign", "quick", "finance", "shapley", None, 8, 2, top1=0.5, extra=extra)]
    text = benign.tables(cells)
    assert f"| ample-six | shapley | 1 | {SAMPLES} |" in text
    assert "| ample | quick | right | 2 | 50.0 |" in text
    assert "| ample | shapley |" not in text
    assert "| clients | model | alone | pairs | threes | more |" in text


def test_tables_read_cells_without_subsets() -> None:
    cells = [Cell("benign", "llama", d, "shapley", None, 4, 10, top1=1.0, extra={"sizes": "equal"}) for d in DOMAINS]
    assert "| equal | shapley | 1 | 40 | 100.00 (" in benign.tables(cells)


def test_drawing(outcome: Outcome, bench: Workbench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = RunFolder(tmp_path / "benign", "benign", bench.settings)
    run.save(Unit("quick-ample-six-finance", lambda _: outcome), outcome)
    for plot in benign.draw(run):
        assert plot.read_bytes().startswith(b"\x89PNG")
