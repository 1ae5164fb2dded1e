"""Who serves a call, why, and that the operators work under torch.compile."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from op_cases import bank_of, factors_of, tokens_of
from torch.library import opcheck

from protoken import _C, dispatch, ops
from protoken.dispatch import OPS, ORDER, backends_for, choose
from protoken.errors import ArgumentError, BackendError

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", OPS)
def test_every_op_lists_every_backend_with_a_reason(op: str) -> None:
    found = backends_for(op, "cpu")
    assert [backend.name for backend in found] == list(ORDER)
    assert all(backend.reason for backend in found)
    assert found[-1].available


@pytest.mark.parametrize("op", ["client_scores", "client_scores_lowrank", "client_totals"])
def test_auto_takes_the_native_kernels_on_the_cpu_and_says_so_once(
    op: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_told", set())
    with caplog.at_level(logging.INFO, logger="protoken"):
        assert choose(op, "auto", CPU).name == "cpp"
        assert choose(op, "auto", CPU).name == "cpp"
    assert len(caplog.records) == 1


def test_a_backend_asked_for_by_name_raises_with_its_reason() -> None:
    x, grad = tokens_of(2, 3, 4)
    bank, _ = bank_of("fp32", 1, 3, 4)
    with pytest.raises(BackendError, match=r"cuda.*serves cuda tensors, not cpu"):
        ops.client_scores(x, grad, bank, backend="cuda")
    with pytest.raises(ArgumentError, match="backend: expected auto or one of cuda, triton, cpp, torch"):
        ops.client_scores(x, grad, bank, backend="fast")
    with pytest.raises(ArgumentError, match="op"):
        backends_for("client_score")


@pytest.mark.parametrize(
    ("triton", "numpy", "broken"), [("3.6.0", "2.4.1", True), ("3.7.0", "2.4.1", False), ("3.6.0", "2.3.9", False)]
)
def test_an_interpreter_that_numpy_broke_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, triton: str, numpy: str, broken: bool
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "version_of", {"triton": triton, "numpy": numpy}.get)
    monkeypatch.setattr(dispatch, "_modules", {})
    (found,) = (backend for backend in backends_for("client_totals", "cpu") if backend.name == "triton")
    assert found.available is not broken
    assert ("numpy" in found.reason) is broken


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(13010, "serves cuda"), (12080, "built with CUDA 13.0, the driver serves up to 12.8"), (0, "serves cuda")],
)
def test_a_driver_older_than_the_native_code_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, driver: int, reason: str
) -> None:
    import protoken

    native = ModuleType("protoken._C_cuda")
    native.__spec__ = ModuleSpec("protoken._C_cuda", None)
    native.versions = lambda: (driver, 13000)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "protoken._C_cuda", native)
    monkeypatch.setattr(protoken, "_C_cuda", native, raising=False)
    monkeypatch.delitem(sys.modules, "protoken.ops.cuda", raising=False)
    monkeypatch.setattr(ops, "cuda", None, raising=False)
    monkeypatch.setattr(dispatch, "_modules", {})
    (found,) = (backend for backend in backends_for("client_totals", "cuda") if backend.name == "cuda")
    sys.modules.pop("protoken.ops.cuda", None)  # it knows this native module alone
    assert reason in found.reason
    assert found.available is (driver != 12080)


def test_an_error_in_a_launch_is_raised_and_not_served_by_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from protoken.ops import cpp

    def broken(*_: object) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(cpp, "launch_client_scores", broken)
    x, grad = tokens_of(2, 3, 4)
    with pytest.raises(MemoryError):
        ops.client_scores(x, grad, bank_of("fp32", 1, 3, 4)[0])


def test_auto_asks_for_objections_at_every_call() -> None:
    """Once a backend has served, another call that it cannot serve still goes to the next one."""
    head = ops.Head(torch.ones(5, 4))
    few, many = torch.ones(2, 4), torch.ones(_C.head_tokens + 1, 4)
    targets = torch.zeros(len(many), dtype=torch.long)
    for _ in range(2):
        assert dispatch.launcher("relevance_head", "auto", CPU, few, targets[:2], head).__module__ == "protoken.ops.cpp"
        served = dispatch.launcher("relevance_head", "auto", CPU, many, targets, head)
        assert served.__module__ == "protoken.ops.relevance_head"
    with pytest.raises(BackendError, match="cuda"):
        dispatch.launcher("relevance_head", "cuda", CPU, few, targets[:2], head)


def test_instruction_sets_are_known_by_name() -> None:
    sets = _C.instruction_sets()
    assert sets[-1] == "portable"
    known = [*sets, "amx-emulated"] if "avx512" in sets else sets  # which is made of AVX-512
    with pytest.raises(ValueError, match=f"one of {', '.join(known)}, got mmx"):
        _C.use_instruction_set("mmx")


def test_threads_are_those_of_torch() -> None:
    assert "OpenMP" in _C.team_source()
    assert "torch" in _C.team_source()


def test_the_kernels_run_without_an_openmp_runtime() -> None:
    """The native module alone, torch never loaded: its own threads do the work."""
    script = (
        "import importlib.util, sys, array\n"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert module.team_source() == 'std::thread', module.team_source()\n"
        "bank = array.array('f', [1.0] * (300 * 64)); x = array.array('f', [2.0] * 64)\n"
        "grad = array.array('f', [1.0] * 300); out = array.array('f', [0.0])\n"
        "at = lambda a: a.buffer_info()[0]\n"
        "pointers = array.array('q', [at(bank)])\n"
        "row = array.array('q', [at(x), at(grad), 300, 64, 0, at(pointers), 64, 1, 0])\n"
        "module.client_scores(at(row), 1, 1, 1, at(out), 3)\n"
        "assert out[0] == 300 * 64 * 2, out\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr


def operands(op: str) -> tuple[object, ...]:
    x, grad = tokens_of(5, 9, 12)
    bank, _ = bank_of("fp32", 3, 9, 12)
    eight, scale = bank_of("int8", 3, 9, 12)
    a, b, factor = factors_of("fp32", 3, 9, 12, 2)
    weight, targets = torch.randn(20, 12), torch.arange(5)
    return {
        "client_scores": ([x, x], [grad, grad], [eight, *bank], [-1, 3], [scale, None], "auto"),
        "client_scores_lowrank": ([x], [grad], [a], [b], [-1], [factor], "auto"),
        "client_totals": ([grad.T @ x], [bank], [-1], [None], "auto"),
        "relevance_head": (x, targets, weight, None, None, None, "rms", 1e-6, 1.0, None, "log_prob", "auto"),
        "capture_append": ([torch.zeros(4, 12)], [x], torch.zeros(1, dtype=torch.int64), "auto"),
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_operators_pass_opcheck(op: str) -> None:
    results = opcheck(getattr(torch.ops.protoken, op).default, operands(op))
    assert set(results.values()) == {"SUCCESS"}


def test_the_ops_compile_without_graph_breaks() -> None:
    x, grad = tokens_of(5, 9, 12)
    bank, _ = bank_of("fp32", 3, 9, 12)
    a, b, factor = factors_of("fp32", 3, 9, 12, 2)
    head = ops.Head(torch.randn(20, 12))
    buffer, cursor = torch.zeros(8, 12), torch.zeros(1, dtype=torch.int64)

    def scored(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        ops.capture_append([buffer], [x], cursor)
        scores = ops.client_scores(2 * x, grad, bank) + ops.client_scores(x, grad, list(bank))
        scores = scores + ops.client_scores_lowrank(x, grad, a, b, factor)
        return scores + ops.client_totals(grad.T @ x, bank)[:, None] + ops.relevance_head(x, torch.arange(5), head)[1]

    compiled = torch.compile(scored, fullgraph=True, backend="aot_eager")(x, grad)
    assert torch.equal(buffer[:5], x)
    assert cursor == 5
    torch.testing.assert_close(compiled, scored(x, grad))


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "compute capability 8.0"), ((8, 0), None), ((12, 0), None)]
)
def test_devices_older_than_the_native_code_are_not_served_by_it(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from protoken import dispatch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = dispatch._device_reason("cuda", torch.device("cuda", 1))
    assert found is None if reason is None else reason in found
    if reason is not None:
        assert found.endswith("cuda:1 has 7.5")
        assert not next(b for b in dispatch.backends_for("client_scores", "cuda") if b.name == "cuda").available


def test_tables_of_addresses_are_known_to_the_stream_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped with their bank while that stream is still at work, they must not be given to somebody else."""
    from protoken.ops.banks import read_here

    class Held:
        is_cuda, device = True, torch.device("cuda", 1)

        def record_stream(self, stream: object) -> None:
            seen.append(stream)

    seen: list[object] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    held = Held()
    assert read_here(held) is held  # type: ignore[arg-type,comparison-overlap]
    assert seen == ["the stream of cuda:1"]
    table = torch.zeros(3, dtype=torch.int64)
    assert read_here(table) is table
