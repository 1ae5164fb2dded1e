"""Steps cuda, triton and the sanitizers: right results, equal bits, and a small run of every kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from gpu_cases import Case, cases, launcher
from gpu_device import DEVICE, DRY_RUN, Rows, bank_of, error_of, normal, poisoned, synchronize

from protoken.dispatch import OPS
from protoken.ops import DenseBank

RUNS = 2 if DRY_RUN else 100


def check(rows: Rows, backend: str, op: str, part: int = 0, parts: int = 1) -> None:
    """Every case of an op against fp64, then `check_bits`; or, of ``parts`` equal parts, one."""
    for case in list_of(backend, op, part, parts):
        if rows.left() < 5:
            rows.add(case=f"{backend} {op}: the time was up before every case was seen", ok=False)
            return
        rows.attempt(f"{backend} {case.name}", lambda case=case: compared(case), case.kind)  # type: ignore[misc]
    check_bits(rows, backend, op, part, parts)


def list_of(backend: str, op: str, part: int, parts: int, small: bool = False) -> Iterator[Case]:
    return itertools.islice(cases(backend, op, small), part, None, parts)


def compared(case: Case) -> dict[str, Any]:
    error = max(error_of(got, want) for got, want in zip(case.run(), case.reference(), strict=True))
    return {"error": error, "allowed": case.allowed, "ok": error <= case.allowed}


def check_bits(rows: Rows, backend: str, op: str, part: int, parts: int) -> None:
    """The same bits over 100 runs, and for another order and number of clients."""

    def repeated(case: Case) -> dict[str, Any]:
        first = case.run()
        differing = sum(not all(map(torch.equal, case.run(), first)) for _ in range(RUNS))
        return {"differing": differing, "ok": differing == 0}

    for case in list_of(backend, op, part, parts, small=True):
        if rows.left() < 5:
            rows.add(case=f"{backend} {op}: the time was up before every case was run {RUNS} times", ok=False)
            return
        name = f"{backend} {RUNS} runs: {case.name}"
        rows.attempt(name, lambda case=case: repeated(case), case.kind)  # type: ignore[misc]
    if op == "client_scores" and part == 0:
        for tokens in (4, 20) if DRY_RUN else (4, 50, 100):
            name = f"{backend} client order and number, T = {tokens}"
            rows.attempt(name, lambda tokens=tokens: {"ok": order_is_kept(backend, tokens)})  # type: ignore[misc]


def order_is_kept(backend: str, tokens: int) -> bool:
    """Whether scores are the same bits for another order of the clients, and for fewer of them."""
    launch = launcher(backend, "client_scores")
    outputs, columns = (20, 40) if DRY_RUN else (300, 1040)
    x, grad = normal(tokens, columns, seed=1, dtype=torch.bfloat16), normal(tokens, outputs, seed=2)
    bank, _ = bank_of("bf16", 9, outputs, columns)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    outs = []
    for chosen in (bank, bank[order], bank[:2]):
        out = poisoned(1, chosen.shape[0], tokens)
        launch(out, [x], [grad], [DenseBank.of(chosen)])
        outs.append(out[0])
    return torch.equal(outs[0][order], outs[1]) and torch.equal(outs[0][:2], outs[2])


def sanitize(rows: Rows) -> None:
    """One launch of every kernel of the native module, for compute-sanitizer, whose exit status is the finding."""

    def launched(case: Case) -> dict[str, Any]:
        case.run()
        synchronize()
        return {"launched": True}

    for case in (case for op in OPS for case in cases("cuda", op, small=True)):
        if rows.left() < 5:
            rows.add(left_out="sanitize: the time was up", before=case.name)
            return
        rows.attempt(f"sanitize {case.name}", lambda case=case: launched(case), case.kind)  # type: ignore[misc]


def control(rows: Rows, tool: str) -> None:
    """What compute-sanitizer has to object to, so that its silence elsewhere says something.

    memcheck: a bank of one client where the scores have room for 64; initcheck: a bank that nobody has written.
    """
    clients = 1 if tool == "memcheck" and not DRY_RUN else 64
    m, bank = normal(64, 64, seed=1).to(DEVICE), torch.empty(clients, 64, 64, device=DEVICE)
    if tool == "memcheck":
        bank.copy_(torch.zeros(bank.shape))
    with suppress(RuntimeError):  # were the context to end with the kernel
        launcher("cuda", "client_totals")(poisoned(1, 64), [m], [DenseBank.of(bank)])
        synchronize()
    rows.add(control=tool)
