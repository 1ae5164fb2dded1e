"""Steps bench and compile: what every op costs on the device, ours beside torch's ways.

Correctness of the very operands first. A way that ended an earlier process of the step is left out, and so are others
that run the same kernels.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_cases import built, has, launcher
from gpu_device import DEVICE, DRY_RUN, RMS, Clock, Lost, Rows, alive, captured, empty_cache, error_of, memory_free
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
    if op == "client_scores" and shape[-1] > 16 and not DRY_RUN and built():
        from protoken.ops import cuda

        paths["cuda-mma"] = {"path": cuda.MMA}
    ways: Ways = {
        name: lambda options=options: into(launcher("cuda", op), shape, operands, options)
        for name, options in paths.items()
        if built() and has("cuda", op)
    }
    return ways | {"triton": lambda: into(launcher("triton", op), shape, operands, {}), "auto": public}


def into(launch: Callable[..., None], shape: tuple[int, ...], operands: tuple[Any, ...], options: Any) -> Tensor:
    out = torch.empty(*shape, dtype=torch.float32, device=DEVICE)
    launch(out, *operands, **options)
    return out


def time_rows(rows: Rows, clock: Clock, copy: float, work: Work) -> None:
    """Check, then time, every way: torch's first, then ours, each of which is on disk before the next begins."""
    timed = {row["backend"]: row for row in rows.earlier if "median_s" in row and work.about.items() <= row.items()}
    theirs = [
        row
        for name, call in work.theirs.items()
        if (row := timed.get(name) or time_way(rows, clock, copy, work, name, call))
    ]
    best = min((row["median_s"] for row in theirs), default=None)

    def found(row: dict[str, Any]) -> None:
        if best is not None:
            row |= {"best_torch": best, "ratio_to_best_torch": best / row["median_s"]}
        rows.add(**row)

    for row in theirs:
        if row["backend"] not in timed:
            found(row)
    for name, call in work.ours.items():
        if name not in timed and (row := time_way(rows, clock, copy, work, name, call)):
            found(row)


def time_way(
    rows: Rows, clock: Clock, copy: float, work: Work, name: str, call: Callable[[], Any]
) -> dict[str, Any] | None:
    """The way's row, or None where there is none: no time, a wrong result, an error (which the rows then hold)."""
    row: dict[str, Any] = {**work.about, "backend": name, "bytes": work.bytes}
    if rows.left() < 6:
        rows.add(left_out=[name, work.about])
        return None
    if not rows.begin(f"bench {name} {work.about}", kind_of(work, name), repeat=True):
        return None
    try:
        empty_cache()
        pairs = zip(work.part(call()), work.reference, strict=True)
        row["max_error"] = max(error_of(got, want) for got, want in pairs)
        if name in work.ours:
            right = row["max_error"] <= work.allowed
            rows.add(case=f"bench {name} {work.about}", error=row["max_error"], allowed=work.allowed, ok=right)
            if not right:
                return None
        median, spread, repeats = clock.measure(call)
        row |= {"median_s": median, "spread_s": spread, "repeats": repeats}
        row["bandwidth_share"] = work.bytes / median / copy
    except Exception as problem:
        wrong = {"ok": False} if name in work.ours else {}
        rows.add(**row, problem=f"{type(problem).__name__}: {problem}"[:300], **wrong)
        traceback.print_exc()
        if not alive():
            raise Lost(f"bench {name} {work.about}") from problem
        return None
    if work.graphs:
        try:
            row["graph_median_s"] = clock.measure(captured(call)[0])[0]
        except Exception as problem:  # what was timed without a graph stands
            row["graph_problem"] = f"{type(problem).__name__}: {problem}"[:300]
    return row


def kind_of(work: Work, name: str) -> str:
    """What other rows run the same kernels; what auto picks is the native module where there is one."""
    return f"{work.about['op']} {'cuda' if name == 'auto' and built() else name} T = {work.about['T']}"


