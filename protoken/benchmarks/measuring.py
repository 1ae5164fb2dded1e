"""Where a call runs, how long it takes, and its peak memory."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from protoken.arguments import check_word
from protoken.errors import ArgumentError


def device_of(name: str) -> torch.device:
    """ "cpu", "cuda", or "auto": cuda if there. ArgumentError for another word, or for cuda where there is none."""
    there = torch.cuda.is_available()
    check_word("device", name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not there:
        raise ArgumentError("device", expected="cpu: no CUDA device is there", got=name, remedy="Use cpu, or auto")
    return torch.device(("cuda" if there else "cpu") if name == "auto" else name)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, in seconds; what it launched on an accelerator included."""
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most memory in use while a call runs: of the accelerator, or the process's resident set.

    None where the system does not let a process reset its high-water mark (other than Linux, some containers).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    run()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def _give_back() -> None:
    """Hand freed memory back to the system: what an earlier call left in the heap would count as this one's."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
