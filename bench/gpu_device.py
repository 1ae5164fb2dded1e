"""What the steps of bench/gpu.py share: the device, findings on disk, random operands, errors and a clock.

With PROTOKEN_GPU_DRY_RUN=1 the device is the CPU: Triton runs in its interpreter, the native CPU module stands where
the CUDA module would, and sizes are tiny. That shows that the steps work from end to end; its times mean nothing.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_runner import lines_of
from torch import Tensor

DRY_RUN = os.environ.get("PROTOKEN_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
# compute-sanitizer looks at protoken's kernels alone and then does not see what torch's kernels write: for its steps
# operands are made on the CPU and copied, which it does see.
MADE_ON = torch.device("cpu") if os.environ.get("PROTOKEN_GPU_HOST_OPERANDS") == "1" else DEVICE
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
# Relative RMS error allowed against fp64: products are exact in every format, sums are fp32.
RMS = 1e-5


class Lost(Exception):
    """The device no longer answers this process: the next process of the step goes on."""


class Rows:
    """Appends findings to the file, one JSON line each; knows when the step's time is up, and what earlier processes
    of the same step did before they died (gpu_runner.py starts a step again).

    With ``patience`` (seconds), a thread ends the process when nothing was begun or added for so long: a kernel hangs,
    and the steps that wait for this one shall not wait in vain. What died is not begun again, nor, after ``strikes``
    deaths, anything else of its kind: every hang costs the patience and a start.
    """

    def __init__(self, path: Path, seconds: float, patience: float | None = None, strikes: int = 1) -> None:
        self.earlier = lines_of(path)
        self.file = path.open("a")
        self.end = time.monotonic() + seconds
        self.doing, self.since = "start", time.monotonic()
        self.strikes = strikes
        begun = [row for row in self.earlier if "begin" in row]
        if begun:  # the last thing that the process before this one began is what it died of
            self._write({"died": begun[-1]["begin"], "kind": begun[-1]["kind"]})
        died = [row for row in lines_of(path) if "died" in row]
        self.begun, self.died = {row["begin"] for row in begun}, {row["died"] for row in died}
        self.kinds = [row["kind"] for row in died if row["kind"]]
        self.done = {row["done"] for row in self.earlier if "done" in row}
        if patience is not None:
            threading.Thread(target=self._watch, args=(patience,), daemon=True).start()

    def begin(self, what: str, kind: str = "", repeat: bool = False) -> bool:
        """Whether to do it: not if an earlier process did (unless ``repeat``), died of it, or of others like it."""
        if what in self.died or (what in self.begun and not repeat):
            return False
        if self.kinds.count(kind) >= self.strikes:
            self.add(left_out=what, reason=f"of a kind that ended the process: {kind}")
            return False
        self.doing, self.since = what, time.monotonic()
        self._write({"begin": what, "kind": kind})
        return True

    def attempt(self, case: str, work: Callable[[], dict[str, Any]], kind: str = "") -> None:
        """Begin the case and add what ``work`` finds. An error is a wrong case, and the rest goes on; `Lost` if not."""
        if not self.begin(case, kind):
            return
        try:
            self.add(case=case, **work())
        except Exception as problem:
            self.add(case=case, ok=False, problem=f"{type(problem).__name__}: {problem}"[:600])
            if not alive():
                raise Lost(case) from problem

    def finish(self, what: str) -> None:
        """Remembered in ``done`` of the processes that come after."""
        self._write({"done": what})

    def close(self) -> None:
        """The step has come to its end."""
        self._write({"end": True})

    def add(self, **row: Any) -> None:
        self._write({key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()})
        self.since = time.monotonic()

    def left(self) -> float:
        return self.end - time.monotonic()

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def _watch(self, patience: float) -> None:
        while time.monotonic() - self.since < patience:
            time.sleep(min(1.0, patience / 4))
        self.add(case=f"hangs: {self.doing}", ok=False)
        os._exit(3)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(MADE_ON).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=MADE_ON).to(dtype)


def bank_of(name: str, clients: int, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """(bank [K, O, I], scale [K, O] or None), filled client by client: no more than one client is held in fp32.

    Very many, and so small, clients repeat the first 1000."""
    bank = torch.empty(clients, rows, columns, dtype=DTYPES[name], device=MADE_ON)
    for client in range(min(clients, 1000)):
        values = normal(rows, columns, seed=100 + client)
        bank[client] = (
            (values * 40).clamp(-127, 127).round().to(torch.int8) if name == "int8" else values.to(bank.dtype)
        )
    for client in range(1000, clients, 1000):
        bank[client : client + 1000] = bank[: min(1000, clients - client)]
    scale = normal(clients, rows, seed=4).abs() + 0.1 if name in ("int8", "fp8") else None
    return bank.to(DEVICE), None if scale is None else scale.to(DEVICE)


def error_of(got: Tensor, reference: Tensor) -> float:
    """Relative RMS error; infinite when anything is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-300))


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def alive() -> bool:
    """Whether the device still answers this process: after an illegal access it never does again."""
    try:
        synchronize()
        return float(torch.ones(1, device=DEVICE)) == 1.0
    except RuntimeError:
        return False


def memory_free() -> int | None:
    """Bytes; whatever else the device holds, of other processes, too, is missing here."""
    return torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else None


def empty_cache() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def captured(call: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    """(replay, outputs) of the call as a CUDA graph; in a dry run the call itself, copying into its first outputs."""
    if DRY_RUN:
        outputs = call()
        held = outputs if isinstance(outputs, list) else [outputs]

        def again() -> None:
            new = call()
            for old, value in zip(held, new if isinstance(new, list) else [new], strict=True):
                if isinstance(old, Tensor):
                    old.copy_(value)

        return again, outputs
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


class Clock:
    """Medians of device time with a cold L2."""

    def __init__(self) -> None:
        self.flush = torch.empty((1 if DRY_RUN else 256) << 20, dtype=torch.int8, device=DEVICE)

    def measure(self, call: Callable[[], object], seconds: float = 0.5, most: int = 40) -> tuple[float, float, int]:
        """(median, half the distance between the quartiles, repeats) in seconds."""
        if DRY_RUN:
            seconds, most = 0.0, 1
        for _ in range(0 if DRY_RUN else 2):
            call()
        synchronize()
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < min(5, most) or (len(times) < most and time.monotonic() < end):
            self.flush.zero_()
            times.append(self._once(call))
            if times[-1] > 2.0:
                break
        spread = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        return statistics.median(times), (spread[2] - spread[0]) / 2, len(times)

    def _once(self, call: Callable[[], object]) -> float:
        if DEVICE.type == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def copy_bandwidth(self) -> float:
        """Bytes read plus bytes written per second."""
        source = torch.empty((1 << 20) if DRY_RUN else (2 << 30), dtype=torch.int8, device=DEVICE).random_(-100, 100)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.measure(lambda: target.copy_(source))[0]
