"""A bank's formats against each other, in turns: how many times as fast as fp32 are bf16, int8 and fp8?

    python bench/bench_formats.py [--models SmolLM2-135M ...] [--clients 55] [--seconds 2] [--json FILE]

`client_scores` of one token and `client_totals` read every byte of a bank once and do little with it: where the bank
is larger than the caches, a format should be as many times as fast as it is smaller. `protoken bench kernels` times
formats one after another, and a shared machine changes in between; here each round times all of them in another order,
each after a read of 96 MB that leaves nothing of a bank in the caches. A wrong score ends the run.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from protoken import _C
from protoken.benchmarks.kernel_cases import DENSE_CLIENTS, FORMATS, SHAPES, Case, prepare
from protoken.benchmarks.turns import interquartile_range, paired_ratio
from protoken.machine import machine

CPU = torch.device("cpu")
CACHES = 24_000_000  # numbers of 4 bytes, more than any cache they pass through holds
RIGHT = 1e-4  # of the largest score: totals of millions of terms leave a small rest; formats read the same bytes


def compare(op: str, model: str, layer: str, clients: int, seconds: float) -> dict[str, Any]:
    """One row: seconds a call of every format, and how many times as fast as fp32 each is."""
    tokens = 1 if op == "client_scores" else None
    cases = {name: Case(op, model, layer, *SHAPES[model][layer], clients, tokens, name) for name in FORMATS}
    works = {name: prepare(case, CPU) for name, case in cases.items()}
    for name, work in works.items():
        got = work.ours("auto")[: len(work.reference)].double()
        error = float((got - work.reference).abs().max() / work.reference.abs().max())
        if not error <= RIGHT:
            raise SystemExit(f"{op} of {model} {layer} in {name}: error {error:.1e}, over {RIGHT:.0e}")
    other = torch.randn(CACHES)
    order = list(works)
    times: dict[str, list[float]] = {name: [] for name in order}
    began = time.perf_counter()
    for turn in range(10_000):
        if turn >= 9 and time.perf_counter() - began > seconds:
            break
        random.Random(turn).shuffle(order)
        for name in order:
            other.sum()
            start = time.perf_counter()
            works[name].ours("auto")
            times[name].append(time.perf_counter() - start)
    row: dict[str, Any] = {"op": op, "model": model, "layer": layer, "K": clients, "T": tokens, "rounds": turn}
    for name, taken in times.items():
        ratio, low, high, _ = paired_ratio(times["fp32"], taken)
        row[name] = {
            "median_s": statistics.median(taken),
            "spread_s": interquartile_range(taken),
            "bytes": cases[name].bytes,
            "times_as_fast": ratio,
            "interval": [low, high],
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B"])
    parser.add_argument("--clients", type=int, default=DENSE_CLIENTS[-1])
    parser.add_argument("--seconds", type=float, default=2.0, help="of a row, about")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for model in given.models:
        for layer in SHAPES[model]:
            for op in ("client_scores", "client_totals"):
                row = compare(op, model, layer, given.clients, given.seconds)
                rows.append(row)
                fast = [f"{n} {row[n]['median_s'] * 1e3:.3f} ms x{row[n]['times_as_fast']:.2f}" for n in FORMATS]
                print(f"{op:13s} {model:12s} {layer:9s} K={given.clients:<3d}", "  ".join(fast), flush=True)
    if given.json:
        about = {
            "device": machine() | {"instruction_set": _C.instruction_set()},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "rows": rows,
        }
        given.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
