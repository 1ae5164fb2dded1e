"""What the tests of `stream` share: a prompt, the two calls to compare, and what equal means."""

from __future__ import annotations

from typing import Any

import torch
from tiny_federation import TinyFederation
from tolerances import close

import protoken

PROMPT = [5, 17, 42, 8, 60, 33, 21]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


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
