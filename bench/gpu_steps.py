"""What bench/gpu.py's steps do on the device: `python gpu_steps.py ACTION ROWS_FILE SECONDS`.

Each finding is one JSON line in ROWS_FILE, written at once. Actions: cuda, triton (every op, format and odd shape
against fp64, NaN-poisoned outputs, 100 equal runs, client order), graph (capture and replay), sanitize (a small run
for compute-sanitizer), bench (correctness of the very operands first, then timings).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protoken.ops import (
    DenseBank,
    LowRankBank,
    client_scores_lowrank_reference,
    client_scores_reference,
    client_totals_reference,
)

DEVICE = torch.device("cuda")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
# Relative RMS error allowed against fp64: products are exact in every format, sums are fp32.
RMS = 1e-5
# (hidden, inputs of o_proj, inputs of down_proj, blocks)
MODELS = {
    "SmolLM2-135M": (576, 576, 1536, 30),
    "Qwen2.5-0.5B": (896, 896, 4864, 24),
    "Llama-3.2-1B": (2048, 2048, 8192, 16),
    "Llama-3.1-8B": (4096, 4096, 14336, 32),
    "Gemma-3-27B": (5376, 4096, 21504, 62),
}


class Rows:
    """Appends findings to the file; knows when the step's time is up."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.file = path.open("a")
        self.end = time.monotonic() + seconds

    def add(self, **row: Any) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def left(self) -> float:
        return self.end - time.monotonic()


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def bank_of(name: str, clients: int, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """A random bank, filled client by client so that nothing larger than one client is held in fp32."""
    bank = torch.empty(clients, rows, columns, dtype=DTYPES[name], device=DEVICE)
    for client in range(clients):
        values = normal(rows, columns, seed=100 + client)
        bank[client] = (
            (values * 40).clamp(-127, 127).round().to(torch.int8) if name == "int8" else values.to(bank.dtype)
        )
    scale = normal(clients, rows, seed=4).abs() + 0.1 if name in ("int8", "fp8") else None
    return bank, scale


def error_of(got: Tensor, reference: Tensor) -> float:
    """Relative RMS error; infinite when anything is not finite."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.double() - reference.double()).norm() / reference.double().norm().clamp(min=1e-300))


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE)


# ---- checks ------------------------------------------------------------------------------------------------------

Launch = Callable[[Tensor], None]


def cases(backend: str, small: bool = False) -> Iterator[tuple[str, tuple[int, ...], Launch, Callable[[], Tensor]]]:
    """(name, shape of the output, launch, reference) of every op, format and odd shape."""
    if backend == "cuda":
        from protoken.ops import cuda

        scores, lowrank, totals = (
            cuda.launch_client_scores,
            cuda.launch_client_scores_lowrank,
            cuda.launch_client_totals,
        )
        paths: list[dict[str, int]] = [{"path": cuda.AUTO}, {"path": cuda.MMA}]
        splits: list[dict[str, int]] = [{"path": cuda.WHOLE}, {"path": cuda.SPLIT}]
    else:
        from protoken.kernels.client_scores import launch_client_scores as scores  # type: ignore[assignment]
        from protoken.kernels.client_scores_lowrank import launch_client_scores_lowrank as lowrank  # type: ignore[assignment]
        from protoken.kernels.client_totals import launch_client_totals as totals

        paths, splits = [{}], [{}]

    dense_shapes = [(1, 1, 1, 1), (3, 7, 63, 61), (5, 20, 65, 528), (2, 130, 200, 1040), (4, 64, 576, 1536)]
    lowrank_shapes = [
        (1, 1, 1, 1, 1),
        (20, 5, 72, 136, 8),
        (5, 20, 65, 61, 3),
        (3, 70, 130, 1040, 16),
        (2, 17, 64, 64, 64),
    ]
    tokens_dtypes = ("bf16", "fp32", "fp16")
    if small:
        dense_shapes, lowrank_shapes, tokens_dtypes = [(3, 20, 65, 528), (2, 5, 7, 9)], [(20, 5, 72, 136, 8)], ("bf16",)
    for name in DTYPES:
        for tokens_dtype in tokens_dtypes:
            for clients, tokens, rows, columns in dense_shapes:
                x, grad = (normal(tokens, n, seed=n, dtype=DTYPES[tokens_dtype]) for n in (columns, rows))
                bank, scale = bank_of(name, clients, rows, columns)
                held = DenseBank.of(bank, scale)
                for options in paths:
                    yield (
                        f"client_scores {name} x {tokens_dtype} {(clients, tokens, rows, columns)} {options}",
                        (1, clients, tokens),
                        lambda out, x=x, grad=grad, held=held, options=options: scores(
                            out, [x], [grad], [held], **options
                        ),
                        lambda x=x, grad=grad, bank=bank, scale=scale: client_scores_reference(
                            x, grad, bank, scale=scale
                        )[None],
                    )
    for name in ("bf16", "fp32", "fp16"):
        for tokens_dtype in tokens_dtypes:
            for clients, tokens, rows, columns, rank in lowrank_shapes:
                x, grad = (normal(tokens, n, seed=n, dtype=DTYPES[tokens_dtype]) for n in (columns, rows))
                a = normal(clients, rank, columns, seed=3, dtype=DTYPES[name])
                b, s = normal(clients, rows, rank, seed=4, dtype=DTYPES[name]), normal(clients, seed=5).abs() + 0.5
                factors = LowRankBank.of(a, b, s)
                shape = (clients, tokens, rows, columns, rank)
                for options in splits:
                    yield (
                        f"client_scores_lowrank {name} x {tokens_dtype} {shape} {options}",
                        (1, clients, tokens),
                        lambda out, x=x, g=grad, f=factors, options=options: lowrank(out, [x], [g], [f], **options),
                        lambda x=x, g=grad, a=a, b=b, s=s: client_scores_lowrank_reference(x, g, a, b, s)[None],
                    )
    for name in DTYPES:
        for clients, rows, columns in [(1, 1, 1), (70, 5, 7), (3, 70, 64), (5, 576, 1536)][: 3 if small else 4]:
            m = normal(rows, columns, seed=1)
            bank, scale = bank_of(name, clients, rows, columns)
            held = DenseBank.of(bank, scale)
            yield (
                f"client_totals {name} {(clients, rows, columns)}",
                (1, clients),
                lambda out, m=m, held=held: totals(out, [m], [held]),
                lambda m=m, bank=bank, scale=scale: client_totals_reference(m, bank, scale=scale)[None],
            )


def check(rows: Rows, backend: str) -> None:
    for case, shape, launch, reference in cases(backend):
        if rows.left() < 5:
            rows.add(case=f"{backend}: the time was up before every case was seen", ok=False)
            return
        try:
            out = poisoned(*shape)
            launch(out)
            error = error_of(out, reference())
            rows.add(case=f"{backend} {case}", error=error, allowed=RMS, ok=error <= RMS)
        except Exception as problem:  # reported as a wrong case; the rest goes on
            rows.add(case=f"{backend} {case}", ok=False, problem=f"{type(problem).__name__}: {problem}"[:600])
            if "illegal" in str(problem) or "launch failure" in str(problem):
                return  # the context is lost
    check_bits(rows, backend)


def check_bits(rows: Rows, backend: str) -> None:
    """The same bits over 100 runs, and for another order and number of clients."""
    for case, shape, launch, _ in cases(backend, small=True):
        if rows.left() < 5:
            return
        first = poisoned(*shape)
        launch(first)
        runs = []
        for _ in range(100):
            again = poisoned(*shape)
            launch(again)
            runs.append(torch.equal(first, again))
        rows.add(case=f"{backend} 100 runs: {case}", ok=all(runs))
    if backend == "cuda":
        from protoken.ops.cuda import launch_client_scores
    else:
        from protoken.kernels.client_scores import launch_client_scores
    for tokens in (4, 50, 100):
        x, grad = normal(tokens, 1040, seed=1, dtype=torch.bfloat16), normal(tokens, 300, seed=2)
        bank, _ = bank_of("bf16", 9, 300, 1040)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        outs = []
        for chosen in (bank, bank[order], bank[:2]):
            out = poisoned(1, chosen.shape[0], tokens)
            launch_client_scores(out, [x], [grad], [DenseBank.of(chosen)])
            outs.append(out[0])
        same = torch.equal(outs[0][order], outs[1]) and torch.equal(outs[0][:2], outs[2])
        rows.add(case=f"{backend} client order and number, T = {tokens}", ok=same)


def sanitize(rows: Rows) -> None:
    for case, shape, launch, _ in cases("cuda", small=True):
        if rows.left() < 5:
            rows.add(case="sanitize: the time was up", ok=True, complete=False)
            return
        launch(poisoned(*shape))
        torch.cuda.synchronize()
        rows.add(sanitized=case)


def graph(rows: Rows) -> None:
    """Captured once, replayed with other inputs: what eager mode gives, bit for bit."""
    from protoken.ops import client_scores_grouped, client_scores_lowrank, client_totals

    for backend in ("cuda", "triton"):
        for tokens in (3, 70):
            x, grad = (
                normal(tokens, 528, seed=1, dtype=torch.bfloat16),
                normal(tokens, 200, seed=2, dtype=torch.bfloat16),
            )
            bank, m = DenseBank.of(normal(5, 200, 528, seed=3, dtype=torch.bfloat16)), normal(200, 528, seed=6)
            factors = LowRankBank.of(normal(9, 8, 528, seed=4), normal(9, 200, 8, seed=5))

            def run(
                x: Tensor = x,
                grad: Tensor = grad,
                bank: DenseBank = bank,
                m: Tensor = m,
                factors: LowRankBank = factors,
                backend: str = backend,
            ) -> list[Tensor]:
                return [
                    client_scores_grouped([x, x], [grad, grad], [bank, bank], backend=backend),
                    client_scores_lowrank(x, grad, factors, backend=backend),
                    client_totals(m, bank, backend=backend),
                ]

            case = f"graph {backend} T = {tokens}"
            try:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    run()
                torch.cuda.current_stream().wait_stream(side)
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):
                    outs = run()
                x.copy_(normal(tokens, 528, seed=11))
                grad.copy_(normal(tokens, 200, seed=12))
                captured.replay()
                got = [out.clone() for out in outs]
                rows.add(case=case, ok=all(torch.equal(a, b) for a, b in zip(got, run(), strict=True)))
            except Exception as problem:
                rows.add(case=case, ok=False, problem=f"{type(problem).__name__}: {problem}"[:600])


# ---- bench -------------------------------------------------------------------------------------------------------


class Clock:
    """Medians of device time with a cold L2."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)

    def measure(self, call: Callable[[], object], seconds: float = 0.5, most: int = 40) -> tuple[float, float, int]:
        """(median, half the distance between the quartiles, repeats) in seconds."""
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < 5 or (len(times) < most and time.monotonic() < end):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            before.record()
            call()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) / 1e3)
            if times[-1] > 2.0:
                break
        spread = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        return statistics.median(times), (spread[2] - spread[0]) / 2, len(times)

    def copy_bandwidth(self) -> float:
        source = torch.empty(2 << 30, dtype=torch.int8, device=DEVICE).random_(-100, 100)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.measure(lambda: target.copy_(source))[0]


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph's replay: device time without the launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    held = torch.cuda.CUDAGraph()
    with torch.cuda.graph(held):
        call()
    return held.replay


