"""`stream`: the same numbers as `trace`, token by token, and nothing left behind however it ends."""

from __future__ import annotations

import contextvars
import gc
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from character_tokenizer import character_tokenizer
from oracle import equals_oracle
from test_trace_errors import BAD_CALLS, failing, fingerprint
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import CONFIGS, MIXTURES, OTHER_FAMILIES, tiny_model
from tolerances import close
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import protoken
from protoken import errors, leaf_tap

PROMPT = [5, 17, 42, 8, 60, 33, 21]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=[*CONFIGS, *OTHER_FAMILIES, *MIXTURES])
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def streamed(federation: TinyFederation, prompt: Any = PROMPT, **arguments: Any) -> protoken.Stream:
    return protoken.stream(federation.model, prompt, **{"ledger": federation.path, **arguments})


def traced(federation: TinyFederation, prompt: Any = PROMPT, **arguments: Any) -> protoken.Trace:
    return protoken.trace(federation.model, prompt, **{"ledger": federation.path, **arguments})


def equal(stream: protoken.Stream, trace: protoken.Trace, dtype: torch.dtype = torch.float32) -> None:
    """Every token as it was handed over, and the stream's own trace, are the trace's."""
    assert stream.finished
    assert [token.id for token in stream.tokens] == [token.id for token in trace.token_list]
    assert [token.index for token in stream.tokens] == list(range(len(stream.tokens)))
    clients, scores = trace.client_ids, torch.tensor(trace.token_scores)
    close(torch.tensor([[t.scores[c] for c in clients] for t in stream.tokens], dtype=torch.float64), scores, dtype)
    totals = torch.tensor([[t.totals[c] for c in clients] for t in stream.tokens], dtype=torch.float64)
    close(totals, scores.cumsum(0), dtype, factor=3)
    values = torch.tensor([token.objective for token in stream.tokens], dtype=torch.float64)
    close(values, torch.tensor(trace.objective_values), dtype)
    own = stream.trace
    close(torch.tensor(own.token_scores), scores, dtype)
    close(torch.tensor(own.layer_totals), torch.tensor(trace.layer_totals), dtype, factor=3)
    assert (own.response, own.prompt_ids, own.info.way) == (trace.response, trace.prompt_ids, "local")
    assert (own.info.layers, own.info.rounds, own.info.backend) == (
        trace.info.layers,
        trace.info.rounds,
        trace.info.backend,
    )


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


# ---- refusals ------------------------------------------------------------------------------------------

UNSTREAMABLE: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "an assistant": {"assistant_model": object()},
    "guidance": {"guidance_scale": 1.5},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "custom decoding": {"custom_generate": failing},
    "paged cache": {"cache_implementation": "paged"},
    "padding": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])},
}


@pytest.mark.parametrize("arguments", UNSTREAMABLE.values(), ids=UNSTREAMABLE.keys())
def test_what_cannot_stream_is_refused_at_once_with_a_remedy(llama: TinyFederation, arguments: dict[str, Any]) -> None:
    before = fingerprint(llama.model)
    with pytest.raises(errors.GenerationError) as caught:
        streamed(llama, max_new_tokens=3, **arguments)
    assert caught.value.remedy
    assert fingerprint(llama.model) == before


def test_modes_of_a_generation_config_are_seen(llama: TinyFederation) -> None:
    config = llama.model.generation_config
    config.num_beams = 2
    try:
        with pytest.raises(errors.GenerationError, match="num_beams"):
            streamed(llama, **GREEDY)
        assert len(list(streamed(llama, num_beams=1, **GREEDY))) == 6
    finally:
        config.num_beams = None


@pytest.mark.parametrize("prompt", [torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]], ["one", "two"]])
def test_several_prompts_are_refused(llama: TinyFederation, prompt: Any) -> None:
    with pytest.raises(errors.GenerationError, match=r"one prompt.*tracing"):
        streamed(llama, prompt, **GREEDY)


