"""The axioms that the methods beyond first order are built on, on tiny models with a real ledger."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_federation import CLIENTS, WEIGHTS, TinyFederation, tiny_federation
from tiny_models import tiny_model
from transformers import PreTrainedModel

import protoken
from protoken.banks.bank import Rounds
from protoken.errors import ArgumentError
from protoken.ledger import ClientUpdate, Ledger, LowRank
from protoken.methods.shapley import exact_shapley, sampled_shapley, shapley_by_order

PROMPT = [5, 17, 42, 8, 60, 33, 21]
VALUES = ("aumann_shapley", "shapley", "paired_shapley")


@pytest.fixture(scope="module", params=["llama", "smollm"])
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("axioms"), request.param, rounds=2)


def run(federation: TinyFederation, **arguments) -> protoken.Trace:
    return protoken.trace(federation.model, PROMPT, **{"max_new_tokens": 6, "ledger": federation.path, **arguments})


def log_prob(model: PreTrainedModel, trace: protoken.Trace) -> torch.Tensor:
    """The response's log-probability per token, computed the plain way."""
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, len(trace.prompt_ids) - 1 :].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(trace.prompt_ids) :, None])[:, 0]


def at(federation: TinyFederation, members: set[str], rounds: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """start + sum over members of rho_k delta_k, straight from the ledger."""
    records = [federation.ledger.round(number) for number in rounds]
    weights = {}
    for name in records[0].parameters:
        value = federation.model.get_parameter(name).detach().clone()
        for record in records:
            value -= record.change(name)
            for client in record.clients:
                if client.client in members:
                    value += client.weight * record.delta(client.client, name)
        weights[name] = value
    return weights


def value_of(federation: TinyFederation, trace: protoken.Trace, members: set[str]) -> torch.Tensor:
    """v(S) by a copy of the model that really holds those weights."""
    other = tiny_model(federation.path.name.removesuffix("-ledger"))
    other.load_state_dict(federation.model.state_dict())
    with torch.no_grad():
        for name, weight in at(federation, members, trace.info.rounds).items():
            other.get_parameter(name).copy_(weight)
    return log_prob(other, trace)


@pytest.mark.parametrize("rounds", ["last", "all"])
def test_shapley_equals_its_definition(federation: TinyFederation, rounds: str) -> None:
    trace = run(federation, method="shapley", rounds=rounds)
    v = {frozenset(s): value_of(federation, trace, set(s)) for size in range(5) for s in combinations(CLIENTS, size)}
    for k, client in enumerate(CLIENTS):
        expected = sum(
            math.factorial(len(s)) * math.factorial(3 - len(s)) / 24 * (v[s | {client}] - v[s])
            for s in v
            if client not in s
        )
        np.testing.assert_allclose(trace.token_scores[:, k], expected, atol=2e-5)
    assert trace.change == pytest.approx(float((log_prob(federation.model, trace) - v[frozenset()]).sum()), abs=1e-4)


@pytest.mark.parametrize("method", VALUES)
@pytest.mark.parametrize("rounds", ["last", "all"])
def test_values_are_complete(federation: TinyFederation, method: str, rounds: str) -> None:
    trace = run(federation, method=method, rounds=rounds, nodes=8 if method == "aumann_shapley" else None)
    start = value_of(federation, trace, set()).sum()
    change = float(log_prob(federation.model, trace).sum() - start)
    assert trace.change == pytest.approx(change, abs=1e-4)
    assert abs(trace.change) > 0.1
    assert abs(trace.residual) < 0.01 * abs(trace.change)


def test_completeness_improves_with_nodes(federation: TinyFederation) -> None:
    residuals = [abs(run(federation, method="aumann_shapley", rounds="all", nodes=m).residual) for m in (1, 2, 8)]
    assert residuals[2] < residuals[1] < residuals[0]
    assert residuals[2] < 1e-4


@pytest.mark.parametrize("rounds", ["last", 2, "all", [1, 2]])
def test_as_many_nodes_as_completeness_takes(federation: TinyFederation, rounds: Rounds) -> None:
    trace = run(federation, method="aumann_shapley", rounds=rounds)
    assert 2 <= trace.info.settings["nodes"] == trace.info.settings["gradients"] <= 8
    assert abs(trace.residual) < 0.01 * abs(trace.change)


@pytest.mark.parametrize("method", VALUES)
def test_null_client_scores_exactly_zero(federation: TinyFederation, method: str) -> None:
    assert run(federation, method=method).totals[CLIENTS.index("null")] == 0


def test_reverse_and_forward_way_agree(federation: TinyFederation) -> None:
    reverse = run(federation, method="aumann_shapley", nodes=3)
    forward = run(federation, method="aumann_shapley", nodes=3, way="forward")
    assert reverse.token_scores is None
    np.testing.assert_allclose(forward.totals, reverse.totals, atol=1e-5 * np.abs(forward.token_scores).sum())
    start = value_of(federation, forward, set())
    change = (log_prob(federation.model, forward) - start).numpy()
    np.testing.assert_allclose(forward.token_scores.sum(1) + forward.token_residual, change, atol=1e-4)


def test_layers_add_up(federation: TinyFederation) -> None:
    trace = run(federation, method="aumann_shapley")
    np.testing.assert_allclose(trace.layer_totals.sum(0), trace.totals, atol=1e-9)
    assert len(trace.info.layers) == len(federation.ledger.round("last").parameters)


def test_chosen_blocks_equal_a_game_of_these_layers_alone(federation: TinyFederation, tmp_path: Path) -> None:
    """Blocks below the chosen ones are not run again: the same values as with a ledger that holds nothing else."""
    record = federation.ledger.round("last")
    names = [n for n in record.parameters if ".3.mlp." in n or ".2.mlp." in n]
    ledger = Ledger.create(tmp_path / "part")
    end = {n: federation.model.get_parameter(n).detach() for n in names}
    updates = [
        ClientUpdate(c.client, c.weight, delta={n: record.delta(c.client, n) for n in names}) for c in record.clients
    ]
    ledger.commit_round({n: end[n] - record.change(n) for n in names}, end, updates)
    for method in ("aumann_shapley", "shapley"):
        chosen = run(federation, method=method, blocks=2, layers=["mlp.*"])
        alone = run(federation, method=method, ledger=tmp_path / "part")
        assert set(chosen.info.layers) == set(alone.info.layers)
        np.testing.assert_allclose(chosen.totals, alone.totals, atol=1e-5)


def commit(
    folder: Path, model: PreTrainedModel, deltas: dict[str, dict[str, torch.Tensor | LowRank]], weights: list[float]
) -> Path:
    """One round of these updates; the model becomes its aggregate."""
    names = list(next(iter(deltas.values())))
    base = {n: model.get_parameter(n).detach().clone() for n in names}
    dense = [{n: v.dense() if isinstance(v, LowRank) else v for n, v in d.items()} for d in deltas.values()]
    with torch.no_grad():
        for n in names:
            model.get_parameter(n).add_(sum(w * d[n] for w, d in zip(weights, dense, strict=True)))
    ledger = Ledger.create(folder)
    updates = [ClientUpdate(c, w, delta=d) for (c, d), w in zip(deltas.items(), weights, strict=True)]
    ledger.commit_round(base, {n: model.get_parameter(n).detach().clone() for n in names}, updates)
    return folder


NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.2.self_attn.o_proj.weight", "model.norm.weight")


def random_update(seed: int, scale: float = 0.05) -> dict[str, torch.Tensor]:
    """An update of a first-block matrix, a deep one, and a norm's vector."""
    generator = torch.Generator().manual_seed(seed)
    model = tiny_model("llama")
    return {n: torch.randn(model.get_parameter(n).shape, generator=generator) * scale for n in NAMES}


def test_split_client_scores_as_the_sum_of_its_parts(tmp_path: Path) -> None:
    a, b, c = (random_update(seed) for seed in (1, 2, 3))
    whole, parts = tiny_model("llama"), tiny_model("llama")
    joined = {n: 0.25 * a[n] + 0.75 * b[n] for n in NAMES}
    one = commit(tmp_path / "one", whole, {"ab": joined, "c": c}, [0.6, 0.4])
    two = commit(tmp_path / "two", parts, {"a": a, "b": b, "c": c}, [0.15, 0.45, 0.4])
    arguments = {"method": "aumann_shapley", "max_new_tokens": 6, "nodes": 4}
    left = protoken.trace(whole, PROMPT, ledger=one, **arguments)
    right = protoken.trace(parts, PROMPT, ledger=two, **arguments)
    size = np.abs(left.totals).sum()
    assert abs(left.totals[0] - right.totals[:2].sum()) < 1e-6 * max(size, 1)
    assert abs(left.totals[1] - right.totals[2]) < 1e-6 * max(size, 1)


@pytest.mark.parametrize("method", [*VALUES, "leave_one_out"])
def test_equal_updates_score_equally(tmp_path: Path, method: str) -> None:
    model, update = tiny_model("llama"), random_update(4)
    path = commit(tmp_path / "twins", model, {"x": update, "y": random_update(5), "z": update}, [0.3, 0.4, 0.3])
    trace = protoken.trace(model, PROMPT, ledger=path, method=method, max_new_tokens=6)
    assert trace.totals[0] == pytest.approx(trace.totals[2], abs=2e-6)
    assert abs(trace.totals[0] - trace.totals[1]) > 1e-3


@pytest.mark.parametrize("method", VALUES)
def test_scores_do_not_depend_on_the_factors_gauge(tmp_path: Path, method: str) -> None:
    """(c A, B / c) is the same update as (A, B)."""
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.1.self_attn.o_proj.weight"
    pairs = [
        (torch.randn(3, 48, generator=generator) * 0.2, torch.randn(48, 3, generator=generator) * 0.2) for _ in range(2)
    ]
    found = []
    for place, factor in enumerate((1.0, 8.0)):
        model = tiny_model("llama")
        deltas = {c: {name: LowRank(a * factor, b / factor, 0.5)} for c, (a, b) in zip("pq", pairs, strict=True)}
        dense = [d[name].dense() for d in deltas.values()]
        base = {name: model.get_parameter(name).detach().clone()}
        with torch.no_grad():
            model.get_parameter(name).add_(0.5 * dense[0] + 0.5 * dense[1])
        ledger = Ledger.create(tmp_path / str(place))
        end = {name: model.get_parameter(name).detach().clone()}
        ledger.commit_round(base, end, [ClientUpdate(c, 0.5, delta=d) for c, d in deltas.items()])
        found.append(protoken.trace(model, PROMPT, ledger=ledger, method=method, max_new_tokens=6).totals)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0]).max() > 1e-3


