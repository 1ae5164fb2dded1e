"""Public calls with arguments of the wrong kind: each is told what it was, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from character_tokenizer import character_tokenizer
from tiny_federation import TinyFederation, tiny_federation

import protoken
from protoken import errors
from protoken.confidence import Calibration, intervals, margin
from protoken.verdict import Abstention, leading

PROMPT = [5, 17, 42, 8]
HALF = "\ud83d"  # the first half of an emoji, as texts cut in UTF-16 end


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("strange"), "smollm", rounds=3)


@pytest.fixture(scope="module")
def trace(federation: TinyFederation) -> protoken.Trace:
    return run(federation)


def run(federation: TinyFederation, prompt: Any = PROMPT, **arguments: Any) -> protoken.Trace:
    arguments = {"max_new_tokens": 3, "do_sample": False, "ledger": federation.path, **arguments}
    return protoken.trace(federation.model, prompt, **arguments)


def streamed(federation: TinyFederation, prompt: Any = PROMPT, **arguments: Any) -> list[protoken.StreamedToken]:
    arguments = {"max_new_tokens": 3, "do_sample": False, "ledger": federation.path, **arguments}
    return list(protoken.stream(federation.model, prompt, **arguments))


def taped(federation: TinyFederation, **arguments: Any) -> None:
    with protoken.tracing(federation.model, **{"ledger": federation.path, **arguments}):
        pytest.fail("the tape was opened")


# ---- one attribution's choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [run, streamed, taped], ids=["trace", "stream", "tracing"])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("layers", value) for value in ([], [1], [None], 5, "o_proj", b"o_proj")),
        *(("ledger", value) for value in (5, torch)),
        *(("tokenizer", value) for value in (5, "tokenizer")),
        *(("rounds", value) for value in (slice(5, 9), slice(None, None, 0), slice("a", None), [], None, True, 1.0)),
    ],
)
def test_choice_of_the_wrong_kind_is_named(
    federation: TinyFederation, call: Callable[..., object], argument: str, value: Any
) -> None:
    with pytest.raises((errors.ArgumentError, errors.UnknownRoundError), match=argument.removesuffix("s")):
        call(federation, **{argument: value})


@pytest.mark.parametrize(
    ("rounds", "same"),
    [
        (slice(-2, None), [2, 3]),
        (slice(None), "all"),
        (slice(1, 3), (2, 3)),
        (np.int64(2), 2),
        ([2], 2),
        (np.array([1, 3]), [1, 3]),
    ],
)
def test_rounds_may_be_a_slice_or_numpys(federation: TinyFederation, rounds: Any, same: Any) -> None:
    for method in ("protoken", "aumann_shapley"):
        found, expected = (run(federation, rounds=r, method=method) for r in (rounds, same))
        assert found.info.rounds == expected.info.rounds
        assert found.info.settings == expected.info.settings
        assert np.array_equal(found.totals, expected.totals)


def test_slice_ends_at_the_models_own_round(federation: TinyFederation, tmp_path: Path) -> None:
    early = tiny_federation(tmp_path, "smollm", rounds=1)
    protoken.attach(early.model, federation.path, at_round=1, verify=False)
    assert protoken.trace(early.model, PROMPT, max_new_tokens=2, rounds=slice(-3, None)).info.rounds == (1,)


@pytest.mark.parametrize("chat", ["yes", 1])
def test_chat_is_yes_no_or_none(federation: TinyFederation, chat: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="chat"):
        run(federation, chat=chat)


@pytest.mark.parametrize("seed", [-1, "a", 1.5, True])
def test_estimate_refuses_the_seed_that_trace_refuses(federation: TinyFederation, seed: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="seed"):
        protoken.estimate(federation.model, PROMPT, ledger=federation.path, seed=seed)


def test_estimate_refuses_the_backend_that_trace_refuses(federation: TinyFederation) -> None:
    with pytest.raises(errors.BackendError, match="cuda"):
        protoken.estimate(federation.model, PROMPT, ledger=federation.path, backend="cuda")


# ---- texts and ids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [HALF, "hello " + HALF])
def test_half_a_character_is_named(federation: TinyFederation, text: str) -> None:
    tokenizer = character_tokenizer()
    for call in (run, streamed):
        with pytest.raises(errors.PromptError, match="surrogate"):
            call(federation, text, tokenizer=tokenizer)
    with pytest.raises(errors.PromptError, match=r"response.*surrogate"):
        protoken.trace(federation.model, PROMPT, ledger=federation.path, tokenizer=tokenizer, response=text)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for prompt in (text, [{"role": "user", "content": text}]):
        with pytest.raises(errors.PromptError, match="surrogate"):
            run(federation, prompt, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "response", [np.array([4, 5]), [np.int64(4), np.int64(5)], torch.tensor([[4, 5]]), (4, 5)], ids=repr
)
def test_ids_of_a_response_may_come_as_those_of_a_prompt(federation: TinyFederation, response: Any) -> None:
    found = protoken.trace(federation.model, PROMPT, ledger=federation.path, response=response)
    assert [token.id for token in found.token_list] == [4, 5]


@pytest.mark.parametrize("response", [b"ab", bytearray(b"ab"), np.array([0.5]), torch.tensor([True])], ids=repr)
def test_what_is_neither_text_nor_ids_is_no_response(federation: TinyFederation, response: Any) -> None:
    with pytest.raises(errors.PromptError, match="response"):
        protoken.trace(federation.model, PROMPT, ledger=federation.path, response=response)


# ---- results -------------------------------------------------------------------------------------------------------


def test_account_of_an_unknown_client_is_a_typed_error(trace: protoken.Trace) -> None:
    book = protoken.account([trace])
    assert book["ada"].client == "ada"
    with pytest.raises(errors.UnknownClientError, match="nobody"):
        book["nobody"]


@pytest.mark.parametrize("traces", [5, None, [5], "trace"])
def test_account_of_no_traces(traces: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="traces"):
        protoken.account(traces)


def test_one_trace_is_no_list_of_traces(trace: protoken.Trace) -> None:
    with pytest.raises(errors.ArgumentError, match=r"a list of protoken\.Trace, got a Trace"):
        protoken.account(trace)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match="null_traces"):
        Abstention.fit(trace)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments", [{"rate": "a"}, {"draws": 1.5}, {"seed": -1}, {"seed": "a"}, {"confidence": float("nan")}], ids=str
)
def test_accounts_name_the_setting_that_is_wrong(trace: protoken.Trace, arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentError, match=next(iter(arguments))):
        protoken.account([trace], **arguments)


@pytest.mark.parametrize("arguments", [{"draws": 1.5}, {"block": "a"}, {"seed": "x"}, {"confidence": "a"}], ids=str)
def test_intervals_name_the_setting_that_is_wrong(trace: protoken.Trace, arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentError, match=next(iter(arguments))):
        intervals(trace, **arguments)


def test_verdicts_want_traces_and_numbers(trace: protoken.Trace) -> None:
    judge = Abstention.fit([trace] * 20, false_alarm=0.1).judge
    for wrong in (
        lambda: margin(5),  # type: ignore[arg-type]
        lambda: intervals(None),  # type: ignore[arg-type]
        lambda: judge(None),  # type: ignore[arg-type]
        lambda: judge(trace, draws=0),
        lambda: Abstention.fit([trace] * 20, false_alarm="a"),  # type: ignore[arg-type]
        lambda: Abstention.fit([trace] * 20, false_alarm=0.1, lead=7),
        lambda: Calibration.fit(["a"] * 10, [True] * 10),
        lambda: Calibration(1.0, 0.0, 10).probability("x"),  # type: ignore[arg-type]
    ):
        with pytest.raises(errors.ArgumentError):
            wrong()


@pytest.mark.parametrize("totals", [[3.0, 2.8, 0.1], (3.0, 2.8, 0.1), np.array([3.0, 2.8, 0.1])], ids=repr)
def test_leading_takes_what_holds_numbers(totals: Any) -> None:
    assert leading(totals)[0] == (0, 1)


@pytest.mark.parametrize("totals", [[], None, "x", [float("nan"), 1.0], [[1.0, 2.0]], 5])
def test_leading_of_what_is_no_vector_is_refused(totals: Any) -> None:
    with pytest.raises(errors.ArgumentError, match="totals"):
        leading(totals)


# ---- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [{"layers": []}, {"layers": [1]}, {"span": 5}, {"span": ("a", 1)}, {"step": "a"}], ids=str
)
def test_probe_names_the_setting_that_is_wrong(trace: protoken.Trace, arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentError, match=next(iter(arguments))):
        protoken.record_probe(trace, **arguments)


def test_records_need_a_tokenizer_and_whole_characters(federation: TinyFederation, trace: protoken.Trace) -> None:
    probe = protoken.record_probe(trace)
    with pytest.raises(errors.ArgumentError, match="tokenizer"):
        probe.score(federation.model, ["a text"], None)
    for record in (HALF, ("question", HALF), (HALF, "answer")):
        with pytest.raises(errors.ArgumentError, match=r"records\[0\].*surrogate"):
            probe.score(federation.model, [record], character_tokenizer())
    with pytest.raises(errors.ArgumentError, match="records"):
        probe.score(federation.model, None, character_tokenizer())  # type: ignore[arg-type]


# ---- ledgers -------------------------------------------------------------------------------------------------------


def test_ledger_that_is_no_path_is_named(federation: TinyFederation) -> None:
    for wrong in (None, 5):
        for call in (protoken.Ledger.open, protoken.Ledger.create, lambda x: protoken.attach(federation.model, x)):
            with pytest.raises(errors.ArgumentError, match="ledger"):
                call(wrong)


# ---- what a chat template refuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "system", "content": "be kind"}],
        [{"role": "user", "content": None}],
        [{"role": 5, "content": "hi"}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
    ids=str,
)
def test_turns_that_the_template_refuses_are_named(
    federation: TinyFederation, trace: protoken.Trace, turns: list[dict[str, Any]]
) -> None:
    tokenizer = character_tokenizer()
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuse + str(tokenizer.chat_template)
    for call in (run, streamed):
        with pytest.raises(errors.PromptError, match="prompt: expected turns that the tokenizer's chat template takes"):
            call(federation, turns, tokenizer=tokenizer)
    record = {"messages": [*turns, {"role": "assistant", "content": "yes"}]}
    with pytest.raises(errors.ArgumentError, match=r"records\[0\]"):
        protoken.record_probe(trace, blocks=1).score(federation.model, [record], tokenizer)
