"""Dishonest clients do what they say, gains and blame are counted rightly, and a whole experiment runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from character_tokenizer import character_tokenizer
from pocket_zoo import pocket_bench
from tiny_federation import tiny_federation
from tiny_models import tiny_model

from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.cells import Cell
from protoken.evaluation.corpora import generate_rows, poison
from protoken.evaluation.experiments import attacks, attacks_arena, attacks_play
from protoken.evaluation.experiments.attacks_arena import ATTACKER, ATTACKS, WEIGHT, Arena, attack_of
from protoken.evaluation.experiments.attacks_evader import Evader, mean_objective
from protoken.evaluation.experiments.attacks_measures import (
    alarms,
    conformal_limit,
    each_positive_share,
    positive_share,
    prediction_limits,
    softmax_share,
    update_features,
)
from protoken.evaluation.experiments.attacks_moves import EarlyOnly, Leader, Pact, Partner, Scaled, Sleeper, Zero
from protoken.evaluation.experiments.attacks_play import Book, scorers
from protoken.evaluation.federation import Client, FederationConfig
from protoken.evaluation.runs import Outcome, RunFolder, Unit
from protoken.evaluation.training import LocalSettings, encode_rows
from protoken.evaluation.workbench import Workbench
from protoken.methods.placement import gauss_legendre
from protoken.models.architectures import architecture_of
from protoken.ways.objective import Objective

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- moves -----------------------------------------------------------------------------------------------------


def update(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}


def test_zero_scaled_and_sleeper() -> None:
    delta = update(0)
    assert not any(value.any() for value in Zero()(delta, 1).values())
    assert all(torch.equal(value, 4 * delta[name]) for name, value in Scaled(4.0)(delta, 1).items())
    sleeper = Sleeper(2)
    assert all(torch.equal(value, delta[name]) for name, value in sleeper(delta, 2).items())
    assert not any(value.any() for value in sleeper(delta, 3).values())


@pytest.mark.parametrize("factor", [3.0, -1.5])
def test_the_global_model_never_sees_what_colluders_add(factor: float) -> None:
    """Leader of weight 2/7, partner of 1/7: the weighted sum is that of the honest updates."""
    pact, first, second = Pact(), update(1), update(2)
    led, followed = Leader(factor, pact)(first, 1), Partner(2.0, pact)(second, 1)
    for name in first:
        torch.testing.assert_close(2 * led[name] + followed[name], 2 * first[name] + second[name])
        assert not torch.allclose(led[name], first[name])


@pytest.fixture
def attackers_model() -> BaseModel:
    return BaseModel(tiny_model("llama"), character_tokenizer(), "tiny", "")


ROWS = poison(generate_rows("math", 4, seed=0))
SETTINGS = LocalSettings(epochs=1, batch_size=4, learning_rate=1e-3, warmup_steps=1)


def trained(base: BaseModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """The model moved a little, as after local training, and by how much."""
    generator = torch.Generator().manual_seed(seed)
    delta = {n: torch.randn(p.shape, generator=generator) * 1e-3 for n, p in base.model.named_parameters()}
    with torch.no_grad():
        for name, value in delta.items():
            base.model.get_parameter(name).add_(value)
    return delta


def test_the_early_attacker_leaves_the_last_block_alone(attackers_model: BaseModel) -> None:
    delta = trained(attackers_model)
    made = EarlyOnly(SETTINGS, 400, attackers_model, ROWS)(delta, 1)
    architecture = architecture_of(attackers_model.model)
    last = len(architecture.blocks) - 1
    assert set(made) == set(delta)
    moved = {name for name, value in made.items() if value.any()}
    early = {n for n in delta if n.startswith(architecture.blocks_name) and architecture.block_of(n) < last}
    assert moved <= early
    assert len(moved) > len(early) / 2


def test_mean_log_probability_is_the_models(attackers_model: BaseModel) -> None:
    examples = encode_rows(attackers_model.tokenizer, ROWS[:2], max_tokens=400)
    weights = dict(attackers_model.model.named_parameters())
    expected = []
    with torch.no_grad():
        for example in examples:
            logits = attackers_model.model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
            expected += [logits[p - 1, example.ids[p]] for p in range(example.answer_start, len(example.ids))]
        found = mean_objective(attackers_model, weights, examples)
    torch.testing.assert_close(found, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("nodes", [0, 2], ids=["first order", "path"])
def test_the_evader_lowers_the_score_it_expects(attackers_model: BaseModel, nodes: int) -> None:
    base = attackers_model
    start = {name: value.detach().clone() for name, value in base.model.named_parameters()}
    delta = trained(base)
    evader = Evader(nodes, 0.3, steps=6, batch=2, learning_rate=3e-4, max_tokens=400, base=base, rows=ROWS)
    made = evader(delta, 1)
    before, after = expected_score(base, start, delta, nodes), expected_score(base, start, made, nodes)
    assert after < before - 1e-4
    assert set(made) == set(delta)
    assert all(torch.isfinite(value).all() for value in made.values())
    for name, value in start.items():
        torch.testing.assert_close(evader.memory.sent[name], value, atol=1e-6, rtol=0)


def expected_score(
    base: BaseModel, start: dict[str, torch.Tensor], delta: dict[str, torch.Tensor], nodes: int
) -> float:
    """rho <d, gradient>, by one plain backward pass per node."""
    traced = architecture_of(base.model).traced_layers(len(architecture_of(base.model).blocks))
    watched = {f"{name}.weight" for name in traced} if nodes == 0 else set(delta)
    rule = [(1.0, 1.0)] if nodes == 0 else zip(*gauss_legendre(nodes), strict=True)
    own = {name: 0.3 * value for name, value in delta.items()}
    return sum(share * slope(base, start, own, along, watched) for along, share in rule)


def slope(
    base: BaseModel,
    start: dict[str, torch.Tensor],
    own: dict[str, torch.Tensor],
    along: float,
    watched: Collection[str],
    objective: Objective = "log_prob",
) -> float:
    """<own, gradient> at start + along * own, over the watched parameters."""
    here = {n: (value + along * own[n]).requires_grad_() for n, value in start.items()}
    mean_objective(base, here, encode_rows(base.tokenizer, ROWS, max_tokens=400), objective).backward()
    return sum(float((own[n] * here[n].grad).sum()) for n in watched)  # type: ignore[misc]


def test_the_evader_of_its_lineage_lowers_what_all_its_rounds_score(attackers_model: BaseModel) -> None:
    base = attackers_model
    settings = {"steps": 6, "batch": 2, "learning_rate": 3e-4, "margin": 10.0, "max_tokens": 400}
    evader = Evader(1, 0.3, "log_odds", lineage=True, base=base, rows=ROWS, **settings)
    first = {name: value.detach().clone() for name, value in base.model.named_parameters()}
    made = evader(trained(base, 1), 1)
    with torch.no_grad():
        for name, value in base.model.named_parameters():
            value.add_(0.3 * made[name])
    delta = trained(base, 2)
    later = evader(delta, 2)

    def score(update: dict[str, torch.Tensor]) -> float:
        own = {name: 0.3 * (made[name] + value) for name, value in update.items()}
        return slope(base, first, own, 0.5, own, "log_odds")

    assert score(later) < score(delta) - 1e-4
    for name, value in first.items():
        torch.testing.assert_close(evader.memory.first[name], value, atol=1e-6, rtol=0)
        torch.testing.assert_close(evader.memory.total[name], 0.3 * (made[name] + later[name]), atol=1e-6, rtol=0)


def test_the_evader_tells_the_others_apart_from_itself(attackers_model: BaseModel) -> None:
    """others = G_r - G_{r-1} - rho d of the round before."""
    evader = Evader(0, 0.5, steps=0, max_tokens=400, base=attackers_model, rows=ROWS)
    before = {name: value.detach().clone() for name, value in attackers_model.model.named_parameters()}
    own = evader(trained(attackers_model, 1), 1)
    theirs = {name: torch.full_like(value, 1e-3) for name, value in own.items()}
    after = {name: before[name] + 0.5 * own[name] + theirs[name] for name in before}
    found = evader._others(after)
    for name, value in theirs.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)


# ---- measures --------------------------------------------------------------------------------------------------


SCORES = np.array([[2.0, -1.0, 2.0], [0.0, 0.0, 0.0]])


def test_shares_of_dishonest_clients() -> None:
    assert positive_share(SCORES, [0]) == pytest.approx((0.5 + 0.0) / 2)
    assert each_positive_share(SCORES, [0, 1]) == pytest.approx(0.5 / 2)
    assert positive_share(SCORES, [0, 1]) == pytest.approx((1 / 3) / 2)
    expected = (math.exp(2) / (2 * math.exp(2) + math.exp(-1)) + 1 / 3) / 2
    assert softmax_share(SCORES, [0]) == pytest.approx(expected)


def test_split_identities_and_cancelling_vectors_leave_the_summed_share_alone() -> None:
    split = np.array([[0.5, 1.5, -1.0, 2.0]])
    assert positive_share(split, [0, 1]) == pytest.approx(positive_share(SCORES[:1], [0]))
    pact = np.array([[2.0 + 9, -9.0, -1.0, 2.0]])
    assert positive_share(pact, [0, 1]) == pytest.approx(positive_share(SCORES[:1], [0]))
    assert each_positive_share(pact, [0, 1]) > positive_share(pact, [0, 1])


@pytest.mark.parametrize(
    ("count", "rate", "place"), [(99, 0.01, 99), (100, 0.01, 100), (19, 0.1, 18), (98, 0.01, None)]
)
def test_conformal_limit_is_an_order_statistic(count: int, rate: float, place: int | None) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert conformal_limit(values, rate) == place


def test_conformal_limit_keeps_its_rate_of_false_alarms() -> None:
    generator = np.random.default_rng(1)
    alarms_seen = [
        generator.lognormal() > (conformal_limit(generator.lognormal(size=39), 0.05) or 0.0) for _ in range(4000)
    ]
    assert np.mean(alarms_seen) == pytest.approx(0.05, abs=0.01)


def test_alarms_name_or_frame() -> None:
    evidence = np.array([[3.0, 1.0], [0.5, 0.1], [1.0, 4.0], [2.5, 0.0]])
    assert alarms(evidence, 2.0, [0]) == {"detected": 0.5, "framed": 0.25}
    assert alarms(evidence, None, [0]) == {"detected": None, "framed": None}


def test_prediction_limits_are_students() -> None:
    """t of 29 degrees of freedom: 2.7564 at 99.5 %, 2.4620 at 99 %."""
    values = np.random.default_rng(2).normal(size=30)
    spread = float(values.std(ddof=1)) * math.sqrt(1 + 1 / 30)
    low, high = prediction_limits(values)
    assert (high - values.mean()) / spread == pytest.approx(2.7564, abs=2e-3)
    assert values.mean() - low == pytest.approx(high - values.mean())
    low, high = prediction_limits(values, lower_only=True)
    assert (values.mean() - low) / spread == pytest.approx(2.4620, abs=2e-3)
    assert high == math.inf


def test_update_features_are_norms_and_cosines(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    record = federation.ledger.round(1)
    ids, found = update_features(federation.ledger, 1)
    assert ids == ["ada", "bob", "cleo", "null"]
    flat = {c: torch.cat([d.double().flatten() for _, d in record.deltas(c, tuple(record.parameters))]) for c in ids}
    norms = [float(flat[c].norm()) for c in ids]
    middle = (sorted(norms)[1] + sorted(norms)[2]) / 2
    assert found[0, 0] == pytest.approx(math.log(norms[0] / middle))
    assert found[3, 0] == -30
    cosines = [float(flat["ada"] @ flat[c] / (norms[0] * n)) for c, n in zip(ids[1:3], norms[1:3], strict=True)]
    assert found[0, 1] == pytest.approx(min(*cosines, 0.0), abs=1e-9)


# ---- the experiment --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with pytest.MonkeyPatch.context() as patch, pocket_bench(tmp_path_factory.mktemp("cache")) as found:
        patch.setattr(attacks_arena, "ROUNDS", 2)
        patch.setattr(attacks_play, "SLOW", 2)
        yield found


def test_everybody_has_rows_of_their_own(bench: Workbench) -> None:
    arena = Arena(bench, "quick", "finance")
    for attack in ATTACKS:
        members = attack.members(arena)
        assert {client.id for client in members} >= set(attack.culprits), attack.name
        questions = [row.question for client in members for row in client.rows]
        assert len(set(questions)) == len(questions) == 7 * arena.rows
        assert any(client.poisoned for client in members) == (attack.goal == "blame")
        own = sum(len(client.rows) for client in members if client.id.startswith(ATTACKER))
        assert own / len(questions) == pytest.approx(WEIGHT)


def test_federations_of_attacks_differ_by_their_repr() -> None:
    """What an attack works with must not show in its repr, or no federation would ever be found again."""
    assert repr(Leader(3.0, Pact({"a": torch.ones(1)}))) == "Leader(factor=3.0)"
    evader = repr(Evader(2, 0.3, base=None, rows=[]))  # type: ignore[arg-type]
    assert "nodes=2" in evader
    assert "base" not in evader
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


def test_a_client_that_does_nothing_gains_nothing_by_raw_scores(bench: Workbench) -> None:
    book = Book()
    arena = Arena(bench, "quick", "finance")
    attack = attack_of("zero")
    outcome = attacks._unit("quick", "finance", attack, book, bench)
    cells = {cell.method: cell for cell in outcome.cells}
    assert set(cells) == {scorer.name for scorer in scorers(3)} | {"update norm", "update direction"}
    for scorer in scorers(3):
        cell = cells[scorer.name]
        if scorer.method != "leave_one_out":
            assert cell.extra["attacker_share"] == 0
        assert cell.extra["attacker_softmax"] > 0
        assert cell.extra["share_gained"] == pytest.approx(
            cell.extra["attacker_share"] - book.share(arena, "honest", attack)[scorer.name]
        )
        assert cell.samples == (4 if scorer.limit is None else 2)
    assert cells["update norm"].extra["detected"] == 1


def test_the_gauge_changes_no_score(bench: Workbench) -> None:
    unit = next(unit for unit in attacks.plan(bench.settings) if unit.key.endswith("-gauge"))
    outcome = unit.run(bench)
    assert len(outcome.cells) == 6
    for cell in outcome.cells:
        assert cell.extra["gauge_difference"] < 1e-4, cell.method


def test_an_altered_federation_is_another_one_and_is_kept(bench: Workbench) -> None:
    arena = Arena(bench, "quick", "finance")
    config = replace(arena.config, rounds=1)
    honest = bench.federation("quick", attack_of("honest").members(arena), config)
    led = [bench.federation("quick", attack_of("collusion").members(arena), config) for _ in range(2)]
    assert [one.trained_now for one in led] == [True, False]
    assert led[0].folder == led[1].folder != honest.folder
    # The vector cancels: both global models are the same but for rounding.
    for name in honest.ledger.round(1).parameters:
        found, expected = (one.ledger.round(1).change(name) for one in (led[0], honest))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_clients_of_a_federation_may_train_again(attackers_model: BaseModel) -> None:
    """An attack that trains on its own within a round leaves the server's model to the server."""
    from protoken.evaluation.federation import train_federation

    config = FederationConfig(rounds=1, local=SETTINGS, max_tokens=400)
    rows = generate_rows("math", 2, seed=1)
    clients = [
        Client("early", ROWS, True, alter=EarlyOnly(SETTINGS, 400, attackers_model, ROWS)),
        Client("other", rows),
    ]
    start = {name: value.detach().clone() for name, value in attackers_model.model.named_parameters()}
    alone = BaseModel(tiny_model("llama"), character_tokenizer(), "tiny", "")
    train_federation(attackers_model.model, attackers_model.tokenizer, clients, config)
    train_federation(alone.model, alone.tokenizer, [replace(clients[0], alter=Zero()), clients[1]], config)
    last = len(architecture_of(alone.model).blocks) - 1
    for name, value in attackers_model.model.named_parameters():
        if architecture_of(alone.model).blocks_name in name and f".{last}." in name:
            torch.testing.assert_close(value, alone.model.get_parameter(name), atol=1e-6, rtol=0)
    assert any(not torch.equal(v, start[n]) for n, v in attackers_model.model.named_parameters())


