"""`stream`: however it ends, the model is as it was and nothing is left behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading

import pytest
import torch
from stream_cases import GREEDY, PROMPT, streamed, traced
from test_trace_errors import failing, fingerprint
from tiny_federation import TinyFederation, tiny_federation
from tolerances import close
from transformers import LogitsProcessor, LogitsProcessorList

import protoken

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"))


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
