"""Scores per token over several blocks: tangents through every family's own code, against the published double loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import equals_oracle, oracle
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import CONFIGS, MIXTURES, OTHER_FAMILIES
from tolerances import close

import protoken
from protoken.errors import GenerationError
from protoken.ways import forward as forward_mode

PROMPTS = [[5, 17, 42, 8, 60, 33, 21], [11, 9], [70, 3, 88, 14]]
# Families whose code adds in place: differentiated as a whole.
IN_PLACE = ("falcon", "mixtral")
# Families without casts to fp32 in norms or rotary angles.
DOUBLE = ("gpt2", "gpt_bigcode", "gpt_neox", "opt", "falcon", "falcon-alibi", "phi", "starcoder2", "stablelm")


@pytest.fixture(scope="module", params=(*CONFIGS, *OTHER_FAMILIES, *MIXTURES))
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param)


def traced(federation: TinyFederation, prompt: list[int], **choices: Any) -> protoken.Trace:
    settings = {"blocks": 3, "way": "forward", "max_new_tokens": 5, "do_sample": True, "seed": 2, **choices}
    return protoken.trace(federation.model, prompt, ledger=federation.path, **settings)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per pass that was differentiated as a whole."""
    calls: list[int] = []
    own = forward_mode.scores_by_autograd

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(forward_mode, "scores_by_autograd", counting)
    return calls


def test_tokens_of_a_left_padded_batch_equal_the_oracle(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    with protoken.tracing(federation.model, ledger=federation.path, blocks=3, way="forward") as tape:
        federation.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for trace in tape:
        assert trace.info.way == "forward"
        equals_oracle(federation.model, federation.ledger, trace)
        assert trace.conservation_residual < 1e-4
    rides = federation.path.name.removesuffix("-ledger") not in IN_PLACE
    assert len(calls) == (0 if rides else len(PROMPTS))


@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
def test_one_token_after_a_prompt_of_one(federation: TinyFederation, objective: str) -> None:
    trace = traced(federation, [17], max_new_tokens=1, objective=objective)
    equals_oracle(federation.model, federation.ledger, trace)


def test_all_layers_of_the_blocks(federation: TinyFederation) -> None:
    trace = traced(federation, PROMPTS[0], layers=["*"], blocks=2, max_new_tokens=3)
    equals_oracle(federation.model, federation.ledger, trace)


def test_riding_tangents_equal_torch_func(federation: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    riding = traced(federation, PROMPTS[0])
    calls = counted(monkeypatch)

    def refuse(*_: object, **__: object) -> Any:
        raise forward_mode.NoRule("asked for")

    monkeypatch.setattr(forward_mode, "_pushed", refuse)
    whole = traced(federation, PROMPTS[0])
    assert calls == [1]
    close(torch.tensor(riding.token_scores), torch.tensor(whole.token_scores), torch.float32)


def test_one_pass_pushes_all_clients_and_the_change(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, sizes = forward_mode._pushed, []

    def counting(*args: Any) -> Any:
        reached = own(*args)
        sizes.append(reached.h[0].tangent.shape[0])
        return reached

    monkeypatch.setattr(forward_mode, "_pushed", counting)
    trace = traced(federation, PROMPTS[0])
    rides = federation.path.name.removesuffix("-ledger") not in IN_PLACE
    assert sizes == ([len(trace.client_ids) + 1] if rides else [])


def test_chunks_of_clients_change_nothing(federation: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    together = traced(federation, PROMPTS[0])
    monkeypatch.setattr(forward_mode, "_AT_ONCE", 1)
    apart = traced(federation, PROMPTS[0])
    close(torch.tensor(apart.token_scores), torch.tensor(together.token_scores), torch.float32)
    assert apart.conservation_residual < 1e-4


@pytest.mark.parametrize("family", DOUBLE)
def test_double_precision_equals_the_oracle(family: str, tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, family, dtype=torch.float64)
    trace = traced(federation, PROMPTS[0])
    expected = oracle(federation.model, federation.ledger, trace).sum(0)
    close(torch.tensor(trace.token_scores), expected, torch.float64)


@pytest.mark.parametrize("layers", [["self_attn.q_proj"], ["self_attn.k_proj", "mlp.gate_proj"]])
def test_tangents_may_start_inside_the_last_block(layers: list[str], tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, "llama")
    trace = traced(federation, PROMPTS[0], layers=layers, blocks=1)
    equals_oracle(federation.model, federation.ledger, trace)


def test_embeddings_and_tied_head(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, "smollm", ends=True)
    trace = traced(federation, PROMPTS[0], layers=["model.embed_tokens", "mlp.down_proj"], blocks=2)
    equals_oracle(federation.model, federation.ledger, trace)


def test_half_precision_stays_near_single(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, "llama")
    choices: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3}
    single = torch.tensor(traced(federation, PROMPTS[0], **choices).token_scores)
    federation.model.to(torch.bfloat16)
    protoken.attach(federation.model, federation.path, verify=False)
    half = protoken.trace(federation.model, PROMPTS[0], blocks=3, way="forward", **choices)
    assert (torch.tensor(half.token_scores) - single).norm() < 0.1 * single.norm()


def test_a_pass_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = tiny_federation(tmp_path, "llama")
    own: Callable[..., Any] = forward_mode.run_whole

    def other(model: Any, ids: torch.Tensor, *args: Any) -> Any:
        # The replayed positions one further: other rotary angles.
        return model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None] * 2, use_cache=False)

    monkeypatch.setattr(forward_mode, "run_whole", other)
    with pytest.raises(GenerationError, match="replay of the traced blocks"):
        traced(federation, PROMPTS[0])
    monkeypatch.setattr(forward_mode, "run_whole", own)
    assert traced(federation, PROMPTS[0]).token_scores is not None


def test_model_is_left_as_it_was_found(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, "gemma3")
    before = {name: set(vars(module)) for name, module in federation.model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in federation.model.modules()]
    traced(federation, PROMPTS[0])
    assert {name: set(vars(module)) for name, module in federation.model.named_modules()} == before
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in federation.model.modules()] == hooks
    assert torch.is_grad_enabled()