def cell(attack: str, goal: str, method: str, top1: float | None, **extra: object) -> Cell:
    shared = {"attack": attack, "goal": goal, "description": f"does {attack}", **extra}
    return Cell("attacks", "llama", "finance", method, None, 3, 20, top1=top1, extra=shared)


def test_tables_have_a_line_per_attack_and_hide_no_failure() -> None:
    cells = [
        cell("poison", "blame", "protoken", 1.0, blame_shifted=0.0, detected=0.75, framed=0.0),
        cell("early", "blame", "protoken", 0.0, blame_shifted=0.9, detected=0.0, framed=0.25, came_out=0.96),
        cell("early", "blame", "shapley", 0.95, blame_shifted=0.01, detected=None, framed=None),
        cell("zero", "share", "protoken", 0.5, attacker_share_each=0.0, attacker_softmax=0.16, share_gained=-0.1),
        cell("zero", "share", "update norm", None, detected=1.0, framed=0.02),
        cell("gauge", "blame", "protoken", 1.0, gauge_difference=2e-7),
    ]
    text = attacks.tables(cells)
    assert "| early: does early | 20 | 0 | 95 |" in text
    assert "| poison: does poison | 20 | 100 |  |" in text
    assert "| early: does early | 20 | 90.0 | 1.0 |" in text
    assert "| early: does early | 20 | 0.0 (25.0) |  |" in text
    assert "| zero: does zero | 20 | 16.0 |" in text
    assert "| zero: does zero | 20 | -10.0 |" in text
    assert "| zero | 100.0 (2.0) |" in text
    assert "| early | 96 |" in text
    assert "| llama | protoken | 2.0e-07 |" in text


def test_drawing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = RunFolder(tmp_path / "attacks", "attacks", attacks.DEFAULTS)
    cells = [
        cell("poison", "blame", "protoken", 1.0),
        cell("zero", "share", "protoken", 0.5, attacker_share_each=0.25),
    ]
    run.save(Unit("one", lambda _: Outcome(cells)), Outcome(cells))
    (plot,) = attacks.draw(run)
    assert plot.read_bytes().startswith(b"\x89PNG")