def dense_torch(xs: list[Tensor], grads: list[Tensor], banks: list[Tensor]) -> dict[str, Callable[[], list[Tensor]]]:
    """The ways torch offers, in the bank's dtype."""

    def einsum() -> list[Tensor]:
        return [torch.einsum("to,koi,ti->kt", g, w, x) for x, g, w in zip(xs, grads, banks, strict=True)]

    def bmm() -> list[Tensor]:
        return [(torch.matmul(x, w.transpose(1, 2)) * g).sum(-1) for x, g, w in zip(xs, grads, banks, strict=True)]

    def loop() -> list[Tensor]:
        return [torch.stack([((x @ one.T) * g).sum(-1) for one in w]) for x, g, w in zip(xs, grads, banks, strict=True)]

    return {"torch.einsum": einsum, "torch.bmm": bmm, "torch.loop": loop}


def lowrank_torch(
    xs: list[Tensor], grads: list[Tensor], factors: list[tuple[Tensor, Tensor]]
) -> dict[str, Callable[[], list[Tensor]]]:
    def bmm() -> list[Tensor]:
        return [
            (torch.matmul(x, a.transpose(1, 2)) * torch.matmul(g, b)).sum(-1)
            for x, g, (a, b) in zip(xs, grads, factors, strict=True)
        ]

    return {"torch.bmm": bmm}


