"""Leave-one-out, counterfactuals and baselines against plain computations; and a model that comes back untouched."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_federation import CLIENTS, WEIGHTS, TinyFederation, tiny_federation
from tiny_models import CONFIGS, OTHER_FAMILIES, tiny_model

import protoken
from protoken.errors import ArgumentError, LayerError, LedgerMismatchError, ModelError, UnknownClientError
from protoken.ledger import ClientUpdate, Ledger
from protoken.methods.baselines import BASELINES
from protoken.methods.game import Game
from protoken.methods.leave_one_out import leave_one_out_scores
from protoken.methods.updates import read_updates
from protoken.methods.weights import at_weights, shift_without
from protoken.models.architectures import architecture_of
from protoken.ways.relevance import Response

PROMPT = [5, 17, 42, 8, 60, 33, 21]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"), rounds=2)


def run(federation: TinyFederation, **arguments) -> protoken.Trace:
    return protoken.trace(federation.model, PROMPT, **{"max_new_tokens": 6, "ledger": federation.path, **arguments})


def game_of(federation: TinyFederation, tokens: int = 5) -> Game:
    ids = torch.tensor([[*PROMPT, *range(20, 20 + tokens)]])
    record = federation.ledger.round("last")
    updates = read_updates(federation.ledger, federation.model, [record.number], list(record.parameters))
    return Game(federation.model, architecture_of(federation.model), Response(ids, len(PROMPT)), updates)


@pytest.mark.parametrize("family", [*CONFIGS, *OTHER_FAMILIES])
def test_gradient_and_tangent_agree_in_every_family(tmp_path: Path, family: str) -> None:
    """sum_t df_t/d eps along a client's update, by forward mode, = <gradient, delta>; also where blocks are reused."""
    federation = tiny_federation(tmp_path, family)
    record = federation.ledger.round("last")
    late = [n for n in record.parameters if ".3." in n]
    for names in (list(record.parameters), late):
        ids = torch.tensor([[*PROMPT, 20, 21, 22]])
        updates = read_updates(federation.ledger, federation.model, [record.number], names)
        game = Game(federation.model, architecture_of(federation.model), Response(ids, len(PROMPT)), updates)
        weights = game.on_path(0.3)
        values, gradient = game.gradient(weights)
        by_gradient = sum(float((gradient[n].double() * updates.deltas[0][n].double()).sum()) for n in names)
        tangent = game.tangent(weights, updates.deltas[0])
        assert float(tangent.sum()) == pytest.approx(by_gradient, rel=1e-3, abs=2e-4 * float(tangent.abs().sum()))
        torch.testing.assert_close(game.value_at(weights), values, atol=1e-5, rtol=1e-5)


def without(federation: TinyFederation, absent: str, *, reaggregate: bool) -> torch.nn.Module:
    """The last round averaged again without a client, by hand."""
    other = tiny_model("llama")
    other.load_state_dict(federation.model.state_dict())
    record = federation.ledger.round("last")
    left = 1 - dict(zip(CLIENTS, WEIGHTS, strict=True))[absent] if reaggregate else 1.0
    with torch.no_grad():
        for name in record.parameters:
            kept = sum(c.weight / left * record.delta(c.client, name) for c in record.clients if c.client != absent)
            other.get_parameter(name).copy_(federation.model.get_parameter(name) - record.change(name) + kept)
    return other


def log_prob(model: torch.nn.Module, trace: protoken.Trace) -> np.ndarray:
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, len(trace.prompt_ids) - 1 :].double()
    return logits.log_softmax(-1).gather(1, ids[0, len(trace.prompt_ids) :, None])[:, 0].numpy()


def test_leave_one_out_is_the_server_without_a_client(llama: TinyFederation) -> None:
    trace = run(llama, method="leave_one_out")
    now = log_prob(llama.model, trace)
    for k, client in enumerate(CLIENTS):
        gone = log_prob(without(llama, client, reaggregate=True), trace)
        np.testing.assert_allclose(trace.token_scores[:, k], now - gone, atol=2e-5)


@pytest.mark.parametrize("reaggregate", [True, False])
def test_counterfactual_replays_the_response(llama: TinyFederation, reaggregate: bool) -> None:
    trace = run(llama)
    found = trace.counterfactual("ada", reaggregate=reaggregate)
    np.testing.assert_allclose(found.before, log_prob(llama.model, trace), atol=1e-5)
    np.testing.assert_allclose(found.after, log_prob(without(llama, "ada", reaggregate=reaggregate), trace), atol=2e-5)
    assert found.total == pytest.approx(float((found.before - found.after).sum()))
    assert found.response is None


