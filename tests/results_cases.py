"""A `Trace` made by hand, for the tests of what can be done with one."""

from __future__ import annotations

from typing import Any

import numpy as np

from protoken.results import Token, Trace, TraceInfo

LAYERS = ("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")


def info(**changes: Any) -> TraceInfo:
    given = {
        "method": "protoken",
        "way": "local",
        "objective": "log_prob",
        "layers": LAYERS,
        "rounds": (1, 2),
        "versions": {"torch": "2.13.0"},
        "seed": 7,
        "seconds_generate": 1.8,
        "seconds_trace": 1.84,
        "generate_arguments": {"max_new_tokens": 8},
        "created": "2026-01-02T03:04:05+00:00",
    }
    return TraceInfo(**{**given, **changes})  # type: ignore[arg-type]


def make(
    texts: list[str] | None = None,
    clients: int = 3,
    *,
    seed: int = 0,
    per_token: bool = True,
    scores: Any = None,
    **changes: Any,
) -> Trace:
    random = np.random.default_rng(seed)
    pieces = ["The", " INR", " is", " fine", "."] if texts is None else texts
    tokens = tuple(Token(i, piece, piece.startswith("<|")) for i, piece in enumerate(pieces))
    own = random.normal(size=(len(tokens), clients)) if scores is None else np.asarray(scores, dtype=float)
    inside = random.normal(size=len(tokens)) * 1e-3
    fields: dict[str, Any] = {
        "prompt": "Is it?",
        "prompt_ids": (5, 6, 7),
        "response": "".join(pieces),
        "token_list": tokens,
        "client_ids": tuple(f"client_{k}" for k in range(clients)),
        "weights": np.full(clients, 1 / clients),
        "token_scores": own if per_token else None,
        "totals": own.sum(axis=0),
        "objective_values": -random.random(len(tokens)),
        "token_residual": inside if per_token else None,
        "residual": inside.sum(),
        "change": own.sum() + inside.sum(),
        "layer_totals": np.stack([own.sum(axis=0) * 0.25, own.sum(axis=0) * 0.75]),
        "info": info(),
    }
    return Trace(**{**fields, **changes})