def test_what_the_server_did_beyond_the_mean_is_the_residual(tmp_path: Path) -> None:
    model = tiny_model("llama")
    name = NAMES[1]
    base = {name: model.get_parameter(name).detach().clone()}
    deltas = [random_update(seed)[name] for seed in (6, 7)]
    with torch.no_grad():
        model.get_parameter(name).add_(0.5 * deltas[0])  # the server dropped the second client
    ledger = Ledger.create(tmp_path / "ledger")
    updates = [ClientUpdate(c, 0.5, delta={name: d}) for c, d in zip("ab", deltas, strict=True)]
    ledger.commit_round(base, {name: model.get_parameter(name).detach().clone()}, updates, rule="robust")
    trace = protoken.trace(model, PROMPT, ledger=ledger, method="aumann_shapley", nodes=6, max_new_tokens=6)
    assert trace.totals[0] == pytest.approx(trace.change, abs=1e-4)
    assert trace.residual == pytest.approx(-trace.totals[1], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(tmp_path: Path, dtype: torch.dtype) -> None:
    """bf16 weights would swallow most updates: the game is played in fp32. Double precision stays double."""
    federation = tiny_federation(tmp_path, dtype=dtype)
    before = {n: p.detach().clone() for n, p in federation.model.named_parameters()}
    trace = run(federation, method="aumann_shapley", nodes=6)
    exact = run(federation, method="shapley")
    assert [t.id for t in trace.token_list] == [t.id for t in exact.token_list]
    assert abs(trace.residual) < (2e-2 if dtype == torch.bfloat16 else 1e-4) * np.abs(trace.totals).sum()
    assert np.corrcoef(trace.totals, exact.totals)[0, 1] > 0.99
    assert all(torch.equal(p, before[n]) and p.dtype == dtype for n, p in federation.model.named_parameters())


def test_weights_and_rounds_are_the_ledgers(federation: TinyFederation) -> None:
    trace = run(federation, method="shapley")
    assert trace.weights.tolist() == list(WEIGHTS)
    assert trace.info.rounds == (2,)
    assert trace.info.settings["evaluations"] == 2**3 + 1  # the null client is left out


def test_exact_values_of_a_majority_game() -> None:
    """Three players, two needed: a third each, whatever the tokens' scale."""
    scale = torch.tensor([1.0, -2.0], dtype=torch.float64)
    values = exact_shapley(lambda mask: scale * (mask.bit_count() >= 2), 3)
    torch.testing.assert_close(values, scale[:, None].expand(2, 3) / 3)


def test_paired_orders_are_exact_for_pairwise_games() -> None:
    generator = torch.Generator().manual_seed(0)
    pairwise = torch.randn(6, 6, generator=generator, dtype=torch.float64)

    def value(mask: int) -> torch.Tensor:
        x = torch.tensor([(mask >> k) & 1 for k in range(6)], dtype=torch.float64)
        return (x @ pairwise @ x)[None]

    estimate, errors = sampled_shapley(value, 6, 2, seed=1)
    torch.testing.assert_close(estimate, exact_shapley(value, 6))
    assert float(errors.max()) < 1e-12


def test_parts_by_order_sum_to_the_exact_values() -> None:
    table = torch.randn(16, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    table[0] = 0
    parts = shapley_by_order(lambda mask: table[mask], 4)
    assert parts.shape == (4, 3, 4)
    torch.testing.assert_close(parts.sum(0), exact_shapley(lambda mask: table[mask], 4))
    torch.testing.assert_close(parts[0], torch.stack([table[1 << k] for k in range(4)], dim=1))
    pair = (table[3] - table[1] - table[2]) / 2
    others = sum((table[1 | 1 << k] - table[1] - table[1 << k]) / 2 for k in (2, 3))
    torch.testing.assert_close(parts[1, :, 0], pair + others)


def test_a_game_of_three_has_its_value_in_the_third_order_alone() -> None:
    parts = shapley_by_order(lambda mask: torch.tensor([6.0], dtype=torch.float64) * (mask & 7 == 7), 4)
    torch.testing.assert_close(parts[2], torch.tensor([[2.0, 2.0, 2.0, 0.0]], dtype=torch.float64))
    assert not parts[[0, 1, 3]].any()
    with pytest.raises(ArgumentError, match="clients"):
        shapley_by_order(lambda mask: torch.zeros(1), 21)
