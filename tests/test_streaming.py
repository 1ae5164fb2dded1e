"""`stream`: the same numbers as `trace`, token by token, in step with the model's own generation."""

from __future__ import annotations

import contextvars
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from character_tokenizer import character_tokenizer
from oracle import equals_oracle
from stream_cases import GREEDY, PROMPT, equal, streamed, traced
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import CONFIGS, MIXTURES, OTHER_FAMILIES, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import protoken
from protoken.streaming import leaf_tap

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=[*CONFIGS, *OTHER_FAMILIES, *MIXTURES])
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param)


# ---- the numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_equals_the_local_way_and_the_oracle(federation: TinyFederation, objective: str, sampled: bool) -> None:
    arguments = {"max_new_tokens": 6, "do_sample": sampled, "seed": 4, "objective": objective}
    stream = streamed(federation, **arguments)
    assert len(list(stream)) == 6
    equal(stream, traced(federation, **arguments))
    equals_oracle(federation.model, federation.ledger, stream.trace)
    assert stream.trace.conservation_residual < 1e-4


@pytest.mark.parametrize(
    "mode",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.4},
        {"return_dict_in_generate": True, "output_hidden_states": True, "output_scores": True},
        {"layers": ["mlp.gate_proj", "mlp.down_proj"]},
        {"layers": ["mlp.down_proj"]},
        {"layers": ["lm_head"]},
        {"backend": "torch"},
        {"rounds": "all"},
    ],
    ids=lambda mode: "-".join(f"{k}={v}" for k, v in mode.items())[:30],
)
@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
def test_every_mode_that_streams_equals_the_local_way(
    tmp_path_factory: pytest.TempPathFactory, mode: dict[str, Any], objective: str
) -> None:
    federation = tiny_federation(tmp_path_factory.mktemp("ends"), ends=True, rounds=2)
    arguments = {**GREEDY, "objective": objective, **mode}
    stream = streamed(federation, **arguments)
    list(stream)
    equal(stream, traced(federation, way="local", **arguments))


@pytest.mark.parametrize("length", [1, 2])
def test_short_prompts(llama: TinyFederation, length: int) -> None:
    stream = streamed(llama, PROMPT[:length], **GREEDY)
    list(stream)
    equal(stream, traced(llama, PROMPT[:length], **GREEDY))


def test_one_token_and_a_stop_at_once(llama: TinyFederation) -> None:
    first = next(iter(streamed(llama, **GREEDY)))
    for arguments in ({"max_new_tokens": 1}, {"max_new_tokens": 5, "eos_token_id": first.id}):
        stream = streamed(llama, do_sample=False, **arguments)
        assert [token.id for token in stream] == [first.id]
        equal(stream, traced(llama, do_sample=False, **arguments))


def test_double_precision(tmp_path) -> None:
    federation = tiny_federation(tmp_path, "gpt2", dtype=torch.float64)
    for objective in ("log_prob", "log_odds", "logit"):
        stream = streamed(federation, objective=objective, **GREEDY)
        list(stream)
        # transformers hands fp32 logits to its processors, not to us: these are the model's own.
        equal(stream, traced(federation, objective=objective, **GREEDY), torch.float64)


def test_half_precision_is_as_close_as_its_rounding(tmp_path) -> None:
    federation = tiny_federation(tmp_path, dtype=torch.bfloat16)
    stream = streamed(federation, **GREEDY)
    list(stream)
    reference = torch.tensor(traced(federation, **GREEDY).token_scores)
    assert (torch.tensor(stream.trace.token_scores) - reference).norm() < 0.05 * reference.norm()


def test_frozen_parameters_and_no_grad_around_the_loop(llama: TinyFederation) -> None:
    trace = traced(llama, **GREEDY)
    llama.model.requires_grad_(False)
    try:
        with torch.no_grad():
            stream = streamed(llama, **GREEDY)
            for _ in stream:
                assert not torch.is_grad_enabled()
        equal(stream, trace)
    finally:
        llama.model.requires_grad_(True)
    for _ in (stream := streamed(llama, **GREEDY)):
        assert torch.is_grad_enabled()
    equal(stream, trace)