def time_rows(
    rows: Rows,
    clock: Clock,
    copy: float,
    about: dict[str, Any],
    moved: int,
    reference: Tensor | None,
    ours: dict[str, Callable[[], Any]],
    theirs: dict[str, Callable[[], Any]],
    graphs: bool,
) -> None:
    """Check, then time, every way; the ratios go on ours once torch's are known."""
    best, found = float("inf"), []
    for name, call in (theirs | ours).items():
        if rows.left() < 6:
            break
        row: dict[str, Any] = {**about, "backend": name, "bytes": moved}
        try:
            torch.cuda.empty_cache()
            result = call()
            result = torch.stack([value.float() for value in result]) if isinstance(result, list) else result
            row["max_error"] = error_of(result, reference) if reference is not None else None
            del result
            if name in ours and row["max_error"] is not None and row["max_error"] > RMS:
                rows.add(**row, case=f"bench {name} {about}", ok=False)
                continue
            median, spread, repeats = clock.measure(call)
            row |= {"median_s": median, "spread_s": spread, "repeats": repeats}
            row["bandwidth_share"] = moved / median / copy
            if graphs:
                row["graph_median_s"] = clock.measure(captured(call))[0]
        except Exception as problem:
            rows.add(**row, problem=f"{type(problem).__name__}: {problem}"[:300])
            traceback.print_exc()
            continue
        if name in theirs:
            best = min(best, median)
        found.append(row)
    for row in found:
        if best < float("inf"):
            row |= {"best_torch": best, "ratio_to_best_torch": best / row["median_s"]}
        rows.add(**row)


