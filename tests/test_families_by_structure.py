"""Families without a row in the table: their layers found by structure, every way against the oracle, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import equals_oracle
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import BY_STRUCTURE, tiny_model
from tolerances import close
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import protoken
from protoken import errors
from protoken.ledger import ClientUpdate, Ledger
from protoken.models.architectures import architecture_of
from protoken.models.families import FAMILIES

PROMPT = [5, 17, 42, 8, 60, 33, 21]
WAYS: dict[str, dict[str, Any]] = {
    "local": {},
    "local, logit": {"objective": "logit"},
    "forward": {"blocks": 4, "way": "forward"},
    "reverse": {"blocks": 4, "way": "reverse"},
    "reverse, logit": {"blocks": 4, "way": "reverse", "objective": "logit"},
    "reverse, by token": {"blocks": 4, "way": "reverse", "granularity": "token"},
}
# Block by block, out-projection and MLP-final layer.
LAYERS = {
    "deepseek_v3": [("self_attn.o_proj", "mlp.down_proj")] + [("self_attn.o_proj", "mlp.experts.down_proj")] * 3,
    "qwen2_moe": [("self_attn.o_proj", "mlp.experts.down_proj")] * 4,
    "phimoe": [("self_attn.o_proj", "mlp.experts.down_proj")] * 4,
    "afmoe": [("self_attn.o_proj", "mlp.down_proj")] + [("self_attn.o_proj", "mlp.experts.down_proj")] * 3,
    "lfm2": [("self_attn.out_proj", "feed_forward.w2"), ("conv.out_proj", "feed_forward.w2")] * 2,
    "bamba": [("self_attn.o_proj", "feed_forward.down_proj"), ("mamba.out_proj", "feed_forward.down_proj")] * 2,
    "qwen3_next": [("linear_attn.out_proj", "mlp.experts.down_proj"), ("self_attn.o_proj", "mlp.experts.down_proj")]
    * 2,
    "llama4": [
        ("self_attn.o_proj", "feed_forward.down_proj"),
        ("self_attn.o_proj", "feed_forward.shared_expert.down_proj"),
    ]
    * 2,
    "bart": [("self_attn.out_proj", "fc2")] * 4,
    "mamba": [("mixer.out_proj",)] * 4,
    "falcon_mamba": [("mixer.out_proj",)] * 4,
    "mamba2": [("mixer.out_proj",)] * 4,
    "nemotron_h": [("mixer.out_proj",), ("mixer.down_proj",), ("mixer.o_proj",), ("mixer.down_proj",)],
    "modernbert-decoder": [("attn.Wo", "mlp.Wo")] * 4,
}
ROUTERS = {"deepseek_v3": "mlp.gate", "phimoe": "mlp.router", "qwen2_moe": "mlp.gate"}


@pytest.fixture(scope="module", params=tuple(BY_STRUCTURE))
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param)


def decoding(federation: TinyFederation) -> dict[str, Any]:
    """Nemotron-H's cached steps differ from a whole pass by 1e-5, in double precision as well."""
    return {"use_cache": False} if federation.model.config.model_type == "nemotron_h" else {}


def run(federation: TinyFederation, **arguments: Any) -> protoken.Trace:
    arguments = {"max_new_tokens": 5, "do_sample": True, "seed": 2, "ledger": federation.path, **arguments}
    arguments = {**decoding(federation), **arguments}
    return protoken.trace(federation.model, PROMPT, **arguments)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_the_oracle(federation: TinyFederation, way: str) -> None:
    trace = run(federation, **WAYS[way])
    equals_oracle(federation.model, federation.ledger, trace)
    assert trace.conservation_residual < 1e-4


def test_stream_equals_trace(federation: TinyFederation) -> None:
    alone = run(federation, do_sample=False, seed=None)
    arguments = {"ledger": federation.path, "max_new_tokens": 5, "do_sample": False, **decoding(federation)}
    stream = protoken.stream(federation.model, PROMPT, **arguments)
    assert [token.id for token in stream] == [token.id for token in alone.token_list]
    close(torch.tensor(stream.trace.token_scores), torch.tensor(alone.token_scores), torch.float32)


@pytest.mark.parametrize("family", BY_STRUCTURE)
def test_layers_are_those_that_write_to_the_residual_stream(family: str) -> None:
    found = architecture_of(tiny_model(family))
    assert found.family not in FAMILIES
    assert [found.written_by(number) for number in range(4)] == LAYERS[family]


@pytest.mark.parametrize("family", ROUTERS)
@pytest.mark.parametrize("granularity", ["forward", "reverse"])
def test_routers_equal_the_oracle(tmp_path: Any, family: str, granularity: str) -> None:
    federation = tiny_federation(tmp_path, family)
    chosen: dict[str, Any] = {"layers": [ROUTERS[family]], "blocks": 3}
    chosen |= {"way": "forward"} if granularity == "forward" else {"way": "reverse", "granularity": "token"}
    trace = run(federation, **chosen)
    equals_oracle(federation.model, federation.ledger, trace)
    assert abs(trace.token_scores).sum() > 0


def test_router_that_is_widened_for_the_call_is_scored_in_half_precision(tmp_path: Any) -> None:
    federation = tiny_federation(tmp_path, "deepseek_v3", dtype=torch.bfloat16)
    chosen: dict[str, Any] = {"layers": ["mlp.gate"], "blocks": 3, "response": [9, 44, 12, 7]}
    forward, reverse = (
        protoken.trace(federation.model, PROMPT, ledger=federation.path, way=way, **chosen)
        for way in ("forward", "reverse")
    )
    assert abs(forward.totals).sum() > 0
    close(torch.tensor(forward.totals), torch.tensor(reverse.totals), torch.bfloat16, factor=3)


