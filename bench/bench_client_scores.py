"""pytest bench/bench_client_scores.py: dense scores at SmolLM2-135M's last block, after a check of the result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from op_cases import bank_of, cpu_ways, tokens_of, use
from tolerances import close

from protoken import _C
from protoken.ops import DenseBank, client_scores, client_scores_reference


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 16, 128])
@pytest.mark.parametrize("way", cpu_ways())
def test_bench_client_scores(benchmark: Any, way: str, tokens: int, name: str) -> None:
    x, grad = tokens_of(tokens, 576, 1536)
    bank, scale = bank_of(name, 6, 576, 1536)
    wrapped, before = DenseBank.of(bank, scale), _C.instruction_set()
    try:
        backend = use(way)
        got = benchmark(client_scores, x, grad, wrapped, backend=backend)
    finally:
        _C.use_instruction_set(before)
    close(got, client_scores_reference(x, grad, bank, scale=scale), x.dtype)
    benchmark.extra_info["bytes"] = bank.numel() * bank.element_size()
