"""Mixtures of experts, routers, embeddings and heads: every way against the oracle, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from oracle import equals_oracle
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import MIXTURES, tiny_model
from tolerances import close

import protoken
from protoken import errors
from protoken.models.architectures import architecture_of
from protoken.models.families import FAMILIES, list_models
from protoken.models.layers import layer_of

PROMPTS = [[5, 17, 42, 8, 60, 33, 21], [11, 9], [70, 3, 88, 14]]
WAYS = {
    "local": {},
    "forward": {"blocks": 3},
    "reverse": {"blocks": 3, "way": "reverse"},
    "every layer, forward": {"blocks": 2, "layers": ["*"]},
    "every layer, reverse": {"blocks": 2, "layers": ["*"], "way": "reverse"},
}
# Untied, tied with a scaled embedding, tied and narrow, tied behind learned positions, tied behind a norm.
ENDS = ("llama", "gemma3", "smollm", "gpt2", "bloom", "mixtral")


@pytest.fixture(scope="module", params=tuple(MIXTURES))
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("mixture"), request.param)


@pytest.fixture(scope="module", params=ENDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    """A federation that trained the embeddings and the head, too."""
    return tiny_federation(tmp_path_factory.mktemp("whole"), request.param, ends=True)


def run(federation: TinyFederation, **arguments) -> protoken.Trace:
    arguments = {"max_new_tokens": 6, "do_sample": True, "seed": 2, "ledger": federation.path, **arguments}
    return protoken.trace(federation.model, PROMPTS[0], **arguments)


@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
@pytest.mark.parametrize("way", WAYS)
def test_mixtures_equal_the_oracle(mixture: TinyFederation, way: str, objective: str) -> None:
    trace = run(mixture, objective=objective, **WAYS[way])
    equals_oracle(mixture.model, mixture.ledger, trace)
    assert trace.conservation_residual < 1e-5


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_every_backend_scores_experts(mixture: TinyFederation, backend: str) -> None:
    equals_oracle(mixture.model, mixture.ledger, run(mixture, backend=backend))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_implementation_of_the_model_does_not_matter(mixture: TinyFederation, implementation: str) -> None:
    before = mixture.model.get_experts_implementation()
    expected = run(mixture, do_sample=False)
    mixture.model.set_experts_implementation(implementation)
    try:
        found = run(mixture, do_sample=False)
        assert mixture.model.get_experts_implementation() == {"": implementation}
    finally:
        mixture.model.set_experts_implementation(before)
    close(torch.tensor(found.token_scores), torch.tensor(expected.token_scores), torch.float32, factor=3)


def test_left_padded_batch_equals_each_prompt_alone(mixture: TinyFederation) -> None:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    with protoken.tracing(mixture.model, ledger=mixture.path, blocks=2) as tape:
        mixture.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for traced, prompt in zip(tape, PROMPTS, strict=True):
        alone = protoken.trace(mixture.model, prompt, ledger=mixture.path, blocks=2, max_new_tokens=4, do_sample=False)
        assert [t.id for t in traced.token_list] == [t.id for t in alone.token_list]
        close(torch.tensor(traced.token_scores), torch.tensor(alone.token_scores), torch.float32, factor=3)


def test_model_is_left_as_it_was_found(mixture: TinyFederation) -> None:
    def state() -> list[object]:
        modules = [(n, sorted(m.__dict__), len(m._forward_hooks)) for n, m in mixture.model.named_modules()]
        return [modules, mixture.model.config.to_dict(), mixture.model.get_experts_implementation()]

    before = state()
    for arguments in WAYS.values():
        run(mixture, **arguments)
        assert state() == before
    with pytest.raises(errors.LayerError, match="experts"):
        run(mixture, layers=["mlp.experts.sideways"])
    assert state() == before


def test_published_method_takes_experts(mixture: TinyFederation) -> None:
    paper, fast = run(mixture, method="paper"), run(mixture, objective="logit")
    centred = paper.token_scores - paper.token_scores.mean(1, keepdims=True)
    unweighted = fast.token_scores / fast.weights
    expected = torch.tensor(unweighted - unweighted.mean(1, keepdims=True))
    close(torch.tensor(centred), expected, torch.float32, factor=100)


def test_blocks_without_experts_take_their_own_last_layer() -> None:
    found = architecture_of(tiny_model("qwen3_moe"))
    assert [found.final_of(number) for number in range(4)] == ["mlp.down_proj", "mlp.experts.down_proj"] * 2


@pytest.mark.parametrize("way", ["forward", "reverse"])
@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
def test_embeddings_and_head_equal_the_oracle(whole: TinyFederation, way: str, objective: str) -> None:
    found = architecture_of(whole.model)
    for patterns in ([found.head_name], [f"{found.embeddings_name[:-1]}?"], [found.embeddings_name, found.head_name]):
        trace = run(whole, layers=patterns, objective=objective, way=way)
        assert trace.token_scores is not None or way == "reverse"
        equals_oracle(whole.model, whole.ledger, trace)
        assert trace.conservation_residual < 1e-5


def test_untied_head_is_scored_locally(tmp_path) -> None:
    federation = tiny_federation(tmp_path, "llama", ends=True)
    trace = run(federation, layers=["lm_head"])
    assert (trace.info.way, trace.info.layers) == ("local", ("lm_head",))
    equals_oracle(federation.model, federation.ledger, trace)


def test_tied_head_is_one_tensor_that_acts_twice(tmp_path) -> None:
    federation = tiny_federation(tmp_path, "smollm", ends=True)
    names = ("model.embed_tokens", "lm_head")
    assert [n for n in federation.ledger.round(1).parameters if "embed" in n or "head" in n] == [f"{names[0]}.weight"]
    traces = [run(federation, layers=[name], way="reverse") for name in names]
    for trace in traces:
        assert trace.info.layers == names
    # Together they are what moving the one tensor does: the slope of the objective along a client's update.
    delta = federation.ledger.round(1).delta("ada", f"{names[0]}.weight")
    expected = _slope(federation, traces[0], delta) * 0.4
    assert traces[0].totals[0] == pytest.approx(expected, rel=2e-3)


def _slope(federation: TinyFederation, trace: protoken.Trace, delta: torch.Tensor) -> float:
    """d/d eps of the response's log-probability when eps * delta is added to the shared tensor, by differences."""
    model = federation.model.double()
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    table = model.get_input_embeddings().weight
    values = []
    with torch.no_grad():
        for step in (0.01, -0.02):
            table.add_(step * delta.double())
            logits = model(ids[:, :-1]).logits[0, len(trace.prompt_ids) - 1 :].log_softmax(-1)
            values.append(logits.gather(-1, ids[0, len(trace.prompt_ids) :, None]).sum())
        table.add_(0.01 * delta.double())
    return float(values[0] - values[1]) / 0.02


