"""`protoken bench kernels`: every backend of the ops against torch's own ways, as shares of a copy's bandwidth.

Correctness is checked first: a wrong result ends the run. All ways of a row and a copy of memory then take turns, so
that a machine that slows down slows all of them. Figures are medians; spread is the interquartile range. The ratio to
the best torch way comes twice: of the two medians, and as the median of the ratios within a round with its interval.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from protoken.benchmarks.kernel_cases import (
    DENSE_CLIENTS,
    FORMATS,
    LOWRANK_CLIENTS,
    RANK,
    SHAPES,
    TOKENS,
    Case,
    cases,
    max_error,
    prepare,
)
from protoken.benchmarks.measuring import device_of
from protoken.benchmarks.turns import interquartile_range, paired_ratio, take_turns, timed
from protoken.dispatch import backends_for
from protoken.errors import ArgumentError, BackendError
from protoken.machine import processor
from protoken.paths import path_of, write_text, write_whole

OPS = ("client_scores", "client_scores_lowrank", "client_totals")
LARGEST_ERROR = 1e-4  # relative; fp32 sums over tens of millions of products stay well below
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # of each side, beyond any cache


def run_kernels(
    device: str = "auto",
    json_path: str | Path | None = None,
    *,
    models: Sequence[str] | None = None,
    tokens: Sequence[int] = TOKENS,
    clients: Sequence[int] = (*DENSE_CLIENTS, *LOWRANK_CLIENTS),
    formats: Sequence[str] = tuple(FORMATS),
    ops: Sequence[str] | None = None,
    seconds: float = 0.6,
    longest_call: float = 2.0,
    memory_bytes: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure, print a table row by row, write JSON if asked, also when interrupted, and return the same.

    ``seconds``: about how long each way of a row is repeated (at least 3 times; with 0 once). Rows whose bank needs
    more than ``memory_bytes`` (default: 40 % of what is free), or whose arithmetic alone would take longer than
    ``longest_call`` seconds per call at the measured matmul rate, are listed under ``skipped`` with the reason.

    Returns {device, copy_bandwidth (bytes read and written per second), versions, rows, skipped}; a row has op,
    backend, format, shape [O, I], T (null for client_totals), K, median_s, spread_s, bytes, bandwidth_share,
    best_torch (seconds), best_torch_way, ratio_to_best_torch (of the two medians; above 1: ours is faster),
    paired_ratio (the median over rounds of that ratio within a round), paired_interval (its 95 % interval), pairs,
    max_error, model, layer.

    Errors: `ArgumentError` for an unknown device or choice; `BackendError` when a backend's result is wrong.
    """
    place = device_of(device)
    _check_choices(models=models or (), formats=formats, clients=clients, ops=ops or (), tokens=tokens)
    console = console or Console()
    path = path_of("json_path", json_path) if json_path is not None else None
    free = memory_bytes if memory_bytes is not None else int(0.4 * _free_bytes(place))
    rate = _matmul_rate(place)
    report: dict[str, Any] = {"device": _describe(place), "copy_bandwidth": 0.0, "versions": _versions()}
    report |= {"rows": [], "skipped": []}
    copies: list[float] = []
    try:
        for case in cases(models, tokens, formats, clients):
            if ops and case.op not in ops:
                continue
            reason = _too_much(case, free, rate, longest_call)
            if reason:
                report["skipped"].append(_labels(case) | {"reason": reason})
                continue
            rows, copy = _measure(case, place, seconds)
            copies.append(copy)
            report["rows"].extend(rows)
            for row in rows:
                console.print(_line(row), highlight=False, soft_wrap=True)
    finally:
        # Some runs take hours: what was measured before an interruption is kept.
        report["copy_bandwidth"] = statistics.median(copies) if copies else _copy_bandwidth(place)
        if path is not None:
            text = json.dumps(report, indent=1) + "\n"
            write_whole(path, lambda place: write_text(place, text))
    _summary(report, console)
    return report


def _check_choices(**chosen: Sequence[object]) -> None:
    known: dict[str, Sequence[object]] = {
        "models": tuple(SHAPES),
        "formats": tuple(FORMATS),
        "clients": (*DENSE_CLIENTS, *LOWRANK_CLIENTS),
        "ops": OPS,
        "tokens": TOKENS,
    }
    for name, values in chosen.items():
        for value in values:
            if value not in known[name]:
                raise ArgumentError(name, expected=f"among {', '.join(map(str, known[name]))}", got=repr(value))


def _labels(case: Case) -> dict[str, Any]:
    return {
        "op": case.op,
        "format": case.format,
        "inputs": None if case.tokens is None else str(case.inputs).removeprefix("torch."),
        "shape": [case.rows, case.columns],
        "T": case.tokens,
        "K": case.clients,
        "model": case.model,
        "layer": case.layer,
    }


