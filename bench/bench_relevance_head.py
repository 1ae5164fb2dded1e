"""pytest bench/bench_relevance_head.py: SmolLM2-135M's head, ours beside log_softmax and autograd, after a check."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from op_cases import normal
from tolerances import close

from protoken.dispatch import backends_for
from protoken.ops import Head, relevance_head, relevance_head_reference

WAYS = [found.name for found in backends_for("relevance_head", "cpu") if found.available] + ["autograd"]


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("way", WAYS)
def test_bench_relevance_head(benchmark: Any, way: str, tokens: int) -> None:
    head = Head(normal(49152, 576, seed=1) / 24, norm_weight=normal(576, seed=4))
    hidden = normal(tokens, 576, seed=2)
    targets = torch.arange(tokens) * 1000
    if way == "autograd":
        got = benchmark(relevance_head_reference, hidden, targets, head, dtype=torch.float32)
    else:
        got = benchmark(relevance_head, hidden, targets, head, backend=way)
    close(got[0], relevance_head_reference(hidden, targets, head)[0], torch.float32)