@pytest.mark.parametrize("arguments", [{"blocks": 2}, {"way": "reverse"}, {"method": "paper"}])
def test_other_depths_and_methods_point_to_trace(llama: TinyFederation, arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentError, match=r"protoken\.trace"):
        streamed(llama, **arguments)
    assert len(list(streamed(llama, blocks=1, way="local", method="protoken", **GREEDY))) == 6


def test_layer_that_talks_to_other_positions_is_refused(llama: TinyFederation) -> None:
    with pytest.raises(errors.ArgumentError, match="way"):
        streamed(llama, layers=["self_attn.v_proj"])


def _same_as_trace() -> list[str]:
    return [n for n, (_, a, _) in BAD_CALLS.items() if not {"blocks", "way", "method", "num_beams"} & set(a)]


@pytest.mark.parametrize("name", _same_as_trace())
def test_bad_calls_are_refused_as_by_trace(llama: TinyFederation, name: str) -> None:
    expected, arguments, prompt = BAD_CALLS[name]
    before = fingerprint(llama.model)
    with pytest.raises(expected):
        streamed(llama, prompt, **{"max_new_tokens": 4, **arguments})
    assert fingerprint(llama.model) == before


def test_inference_mode_is_refused(llama: TinyFederation) -> None:
    with torch.inference_mode(), pytest.raises(errors.ModelError, match="inference"):
        streamed(llama, **GREEDY)


def test_processor_that_runs_the_model_is_noticed(llama: TinyFederation) -> None:
    class Again(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            llama.model(input_ids[:, -1:])
            return scores

    before = fingerprint(llama.model)
    with pytest.raises(errors.GenerationError, match="passes"):
        list(streamed(llama, logits_processor=LogitsProcessorList([Again()]), **GREEDY))
    assert fingerprint(llama.model) == before


# ---- leaving -------------------------------------------------------------------------------------------


def leave_by_break(stream: protoken.Stream) -> None:
    for token in stream:
        if token.index == 2:
            break
    stream.close()


def leave_by_close(stream: protoken.Stream) -> None:
    for _ in range(3):
        next(stream)
    stream.close()
    stream.close()


def leave_by_with(stream: protoken.Stream) -> None:
    with stream:
        for _ in range(3):
            next(stream)


def leave_by_error(stream: protoken.Stream) -> None:
    def consume() -> None:
        with stream:
            for token in stream:
                if token.index == 2:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_close, leave_by_with, leave_by_error])
def test_leaving_early_restores_the_model_and_leaves_a_partial_trace(llama: TinyFederation, leave) -> None:
    whole = traced(llama, **GREEDY)
    model = llama.model.train()
    before = fingerprint(model)
    stream = streamed(llama, **GREEDY)
    leave(stream)
    assert fingerprint(model) == before
    assert not stream.finished
    assert list(stream) == []
    partial = stream.trace
    assert len(partial.token_list) == 3
    close(torch.tensor(partial.token_scores), torch.tensor(whole.token_scores[:3]), torch.float32)
    model.eval()


def test_trace_grows_with_the_stream(llama: TinyFederation) -> None:
    stream = streamed(llama, **GREEDY)
    assert stream.trace.totals.tolist() == [0.0] * 4
    for count, token in enumerate(stream, start=1):
        assert len(stream.trace.token_list) == count
        assert stream.trace.totals.tolist() == pytest.approx(list(token.totals.values()), rel=1e-5, abs=1e-7)


def test_dropping_the_stream_ends_the_generation(llama: TinyFederation) -> None:
    before = fingerprint(llama.model)
    for _ in streamed(llama, **GREEDY):
        break
    assert fingerprint(llama.model) == before
    stream = streamed(llama, **GREEDY)
    next(stream)
    cycle = [stream]
    cycle.append(cycle)  # type: ignore[arg-type]
    del stream, cycle
    gc.collect()
    assert fingerprint(llama.model) == before