def _too_much(case: Case, free: int, rate: float, longest: float) -> str | None:
    # Beside the bank, torch's ways hold [K, T, O] products (low rank: [K, T, r]), for small formats converted copies.
    width = RANK if case.op == "client_scores_lowrank" else case.rows
    held = case.bank_bytes + 4 * case.clients * (case.tokens or 1) * width * 2
    if held > free:
        return f"needs {held / 1e9:.1f} GB, {free / 1e9:.1f} GB allowed"
    if case.flops / rate > longest:
        return f"one call takes about {case.flops / rate:.1f} s at the measured matmul rate, {longest:g} s allowed"
    return None


def _measure(case: Case, device: torch.device, seconds: float) -> tuple[list[dict[str, Any]], float]:
    work = prepare(case, device)
    names = [found.name for found in backends_for(case.op, device) if found.available] + ["auto"]
    errors = {}
    for name in names:
        errors[name] = max_error(work.ours(name), work.reference)
        if not errors[name] <= LARGEST_ERROR:
            raise BackendError(
                f"{name} of {case.op}, {_labels(case)}", expected=f"error at most {LARGEST_ERROR}", got=errors[name]
            )
    ways: dict[str, Callable[[], object]] = {f"torch: {name}": way for name, way in work.torch_ways.items()}
    for name in names:
        ways[name] = lambda name=name: work.ours(name)  # type: ignore[misc]
    size = COPY_BYTES[device.type]
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    ways["copy"] = lambda: target.copy_(source)
    times = take_turns(ways, device, seconds)
    copy = 2 * size / statistics.median(times["copy"])
    torch_medians = {name: statistics.median(taken) for name, taken in times.items() if name.startswith("torch: ")}
    best_way = min(torch_medians, key=torch_medians.__getitem__)
    best = torch_medians[best_way]
    rows = []
    for name in names:
        median = statistics.median(times[name])
        paired, low, high, pairs = paired_ratio(times[best_way], times[name])
        rows.append(
            {"backend": name}
            | _labels(case)
            | {
                "median_s": median,
                "spread_s": interquartile_range(times[name]),
                "bytes": case.bytes,
                "bandwidth_share": case.bytes / median / copy,
                "best_torch": best,
                "best_torch_way": best_way.removeprefix("torch: "),
                "ratio_to_best_torch": best / median,
                "paired_ratio": paired,
                "paired_interval": [low, high],
                "pairs": pairs,
                "max_error": errors[name],
            }
        )
    return rows, copy


def _copy_bandwidth(device: torch.device) -> float:
    size = COPY_BYTES[device.type]
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / statistics.median(timed(lambda: target.copy_(source), device) for _ in range(5))


def _matmul_rate(device: torch.device) -> float:
    """fp32 operations per second of a square matmul."""
    side = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(side, side, device=device) for _ in range(2))
    torch.mm(left, right)
    return 2 * side**3 / statistics.median(timed(lambda: torch.mm(left, right), device) for _ in range(5))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        return {"kind": "cuda", "name": name, "capability": list(torch.cuda.get_device_capability())}
    from protoken import _C

    return {
        "kind": "cpu",
        "name": processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.instruction_set(),
    }


def _versions() -> dict[str, str]:
    from protoken import __version__

    return {"protoken": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _line(row: dict[str, Any]) -> str:
    tokens = "-" if row["T"] is None else row["T"]
    low, high = row["paired_interval"]
    return (
        f"{row['op']:<22} {row['model']:<13} {row['layer']:<9} K={row['K']:<5} T={tokens:<4} {row['format']:<5}"
        f" {row['backend']:<6} {row['median_s'] * 1e3:9.3f} ms ±{row['spread_s'] * 1e3:.3f}"
        f"  copy {row['bandwidth_share']:6.1%}"
        f"  torch x{row['paired_ratio']:.2f} [{low:.2f}, {high:.2f}] ({row['best_torch_way']})"
        f"  error {row['max_error']:.0e}"
    )


def _summary(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"copy {report['copy_bandwidth'] / 1e9:.1f} GB/s, both directions counted")
    for column in ("op", "backend", "rows", "slowest against torch", "median against torch", "best share of copy"):
        table.add_column(column, no_wrap=column == "op")
    groups = sorted({(row["op"], row["backend"]) for row in report["rows"]})
    for op, backend in groups:
        rows = [row for row in report["rows"] if (row["op"], row["backend"]) == (op, backend)]
        ratios = [row["paired_ratio"] for row in rows]
        share = max(row["bandwidth_share"] for row in rows)
        middle = statistics.median(ratios)
        table.add_row(op, backend, str(len(rows)), f"{min(ratios):.2f}", f"{middle:.2f}", f"{share:.0%}")
    console.print(table)
    if report["skipped"]:
        console.print(f"{len(report['skipped'])} rows left out for memory or time; the JSON names each with its reason")