def backends(op: str, operands: tuple[Any, ...], shape: tuple[int, ...], cuda_paths: dict[str, int]) -> dict[str, Any]:
    """Our ways as calls: each CUDA path by name, and Triton."""
    import importlib

    from protoken.ops import cuda

    calls: dict[str, Any] = {}

    def call(launch: Callable[..., None], **options: int) -> Tensor:
        out = torch.empty(*shape, dtype=torch.float32, device=DEVICE)
        launch(out, *operands, **options)
        return out

    for name, path in cuda_paths.items():
        options = {} if op == "client_totals" else {"path": path}
        calls[name] = lambda options=options: call(getattr(cuda, f"launch_{op}"), **options)
    triton = getattr(importlib.import_module(f"protoken.kernels.{op}"), f"launch_{op}")
    calls["triton"] = lambda: call(triton)
    return calls


def dense(
    rows: Rows, clock: Clock, copy: float, model: str, name: str, clients: int, tokens: int, blocks: int = 1
) -> None:
    hidden, attention, mlp, _ = MODELS[model]
    shapes = [(hidden, attention), (hidden, mlp)] * blocks
    held = [bank_of(name, clients, *shape) for shape in shapes]
    exact = torch.bfloat16 if name in ("int8", "fp8") else DTYPES[name]
    xs = [normal(tokens, columns, seed=n, dtype=exact) for n, (_, columns) in enumerate(shapes)]
    grads = [normal(tokens, r, seed=50 + n, dtype=exact) for n, (r, _) in enumerate(shapes)]
    banks = [DenseBank.of(bank, scale) for bank, scale in held]
    few = min(clients, 2)
    reference = torch.stack(
        [
            client_scores_reference(x, g, bank[:few], scale=None if scale is None else scale[:few])
            for x, g, (bank, scale) in zip(xs[:2], grads[:2], held[:2], strict=True)
        ]
    )
    moved = sum(bank.numel() * bank.element_size() for bank, _ in held)
    moved += sum(v.numel() * v.element_size() for v in xs + grads) + 4 * len(shapes) * clients * tokens
    about = {
        "op": "client_scores",
        "format": name,
        "T": tokens,
        "K": clients,
        "shape": f"{model} x{blocks}" if blocks > 1 else model,
    }
    paths = {"cuda": 0, "cuda-mma": 1} if tokens > 16 else {"cuda": 0}
    ours = backends("client_scores", (xs, grads, banks), (len(shapes), clients, tokens), paths)
    got = ours["cuda"]()[:2, :few]
    error = error_of(got, reference)
    rows.add(case=f"bench {about}", error=error, allowed=RMS, ok=error <= RMS)
    if name in ("int8", "fp8"):  # torch has no kernel for these: it widens the bank first
        theirs = {
            "torch.widen+bmm": lambda: [
                (torch.matmul(x, (b.to(exact) * s.to(exact)[:, :, None]).transpose(1, 2)) * g).sum(-1)
                for x, g, (b, s) in zip(xs, grads, held, strict=True)
            ]
        }
    else:
        theirs = dense_torch(xs, grads, [bank for bank, _ in held])
    time_rows(rows, clock, copy, about, moved, None, ours, theirs, graphs=moved < 1 << 29)