def test_pattern_that_names_nothing_lists_what_there_is(tmp_path) -> None:
    federation = tiny_federation(tmp_path, "mixtral")
    with pytest.raises(errors.LayerError, match=r"mlp\.experts\.down_proj.*model\.embed_tokens or lm_head"):
        run(federation, layers=["no_such_layer"])


def test_star_means_the_blocks_and_not_their_ends(tmp_path) -> None:
    federation = tiny_federation(tmp_path, "llama")
    assert not {"lm_head", "model.embed_tokens"} & set(run(federation, layers=["*"]).info.layers)


def test_list_of_models_is_the_table() -> None:
    rows = list_models()
    assert [row.family for row in rows] == sorted(FAMILIES)
    assert {row.family for row in rows if row.experts} == {"mixtral", "qwen3_moe", "gpt_oss"}
    for family in ("mixtral", "gpt_oss", "qwen2", "gpt2", "opt"):
        (row,) = (row for row in rows if row.family == family)
        found = architecture_of(tiny_model(family))
        assert (row.blocks, row.out_projection, row.mlp_final) == (
            found.blocks_name,
            found.out_projection,
            found.mlp_final,
        )


def test_unknown_family_says_what_was_found() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4))])

    model = tiny_model("llama")
    model.model.layers = Odd().layers
    model.model.config.model_type = "odd"
    with pytest.raises(errors.ModelError, match=r"family 'odd' with linear layers \['0'\]"):
        architecture_of(model)
    model.model.layers = torch.nn.Identity()
    with pytest.raises(errors.ModelError, match=r"ModuleList.*embed_tokens: Embedding"):
        architecture_of(model)


def test_experts_over_several_processes_are_refused(tmp_path) -> None:
    federation = tiny_federation(tmp_path, "mixtral")
    federation.model.model.layers[3].mlp.experts._is_expert_parallel = True
    with pytest.raises(errors.GenerationError, match="parallel"):
        run(federation)


def test_layers_know_their_shape_as_recorded() -> None:
    model = tiny_model("gpt_oss")
    for name, parameter in model.named_parameters():
        if name.endswith(("down_proj", "gate_up_proj")):
            assert layer_of(model, name).shape == tuple(parameter.shape)
    with pytest.raises(errors.LayerError, match="no_such"):
        layer_of(model, "model.no_such")
    with pytest.raises(errors.LayerError, match="RMSNorm"):
        layer_of(model, "model.norm")
