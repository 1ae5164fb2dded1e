"""Every op, format and odd shape that bench/gpu.py checks: a name, a run into poisoned outputs, and its reference."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from gpu_device import DEVICE, DRY_RUN, DTYPES, RMS, bank_of, normal, poisoned
from torch import Tensor

from protoken.ops import (
    DenseBank,
    Head,
    LowRankBank,
    capture_append_reference,
    client_scores_lowrank_reference,
    client_scores_reference,
    client_totals_reference,
    relevance_head_reference,
)

FLOATS = ("bf16", "fp32", "fp16")
# A dry run's interpreter takes a tenth of a second per program.
# One per tile: 16 tokens, 64, 128, and rows that cannot be read 16 bytes at a time.
SMALL_DENSE = [(2, 5, 7, 9)] if DRY_RUN else [(3, 5, 65, 528), (3, 20, 65, 528), (2, 70, 130, 528), (2, 5, 7, 9)]
MANY_DENSE = [(100_000, 3, 8, 16), (2, 4096, 65, 72)]
SMALL_LOWRANK = [(5, 3, 12, 20, 3)] if DRY_RUN else [(20, 5, 72, 136, 8)]


@dataclass(frozen=True)
class Case:
    """``run`` fills outputs that arrive poisoned and returns them; ``reference`` returns the same in fp64.

    ``kind``: what cases of other formats share with this one; a kernel that hangs in one is likely to in all.
    """

    name: str
    run: Callable[[], list[Tensor]]
    reference: Callable[[], list[Tensor]]
    allowed: float = RMS
    kind: str = ""


def launcher(backend: str, op: str) -> Callable[..., None]:
    """The backend's ``launch_<op>``; in a dry run the CPU's native module stands for ``cuda``."""
    return getattr(module_of(backend, op), f"launch_{op}")  # type: ignore[no-any-return]


def module_of(backend: str, op: str) -> ModuleType:
    if backend == "triton":
        return importlib.import_module(f"protoken.kernels.{op}")
    return importlib.import_module("protoken.ops.cpp" if DRY_RUN else "protoken.ops.cuda")


def built() -> bool:
    """Whether the CUDA module can be imported; in a dry run the CPU's stands for it."""
    try:
        module_of("cuda", "client_scores")
    except ImportError:
        return False
    return True


def has(backend: str, op: str) -> bool:
    return hasattr(module_of(backend, op), f"launch_{op}")


def paths_of(backend: str, op: str) -> list[dict[str, int]]:
    """The cuda backend's paths, each of which must be right; other backends have one."""
    if backend != "cuda" or DRY_RUN:
        return [{}]
    from protoken.ops import cuda

    names = {
        "client_scores": (cuda.AUTO, cuda.MMA),
        "client_scores_lowrank": (cuda.WHOLE, cuda.SPLIT),
        "relevance_head": (cuda.AUTO, cuda.TWICE),
    }
    return [{"path": path} for path in names[op]] if op in names else [{}]


def cases(backend: str, op: str, small: bool = False) -> Iterator[Case]:
    """All cases of an op; ``small`` ones are few, for the steps that repeat or instrument every launch."""
    make = {
        "client_scores": _scores,
        "client_scores_lowrank": _lowrank,
        "client_totals": _totals,
        "relevance_head": _head,
        "capture_append": _append,
    }[op]
    if has(backend, op):
        yield from make(backend, launcher(backend, op), small or DRY_RUN)


def _into(shape: tuple[int, ...], launch: Callable[..., None], *operands: Any, **options: int) -> list[Tensor]:
    out = poisoned(*shape)
    launch(out, *operands, **options)
    return [out]


def _scores(backend: str, launch: Callable[..., None], small: bool) -> Iterator[Case]:
    shapes = [(1, 1, 1, 1), (3, 7, 63, 61), (5, 20, 65, 528), (2, 130, 200, 1040), (4, 64, 576, 1536)]
    for name in DTYPES:
        for tokens_dtype in FLOATS[:1] if small else FLOATS:
            many = MANY_DENSE if name == tokens_dtype == "bf16" else []
            for clients, tokens, rows, columns in SMALL_DENSE if small else shapes + many:
                x, grad = (normal(tokens, n, seed=n, dtype=DTYPES[tokens_dtype]).to(DEVICE) for n in (columns, rows))
                bank, scale = bank_of(name, clients, rows, columns)
                held = DenseBank.of(bank, scale)
                for options in paths_of(backend, "client_scores"):
                    yield Case(
                        f"client_scores {name} x {tokens_dtype} {(clients, tokens, rows, columns)} {options}",
                        lambda c=clients, t=tokens, x=x, g=grad, held=held, options=options: _into(
                            (1, c, t), launch, [x], [g], [held], **options
                        ),
                        lambda x=x, g=grad, b=bank, s=scale: [client_scores_reference(x, g, b, scale=s)[None]],
                        kind=f"client_scores {(clients, tokens, rows, columns)} {options}",
                    )


