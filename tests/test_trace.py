"""`trace` end to end against the published algorithm (methods/paper.py), and the laws its scores obey."""

from __future__ import annotations

import pytest
import torch
from tiny_federation import CLIENTS, WEIGHTS, TinyFederation, tiny_federation
from tiny_models import CONFIGS, tiny_model
from tolerances import close

import protoken
from protoken.methods.paper import paper_scores

PROMPT = [5, 17, 42, 8, 60, 33, 21]
FAMILIES = tuple(CONFIGS)


@pytest.fixture(scope="module", params=FAMILIES)
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"), rounds=3)


def run(federation: TinyFederation, **arguments) -> protoken.Trace:
    arguments = {"max_new_tokens": 9, "ledger": federation.path, **arguments}
    return protoken.trace(federation.model, PROMPT, **arguments)


def oracle(federation: TinyFederation, trace: protoken.Trace) -> torch.Tensor:
    """rho_k * (deltas in the published double loop), [L, T, K]."""
    record = federation.ledger.round("last")
    deltas = {n: [record.delta(c, f"{n}.weight") for c in CLIENTS] for n in trace.info.layers}
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    scores, _ = paper_scores(federation.model, ids, len(trace.prompt_ids), deltas, trace.info.objective)
    return scores * torch.tensor(WEIGHTS, dtype=torch.float64)


@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_local_way_equals_the_oracle(federation: TinyFederation, objective: str, sampled: bool, backend: str) -> None:
    trace = run(federation, objective=objective, do_sample=sampled, seed=4, backend=backend)
    assert trace.info.way == "local"
    assert trace.info.backend == backend
    expected = oracle(federation, trace)
    close(torch.tensor(trace.token_scores), expected.sum(0), torch.float32)
    close(torch.tensor(trace.layer_totals), expected.sum(1), torch.float32)


@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_reverse_way_equals_the_oracle(federation: TinyFederation, objective: str, blocks: int) -> None:
    trace = run(federation, objective=objective, blocks=blocks, way="reverse", do_sample=True, seed=5)
    assert trace.token_scores is None
    close(torch.tensor(trace.layer_totals), oracle(federation, trace).sum(1), torch.float32)


@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
@pytest.mark.parametrize("blocks", [2, 4])
def test_forward_way_equals_the_oracle_per_token(federation: TinyFederation, objective: str, blocks: int) -> None:
    trace = run(federation, objective=objective, blocks=blocks, do_sample=True, seed=6)
    assert trace.info.way == "forward"
    close(torch.tensor(trace.token_scores), oracle(federation, trace).sum(0), torch.float32)
    assert trace.conservation_residual < 1e-5


@pytest.mark.parametrize("pattern", ["self_attn.v_proj", "mlp.gate_proj", "self_attn.o_proj"])
def test_forward_way_takes_any_linear_layer(federation: TinyFederation, pattern: str) -> None:
    trace = run(federation, layers=[pattern], way="forward")
    close(torch.tensor(trace.token_scores), oracle(federation, trace).sum(0), torch.float32)


def test_reverse_way_takes_any_linear_layer(federation: TinyFederation) -> None:
    trace = run(federation, blocks=2, layers=["self_attn.?_proj", "mlp.gate_proj"], way="reverse")
    assert len(trace.info.layers) == 10
    close(torch.tensor(trace.layer_totals), oracle(federation, trace).sum(1), torch.float32)


def test_double_precision_model_is_answered_in_double_precision(tmp_path) -> None:
    federation = tiny_federation(tmp_path, "qwen2", dtype=torch.float64)
    for way in ("local", "reverse"):
        trace = run(federation, way=way)
        # Rotary embeddings and norms of this family compute in fp32, in both computations alike.
        close(torch.tensor(trace.layer_totals), oracle(federation, trace).sum(1), torch.float64)


def test_paper_method_ranks_by_full_weights_of_the_raw_logit(federation: TinyFederation) -> None:
    paper = run(federation, method="paper")
    fast = run(federation, objective="logit")
    assert paper.info.objective == "logit"
    assert [token.id for token in paper.token_list] == [token.id for token in fast.token_list]
    # W_k = G_prev + delta_k and G_prev's part is the same for all: differences between clients are the deltas'.
    unweighted = fast.token_scores / fast.weights
    centred = paper.token_scores - paper.token_scores.mean(1, keepdims=True)
    expected = torch.tensor(unweighted - unweighted.mean(1, keepdims=True))
    close(torch.tensor(centred), expected, torch.float32, factor=30)


def test_null_client_scores_exactly_zero(federation: TinyFederation) -> None:
    assert (run(federation).token_scores[:, CLIENTS.index("null")] == 0).all()
    assert run(federation, blocks=3, way="reverse").totals[CLIENTS.index("null")] == 0


def test_scores_are_conserved(federation: TinyFederation) -> None:
    for trace in (run(federation), run(federation, blocks=4, way="reverse")):
        assert trace.conservation_residual < 1e-5
        assert trace.totals.sum() + trace.residual == pytest.approx(trace.change, rel=1e-9)
        assert abs(trace.change) > 1e-3


