"""pytest bench/bench_client_totals.py: totals of 6 clients at SmolLM2-135M's last block, after a check."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from op_cases import bank_of, cpu_ways, normal, use
from tolerances import close

from protoken import _C
from protoken.ops import DenseBank, client_totals, client_totals_reference


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("way", cpu_ways())
def test_bench_client_totals(benchmark: Any, way: str, name: str) -> None:
    m = normal(576, 1536, seed=8)
    bank, scale = bank_of(name, 6, 576, 1536)
    wrapped, before = DenseBank.of(bank, scale), _C.instruction_set()
    try:
        backend = use(way)
        got = benchmark(client_totals, m, wrapped, backend=backend)
    finally:
        _C.use_instruction_set(before)
    close(got, client_totals_reference(m, bank, scale=scale), m.dtype, factor=10)
    benchmark.extra_info["bytes"] = bank.numel() * bank.element_size()