def test_counterfactual_answers_anew(llama: TinyFederation) -> None:
    trace = run(llama, do_sample=True, seed=3)
    found = trace.counterfactual(["ada", "cleo"], generate=True)
    other = tiny_model("llama")
    other.load_state_dict(llama.model.state_dict())
    numbers = [llama.ledger.round("last").number]
    names = list(llama.ledger.round("last").parameters)
    with torch.no_grad():
        for name, shift in shift_without(llama.ledger, numbers, names, {"ada", "cleo"}).items():
            other.get_parameter(name).add_(shift)
    row = torch.tensor([PROMPT])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        ids = other.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=6, do_sample=True, pad_token_id=0)
    assert list(found.response_ids) == ids[0, len(PROMPT) :].tolist()
    assert found.without == ("ada", "cleo")


def test_removing_a_client_over_all_rounds(llama: TinyFederation) -> None:
    """Each round is averaged again without it; removing everybody leaves the base model."""
    trace = run(llama, rounds="all", method="leave_one_out")
    base = trace.counterfactual(CLIENTS)
    assert base.rounds == (1, 2)
    start = run(llama, rounds="all", method="shapley")
    assert base.total == pytest.approx(start.change, abs=1e-4)


@pytest.mark.parametrize(
    "rounds", [({"a": 0.5, "b": 0.3, "c": 0.2},) * 3, ({"a": 0.6, "b": 0.4}, {"b": 0.1, "c": 0.9})]
)
@pytest.mark.parametrize("reaggregate", [True, False])
def test_leave_one_out_over_rounds_is_each_round_without_the_client(
    tmp_path: Path, rounds: tuple[dict[str, float], ...], reaggregate: bool
) -> None:
    """Rounds of equal weights take a short way, others are read one by one; both are `shift_without`."""
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(5)
    names = [name for name, _ in model.named_parameters() if ".3." in name]
    ledger = Ledger.create(tmp_path / "ledger", model="llama")
    for weights in rounds:
        base = {name: model.get_parameter(name).detach().clone() for name in names}
        updates = [
            ClientUpdate(k, w, delta={n: 0.02 * torch.randn(v.shape, generator=generator) for n, v in base.items()})
            for k, w in weights.items()
        ]
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).add_(sum(u.weight * u.delta[name] for u in updates))
        ledger.commit_round(base, {name: model.get_parameter(name).detach().clone() for name in names}, updates)
    numbers = list(range(1, len(rounds) + 1))
    updates = read_updates(ledger, model, numbers, names)
    response = Response(torch.tensor([[*PROMPT, 20, 21, 22]]), len(PROMPT))
    game = Game(model, architecture_of(model), response, updates)
    found = leave_one_out_scores(game, ledger, reaggregate=reaggregate)
    assert updates.clients == ("a", "b", "c")
    for k, client in enumerate(updates.clients):
        shift = shift_without(ledger, numbers, names, {client}, reaggregate=reaggregate)
        gone = game.value_at({name: value + shift[name] for name, value in game.end.items()})
        torch.testing.assert_close(found.tokens[:, k], game.value_at_end() - gone, atol=2e-5, rtol=0)


def test_counterfactual_of_a_loaded_trace_needs_its_model(llama: TinyFederation, tmp_path: Path) -> None:
    trace = run(llama)
    trace.save(tmp_path / "trace.json")
    loaded = protoken.Trace.load(tmp_path / "trace.json")
    assert loaded == trace
    with pytest.raises(ModelError, match="model"):
        loaded.counterfactual("ada")
    again = loaded.counterfactual("ada", model=llama.model, ledger=llama.path)
    np.testing.assert_array_equal(again.after, trace.counterfactual("ada").after)
    with pytest.raises(UnknownClientError, match="eve"):
        trace.counterfactual("eve")
    with pytest.raises(ArgumentError, match="without"):
        trace.counterfactual([])


