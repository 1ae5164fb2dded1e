"""`tracing(model)`: any generate call inside, batches included, and nothing about a trace depends on its neighbours."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import CONFIGS
from tolerances import close

import protoken
from protoken import errors

PROMPTS = [[5, 17, 42, 8, 60, 33, 21], [11, 9], [70, 3, 88, 14]]
WAYS = {"local": {}, "forward": {"blocks": 2}, "reverse": {"blocks": 3, "way": "reverse"}}


@pytest.fixture(scope="module", params=tuple(CONFIGS))
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"))


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def alone(federation: TinyFederation, prompt: list[int], **arguments) -> protoken.Trace:
    return protoken.trace(federation.model, prompt, ledger=federation.path, **arguments)


def same(a: protoken.Trace, b: protoken.Trace) -> None:
    assert a.prompt_ids == b.prompt_ids
    assert [t.id for t in a.token_list] == [t.id for t in b.token_list]
    if a.token_scores is not None:
        close(torch.tensor(a.token_scores), torch.tensor(b.token_scores), torch.float32, factor=3)
    else:
        close(torch.tensor(a.totals), torch.tensor(b.totals), torch.float32, factor=3)


def test_seed_is_that_of_the_sampled_coalitions(tmp_path: Path) -> None:
    clients = tuple("abcdefghi")  # one more than are evaluated whole
    federation = tiny_federation(tmp_path, clients=clients, weights=(1 / 9,) * 9)
    totals = []
    for seed in (None, 0, 1):
        arguments = {"ledger": federation.path, "method": "shapley", "pairs": 2, "seed": seed}
        with protoken.tracing(federation.model, **arguments) as tape:
            federation.model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, do_sample=False)
        totals.append(tape.traces[0].totals)
        assert (totals[-1] == protoken.trace(federation.model, PROMPTS[0], max_new_tokens=2, **arguments).totals).all()
    assert (totals[0] == totals[1]).all()
    assert abs(totals[1] - totals[2]).max() > 1e-6
    with pytest.raises(errors.ArgumentError, match="seed"), protoken.tracing(federation.model, seed="x"):
        pass


@pytest.mark.parametrize("way", WAYS)
def test_left_padded_batch_equals_each_prompt_alone(federation: TinyFederation, way: str) -> None:
    with protoken.tracing(federation.model, ledger=federation.path, **WAYS[way]) as tape:
        federation.model.generate(**padded(PROMPTS), max_new_tokens=6, do_sample=False)
    assert len(tape) == 3
    for trace, prompt in zip(tape, PROMPTS, strict=True):
        same(trace, alone(federation, prompt, max_new_tokens=6, do_sample=False, **WAYS[way]))


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"return_dict_in_generate": True, "output_logits": True},
        {"cache_implementation": "static"},
    ],
    ids=["beams", "several sequences", "dict output", "static cache"],
)
def test_generate_returns_what_it_always_returns(llama: TinyFederation, mode: dict[str, object]) -> None:
    arguments = {**padded(PROMPTS), "max_new_tokens": 5, **mode}
    torch.manual_seed(3)
    plain = llama.model.generate(**arguments)
    torch.manual_seed(3)
    with protoken.tracing(llama.model, ledger=llama.path) as tape:
        traced = llama.model.generate(**arguments)
    assert type(traced) is type(plain)
    rows = traced if isinstance(traced, torch.Tensor) else traced.sequences
    expected = plain if isinstance(plain, torch.Tensor) else plain.sequences
    assert torch.equal(rows, expected)
    assert len(tape) == rows.shape[0]
    for trace, row in zip(tape, rows.tolist(), strict=True):
        assert row[-5:] == [token.id for token in trace.token_list]


def test_a_row_ends_with_its_own_stop_token(llama: TinyFederation) -> None:
    free = llama.model.generate(**padded(PROMPTS), max_new_tokens=6, do_sample=False)[:, 7:].tolist()
    stop = free[0][2]
    with protoken.tracing(llama.model, ledger=llama.path) as tape:
        llama.model.generate(**padded(PROMPTS), max_new_tokens=6, do_sample=False, eos_token_id=stop)
    for trace, tokens in zip(tape, free, strict=True):
        expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert [token.id for token in trace.token_list] == expected


def test_two_calls_are_kept_apart(llama: TinyFederation) -> None:
    with protoken.tracing(llama.model, ledger=llama.path) as tape:
        for prompt in PROMPTS[:2]:
            llama.model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)
    assert [len(call) for call in tape.calls] == [1, 1]
    same(tape[1], alone(llama, PROMPTS[1], max_new_tokens=3, do_sample=False))


def test_patch_is_gone_afterwards_also_after_an_error(llama: TinyFederation) -> None:
    before = sorted(llama.model.__dict__)

    def interrupted() -> None:
        with protoken.tracing(llama.model, ledger=llama.path):
            assert "generate" in llama.model.__dict__
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(llama.model.__dict__) == before


def test_a_copy_made_meanwhile_is_a_model_like_any_other(llama: TinyFederation) -> None:
    file, prompt = io.BytesIO(), torch.tensor(PROMPTS[:1])
    with protoken.tracing(llama.model, ledger=llama.path) as tape:
        twin = copy.deepcopy(llama.model)
        torch.save(llama.model, file)
        expected = llama.model.generate(prompt, max_new_tokens=3, do_sample=False)
        assert torch.equal(twin.generate(prompt, max_new_tokens=3, do_sample=False), expected)
    assert len(tape.traces) == 1
    file.seek(0)
    for model in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), expected)
        assert model.generate.__self__ is model


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs_embeds": torch.zeros(1, 3, 48)},
        {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])},
        {},
    ],
    ids=["embeddings", "padding on the right", "nothing"],
)
def test_untraceable_calls_are_refused_with_the_reason(llama: TinyFederation, arguments) -> None:
    with (
        protoken.tracing(llama.model, ledger=llama.path) as tape,
        pytest.raises(errors.GenerationError, match="expected"),
    ):
        llama.model.generate(max_new_tokens=3, **arguments)
    assert len(tape) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())