@pytest.mark.parametrize(
    "break_it",
    [
        lambda model, patch: patch.setattr(model.lm_head, "forward", failing),
        lambda model, patch: patch.setattr(model.model.layers[3].mlp, "forward", failing),
        lambda model, patch: patch.setattr(torch.autograd, "grad", failing),
    ],
    ids=["in generate", "in a block", "in the backward pass"],
)
@pytest.mark.parametrize("form", ["iterator", "callback"])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_interrupted_generation_restores_everything(
    llama: TinyFederation, monkeypatch: pytest.MonkeyPatch, break_it, form: str, grad_mode: bool
) -> None:
    model = llama.model.train()
    with torch.set_grad_enabled(grad_mode):
        before = fingerprint(model)
        for prompt in (PROMPT, PROMPT[:1]):
            with monkeypatch.context() as patch:
                break_it(model, patch)
                with pytest.raises(KeyboardInterrupt):
                    list(streamed(llama, prompt, on_token=print if form == "callback" else None, **GREEDY))
            assert fingerprint(model) == before
    model.eval()


def test_error_of_the_callback_passes_through(llama: TinyFederation) -> None:
    before = fingerprint(llama.model)

    def broken(token: protoken.StreamedToken) -> None:
        torch.set_grad_enabled(False)
        raise ZeroDivisionError(token.index)

    with pytest.raises(ZeroDivisionError):
        streamed(llama, on_token=broken, **GREEDY)
    assert fingerprint(llama.model) == before


def test_ctrl_c_while_the_model_computes(llama: TinyFederation) -> None:
    """The signal reaches the waiting consumer, and the generation stops at the next block."""
    before = fingerprint(llama.model)

    class Interrupt(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if input_ids.shape[1] == len(PROMPT) + 2:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                threading.Event().wait(0.2)
            return scores

    stream = streamed(llama, logits_processor=LogitsProcessorList([Interrupt()]), **GREEDY)
    # Workers of a parallel test run ignore the signal; a user's interpreter does not.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                pass
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(stream.tokens) == 2
    assert len(stream.trace.token_list) == 2
    assert fingerprint(llama.model) == before


SLEEPER = """
import sys; sys.path.insert(0, {tests!r})
import pathlib, tempfile, protoken
from tiny_federation import tiny_federation
federation = tiny_federation(pathlib.Path(tempfile.mkdtemp()))
stream = protoken.stream(federation.model, [5, 6, 7], ledger=federation.path, max_new_tokens=9)
print(next(stream).index)
"""


def test_interpreter_exits_with_a_stream_half_read(pytestconfig: pytest.Config) -> None:
    code = SLEEPER.format(tests=str(pytestconfig.rootpath / "tests"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout == "0\n"
    assert "Traceback" not in done.stderr


def test_error_of_generate_itself_reaches_the_consumer(llama: TinyFederation) -> None:
    before = fingerprint(llama.model)
    with pytest.raises(ValueError, match="not_an_argument"):
        list(streamed(llama, not_an_argument=1, **GREEDY))
    assert fingerprint(llama.model) == before


@pytest.mark.parametrize(
    ("family", "untouched"), [("llama", True), ("gpt2", True), ("gemma2", False), ("cohere", False)]
)
def test_the_slope_is_known_only_where_nothing_follows_the_head(
    family: str, untouched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = tiny_federation(tmp_path, family)
    own, found = leaf_tap._is_last_row, []

    def noting(logits: torch.Tensor, z: torch.Tensor) -> bool:
        found.append(own(logits, z))
        return found[-1]

    monkeypatch.setattr(leaf_tap, "_is_last_row", noting)
    # The torch backend has no short way around the graph (gated_tail.py), so every token asks.
    list(streamed(federation, max_new_tokens=4, do_sample=False, backend="torch"))
    assert found == [untouched] * 3