def groups() -> dict[str, list[tuple[Callable[..., Work], tuple[Any, ...]]]]:
    """Rows by step, the ones that matter most first; "more" is every model, for as long as there is time."""
    from gpu_bench_ops import append, dense, head, lowrank, totals

    large = "Llama-3.1-8B"
    key = {
        "dense": [
            *((dense, (large, "bf16", 55, tokens, 1)) for tokens in (128, 16, 1, 64)),
            *((dense, (large, "fp8", 55, tokens, 1)) for tokens in (16, 128)),
            *((dense, ("SmolLM2-135M", "bf16", 6, tokens, 30)) for tokens in (16, 128)),
            (dense, (large, "bf16", 55, 512, 1)),
            (dense, (large, "int8", 55, 16, 1)),
        ],
        "lowrank": [(lowrank, (large, 10_000, 8, tokens)) for tokens in (64, 16, 1)],
        "others": [
            (totals, (large, "bf16", 55)),
            (head, (large, "bf16", 1)),
            (append, (large, 1)),
            *((head, (large, "bf16", tokens)) for tokens in (16, 4, 128)),
            (append, (large, 512)),
            (totals, (large, "fp8", 55)),
        ],
    }
    more: list[tuple[Callable[..., Work], tuple[Any, ...]]] = []
    for model in ("SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B", large, "Gemma-3-27B"):
        more += [(dense, (model, "bf16", clients, tokens, 1)) for tokens in (1, 16, 128, 512) for clients in (6, 55)]
        more += [(lowrank, (model, clients, 8, tokens)) for tokens in (16, 128) for clients in (1000, 10_000)]
    more += [(dense, (large, name, 55, 16, 1)) for name in ("fp16", "fp32")]
    more += [(totals, (large, "fp32", 55)), (head, ("SmolLM2-135M", "bf16", 1)), (head, ("SmolLM2-135M", "bf16", 16))]
    known = [row for rows in key.values() for row in rows]
    key["more"] = [row for row in dict.fromkeys(more) if row not in known]
    if DRY_RUN:  # one row per op
        return {
            "dense": key["dense"][:1],
            "lowrank": key["lowrank"][:1],
            "others": [next(row for row in key["others"] if row[0] is op) for op in (totals, head, append)],
            "more": [],
        }
    return key


def bench(rows: Rows, group: str) -> None:
    """What the time does not allow is left out and said."""
    rows.begin("bench: copy bandwidth", repeat=True)
    clock = Clock()
    copy = clock.copy_bandwidth()
    rows.add(copy_bandwidth=copy, counts="bytes read plus bytes written", memory_free=memory_free())
    for op, arguments in groups()[group]:
        key = f"bench {op.__name__} {arguments}"
        if key in rows.done:
            continue
        if rows.left() < 8:
            rows.add(left_out=[op.__name__, *arguments])
            continue
        if not rows.begin(f"{key}: operands", repeat=True):
            continue
        try:
            time_rows(rows, clock, copy, op(*arguments))
        except Lost:
            raise
        except Exception as problem:  # out of memory, say: this row is lost, the rest is not
            traceback.print_exc()
            rows.add(lost=[op.__name__, *arguments], problem=f"{type(problem).__name__}: {problem}"[:300])
        if not alive():
            raise Lost(key)
        rows.finish(key)
        empty_cache()


def compile_ahead(rows: Rows) -> None:
    """Triton's kernels of every row, run for few clients: the bench finds them compiled."""

    def compiled(work: Work) -> dict[str, Any]:
        start = time.monotonic()
        work.ours["triton"]()
        return {"seconds": round(time.monotonic() - start, 2)}

    for op, arguments in (row for rows_of in groups().values() for row in rows_of):
        if rows.left() < 10:
            rows.add(left_out=["compile", op.__name__, *arguments])
            return
        case = f"compile {op.__name__} {arguments}"
        rows.attempt(case, lambda op=op, arguments=arguments: compiled(op(*arguments)))  # type: ignore[misc]
        empty_cache()