def test_traces_do_not_keep_their_model_alive(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    trace = run(federation)
    del federation
    gc.collect()
    with pytest.raises(ModelError, match="gone"):
        trace.counterfactual("ada")


def test_settings_and_standard_errors_survive_saving(llama: TinyFederation, tmp_path: Path) -> None:
    trace = run(llama, method="shapley", pairs=3, seed=1)
    assert trace.standard_errors is not None
    assert trace.info.settings["pairs"] == 3
    trace.save(tmp_path / "trace.json")
    assert protoken.Trace.load(tmp_path / "trace.json") == trace


# ---- the model is left as it was ---------------------------------------------------------------------------


def snapshot(model: torch.nn.Module) -> dict[str, tuple[int, torch.Tensor, bool]]:
    return {n: (p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


@pytest.mark.parametrize("frozen", [False, True])
def test_every_method_leaves_the_model_untouched(llama: TinyFederation, frozen: bool) -> None:
    llama.model.requires_grad_(not frozen)
    try:
        before = snapshot(llama.model)
        for method in ("aumann_shapley", "paired_shapley", "leave_one_out", "cosine", "activation_only"):
            run(llama, method=method).counterfactual("bob", generate=True)
        run(llama, method="aumann_shapley", way="forward", nodes=2)
        after = snapshot(llama.model)
        for name, (pointer, value, wants) in before.items():
            assert after[name][0] == pointer
            assert torch.equal(after[name][1], value)
            assert after[name][2] == wants
        assert all(p.grad is None for p in llama.model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.model.modules())
    finally:
        llama.model.requires_grad_(True)


@pytest.mark.parametrize("family", ["smollm", "llama", "gpt2", "mixtral"])
def test_a_model_at_other_weights_is_another_one(family: str) -> None:
    model, same = tiny_model(family), tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    shift = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    ids, before = torch.arange(3, 15)[None], snapshot(model)
    with torch.no_grad():
        for name, parameter in same.named_parameters():
            parameter.add_(shift[name])
        moved = at_weights(model, shift)
        assert moved is not model
        assert torch.equal(moved(ids).logits, same(ids).logits)
        assert not torch.equal(model(ids).logits, same(ids).logits)
    assert all(torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_where_there_is_no_twin_nobodys_weights_are_changed() -> None:
    model = tiny_model("llama")
    head = model.lm_head
    head.forward = lambda hidden: torch.nn.functional.linear(hidden, head.weight)
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"a forward on lm_head that is bound to it"):
        at_weights(model, {"lm_head.weight": torch.ones(97, 48)})
    assert all(torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_a_bad_shape_is_refused_and_nothing_moves() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    shift = {"model.norm.weight": torch.ones(48), "lm_head.weight": torch.ones(2, 2)}
    with pytest.raises(LedgerMismatchError, match="lm_head"):
        at_weights(model, shift)
    assert all(torch.equal(p, before[n][1]) for n, p in model.named_parameters())


# ---- baselines ---------------------------------------------------------------------------------------------


def full_ledger(folder: Path, family: str) -> TinyFederation:
    """Every parameter on record, the head too."""
    model = tiny_model(family)
    names = [name for name, _ in model.named_parameters()]
    base = {n: model.get_parameter(n).detach().clone() for n in names}
    generator = torch.Generator().manual_seed(0)
    deltas = [{n: torch.randn(p.shape, generator=generator) * 0.01 for n, p in base.items()} for _ in range(3)]
    weights = (0.5, 0.3, 0.2)
    with torch.no_grad():
        for n in names:
            model.get_parameter(n).add_(sum(w * d[n] for w, d in zip(weights, deltas, strict=True)))
    ledger = Ledger.create(folder / "full")
    updates = [ClientUpdate(c, w, delta=d) for c, w, d in zip("abc", weights, deltas, strict=True)]
    ledger.commit_round(base, {n: model.get_parameter(n).detach().clone() for n in names}, updates)
    return TinyFederation(model, folder / "full")


@pytest.fixture(scope="module", params=["llama", "smollm", "gpt2"])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return full_ledger(tmp_path_factory.mktemp("full"), request.param)


@pytest.mark.parametrize("method", BASELINES)
def test_baselines_score_and_save(full: TinyFederation, method: str, tmp_path: Path) -> None:
    trace = run(full, method=method)
    assert np.isfinite(trace.totals).all()
    assert len(set(trace.totals.tolist())) == 3
    assert trace.residual == trace.change == 0
    trace.save(tmp_path / "trace.json")
    assert protoken.Trace.load(tmp_path / "trace.json") == trace


@pytest.mark.parametrize("method", ["aumann_shapley", "shapley", "paired_shapley"])
def test_every_parameter_moves_embeddings_and_norms_too(full: TinyFederation, method: str) -> None:
    trace = run(full, method=method, nodes=6 if method == "aumann_shapley" else None)
    assert len(trace.info.layers) == len(list(full.model.named_parameters()))
    assert abs(trace.residual) < 0.01 * abs(trace.change) + 1e-4


def test_client_log_prob_is_the_clients_own_model(full: TinyFederation) -> None:
    trace = run(full, method="client_log_prob")
    record = full.ledger.round("last")
    for k, client in enumerate("abc"):
        shift = {n: record.delta(client, n) - record.change(n) for n in record.parameters}
        expected = log_prob(at_weights(full.model, shift), trace)
        np.testing.assert_allclose(trace.token_scores[:, k], expected, atol=2e-5)


def test_head_only_is_the_heads_part_of_first_order(full: TinyFederation) -> None:
    trace = run(full, method="head_only")
    game = game_of_trace(full, trace)
    taps = game.taps([architecture_of(full.model).head_name])
    ((x, _, grad),) = taps.values()
    record = full.ledger.round("last")
    name = next(n for n in record.parameters if n in ("lm_head.weight", "model.embed_tokens.weight") or "wte" in n)
    if "lm_head.weight" in record.parameters:
        name = "lm_head.weight"
    for k, client in enumerate(record.clients):
        expected = client.weight * torch.einsum("to,oi,ti->t", grad, record.delta(client.client, name), x)
        np.testing.assert_allclose(trace.token_scores[:, k], expected, atol=1e-5)


def game_of_trace(federation: TinyFederation, trace: protoken.Trace) -> Game:
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    record = federation.ledger.round("last")
    updates = read_updates(federation.ledger, federation.model, [record.number], list(record.parameters))
    response = Response(ids, len(trace.prompt_ids))
    return Game(federation.model, architecture_of(federation.model), response, updates)


def test_simple_baselines_are_what_they_say(llama: TinyFederation) -> None:
    assert run(llama, method="aggregation_weight").totals.tolist() == list(WEIGHTS)
    record = llama.ledger.round("last")
    norms = [
        c.weight * float(torch.stack([record.delta(c.client, n).norm() for n in record.parameters]).norm())
        for c in record.clients
    ]
    np.testing.assert_allclose(run(llama, method="update_norm").totals, norms, rtol=1e-5)
    chance = run(llama, method="chance")
    np.testing.assert_array_equal(chance.totals, run(llama, method="chance").totals)
    assert (np.abs(run(llama, method="cosine").totals) <= 1).all()
    assert run(llama, method="cosine").totals[CLIENTS.index("null")] == 0


def test_cosine_is_first_order_without_sizes(llama: TinyFederation) -> None:
    cosine = run(llama, method="cosine").totals[:3]
    first = run(llama, layers=["*"], blocks=4, way="reverse").totals[:3]
    norms = run(llama, method="update_norm").totals[:3]
    np.testing.assert_allclose(cosine / cosine[0], (first / norms) / (first[0] / norms[0]), rtol=1e-3)


def test_activation_only_leaves_the_gradient_out(llama: TinyFederation) -> None:
    trace = run(llama, method="activation_only")
    assert trace.info.layers == run(llama).info.layers
    game = game_of_trace(llama, trace)
    record = llama.ledger.round("last")
    expected = torch.zeros(6, 4)
    for layer, (x, _, _) in game.taps(trace.info.layers).items():
        for k, client in enumerate(record.clients):
            expected[:, k] += client.weight * (x @ record.delta(client.client, f"{layer}.weight").T).sum(1)
    np.testing.assert_allclose(trace.token_scores, expected, atol=1e-5)


# ---- the interface -----------------------------------------------------------------------------------------


def test_tracing_a_batch_with_a_replayed_method(llama: TinyFederation) -> None:
    prompts = torch.tensor([PROMPT, [0, 0, *PROMPT[2:]]])
    mask = (prompts != 0).long()
    with protoken.tracing(llama.model, ledger=llama.path, method="shapley") as tape:
        llama.model.generate(prompts, attention_mask=mask, max_new_tokens=5)
    alone = protoken.trace(llama.model, PROMPT[2:], ledger=llama.path, method="shapley", max_new_tokens=5)
    np.testing.assert_allclose(tape[1].token_scores, alone.token_scores, atol=2e-5)
    assert tape[0].counterfactual("ada").total != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "shap"}, "aumann_shapley"),
        ({"method": "shapley", "way": "reverse"}, "way"),
        ({"method": "aumann_shapley", "nodes": 0}, "nodes"),
        ({"method": "shapley", "pairs": -1}, "pairs"),
        ({"method": "shapley", "blocks": 9}, "blocks"),
    ],
)
def test_wrong_choices_are_named(llama: TinyFederation, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(llama, **arguments)


def test_head_only_needs_the_head_on_record(llama: TinyFederation) -> None:
    with pytest.raises(LayerError, match="head"):
        run(llama, method="head_only")


def test_other_weights_are_refused(llama: TinyFederation) -> None:
    with pytest.raises(LedgerMismatchError, match="digest"):
        protoken.trace(tiny_model("llama", seed=9), PROMPT, ledger=llama.path, method="shapley", max_new_tokens=3)


def test_a_response_of_one_token(llama: TinyFederation) -> None:
    plain = llama.model.generate(torch.tensor([PROMPT]), max_new_tokens=1, pad_token_id=0)
    trace = run(llama, method="aumann_shapley", eos_token_id=int(plain[0, -1]), max_new_tokens=4)
    assert len(trace.token_list) == 1
    assert run(llama, method="shapley", max_new_tokens=1).token_scores.shape == (1, 4)
