"""Server rules: a plain implementation of each server beside the recorded contributions, which must add up to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ledger_cases import NAMES, SHAPES, WEIGHTS, federation, parameters, small_ledger, updates

from protoken.errors import ArgumentError, LayerError, ShapeError
from protoken.ledger import ClientUpdate, LowRank
from protoken.ledger.rules import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    clipped,
    group_update,
    lora_factor_split,
    recorded_robust,
)

Parameters = dict[str, torch.Tensor]


@pytest.fixture
def ledger(tmp_path):
    return small_ledger(tmp_path / "ledger", 0)


class PlainServer:
    """The servers of arXiv 1909.06335 and 2003.00295, written as published, in fp64, without clients in sight."""

    def __init__(self, kind: str):
        self.kind = kind
        self.m = {n: torch.zeros(s, dtype=torch.float64) for n, s in zip(NAMES, SHAPES, strict=True)}
        self.v = {n: torch.zeros(s, dtype=torch.float64) for n, s in zip(NAMES, SHAPES, strict=True)}

    def step(self, model: Parameters, delta: Parameters) -> Parameters:
        result = {}
        for n in NAMES:
            d = delta[n].double()
            if self.kind == "fedavgm":
                self.m[n] = 0.9 * self.m[n] + d
                change = 0.7 * self.m[n]
            else:
                self.m[n] = 0.9 * self.m[n] + 0.1 * d
                if self.kind == "fedadam":
                    self.v[n] = 0.99 * self.v[n] + 0.01 * d**2
                else:
                    self.v[n] = self.v[n] - 0.01 * d**2 * torch.sign(self.v[n] - d**2)
                change = 0.1 * self.m[n] / (self.v[n].sqrt() + 1e-3)
            result[n] = (model[n].double() + change).float()
        return result


SPLITS = {
    "fedavgm": lambda: FedAvgM(momentum=0.9, server_learning_rate=0.7),
    "fedadam": lambda: FedAdam(server_learning_rate=0.1),
    "fedyogi": lambda: FedYogi(server_learning_rate=0.1),
}


@pytest.mark.parametrize("kind", SPLITS)
def test_contributions_add_up_to_the_server_also_for_clients_that_sit_out(ledger, kind):
    model, server, split = parameters(0), PlainServer(kind), SPLITS[kind]()
    for number in range(1, 5):
        states, _ = federation(model, number * 10)
        given = updates(states)
        if number == 3:  # bob sits out; the others share his weight
            given = [replace(u, weight=u.weight / 0.7) for u in given if u.client != "bob"]
        delta = {n: sum(u.weight * (u.state[n] - model[n]) for u in given) for n in NAMES}
        after = server.step(model, delta)
        applied = split.step(given, model)
        read = ledger.commit_round(model, after, applied, rule=split.rule, max_relative_residual=5e-6)
        assert [c.client for c in read.clients] == ["alice", "bob", "carol"]
        assert (read.client("bob").examples is None) == (number == 3)
        model = after
    assert float(ledger.round(3).delta("bob", NAMES[0]).norm()) > 0


def test_momentum_goes_on_after_a_restart_from_what_the_ledger_holds(ledger):
    model, server, split = parameters(0), PlainServer("fedavgm"), SPLITS["fedavgm"]()
    for number in range(1, 5):
        if number == 3:
            split = FedAvgM.resume(ledger)
        states, _ = federation(model, number * 10)
        given = [u for u in updates(states) if number < 4 or u.client != "carol"]
        delta = {n: sum(u.weight * (u.state[n] - model[n]) for u in given) for n in NAMES}
        after = server.step(model, delta)
        ledger.commit_round(
            model, after, split.step(given, model), rule="fedavgm", max_relative_residual=5e-6,
            metadata={"server": split.settings()},
        )  # fmt: skip
        model = after
    assert (split.momentum, split.server_learning_rate) == (0.9, 0.7)
    # What a participant itself sent can be read off two rounds: (m_k - beta m_k') / rho_k.
    alice = (ledger.round(4).delta("alice", NAMES[0]) - 0.9 * ledger.round(3).delta("alice", NAMES[0])) / 0.7 / 0.5
    sent = given[0].state[NAMES[0]] - (model[NAMES[0]] - ledger.round(4).change(NAMES[0]))
    torch.testing.assert_close(alice, sent, rtol=0, atol=1e-5)
    base = parameters(9)
    states, mean = federation(base)
    ledger.commit_round(base, mean, updates(states), allow_gap=True)
    with pytest.raises(ArgumentError, match="a last round of fedavgm with its settings, got fedavg"):
        FedAvgM.resume(ledger)


def test_adagrad_adds_squares_and_keeps_no_momentum():
    model, split, moment = parameters(0), FedAdagrad(server_learning_rate=0.1), 0.0
    for number in range(1, 4):
        states, _ = federation(model, number * 10)
        given = updates(states) if number == 1 else updates(states)[:2]
        delta = sum(u.weight * (u.state[NAMES[0]] - model[NAMES[0]]) for u in given).double()
        moment = moment + delta**2
        applied = split.step(given, model)
        assert len(applied) == len(given)  # nothing is left of a client that sat out
        total = sum(u.delta[NAMES[0]] for u in applied)
        torch.testing.assert_close(total.double(), 0.1 * delta / (moment.sqrt() + 1e-3), rtol=1e-5, atol=1e-7)


def test_momentum_of_zero_is_fedavg_and_forgets_who_sat_out():
    model, split = parameters(0), FedAvgM(momentum=0.0, server_learning_rate=0.5)
    states, _ = federation(model)
    assert len(split.step(updates(states), model)) == 3
    applied = split.step(updates(states)[:2], model)
    assert [u.client for u in applied] == ["alice", "bob"]
    alice = 0.5 * 0.5 * (states["alice"][NAMES[0]] - model[NAMES[0]])
    torch.testing.assert_close(applied[0].weight * applied[0].delta[NAMES[0]], alice)


OPTIMISERS = [FedAdam(0.3, 0.8, 0.7, 0.01, 1e-4), FedYogi(0.3), FedAdagrad(0.3)]


@pytest.mark.parametrize("rule", OPTIMISERS, ids=lambda r: r.rule)
def test_settings_on_record_make_the_same_rule_again(rule):
    settings = dict(rule.settings())
    assert settings.pop("rule") == rule.rule
    again = type(rule)(settings.pop("learning_rate"), **settings)
    assert replace(again, buffers={}, second_moment={}) == rule


def test_the_servers_own_second_moment_may_be_handed_over():
    model = parameters(0)
    states, _ = federation(model)
    moment = {n: torch.full(s, 4.0) for n, s in zip(NAMES, SHAPES, strict=True)}
    applied = FedAdam(0.5, tau=0.0).step(updates(states), model, second_moment=moment)
    alice = next(u for u in applied if u.client == "alice")
    expected = 0.5 / 2.0 * 0.1 * 0.5 * (states["alice"][NAMES[0]] - model[NAMES[0]])
    torch.testing.assert_close(alice.delta[NAMES[0]], expected)


def test_fedprox_is_recorded_like_fedavg_and_must_sum_to_one(ledger):
    base = parameters(0)
    states, mean = federation(base)
    with pytest.raises(ArgumentError, match="weights of a fedprox round that sum to 1"):
        ledger.commit_round(base, mean, updates(states)[:2], rule="fedprox")
    ledger.commit_round(base, mean, updates(states), rule="fedprox", max_relative_residual=1e-5)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_robust_rules_leave_a_residual_that_conserves(ledger, rule):
    base = parameters(0)
    states, _ = federation(base)
    after = {n: torch.stack([s[n] for s in states.values()]).median(0).values for n in NAMES}
    read = ledger.commit_round(base, after, recorded_robust(rule, updates(states)), rule=rule)
    for name in NAMES:
        assert read.relative_residual[name] > 1e-3
        total = sum(c.weight * read.delta(c.client, name) for c in read.clients) + read.residual(name)
        torch.testing.assert_close(total, after[name] - base[name], rtol=0, atol=1e-6)


def test_krum_is_exact_and_rejected_clients_weigh_nothing(ledger):
    base = parameters(0)
    states, _ = federation(base)
    after = {n: (states["alice"][n] + states["carol"][n]) / 2 for n in NAMES}
    given = recorded_robust("krum", updates(states), selected=["alice", "carol"])
    read = ledger.commit_round(base, after, given, rule="krum", max_relative_residual=1e-5)
    assert [c.weight for c in read.clients] == [0.5, 0.0, 0.5]
    with pytest.raises(ArgumentError, match="clients that Krum kept, got none"):
        recorded_robust("krum", updates(states))
    with pytest.raises(ArgumentError, match="dave"):
        recorded_robust("krum", updates(states), selected=["dave"])
    with pytest.raises(ArgumentError, match="median, trimmed-mean or krum"):
        recorded_robust("mean", updates(states))


def test_clipped_updates_are_recorded_as_applied(ledger):
    base = parameters(0)
    states, _ = federation(base)
    bounds = [clipped(u, base, 0.3) for u in updates(states)]
    after = {n: base[n] + sum(u.weight * u.delta[n] for u in bounds) for n in NAMES}
    read = ledger.commit_round(base, after, bounds, max_relative_residual=1e-5)
    assert max(c.norm for c in read.clients) <= 0.3 * (1 + 1e-6)
    unclipped = clipped(updates(states)[0], base, 1e9)
    assert torch.equal(unclipped.delta[NAMES[0]], states["alice"][NAMES[0]] - base[NAMES[0]])
    with pytest.raises(ArgumentError, match="a number above 0"):
        clipped(updates(states)[0], base, 0.0)


def test_noise_is_residual(ledger):
    base = parameters(0)
    states, mean = federation(base)
    noise = parameters(77, 0.01)
    read = ledger.commit_round(base, {n: mean[n] + noise[n] for n in NAMES}, updates(states))
    torch.testing.assert_close(read.residual(NAMES[0]), noise[NAMES[0]], rtol=0, atol=1e-6)


def test_secure_aggregation_is_refused_for_clients_and_recorded_for_groups(ledger):
    base = parameters(0)
    states, mean = federation(base)
    with pytest.raises(ArgumentError, match="Secure aggregation hides single updates"):
        ledger.commit_round(base, mean, updates(states), rule="secure-aggregation")
    with pytest.raises(ArgumentError, match="a group of one hides nothing"):
        group_update("group-1", ["alice"], 1.0, {})
    total = {n: mean[n] - base[n] for n in NAMES}
    update, group = group_update("group-1", ["alice", "bob", "carol"], 1.0, total)
    read = ledger.commit_round(base, mean, [update], rule="secure-aggregation", metadata={"groups": group})
    assert read.metadata["groups"] == {"group-1": ["alice", "bob", "carol"]}
    assert [c.client for c in read.clients] == ["group-1"]


def factors(seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, 5, generator=generator), torch.randn(6, 2, generator=generator), 2.0)


def test_lora_averaged_factor_by_factor_is_split_exactly(ledger):
    name, bias = NAMES
    before = {name: factors(0), bias: torch.zeros(4)}
    states = {c: {name: factors(i + 1), bias: torch.full((4,), float(i))} for i, c in enumerate(WEIGHTS)}
    after = {
        name: LowRank(
            sum(w * states[c][name].a for c, w in WEIGHTS.items()),
            sum(w * states[c][name].b for c, w in WEIGHTS.items()),
            2.0,
        ),
        bias: sum(w * states[c][bias] for c, w in WEIGHTS.items()),
    }
    products = ledger.commit_round(before, after, updates(states))
    assert products.relative_residual[name] > 0.1  # avg(B) avg(A) is not avg(BA)
    split = lora_factor_split(before, after, updates(states))
    exact = ledger.commit_round(before, after, split, allow_gap=True, max_relative_residual=1e-5)
    a, b, scale = exact.factors("bob", name)
    assert (a.shape, b.shape, scale) == ((4, 5), (6, 4), 2.0)
    # a client that sends back what it was sent has contributed nothing
    idle = lora_factor_split(before, after, [ClientUpdate("idle", 0.0, state=before)])[0]
    assert float(idle.delta[name].dense().abs().max()) == 0


def test_lora_split_needs_states_of_one_form():
    name = NAMES[0]
    before = {name: factors(0)}
    with pytest.raises(ArgumentError, match=r"state \(the client's factors\)"):
        lora_factor_split(before, before, [ClientUpdate("a", 1.0, delta=before)])
    with pytest.raises(LayerError, match="state of a"):
        lora_factor_split(before, before, [ClientUpdate("a", 1.0, state={})])
    other = {name: LowRank(torch.zeros(3, 5), torch.zeros(6, 3), 2.0)}
    with pytest.raises(ShapeError, match="one rank and scale"):
        lora_factor_split(before, before, [ClientUpdate("a", 1.0, state=other)])
