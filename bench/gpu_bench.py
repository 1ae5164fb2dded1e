"""Step bench: what every op costs on the device, ours beside torch's ways; correctness of the very operands first."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_cases import has, launcher
from gpu_device import DEVICE, DRY_RUN, RMS, Clock, Rows, captured, empty_cache, error_of
from torch import Tensor

Ways = dict[str, Callable[[], Any]]


@dataclass
class Work:
    """One row of the bench.

    about: op, format, shape, T, K and what else names the row; bytes: what must move at least; reference: fp64
    outputs of a part of the result, which ``part`` picks from what a way returns; ours and theirs: calls by name.
    """

    about: dict[str, Any]
    bytes: int
    ours: Ways
    theirs: Ways
    part: Callable[[Any], list[Tensor]]
    reference: list[Tensor]
    allowed: float = RMS
    graphs: bool = field(default=False)


def our_ways(op: str, operands: tuple[Any, ...], shape: tuple[int, ...], public: Callable[[], Tensor]) -> Ways:
    """Each path of the cuda backend, triton, and ``auto``: the public call, which pays for checks and dispatch."""
    paths: dict[str, dict[str, int]] = {"cuda": {}}
    if op == "client_scores" and shape[-1] > 16 and not DRY_RUN:
        from protoken.ops import cuda

        paths["cuda-mma"] = {"path": cuda.MMA}
    ways: Ways = {
        name: lambda options=options: into(launcher("cuda", op), shape, operands, options)
        for name, options in paths.items()
        if has("cuda", op)
    }
    return ways | {"triton": lambda: into(launcher("triton", op), shape, operands, {}), "auto": public}


def into(launch: Callable[..., None], shape: tuple[int, ...], operands: tuple[Any, ...], options: Any) -> Tensor:
    out = torch.empty(*shape, dtype=torch.float32, device=DEVICE)
    launch(out, *operands, **options)
    return out


def time_rows(rows: Rows, clock: Clock, copy: float, work: Work) -> None:
    """Check, then time, every way; the ratios go on ours once torch's are known."""
    best, found = float("inf"), []
    for name, call in (work.theirs | work.ours).items():
        if rows.left() < 6:
            break
        row: dict[str, Any] = {**work.about, "backend": name, "bytes": work.bytes}
        try:
            empty_cache()
            pairs = zip(work.part(call()), work.reference, strict=True)
            row["max_error"] = max(error_of(got, want) for got, want in pairs)
            if name in work.ours:
                right = row["max_error"] <= work.allowed
                rows.add(case=f"bench {name} {work.about}", error=row["max_error"], allowed=work.allowed, ok=right)
                if not right:
                    continue
            median, spread, repeats = clock.measure(call)
            row |= {"median_s": median, "spread_s": spread, "repeats": repeats}
            row["bandwidth_share"] = work.bytes / median / copy
            if work.graphs:
                row["graph_median_s"] = clock.measure(captured(call)[0])[0]
        except Exception as problem:
            rows.add(**row, problem=f"{type(problem).__name__}: {problem}"[:300])
            traceback.print_exc()
            continue
        if name in work.theirs:
            best = min(best, median)
        found.append(row)
    for row in found:
        if best < float("inf"):
            row |= {"best_torch": best, "ratio_to_best_torch": best / row["median_s"]}
        rows.add(**row)


def bench(rows: Rows) -> None:
    """The rows that matter most come first; what the time does not allow is left out and said."""
    from gpu_bench_ops import append, dense, head, lowrank, totals

    clock = Clock()
    copy = clock.copy_bandwidth()
    rows.add(copy_bandwidth=copy, counts="bytes read plus bytes written")
    work: list[tuple[Callable[..., Work], tuple[Any, ...]]] = []
    work += [(dense, ("Llama-3.1-8B", "bf16", 55, tokens, 1)) for tokens in (128, 1, 16, 64)]
    work += [(lowrank, ("Llama-3.1-8B", 10_000, 8, 64))]
    work += [(dense, ("Llama-3.1-8B", "fp8", 55, tokens, 1)) for tokens in (16, 128)]
    work += [(dense, ("SmolLM2-135M", "bf16", 6, tokens, 30)) for tokens in (16, 128)]
    work += [(totals, ("Llama-3.1-8B", "bf16", 55)), (dense, ("Llama-3.1-8B", "bf16", 55, 512, 1))]
    work += [(head, ("Llama-3.1-8B", "bf16", tokens)) for tokens in (1, 4, 16, 128)]
    work += [(append, ("Llama-3.1-8B", tokens)) for tokens in (1, 512)]
    for model in ("SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.1-8B", "Gemma-3-27B"):
        work += [(dense, (model, "bf16", clients, tokens, 1)) for tokens in (1, 16, 128, 512) for clients in (6, 55)]
        work += [(lowrank, (model, clients, 8, tokens)) for tokens in (16, 128) for clients in (1000, 10_000)]
    work += [(dense, ("Llama-3.1-8B", name, 55, 16, 1)) for name in ("int8", "fp16", "fp32")]
    work += [(totals, ("Llama-3.1-8B", name, 55)) for name in ("fp8", "fp32")]
    work += [(head, ("SmolLM2-135M", "bf16", 1)), (head, ("SmolLM2-135M", "bf16", 16)), (append, ("SmolLM2-135M", 1))]
    if DRY_RUN:  # one row per op
        work = [next(row for row in work if row[0] is op) for op in (dense, lowrank, totals, head, append)]
    for op, arguments in dict.fromkeys(work):
        if rows.left() < 8:
            rows.add(left_out=[op.__name__, *arguments])
            continue
        try:
            time_rows(rows, clock, copy, op(*arguments))
        except Exception as problem:  # out of memory, say: this row is lost, the rest is not
            traceback.print_exc()
            rows.add(lost=[op.__name__, *arguments], problem=f"{type(problem).__name__}: {problem}"[:300])
        empty_cache()
