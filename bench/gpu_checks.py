"""Steps cuda, triton and the sanitizers: right results, equal bits, and a small run of every kernel."""

from __future__ import annotations

import torch
from gpu_cases import cases, launcher
from gpu_device import DEVICE, DRY_RUN, Rows, alive, bank_of, error_of, normal, poisoned, synchronize

from protoken.dispatch import OPS
from protoken.ops import DenseBank

RUNS = 2 if DRY_RUN else 100


def check(rows: Rows, backend: str, op: str) -> None:
    """Every case of an op against fp64, then `check_bits`."""
    for case in cases(backend, op):
        if rows.left() < 5:
            rows.add(case=f"{backend} {op}: the time was up before every case was seen", ok=False)
            return
        rows.begin(f"{backend} {case.name}")
        try:
            error = max(error_of(got, want) for got, want in zip(case.run(), case.reference(), strict=True))
            rows.add(case=f"{backend} {case.name}", error=error, allowed=case.allowed, ok=error <= case.allowed)
        except Exception as problem:  # reported as a wrong case; the rest goes on
            rows.add(case=f"{backend} {case.name}", ok=False, problem=f"{type(problem).__name__}: {problem}"[:600])
            if not alive():
                return
    check_bits(rows, backend, op)


def check_bits(rows: Rows, backend: str, op: str) -> None:
    """The same bits over 100 runs, and for another order and number of clients."""
    for case in cases(backend, op, small=True):
        if rows.left() < 5:
            return
        rows.begin(f"{backend} {RUNS} runs: {case.name}")
        first = case.run()
        runs = [all(map(torch.equal, case.run(), first)) for _ in range(RUNS)]
        rows.add(case=f"{backend} {RUNS} runs: {case.name}", ok=all(runs))
    if op == "client_scores":
        check_order(rows, backend)


def check_order(rows: Rows, backend: str) -> None:
    launch = launcher(backend, "client_scores")
    outputs, columns = (20, 40) if DRY_RUN else (300, 1040)
    for tokens in (4, 20) if DRY_RUN else (4, 50, 100):
        x, grad = normal(tokens, columns, seed=1, dtype=torch.bfloat16), normal(tokens, outputs, seed=2)
        bank, _ = bank_of("bf16", 9, outputs, columns)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        outs = []
        for chosen in (bank, bank[order], bank[:2]):
            out = poisoned(1, chosen.shape[0], tokens)
            launch(out, [x], [grad], [DenseBank.of(chosen)])
            outs.append(out[0])
        same = torch.equal(outs[0][order], outs[1]) and torch.equal(outs[0][:2], outs[2])
        rows.add(case=f"{backend} client order and number, T = {tokens}", ok=same)


def sanitize(rows: Rows) -> None:
    """One launch of every kernel of the native module, for compute-sanitizer."""
    for case in (case for op in OPS for case in cases("cuda", op, small=True)):
        if rows.left() < 5:
            rows.add(left_out="sanitize: the time was up", before=case.name)
            return
        rows.begin(f"sanitize {case.name}")
        case.run()
        synchronize()
        rows.add(sanitized=case.name)