def test_a_wrong_delta_shows_in_the_residual(tmp_path) -> None:
    """The residual is measured, not defined away: record a round whose aggregate is not the weighted mean."""
    model = tiny_model("llama")
    names = ["model.layers.3.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"]
    base = {name: model.get_parameter(name).detach().clone() for name in names}
    deltas = [{name: torch.randn_like(p) * 0.01 for name, p in base.items()} for _ in range(2)]
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).add_(deltas[0][name] * 0.5)  # the second client was left out
    ledger = protoken.Ledger.create(tmp_path / "ledger")
    aggregate = {name: model.get_parameter(name).detach().clone() for name in names}
    ledger.commit_round(
        base,
        aggregate,
        [protoken.ClientUpdate(c, 0.5, delta=d) for c, d in zip("ab", deltas, strict=True)],
        rule="robust",
    )
    trace = protoken.trace(model, PROMPT, ledger=tmp_path / "ledger", max_new_tokens=5)
    assert trace.residual == pytest.approx(-trace.totals[1], rel=1e-4)
    assert trace.conservation_residual > 0.01


def test_client_order_does_not_change_scores(tmp_path) -> None:
    # Bit for bit the same updates under names that sort the other way round.
    names = {"ada": "z", "bob": "y", "cleo": "x", "null": "w"}
    first = tiny_federation(tmp_path / "a")
    record = first.ledger.round("last")
    model = first.model
    parameters = list(record.parameters)
    aggregate = {n: model.get_parameter(n).detach() for n in parameters}
    base = {n: aggregate[n] - record.change(n) for n in parameters}
    updates = [
        protoken.ClientUpdate(names[c.client], c.weight, delta={n: record.delta(c.client, n) for n in parameters})
        for c in reversed(record.clients)
    ]
    ledger = protoken.Ledger.create(tmp_path / "b")
    ledger.commit_round(base, aggregate, updates)
    a, b = run(first), run(first, ledger=tmp_path / "b")
    scores_a = {names[c.client]: c.score for c in a.clients}
    scores_b = {c.client: c.score for c in b.clients}
    assert scores_a == scores_b


def test_one_client_alone_is_the_whole_change(tmp_path) -> None:
    federation = tiny_federation(tmp_path, clients=("only",), weights=(1.0,))
    trace = run(federation)
    assert trace.clients[0].share == 1.0
    # Tokens' scores cancel in the sum, so closeness is measured against their size.
    assert abs(trace.totals[0] - trace.change) < 1e-5 * abs(trace.token_scores).sum()


def test_lineage_over_rounds_is_the_sum_of_the_rounds(llama: TinyFederation) -> None:
    every = run(llama, rounds="all")
    single = [run(llama, rounds=number) for number in (1, 2, 3)]
    assert every.info.rounds == (1, 2, 3)
    by_client = {c: sum(dict(zip(t.client_ids, t.totals, strict=True))[c] for t in single) for c in CLIENTS}
    for client, total in zip(every.client_ids, every.totals, strict=True):
        assert total == pytest.approx(by_client[client], rel=1e-4, abs=1e-6)
    assert every.change == pytest.approx(sum(t.change for t in single), rel=1e-4)


def test_generation_is_the_models_own(federation: TinyFederation) -> None:
    row = torch.tensor([PROMPT])
    arguments = {"attention_mask": torch.ones_like(row), "pad_token_id": 0, "max_new_tokens": 9}
    plain = federation.model.generate(row, **arguments)[0, len(PROMPT) :].tolist()
    assert [token.id for token in run(federation).token_list] == plain


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "seed": 1},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"guidance_scale": 1.5},
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.4},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_every_way_of_decoding_equals_the_oracle(llama: TinyFederation, mode: dict[str, object]) -> None:
    for blocks in (1, 2):
        trace = run(llama, blocks=blocks, **mode)
        close(torch.tensor(trace.token_scores), oracle(llama, trace).sum(0), torch.float32)


def test_seed_makes_sampling_repeatable_and_leaves_the_callers_generator_alone(llama: TinyFederation) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b = (run(llama, do_sample=True, seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.prompt_ids == b.prompt_ids
    assert [t.id for t in a.token_list] == [t.id for t in b.token_list]
    assert (a.token_scores == b.token_scores).all()


def test_spans_add_up_to_the_whole(llama: TinyFederation) -> None:
    trace = run(llama)
    parts = trace.span(0, 4).totals + trace.span(4, 9).totals
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(trace.totals))


def test_attach_serves_calls_without_a_ledger(llama: TinyFederation) -> None:
    protoken.attach(llama.model, llama.path)
    try:
        attached = protoken.trace(llama.model, PROMPT, max_new_tokens=9)
    finally:
        protoken.detach(llama.model)
    assert (attached.token_scores == run(llama).token_scores).all()