def lowrank(rows: Rows, clock: Clock, copy: float, model: str, clients: int, rank: int, tokens: int) -> None:
    hidden, attention, mlp, _ = MODELS[model]
    shapes = [(hidden, attention), (hidden, mlp)]
    factors = [
        (
            normal(clients, rank, i, seed=n, dtype=torch.bfloat16),
            normal(clients, o, rank, seed=9 + n, dtype=torch.bfloat16),
        )
        for n, (o, i) in enumerate(shapes)
    ]
    xs = [normal(tokens, i, seed=20 + n, dtype=torch.bfloat16) for n, (_, i) in enumerate(shapes)]
    grads = [normal(tokens, o, seed=30 + n, dtype=torch.bfloat16) for n, (o, _) in enumerate(shapes)]
    banks = [LowRankBank.of(a, b, torch.ones(clients, device=DEVICE)) for a, b in factors]
    moved = sum(2 * (a.numel() + b.numel()) for a, b in factors) + 4 * 2 * clients * tokens
    about = {"op": "client_scores_lowrank", "format": "bf16", "shape": model, "rank": rank, "T": tokens, "K": clients}
    ours = backends("client_scores_lowrank", (xs, grads, banks), (2, clients, tokens), {"cuda": 0})
    got = ours["cuda"]()[:, :3]
    wanted = torch.stack(
        [client_scores_lowrank_reference(x, g, a[:3], b[:3]) for x, g, (a, b) in zip(xs, grads, factors, strict=True)]
    )
    error = error_of(got, wanted)
    rows.add(case=f"bench {about}", error=error, allowed=RMS, ok=error <= RMS)
    time_rows(rows, clock, copy, about, moved, None, ours, lowrank_torch(xs, grads, factors), graphs=moved < 1 << 29)


