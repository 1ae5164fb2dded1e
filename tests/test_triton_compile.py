"""Every Triton kernel compiles to machine code for the GPUs we serve; needs no GPU, only Triton's own ptxas."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

TARGETS = [80, 90, pytest.param(100, marks=pytest.mark.slow)]
I64, I32 = "i64", "i32"
# module, kernel, pointer and number arguments with their types, compile-time flags; the rest of the arguments is i32.
KERNELS = {
    "client_scores-bf16": (
        "client_scores",
        "_client_scores_kernel",
        {"table": "*i64", "parts": "*fp32"},
        {
            "BANK": "bfloat16",
            "X": "bfloat16",
            "G": "float32",
            "MODE": 0,
            "SCALED": False,
            "FLOAT8": False,
            "ALIGNED": True,
            "X_ALIGNED": True,
            "G_ALIGNED": True,
            "SPAN": 256,
            "BT": 64,
            "BO": 64,
            "BI": 64,
            "DEPTH": 1024,
        },
    ),
    "client_scores-fp8-with-fp32-tokens": (
        "client_scores",
        "_client_scores_kernel",
        {"table": "*i64", "parts": "*fp32"},
        {
            "BANK": "int8",
            "X": "float32",
            "G": "float32",
            "MODE": 1,
            "SCALED": True,
            "FLOAT8": True,
            "ALIGNED": True,
            "X_ALIGNED": True,
            "G_ALIGNED": True,
            "SPAN": 256,
            "BT": 16,
            "BO": 64,
            "BI": 128,
            "DEPTH": 1024,
        },
    ),
    "client_scores-fp32": (
        "client_scores",
        "_client_scores_kernel",
        {"table": "*i64", "parts": "*fp32"},
        {
            "BANK": "float32",
            "X": "float32",
            "G": "float32",
            "MODE": 2,
            "SCALED": False,
            "FLOAT8": False,
            "ALIGNED": False,
            "X_ALIGNED": False,
            "G_ALIGNED": False,
            "SPAN": 256,
            "BT": 128,
            "BO": 64,
            "BI": 64,
            "DEPTH": 1024,
        },
    ),
    "client_totals-int8": (
        "client_totals",
        "_client_totals_kernel",
        {"table": "*i64", "parts": "*fp32"},
        {
            "BANK": "int8",
            "M": "float32",
            "SCALED": True,
            "FLOAT8": False,
            "ALIGNED": True,
            "M_ALIGNED": True,
            "BO": 8,
            "BI": 512,
        },
    ),
    "client_scores_lowrank-bf16": (
        "client_scores_lowrank",
        "_client_scores_lowrank_kernel",
        {"table": "*i64", "numbers": "*i64", "scale": "*fp32", "x": "*bf16", "grad": "*bf16", "out": "*fp32"},
        {
            "BANK": "bfloat16",
            "X": "bfloat16",
            "G": "bfloat16",
            "MODE_X": 0,
            "MODE_G": 0,
            "A_ALIGNED": True,
            "B_ALIGNED": True,
            "CLIENTS": 8,
            "BR": 64,
            "BT": 64,
            "BC": 64,
            "DEPTH": 1024,
        },
    ),
    "client_scores_lowrank-fp32": (
        "client_scores_lowrank",
        "_client_scores_lowrank_kernel",
        {"table": "*i64", "numbers": "*i64", "scale": "*fp32", "x": "*fp32", "grad": "*fp32", "out": "*fp32"},
        {
            "BANK": "float32",
            "X": "float32",
            "G": "float32",
            "MODE_X": 2,
            "MODE_G": 2,
            "A_ALIGNED": True,
            "B_ALIGNED": True,
            "CLIENTS": 1,
            "BR": 64,
            "BT": 16,
            "BC": 64,
            "DEPTH": 1024,
        },
    ),
    "capture_append": (
        "capture_append",
        "_capture_append_kernel",
        {"buffer": "*bf16", "step": "*fp32", "cursor": "*i64"},
        {"NARROWS": True, "BLOCK": 1024},
    ),
    "logits": (
        "relevance_head",
        "_logits_kernel",
        {"normed": "*fp32", "weight": "*bf16", "bias": "*bf16", "logits": "*fp32", "scale": "fp32"},
        {"MODE": 1, "BIAS": False, "BT": 64, "BV": 64, "BD": 64},
    ),
    "stats": (
        "relevance_head",
        "_stats_kernel",
        {"logits": "*fp32", "top": "*fp32", "mass": "*fp32", "shrink": "*fp32", "cap": "fp32"},
        {"CAPPED": True, "BLOCK": 1024},
    ),
    "mean": (
        "relevance_head",
        "_mean_kernel",
        {"logits": "*fp32", "weight": "*bf16", "top": "*fp32", "shrink": "*fp32", "mean": "*fp32", "cap": "fp32"},
        {"MODE": 1, "CAPPED": True, "BT": 64, "BV": 64, "BD": 64},
    ),
    "sum_parts": ("common", "_sum_parts_kernel", {"parts": "*fp32", "out": "*fp32"}, {"BLOCK": 256}),
}


def compile_kernel(name: str, capability: int) -> tuple[int, int]:
    """(bytes of machine code, matrix instructions in the PTX)."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel, types, flags = KERNELS[name]
    function = getattr(importlib.import_module(f"protoken.kernels.{module}"), kernel)
    constants = {key: getattr(tl, value) if isinstance(value, str) else value for key, value in flags.items()}
    signature = {key: "constexpr" if key in constants else types.get(key, I32) for key in function.arg_names}
    compiled = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", capability, 32))
    ptx = compiled.asm["ptx"]
    return len(compiled.asm["cubin"]), ptx.count("mma.sync") + ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="the tests of this file run in this process")
