"""pytest bench/bench_capture_append.py: one decoding step's rows of two layers into their ring buffers, checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from op_cases import normal

from protoken.dispatch import backends_for
from protoken.ops import capture_append


@pytest.mark.parametrize("way", [found.name for found in backends_for("capture_append", "cpu") if found.available])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bench_capture_append(benchmark: Any, way: str, dtype: torch.dtype) -> None:
    buffers = [torch.zeros(512, 576, dtype=dtype), torch.zeros(512, 1536, dtype=dtype)]
    steps = [normal(1, 576, seed=1), normal(1, 1536, seed=2)]
    cursor = torch.zeros(1, dtype=torch.int64)
    benchmark(capture_append, buffers, steps, cursor, backend=way)
    last = (int(cursor) - 1) % 512
    for buffer, step in zip(buffers, steps, strict=True):
        assert torch.equal(buffer[last], step[0].to(dtype))
