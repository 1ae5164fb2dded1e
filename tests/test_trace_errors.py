"""Bad input gets a typed error with a remedy, and the model is left exactly as it was found."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import tiny_model

import protoken
from protoken import errors

PROMPT = [5, 17, 42, 8]


class WordTokenizer:
    """A real if tiny tokenizer: one word per id; enough of the interface that `trace` uses."""

    all_special_ids = (0, 1, 2)

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + sum(word.encode()) % 90 for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" w{token}" for token in ids)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), rounds=2)


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """Everything a trace could leave behind on a model."""
    return {
        "hooks": [
            (n, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        ],
        "attributes": [(n, sorted(m.__dict__)) for n, m in model.named_modules()],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "attention": model.config._attn_implementation,
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "weights": [float(p.detach().double().sum()) for p in model.parameters()],
        "grad_mode": torch.is_grad_enabled(),
    }


BAD_CALLS: dict[str, tuple[type[errors.ProtokenError], dict[str, Any], Any]] = {
    "unknown round": (errors.UnknownRoundError, {"rounds": 9}, PROMPT),
    "word for rounds": (errors.ArgumentError, {"rounds": "first"}, PROMPT),
    "no rounds": (errors.ArgumentError, {"rounds": []}, PROMPT),
    "too many blocks": (errors.ArgumentError, {"blocks": 5}, PROMPT),
    "no blocks": (errors.ArgumentError, {"blocks": 0}, PROMPT),
    "unknown layer": (errors.LayerError, {"layers": ["mlp.nothing"]}, PROMPT),
    "unknown way": (errors.ArgumentError, {"way": "sideways"}, PROMPT),
    "local over two blocks": (errors.ArgumentError, {"way": "local", "blocks": 2}, PROMPT),
    "unknown objective": (errors.ArgumentError, {"objective": "loss"}, PROMPT),
    "unknown method": (errors.ArgumentError, {"method": "guess"}, PROMPT),
    "unknown backend": (errors.ArgumentError, {"backend": "abacus"}, PROMPT),
    "a length in words": (errors.ArgumentError, {"max_new_tokens": "5"}, PROMPT),
    "half a token": (errors.ArgumentError, {"max_new_tokens": 2.5}, PROMPT),
    "true as a length": (errors.ArgumentError, {"max_length": True}, PROMPT),
    "a seed in words": (errors.ArgumentError, {"seed": "x"}, PROMPT),
    "a seed below zero": (errors.ArgumentError, {"seed": -1}, PROMPT),
    "several sequences": (errors.ArgumentError, {"num_return_sequences": 2, "num_beams": 2}, PROMPT),
    "empty ids": (errors.PromptError, {}, []),
    "empty text": (errors.PromptError, {"tokenizer": WordTokenizer()}, ""),
    "text without tokenizer": (errors.PromptError, {}, "hello"),
    "id beyond the vocabulary": (errors.PromptError, {}, [5, 9999]),
    "negative id": (errors.PromptError, {}, [5, -1]),
    "longer than the window": (errors.PromptError, {}, [5] * 200),
    "answer beyond the window": (errors.PromptError, {"max_new_tokens": 126}, PROMPT),
    "conversation without template": (
        errors.PromptError,
        {"tokenizer": WordTokenizer()},
        [{"role": "user", "content": "hello"}],
    ),
    "turns without role": (errors.PromptError, {"tokenizer": WordTokenizer("x")}, [{"text": "hello"}]),
    "several texts": (errors.PromptError, {}, ["hello", "good day"]),
    "nested ids": (errors.PromptError, {}, [PROMPT]),
    "what a tokenizer returns": (errors.PromptError, {}, {"input_ids": PROMPT, "attention_mask": [1] * 4}),
    "bytes": (errors.PromptError, {}, b"hello"),
    "nothing": (errors.PromptError, {}, None),
    "blocks as text": (errors.ArgumentError, {"blocks": "2"}, PROMPT),
    "blocks as a fraction": (errors.ArgumentError, {"blocks": 1.0}, PROMPT),
    "nodes as text": (errors.ArgumentError, {"nodes": "4", "method": "aumann_shapley"}, PROMPT),
    "rounds as a fraction": (errors.UnknownRoundError, {"rounds": 1.0}, PROMPT),
    "one text for layers": (errors.ArgumentError, {"layers": "*.o_proj"}, PROMPT),
}


@pytest.mark.parametrize(("expected", "arguments", "prompt"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_call_raises_a_typed_error_and_leaves_the_model_alone(
    federation: TinyFederation, expected: type[errors.ProtokenError], arguments: dict[str, Any], prompt: Any
) -> None:
    before = fingerprint(federation.model)
    with pytest.raises(expected) as caught:
        protoken.trace(federation.model, prompt, **{"ledger": federation.path, "max_new_tokens": 4, **arguments})
    assert type(caught.value) is expected
    assert caught.value.argument
    assert caught.value.got is not None or caught.value.expected is not None
    assert fingerprint(federation.model) == before


def test_backend_that_is_not_there_says_why(federation: TinyFederation) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(errors.BackendError, match="cuda"):
        protoken.trace(federation.model, PROMPT, ledger=federation.path, backend="cuda", max_new_tokens=3)


def test_model_without_ledger(federation: TinyFederation) -> None:
    with pytest.raises(errors.ModelError, match="attach"):
        protoken.trace(federation.model, PROMPT)


def test_ledger_of_another_model_is_refused(federation: TinyFederation) -> None:
    other = tiny_model("llama", seed=5)
    with pytest.raises(errors.LedgerMismatchError, match="digest"):
        protoken.trace(other, PROMPT, ledger=federation.path, max_new_tokens=3)


def test_ledger_of_a_wider_model_is_refused(federation: TinyFederation) -> None:
    with pytest.raises(errors.LedgerMismatchError):
        protoken.trace(tiny_model("smollm"), PROMPT, ledger=federation.path, max_new_tokens=3)


def test_weights_of_an_earlier_round_are_recognised(tmp_path) -> None:
    federation = tiny_federation(tmp_path)
    old = copy.deepcopy(federation.model)
    later = tiny_federation(tmp_path / "later", rounds=2)
    with pytest.raises(errors.LedgerMismatchError, match="at_round=1"):
        protoken.trace(old, PROMPT, ledger=later.path, max_new_tokens=3)
    protoken.attach(old, later.path, at_round=1)
    assert protoken.trace(old, PROMPT, max_new_tokens=3).info.rounds == (1,)
    protoken.detach(old)


@pytest.mark.parametrize("method", ["protoken", "leave_one_out"])
@pytest.mark.parametrize("change", ["trained", "loaded", "replaced", "dtype"])
def test_weights_that_changed_since_the_first_trace_are_noticed(tmp_path, change: str, method: str) -> None:
    federation = tiny_federation(tmp_path)
    model = federation.model
    protoken.attach(model, federation.path)
    settings = {"method": method, "max_new_tokens": 2}
    protoken.trace(model, PROMPT, **settings)
    protoken.trace(model, PROMPT, **settings)
    layer, own = model.model.layers[-1].mlp.down_proj, model.state_dict()
    own = {name: value.clone() for name, value in own.items()}
    if change == "trained":
        model(torch.tensor([PROMPT]), labels=torch.tensor([PROMPT])).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    elif change == "loaded":
        model.load_state_dict({name: value + 0.1 for name, value in own.items()})
    elif change == "replaced":
        layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.1)
    else:
        model.double()
    with pytest.raises(errors.LedgerMismatchError, match="_proj"):
        protoken.trace(model, PROMPT, **settings)
    model.float().load_state_dict(own)
    assert protoken.trace(model, PROMPT, **settings).response
    protoken.detach(model)


@pytest.mark.parametrize("settings", [{}, {"blocks": 2, "way": "reverse"}, {"method": "leave_one_out"}], ids=str)
def test_blocks_replaced_since_they_were_attached_are_traced(tmp_path, settings: dict[str, Any]) -> None:
    federation = tiny_federation(tmp_path)
    model = federation.model
    protoken.attach(model, federation.path)
    settings = {"max_new_tokens": 3, "do_sample": False, **settings}
    expected = protoken.trace(model, PROMPT, **settings)
    model.model.layers[-1] = copy.deepcopy(model.model.layers[-1])
    model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
    found = protoken.trace(model, PROMPT, **settings)
    assert found.totals.tolist() == expected.totals.tolist()
    if not settings.get("method"):
        last = list(protoken.stream(model, PROMPT, max_new_tokens=3, do_sample=False))[-1]
        assert last.id == found.token_list[-1].id
    assert found.lineage(model=model).totals.any()
    protoken.detach(model)


def test_block_replaced_inside_a_tape_is_traced(tmp_path) -> None:
    federation = tiny_federation(tmp_path)
    model, ids = federation.model, torch.tensor([PROMPT])
    with protoken.tracing(model, ledger=federation.path) as tape:
        model.generate(ids, max_new_tokens=3, do_sample=False)
        model.model.layers[-1] = copy.deepcopy(model.model.layers[-1])
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert tape[0].totals.tolist() == tape[1].totals.tolist()


def test_model_that_can_no_longer_be_traced_is_refused_before_it_generates(tmp_path, monkeypatch) -> None:
    federation = tiny_federation(tmp_path)
    model = federation.model
    protoken.attach(model, federation.path)
    model.model.layers[-1] = torch.nn.Sequential(model.model.layers[-1])
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(errors.ModelError, match="a linear layer at"):
        protoken.trace(model, PROMPT, max_new_tokens=3)
    protoken.detach(model)


def test_layer_that_the_ledger_does_not_hold(tmp_path, federation: TinyFederation) -> None:
    model = tiny_model("llama")
    name = "model.layers.3.mlp.down_proj.weight"
    ledger = protoken.Ledger.create(tmp_path / "ledger")
    base = {name: model.get_parameter(name).detach()}
    ledger.commit_round(base, base, [protoken.ClientUpdate("a", 1.0, delta={name: torch.zeros_like(base[name])})])
    with pytest.raises(errors.LayerError, match="o_proj"):
        protoken.trace(model, PROMPT, ledger=tmp_path / "ledger", max_new_tokens=3)
    only = protoken.trace(model, PROMPT, ledger=tmp_path / "ledger", layers=["mlp.down_proj"], max_new_tokens=3)
    assert only.totals.tolist() == [0.0]


def test_inference_mode_is_refused(federation: TinyFederation) -> None:
    with torch.inference_mode(), pytest.raises(errors.ModelError, match="inference"):
        protoken.trace(federation.model, PROMPT, ledger=federation.path)


def test_no_grad_around_the_call_is_fine(federation: TinyFederation) -> None:
    with torch.no_grad():
        trace = protoken.trace(federation.model, PROMPT, ledger=federation.path, max_new_tokens=3)
        assert not torch.is_grad_enabled()
    assert trace.totals.any()


@pytest.mark.parametrize(
    ("prompt", "remedy"),
    [(["a", "b"], "protoken.tracing"), ({"input_ids": PROMPT}, 'prompt["input_ids"]'), (None, "a NoneType")],
)
def test_prompt_of_another_kind_is_named_as_what_it_is(federation: TinyFederation, prompt: Any, remedy: str) -> None:
    with pytest.raises(errors.PromptError, match=re.escape(remedy)):
        protoken.trace(federation.model, prompt, ledger=federation.path)


@pytest.mark.parametrize("prompt", [np.array(PROMPT), np.array([PROMPT]), list(np.array(PROMPT))])
def test_ids_may_come_from_numpy(federation: TinyFederation, prompt: Any) -> None:
    found = protoken.trace(federation.model, prompt, ledger=federation.path, max_new_tokens=2)
    assert found.prompt_ids == tuple(PROMPT)


@pytest.mark.parametrize("model", ["gpt2", None, object()])
def test_no_model_at_all_is_refused(federation: TinyFederation, model: Any) -> None:
    with pytest.raises(errors.ModelError, match="AutoModelForCausalLM"):
        protoken.trace(model, PROMPT, ledger=federation.path)


def test_not_a_language_model_is_refused(federation: TinyFederation) -> None:
    with pytest.raises(errors.ModelError, match="causal"):
        protoken.trace(torch.nn.Linear(2, 2), PROMPT, ledger=federation.path)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_model_is_left_as_it_was_found(federation: TinyFederation, training: bool, frozen: bool) -> None:
    model = copy.deepcopy(federation.model).train(training).requires_grad_(not frozen)
    model.model.layers[0].train(not training)  # mixed on purpose
    before = fingerprint(model)
    for arguments in ({}, {"blocks": 3}, {"method": "paper"}, {"num_beams": 2}):
        protoken.trace(model, PROMPT, ledger=federation.path, max_new_tokens=3, **arguments)
        assert fingerprint(model) == before


def failing(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "break_it",
    [
        lambda model, patch: patch.setattr(model.lm_head, "forward", failing),
        lambda model, patch: patch.setattr(model.model.layers[3].mlp, "forward", failing),
        lambda model, patch: patch.setattr(torch.autograd, "grad", failing),
    ],
    ids=["in generate", "in a block", "in the backward pass"],
)
@pytest.mark.parametrize("blocks", [1, 2])
def test_hooks_are_gone_after_an_interruption(
    federation: TinyFederation,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[Any, pytest.MonkeyPatch], None],
    blocks: int,
) -> None:
    model = federation.model.train()
    before = fingerprint(model)
    with monkeypatch.context() as patch:
        break_it(model, patch)
        with pytest.raises(KeyboardInterrupt):
            protoken.trace(model, PROMPT, ledger=federation.path, blocks=blocks, max_new_tokens=3)
    assert fingerprint(model.eval()) == {**before, "training": [False] * len(before["training"])}


def test_dropout_is_off_while_tracing(tmp_path) -> None:
    federation = tiny_federation(tmp_path)
    for block in federation.model.model.layers:
        block.self_attn.attention_dropout = 0.5
    federation.model.train()
    traces = [protoken.trace(federation.model, PROMPT, ledger=federation.path, max_new_tokens=5) for _ in range(2)]
    assert (traces[0].token_scores == traces[1].token_scores).all()


def test_text_prompt_without_chat_template_is_taken_as_it_is(federation: TinyFederation) -> None:
    trace = protoken.trace(
        federation.model,
        "three little words",
        ledger=federation.path,
        tokenizer=WordTokenizer(),
        max_new_tokens=4,
    )
    assert len(trace.prompt_ids) == 3
    assert trace.response == "".join(f" w{token.id}" for token in trace.token_list)
