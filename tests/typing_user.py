"""A user's program as `mypy --strict` sees it; read by tests/test_typing.py, never run.

`assert_type` holds what a call is known to give: an attribute that has become Any would pass every other check.
"""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import protoken
from protoken.records import RecordScores
from protoken.results import ClientScore, TokenScore

Weights = dict[str, Tensor]


def record(path: Path, before: Weights, after: Weights, delta: Weights, state: Weights) -> protoken.Ledger:
    ledger = protoken.Ledger.create(path, model="clinics", metadata={"site": "north"})
    updates = [
        protoken.ClientUpdate("clinic-a", 0.5, delta=delta, examples=120),
        protoken.ClientUpdate("clinic-b", 0.5, state=state),
    ]
    ledger.commit_round(before, after, updates)
    assert_type(ledger.rounds, tuple[int, ...])
    assert_type(protoken.Ledger.open(path), protoken.Ledger)
    return ledger


def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ledger: protoken.Ledger) -> protoken.Trace:
    protoken.attach(model, ledger, tokenizer)
    told = protoken.estimate(model, "How is a fever treated?", blocks=4, max_new_tokens=64)
    assert_type(told, protoken.Estimate)
    assert_type(told.total, int)
    chat = [{"role": "user", "content": "How is a fever treated?"}]
    trace = protoken.trace(model, chat, rounds="all", granularity="layer", max_new_tokens=64, do_sample=False)
    assert_type(trace, protoken.Trace)
    assert_type(trace.clients, list[ClientScore])
    assert_type(trace.tokens, list[TokenScore])
    assert_type(trace.totals, NDArray[np.float64])
    assert_type(trace.find("fever"), list[protoken.Trace])
    trace.show(top=3)
    assert_type(trace.to_html("trace.html"), str)
    trace.save(Path("trace.json"))
    protoken.detach(model)
    return protoken.Trace.load("trace.json")


def ask_while_it_runs(model: PreTrainedModel, ids: Tensor) -> list[protoken.Trace]:
    with protoken.tracing(model, ledger="federation.ledger", method="aumann_shapley", nodes=4) as tape:
        assert_type(tape, protoken.Tape)
        model.generate(ids, max_new_tokens=8)
    assert_type(tape[0], protoken.Trace)
    stream = protoken.stream(model, [1, 2, 3], on_token=lambda token: print(token.text, end=""), max_new_tokens=8)
    assert_type(stream, protoken.Stream)
    for token in stream:
        assert_type(token, protoken.StreamedToken)
        assert_type(token.scores, dict[str, float])
    return [*tape.traces, stream.trace]


def ask_again(trace: protoken.Trace, model: PreTrainedModel) -> None:
    assert_type(trace.lineage(nodes=None, model=model), protoken.Trace)
    past = trace.history()
    assert_type(past, protoken.History)
    assert_type(past.ranking, list[tuple[str, float]])
    without = trace.counterfactual(without=["clinic-a"])
    assert_type(without, protoken.Counterfactual)
    assert_type(without.total, float)


def judge(traces: list[protoken.Trace], quiet: list[protoken.Trace]) -> None:
    book = protoken.account(traces)
    assert_type(book, protoken.Account)
    assert_type(book.flagged, tuple[str, ...])
    assert_type([client.total for client in book.clients], list[float])
    verdict = protoken.verdict.Abstention.fit(quiet, false_alarm=0.05).judge(traces[0])
    assert_type(verdict.client, str | None)
    for interval in protoken.confidence.intervals(traces[0]):
        assert_type(interval, protoken.confidence.ClientInterval)


def from_client_to_record(
    trace: protoken.Trace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RecordScores:
    probe = protoken.record_probe(trace, span=(0, 12), model=model)
    assert_type(probe, protoken.RecordProbe)
    scores = probe.score(model, [{"prompt": "A fever?", "response": "Rest."}, "plain text"], tokenizer)
    assert_type(scores, protoken.RecordScores)
    assert_type(scores.by_client(), dict[str, float])
    return scores
