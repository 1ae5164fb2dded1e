"""Step graph: every op captured into a CUDA graph and replayed with other inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_device import DEVICE, DRY_RUN, Rows, captured, normal
from torch import Tensor

from protoken.dispatch import OPS
from protoken.ops import (
    DenseBank,
    Head,
    LowRankBank,
    capture_append,
    client_scores_grouped,
    client_scores_lowrank,
    client_totals,
    relevance_head,
)

TOGETHER = "all ops"


def graph(rows: Rows, backend: str) -> None:
    """Captured once, replayed with other inputs: what eager mode gives, bit for bit. Op by op, then all in one."""
    backend = "cpp" if DRY_RUN and backend == "cuda" else backend
    for tokens in (3, 20) if DRY_RUN else (3, 70):
        for what in (*OPS, TOGETHER):
            case = f"graph {backend} {what} T = {tokens}"
            found = lambda what=what, tokens=tokens: {"ok": replays(backend, what, tokens)}  # noqa: E731
            rows.attempt(case, found, kind=what)


def replays(backend: str, what: str, tokens: int) -> bool:
    outputs, inputs = (20, 40) if DRY_RUN else (200, 528)
    x, grad = (normal(tokens, n, seed=n, dtype=torch.bfloat16) for n in (inputs, outputs))
    bank = DenseBank.of(normal(5, outputs, inputs, seed=3, dtype=torch.bfloat16))
    m = normal(outputs, inputs, seed=6)
    factors = LowRankBank.of(normal(9, 8, inputs, seed=4), normal(9, outputs, 8, seed=5))
    head, targets = Head(normal(1000, outputs, seed=7)), torch.arange(tokens, device=DEVICE)
    buffer, cursor = torch.zeros(16, inputs, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    other = "auto" if backend == "cpp" else backend  # which has not all of the ops

    def appended() -> list[Tensor]:
        cursor.zero_()
        capture_append([buffer], [x], cursor, backend=other)
        return [buffer.clone()]

    calls: dict[str, Callable[[], list[Tensor]]] = {
        "client_scores": lambda: [client_scores_grouped([x, x], [grad, grad], [bank, bank], backend=backend)],
        "client_scores_lowrank": lambda: [client_scores_lowrank(x, grad, factors, backend=backend)],
        "client_totals": lambda: [client_totals(m, bank, backend=backend)],
        "relevance_head": lambda: list(relevance_head(grad, targets, head, backend=other)),
        "capture_append": appended,
    }

    def run() -> list[Tensor]:
        chosen = calls.values() if what == TOGETHER else [calls[what]]
        return [out for call in chosen for out in call()]

    replay, outs = captured(run)
    x.copy_(normal(tokens, inputs, seed=11))
    grad.copy_(normal(tokens, outputs, seed=12))
    m.copy_(normal(outputs, inputs, seed=13))
    replay()
    got = [out.clone() for out in outs]
    return all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))