def totals(rows: Rows, clock: Clock, copy: float, model: str, name: str, clients: int) -> None:
    hidden, attention, mlp, _ = MODELS[model]
    shapes = [(hidden, attention), (hidden, mlp)]
    held = [bank_of(name, clients, *shape) for shape in shapes]
    ms = [normal(*shape, seed=n) for n, shape in enumerate(shapes)]
    banks = [DenseBank.of(bank, scale) for bank, scale in held]
    moved = sum(b.numel() * b.element_size() for b, _ in held) + sum(4 * m.numel() for m in ms)
    about = {"op": "client_totals", "format": name, "shape": model, "T": 0, "K": clients}
    ours = backends("client_totals", (ms, banks), (2, clients), {"cuda": 0})
    wanted = client_totals_reference(ms[0], held[0][0][:2], scale=None if held[0][1] is None else held[0][1][:2])
    error = error_of(ours["cuda"]()[0, :2], wanted)
    rows.add(case=f"bench {about}", error=error, allowed=1e-4, ok=error <= 1e-4)  # two sums of 1e7 terms near zero
    low = [m.to(torch.bfloat16) for m in ms]
    theirs = (
        {}
        if name != "bf16"
        else {"torch.mv": lambda: [torch.mv(b.flatten(1), m.flatten()) for (b, _), m in zip(held, low, strict=True)]}
    )
    time_rows(rows, clock, copy, about, moved, None, ours, theirs, graphs=False)


def bench(rows: Rows) -> None:
    """The bars first; what the time does not allow is left out and said."""
    clock = Clock()
    copy = clock.copy_bandwidth()
    rows.add(copy_bandwidth=copy, counts="bytes read plus bytes written")
    work: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    work += [(dense, ("Llama-3.1-8B", "bf16", 55, tokens)) for tokens in (128, 1, 16, 64)]
    work += [(lowrank, ("Llama-3.1-8B", 10_000, 8, 64))]
    work += [(dense, ("Llama-3.1-8B", "fp8", 55, tokens)) for tokens in (16, 128)]
    work += [(dense, ("SmolLM2-135M", "bf16", 6, tokens, 30)) for tokens in (16, 128)]
    work += [(totals, ("Llama-3.1-8B", "bf16", 55)), (dense, ("Llama-3.1-8B", "bf16", 55, 512))]
    for model in ("SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.1-8B", "Gemma-3-27B"):
        work += [(dense, (model, "bf16", clients, tokens)) for tokens in (1, 16, 128, 512) for clients in (6, 55)]
        work += [(lowrank, (model, clients, 8, tokens)) for tokens in (16, 128) for clients in (1000, 10_000)]
    work += [(dense, ("Llama-3.1-8B", name, 55, 16)) for name in ("int8", "fp16", "fp32")]
    work += [(totals, ("Llama-3.1-8B", name, 55)) for name in ("fp8", "fp32")]
    seen: set[tuple[Any, ...]] = set()
    for op, arguments in work:
        if (op.__name__, *arguments) in seen:
            continue
        seen.add((op.__name__, *arguments))
        if rows.left() < 8:
            rows.add(left_out=[op.__name__, *arguments])
            continue
        try:
            op(rows, clock, copy, *arguments)
        except Exception as problem:  # out of memory, say: this row is lost, the rest is not
            traceback.print_exc()
            rows.add(lost=[op.__name__, *arguments], problem=f"{type(problem).__name__}: {problem}"[:300])
        torch.cuda.empty_cache()


def main() -> int:
    action, path, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    rows = Rows(path, seconds)
    torch.backends.cuda.matmul.allow_tf32 = False
    {
        "cuda": lambda: check(rows, "cuda"),
        "triton": lambda: check(rows, "triton"),
        "graph": lambda: graph(rows),
        "sanitize": lambda: sanitize(rows),
        "bench": lambda: bench(rows),
    }[action]()
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