@pytest.mark.parametrize(
    "choice", [{"way": "forward"}, {"way": "reverse"}, {"way": "reverse", "granularity": "token"}], ids=str
)
def test_layer_that_never_runs_is_refused_and_not_scored_as_zero(tmp_path: Any, choice: dict[str, Any]) -> None:
    federation = tiny_federation(tmp_path, "bart")
    with pytest.raises(errors.GenerationError, match=r"encoder_attn.out_proj.*did not"):
        run(federation, blocks=3, layers=["encoder_attn.out_proj"], **choice)


def built(family: str, **settings: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()


SMALL = {"hidden_size": 48, "num_attention_heads": 4, "vocab_size": 97, "num_hidden_layers": 2, "pad_token_id": 0}


def test_attention_beside_a_state_space_model_is_refused() -> None:
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 96}
    model = built("falcon_h1", **SMALL, **mamba, num_key_value_heads=2, intermediate_size=80)
    with pytest.raises(errors.ModelError, match=r"blocks of one attention and an MLP.*mamba.in_proj"):
        architecture_of(model)


def test_experts_alone_in_the_last_block_are_refused() -> None:
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
    given = {**SMALL, **mamba, **experts, "num_key_value_heads": 2, "head_dim": 12, "topk_group": 1}
    given |= {"moe_shared_expert_intermediate_size": 32, "num_hidden_layers": 3}
    model = built("nemotron_h", **given, hybrid_override_pattern="M*E")
    with pytest.raises(errors.ModelError, match="experts alone in the last block of family 'nemotron_h'"):
        architecture_of(model)
    model = built("nemotron_h", **given, hybrid_override_pattern="ME*")
    found = architecture_of(model)
    assert [found.written_by(n) for n in range(3)] == [
        ("mixer.out_proj",),
        ("mixer.experts.down_proj",),
        ("mixer.o_proj",),
    ]


def federated(model: nn.Module, path: Any, names: list[str]) -> Any:
    ledger = Ledger.create(path)
    base = {name: model.get_parameter(name).detach().clone() for name in names}
    delta = {name: torch.ones_like(tensor) * 1e-2 for name, tensor in base.items()}
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).add_(delta[name])
    ledger.commit_round(
        base, {name: model.get_parameter(name).detach() for name in names}, [ClientUpdate("ada", 1.0, delta=delta)]
    )
    return path


@pytest.mark.parametrize("choice", [{}, {"way": "reverse", "blocks": 2}], ids=str)
def test_several_residual_streams_are_refused(tmp_path: Any, choice: dict[str, Any]) -> None:
    settings = {
        **SMALL,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 97,
        "head_dim": 12,
        "intermediate_size": [80, 80],
        "laurel_rank": 8,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    }
    model = built("gemma3n_text", **settings)
    found = architecture_of(model)
    names = [f"{found.layer_name(n, layer)}.weight" for n in range(2) for layer in found.written_by(n)]
    path = federated(model, tmp_path / "ledger", names)
    with pytest.raises(errors.ModelError, match="one residual stream"):
        protoken.trace(model, PROMPT, ledger=path, max_new_tokens=3, **choice)
    stream = protoken.stream(model, PROMPT, ledger=path, max_new_tokens=3)
    with pytest.raises(errors.ModelError, match="one residual stream"):
        next(stream)


def test_block_that_needs_those_below_is_refused_with_the_cause(tmp_path: Any) -> None:
    model = built("rwkv", hidden_size=48, attention_hidden_size=48, num_hidden_layers=2, vocab_size=97,
                  context_length=64, intermediate_size=80)  # fmt: skip
    names = ["rwkv.blocks.1.attention.output.weight", "rwkv.blocks.1.feed_forward.value.weight"]
    path = federated(model, tmp_path / "ledger", names)
    with pytest.raises(errors.GenerationError, match="blocks that run on the hidden states") as raised:
        protoken.trace(model, PROMPT, ledger=path, max_new_tokens=3)
    assert isinstance(raised.value.__cause__, ValueError)


def test_weight_that_acts_at_two_places_is_refused(tmp_path: Any) -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp.down_proj = model.model.layers[1].mlp.down_proj
    path = federated(model, tmp_path / "ledger", ["model.layers.1.mlp.down_proj.weight"])
    for choice in ({"blocks": 3}, {"blocks": 3, "way": "reverse"}):
        with pytest.raises(errors.LayerError, match=r"also acts as.*layers\.3\.mlp\.down_proj"):
            protoken.trace(model, PROMPT, ledger=path, layers=["*.1.mlp.down_proj"], max_new_tokens=3, **choice)


def test_layer_that_runs_twice_in_a_pass_is_refused(tmp_path: Any) -> None:
    model = tiny_model("llama")
    block = model.model.layers[2].mlp
    own = block.forward
    block.forward = lambda hidden: own(own(hidden))
    path = federated(model, tmp_path / "ledger", ["model.layers.2.mlp.down_proj.weight"])
    for choice in ({}, {"way": "reverse"}, {"way": "reverse", "granularity": "token"}):
        with pytest.raises(errors.GenerationError, match="runs several times"):
            protoken.trace(
                model, PROMPT, ledger=path, blocks=2, layers=["*.2.mlp.down_proj"], max_new_tokens=3, **choice
            )
