"""Step trace: `protoken.trace` and `protoken.stream` of tiny models on the device, against the same on the CPU.

The response is generated once on the CPU and forced on both, so that a tie of two logits cannot make them differ.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_device import DEVICE, DRY_RUN, Rows, error_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

PROMPT = [5, 17, 42, 8, 60, 33, 21]
FAMILIES = ("llama",) if DRY_RUN else ("llama", "qwen2", "gemma3", "smollm")
CALLS: dict[str, dict[str, Any]] = {
    "local": {},
    "local by layer": {"granularity": "layer"},
    "forward": {"way": "forward", "blocks": 2},
    "reverse": {"way": "reverse", "blocks": 2},
    "reverse by token": {"way": "reverse", "granularity": "token", "blocks": 2},
    "aumann_shapley": {"method": "aumann_shapley"},
    "with little memory": {"way": "forward", "blocks": 2, "memory_limit": "64MiB"},
}
# fp32 on both sides, and sums in another order; scores are differences that lose up to two digits.
RELATIVE = 1e-3


def traces(rows: Rows) -> None:
    from tiny_federation import tiny_federation

    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            federation = tiny_federation(Path(folder), family)
            check_family(rows, family, federation)


def check_family(rows: Rows, family: str, federation: Any) -> None:
    import protoken

    model, path = federation.model, federation.path
    first = protoken.trace(model, PROMPT, ledger=path, max_new_tokens=9)
    response = [token.id for token in first.token_list]

    def traced(call: dict[str, Any]) -> torch.Tensor:
        return torch.tensor(protoken.trace(model, PROMPT, ledger=path, response=response, **call).totals)

    def streamed() -> torch.Tensor:
        stream = protoken.stream(model, PROMPT, ledger=path, max_new_tokens=5)
        return torch.tensor([list(token.scores.values()) for token in stream]).sum(0)

    asked: dict[str, Callable[[], torch.Tensor]] = {
        name: lambda call=call: traced(call)  # type: ignore[misc]
        for name, call in CALLS.items()
    }
    asked["stream"] = streamed
    rows.begin(f"trace {family} on the CPU", repeat=True)
    wanted = {name: ask() for name, ask in asked.items()}
    model.to(DEVICE)

    def compared(name: str) -> dict[str, Any]:
        error = error_of(asked[name](), wanted[name])
        return {"error": error, "allowed": RELATIVE, "ok": error <= RELATIVE}

    for name in asked:
        rows.attempt(f"trace {family}, {name}", lambda name=name: compared(name), kind=name)  # type: ignore[misc]