def _lowrank(backend: str, launch: Callable[..., None], small: bool) -> Iterator[Case]:
    shapes = [(1, 1, 1, 1, 1), (20, 5, 72, 136, 8), (5, 20, 65, 61, 3), (3, 70, 130, 1040, 16), (2, 17, 64, 64, 64)]
    for name in FLOATS:
        for tokens_dtype in FLOATS[:1] if small else FLOATS:
            for clients, tokens, rows, columns, rank in SMALL_LOWRANK if small else shapes:
                x, grad = (normal(tokens, n, seed=n, dtype=DTYPES[tokens_dtype]).to(DEVICE) for n in (columns, rows))
                a = normal(clients, rank, columns, seed=3, dtype=DTYPES[name]).to(DEVICE)
                b = normal(clients, rows, rank, seed=4, dtype=DTYPES[name]).to(DEVICE)
                s = (normal(clients, seed=5).abs() + 0.5).to(DEVICE)
                held = LowRankBank.of(a, b, s)
                shape = (clients, tokens, rows, columns, rank)
                for options in paths_of(backend, "client_scores_lowrank"):
                    yield Case(
                        f"client_scores_lowrank {name} x {tokens_dtype} {shape} {options}",
                        lambda c=clients, t=tokens, x=x, g=grad, held=held, options=options: _into(
                            (1, c, t), launch, [x], [g], [held], **options
                        ),
                        lambda x=x, g=grad, a=a, b=b, s=s: [client_scores_lowrank_reference(x, g, a, b, s)[None]],
                        kind=f"client_scores_lowrank {shape} {options}",
                    )


def _totals(_: str, launch: Callable[..., None], small: bool) -> Iterator[Case]:
    shapes = [(1, 1, 1), (70, 5, 7), (3, 70, 64), (5, 576, 1536)]
    for name in DTYPES:
        for clients, rows, columns in shapes[: 2 if DRY_RUN else 3 if small else 4]:
            m = normal(rows, columns, seed=1).to(DEVICE)
            bank, scale = bank_of(name, clients, rows, columns)
            held = DenseBank.of(bank, scale)
            yield Case(
                f"client_totals {name} {(clients, rows, columns)}",
                lambda c=clients, m=m, held=held: _into((1, c), launch, [m], [held]),
                lambda m=m, b=bank, s=scale: [client_totals_reference(m, b, scale=s)[None]],
                kind=f"client_totals {(clients, rows, columns)}",
            )


def _head(backend: str, launch: Callable[..., None], small: bool) -> Iterator[Case]:
    # In cuda: read once (one token, up to four, wide rows), twice (narrow and wide tiles, rows that cannot be read
    # 16 bytes at a time, more tokens than one group).
    shapes = [(7, 64, 300), (1, 33, 500), (1, 64, 300), (3, 136, 700), (20, 64, 300)]
    if not small:
        shapes += [(1, 33, 5003), (16, 576, 2048), (1, 4104, 900), (4, 4096, 5003), (130, 264, 1003)]
    for name in FLOATS[:1] if small else FLOATS:
        for tokens, width, vocabulary in shapes[:1] if DRY_RUN else shapes:
            for norm, objective, softcap in (
                ("rms", "log_prob", None),
                ("layer", "log_prob", 2.0),
                ("none", "logit", None),
            ):
                hidden = (normal(tokens, width, seed=2, dtype=DTYPES[name]) * 3).to(DEVICE)
                weight = (normal(vocabulary, width, seed=1, dtype=DTYPES[name]) / width**0.5).to(DEVICE)
                targets = (torch.arange(tokens) * 7 % vocabulary).to(DEVICE)
                head = Head(
                    weight,
                    bias=normal(vocabulary, seed=3).to(DEVICE),
                    norm=norm,
                    norm_weight=normal(width, seed=4).to(DEVICE),
                    scale=0.7,
                    softcap=softcap,
                    objective=objective,
                )
                both = objective == "log_prob" and tokens <= 4
                for options in paths_of(backend, "relevance_head") if both else [{}]:

                    def run(
                        hidden: Tensor = hidden,
                        targets: Tensor = targets,
                        head: Head = head,
                        options: dict[str, int] = options,
                    ) -> list[Tensor]:
                        outs = [poisoned(*hidden.shape), poisoned(hidden.shape[0])]
                        launch(*outs, hidden, targets, head, **options)
                        return outs

                    yield Case(
                        f"relevance_head {name} {(tokens, width, vocabulary)} {norm} {objective} {softcap} {options}",
                        run,
                        lambda hidden=hidden, targets=targets, head=head: list(
                            relevance_head_reference(hidden, targets, head)
                        ),
                        kind=f"relevance_head {(tokens, width, vocabulary)} {objective} {options}",
                    )


def _append(backend: str, launch: Callable[..., None], small: bool) -> Iterator[Case]:
    for to in FLOATS:
        for of in FLOATS:
            if DRY_RUN and backend == "triton" and to == "bf16":
                continue  # the interpreter cuts off the bits that hardware rounds
            for capacity, tokens, width in [(7, 5, 33)] if small else [(7, 1, 33), (7, 20, 33), (64, 5, 4096)]:
                steps = [normal(tokens, width, seed=1, dtype=DTYPES[of]), normal(width, tokens, seed=2).T]
                steps = [step.to(DEVICE) for step in steps]

                def run(
                    append: Callable[..., None] = launch,
                    capacity: int = capacity,
                    to: str = to,
                    steps: list[Tensor] = steps,
                ) -> list[Tensor]:
                    buffers = [torch.zeros(capacity, s.shape[1], dtype=DTYPES[to], device=DEVICE) for s in steps]
                    cursor = torch.full((1,), 5, dtype=torch.int64).to(DEVICE)
                    append(buffers, steps, cursor)
                    return [*(buffer.double() for buffer in buffers), cursor.double()]

                yield Case(
                    f"capture_append {of} to {to} {(capacity, tokens, width)}",
                    run,
                    lambda run=run: run(capture_append_reference),
                    allowed=0.0,
                    kind=f"capture_append {(capacity, tokens, width)}",
                )