def test_kernels_compile_in_a_process_without_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", str(Path(__file__))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernel_compiles(name: str, capability: int) -> None:
    if capability < 89 and "fp8" in name:
        pytest.skip("float8_e4m3fn needs compute capability 8.9 in Triton; the launcher says so")
    size, matrix_instructions = compile_kernel(name, capability)
    assert size > 0
    if "bf16" in name or name in ("logits", "mean"):
        assert matrix_instructions > 0


class _NoGpu:
    """What Triton asks of a driver before it compiles, answered for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return -1  # under which Triton keeps what it compiled

    def get_current_stream(self, device: int = -1) -> int:
        return 0


class Launched(NamedTuple):
    """A kernel as a launcher compiled it."""

    name: str
    shared: int  # bytes
    ptx: str


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """Launchers compile for compute capability 8.9 as they would there, and launch nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Launched] = []
    run = JITFunction.run

    def compile_only(self: Any, *operands: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *operands, grid=grid, warmup=True, **options)
        compiled.append(Launched(self.fn.__name__, kernel.metadata.shared, kernel.asm["ptx"]))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", _NoGpu(89))
    return compiled


SMALLEST_SHARED = 101376  # bytes that a block may have on compute capability 8.6, 8.9 and 12.0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("bank", "x", "tokens"),
    [("float32", "float32", 16), ("float32", "float32", 32), ("bfloat16", "float32", 128), ("float16", "float16", 64)],
)
def test_client_scores_fit_into_the_shared_memory_of_small_gpus(
    bank: str, x: str, tokens: int, launched: list[Launched]
) -> None:
    import torch
    from protoken.kernels.client_scores import launch_client_scores

    from protoken.ops import DenseBank

    xs, grads = ([torch.ones(tokens, n, dtype=getattr(torch, x))] for n in (256, 64))
    banks = [DenseBank.of(torch.ones(2, 64, 256, dtype=getattr(torch, bank)))]
    launch_client_scores(torch.empty(1, 2, tokens), xs, grads, banks)
    assert [kernel.name for kernel in launched] == ["_client_scores_kernel", "_sum_parts_kernel"]
    assert 0 < launched[0].shared <= SMALLEST_SHARED


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_client_scores_lowrank_fit_into_the_shared_memory_of_small_gpus(launched: list[Launched]) -> None:
    import torch
    from protoken.kernels.client_scores_lowrank import launch_client_scores_lowrank

    from protoken.ops import LowRankBank

    bank = LowRankBank.of(torch.ones(2, 128, 128), torch.ones(2, 64, 128))
    launch_client_scores_lowrank(torch.empty(1, 2, 64), [torch.ones(64, 128)], [torch.ones(64, 64)], [bank])
    (kernel,) = launched
    assert kernel.name == "_client_scores_lowrank_kernel"
    assert 0 < kernel.shared <= SMALLEST_SHARED


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_what_is_aligned_is_loaded_16_bytes_at_a_time(launched: list[Launched]) -> None:
    import torch
    from protoken.kernels.client_scores import launch_client_scores
    from protoken.kernels.client_scores_lowrank import launch_client_scores_lowrank
    from protoken.kernels.client_totals import launch_client_totals

    from protoken.ops import DenseBank, LowRankBank

    x, grad, m = (torch.ones(*shape, dtype=torch.bfloat16) for shape in ((64, 256), (64, 128), (128, 256)))
    dense = DenseBank.of(torch.ones(2, 128, 256, dtype=torch.bfloat16))
    turned = torch.ones(2, 16, 128, dtype=torch.bfloat16).transpose(1, 2)
    lowrank = LowRankBank.of(torch.ones(2, 16, 256, dtype=torch.bfloat16), turned)
    launch_client_scores(torch.empty(1, 2, 64), [x], [grad], [dense])
    launch_client_totals(torch.empty(1, 2), [m], [dense])
    launch_client_scores_lowrank(torch.empty(1, 2, 64), [x], [grad], [lowrank])
    kernels = [kernel for kernel in launched if kernel.name != "_sum_parts_kernel"]
    assert len(kernels) == 3
    for kernel in kernels:
        assert not re.findall(r"ld\.global\S*b16", kernel.ptx), kernel.name
        assert re.search(r"ld\.global\.v4\.b32|cp\.async\.c[ag]\S* .*, 0x10", kernel.ptx), kernel.name


def test_the_package_of_kernels_imports_nothing() -> None:
    tree = ast.parse((Path(__file__).parents[1] / "kernels" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