def test_unmerged_adapter(llama: TinyFederation, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj", "q_proj"])
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    state = peft.get_peft_model_state_dict(adapted)
    base = {name: torch.zeros_like(value) for name, value in state.items()}
    ledger = protoken.Ledger.create(tmp_path / "ledger")
    ledger.commit_round(base, state, [protoken.ClientUpdate("a", 1.0, state=state)])
    arguments = {"ledger": tmp_path / "ledger", **GREEDY}
    trace = protoken.trace(adapted, PROMPT, **arguments)
    stream = protoken.stream(adapted, PROMPT, **arguments)
    list(stream)
    equal(stream, trace)


def test_hook_of_the_users_on_the_head_is_part_of_the_objective(llama: TinyFederation) -> None:
    for objective in ("log_prob", "log_odds", "logit"):
        handle = llama.model.lm_head.register_forward_hook(lambda _m, _a, logits: torch.tanh(logits / 3) * 3)
        try:
            stream = streamed(llama, objective=objective, **GREEDY)
            list(stream)
            equal(stream, traced(llama, objective=objective, **GREEDY))
        finally:
            handle.remove()


def test_nothing_kept_holds_a_graph(llama: TinyFederation) -> None:
    stream = streamed(llama, **GREEDY)
    list(stream)
    kept = [t for one in stream._run.found for t in (*one.x.values(), *one.grad.values(), one.objective)]
    assert kept
    assert not any(tensor.requires_grad for tensor in kept)


@pytest.mark.parametrize(
    ("family", "untouched"), [("llama", True), ("gpt2", True), ("gemma2", False), ("cohere", False)]
)
def test_the_slope_is_known_only_where_nothing_follows_the_head(
    family: str, untouched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = tiny_federation(tmp_path, family)
    own, found = leaf_tap.is_last_row, []

    def noting(logits: torch.Tensor, z: torch.Tensor) -> bool:
        found.append(own(logits, z))
        return found[-1]

    monkeypatch.setattr(leaf_tap, "is_last_row", noting)
    # The torch backend has no short way around the graph (gated_tail.py), so every token asks.
    list(streamed(federation, max_new_tokens=4, do_sample=False, backend="torch"))
    assert found == [untouched] * 3


# ---- in step -------------------------------------------------------------------------------------------


def test_generation_is_the_models_own(llama: TinyFederation) -> None:
    row = torch.tensor([PROMPT])
    for arguments in (GREEDY, {"max_new_tokens": 6, "do_sample": True}):
        torch.manual_seed(9)
        plain = llama.model.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **arguments)
        torch.manual_seed(9)
        assert [token.id for token in streamed(llama, **arguments)] == plain[0, len(PROMPT) :].tolist()


def test_nothing_runs_before_the_first_token_is_asked_for(llama: TinyFederation, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(llama.model, "prepare_inputs_for_generation", lambda *a, **k: calls.append(1))
    streamed(llama, **GREEDY)
    assert not calls


class Recorder(BaseStreamer):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def put(self, value: torch.Tensor) -> None:
        self.log.append(("put", value.flatten().tolist()))

    def end(self) -> None:
        self.log.append(("end",))


def test_the_users_streamer_is_served_first_and_in_step(llama: TinyFederation) -> None:
    log: list[Any] = []
    stream = streamed(llama, streamer=Recorder(log), **GREEDY)
    while (token := next(stream, None)) is not None:
        log.append(("got", [token.id]))
    ids = [token.id for token in streamed(llama, **GREEDY)]
    expected: list[Any] = [("put", PROMPT)]
    for token in ids:
        expected += [("put", [token]), ("got", [token])]
    assert log == [*expected, ("end",)]


def test_text_iterator_streamer_gets_the_whole_text_also_after_an_early_end(llama: TinyFederation) -> None:
    tokenizer = character_tokenizer()
    for count in (6, 2):
        text = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
        with streamed(llama, tokenizer=tokenizer, streamer=text, **GREEDY) as stream:
            for _ in range(count):
                next(stream)
            if count == 6:
                assert list(stream) == []
        assert "".join(text) == "".join(token.text for token in stream.tokens)


def test_callback_form_runs_here_and_now_with_the_same_numbers(llama: TinyFederation) -> None:
    seen, threads = [], []

    def note(token: protoken.StreamedToken) -> None:
        seen.append(token)
        threads.append(threading.get_ident())

    finished = streamed(llama, on_token=note, **GREEDY)
    assert set(threads) == {threading.get_ident()}
    assert finished.finished
    assert list(finished) == []
    assert tuple(seen) == finished.tokens == tuple(streamed(llama, **GREEDY))
    equal(finished, traced(llama, **GREEDY))


def test_seed_belongs_to_the_generation_alone(llama: TinyFederation) -> None:
    arguments = {"max_new_tokens": 6, "do_sample": True, "seed": 7}
    torch.manual_seed(1)
    expected = [float(torch.rand(())) for _ in range(6)]
    ids = [token.id for token in traced(llama, **arguments).token_list]
    torch.manual_seed(1)
    found, drawn = [], []
    for token in streamed(llama, **arguments):
        found.append(token.id)
        drawn.append(float(torch.rand(())))
    assert found == ids
    assert drawn == expected
    torch.manual_seed(1)
    drawn = []
    streamed(llama, on_token=lambda _: drawn.append(float(torch.rand(()))), **arguments)
    assert drawn == expected


def test_context_variables_and_autocast_reach_the_generation(llama: TinyFederation) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    found = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            found.append((variable.get(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()))
            return scores

    variable.set("mine")
    with torch.autocast("cpu", torch.bfloat16):
        list(streamed(llama, logits_processor=LogitsProcessorList([Look()]), **GREEDY))
    assert set(found) == {("mine", True, torch.get_num_threads())}


def test_model_can_be_used_between_two_tokens(llama: TinyFederation) -> None:
    row = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = llama.model(row).logits
    trace, other = traced(llama, **GREEDY), traced(llama, PROMPT[:3], **GREEDY)

    def use(_: object) -> None:
        with torch.no_grad():
            assert torch.equal(llama.model(row).logits, logits)
        assert (traced(llama, **GREEDY).token_scores == trace.token_scores).all()

    stream = streamed(llama, **GREEDY)
    for token in stream:
        use(token)
    equal(stream, trace)
    equal(streamed(llama, on_token=use, **GREEDY), trace)
    first, second = streamed(llama, **GREEDY), streamed(llama, PROMPT[:3], **GREEDY)
    assert len(list(zip(first, second, strict=True))) == 6
    equal(first, trace)
    equal(second, other)


def test_stream_inside_tracing_is_not_its_business(llama: TinyFederation) -> None:
    with protoken.tracing(llama.model, ledger=llama.path) as tape:
        stream = streamed(llama, **GREEDY)
        list(stream)
        llama.model.generate(torch.tensor([PROMPT]), **GREEDY)
    assert len(tape) == 1
    equal(stream, tape[0])


# ---- text ----------------------------------------------------------------------------------------------


class Bytes:
    """Every id is one byte of UTF-8, so that characters span tokens."""

    all_special_ids = (0, 1, 2)
    text = "né → 語!".encode()

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(self.text[i % len(self.text)] for i in ids).decode(errors="replace")


class Say(LogitsProcessor):
    """Makes the model say given ids."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = iter(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, next(self.ids)] = 0
        return forced


@pytest.mark.parametrize("count", [len(Bytes.text), len(Bytes.text) - 2])
def test_texts_add_up_to_the_response(llama: TinyFederation, count: int) -> None:
    say = LogitsProcessorList([Say(list(range(count)))])
    stream = streamed(llama, tokenizer=Bytes(), max_new_tokens=count, do_sample=False, logits_processor=say)
    texts = [token.text for token in stream]
    trace = stream.trace
    assert texts[0] == "n"
    assert texts[1:3] == ["", "é"]
    assert trace.response.startswith("".join(texts))
    # Cut inside a character, what there is of it is known at the end only.
    assert trace.response.removeprefix("".join(texts)) == ("" if count == len(Bytes.text) else "�")
    assert texts[:-1] == [token.text for token in trace.token_list][:-1]


def test_stop_strings(llama: TinyFederation) -> None:
    tokenizer = character_tokenizer()
    free = streamed(llama, tokenizer=tokenizer, **GREEDY)
    texts = [token.text for token in free]
    stopped = [t.text for t in streamed(llama, tokenizer=tokenizer, stop_strings=[texts[2]], **GREEDY)]
    assert stopped == texts[: texts.index(texts[2]) + 1]
