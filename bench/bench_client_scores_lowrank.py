"""pytest bench/bench_client_scores_lowrank.py: 1000 rank-8 clients at SmolLM2-135M's last block, checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from op_cases import cpu_ways, factors_of, tokens_of, use
from tolerances import close

from protoken import _C
from protoken.ops import LowRankBank, client_scores_lowrank, client_scores_lowrank_reference


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 16, 128])
@pytest.mark.parametrize("way", cpu_ways())
def test_bench_client_scores_lowrank(benchmark: Any, way: str, tokens: int, name: str) -> None:
    x, grad = tokens_of(tokens, 576, 1536)
    a, b, scale = factors_of(name, 1000, 576, 1536, 8)
    wrapped, before = LowRankBank.of(a, b, scale), _C.instruction_set()
    try:
        backend = use(way)
        got = benchmark(client_scores_lowrank, x, grad, wrapped, backend=backend)
    finally:
        _C.use_instruction_set(before)
    close(got[:5], client_scores_lowrank_reference(x, grad, a[:5], b[:5], scale[:5]), x.dtype, factor=3)
    benchmark.extra_info["bytes"] = (a.numel() + b.numel()) * a.element_size()
