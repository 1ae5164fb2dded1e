"""Cases of the ops, used by the tests and by the benches: formats, shapes, layouts and the ways to run them."""

from __future__ import annotations

import torch
from torch import Tensor

from protoken.dispatch import ORDER, backends_for

FORMATS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
FACTOR_FORMATS = ("fp32", "bf16", "fp16")
# Of the tokens' vectors: those that are bf16 are multiplied in pairs where the processor can.
INPUTS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# (clients, tokens, rows, columns): one of everything, primes, powers of two, more rows than a task takes
SHAPES = [
    (1, 1, 1, 1),
    (2, 1, 97, 131),
    (3, 2, 7, 11),
    (2, 5, 200, 64),
    (1, 7, 96, 1024),
    (3, 8, 31, 129),
    (2, 13, 101, 300),
    (2, 33, 97, 257),
    (1, 67, 193, 515),
    (2, 130, 5, 31),
]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens_of(tokens: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(x [T, I], grad [T, O])"""
    return normal(tokens, columns, seed=1, dtype=dtype), normal(tokens, rows, seed=2, dtype=dtype)


def bank_of(name: str, clients: int, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """(bank [K, O, I], scale [K, O] or None)"""
    if name == "int8":
        generator = torch.Generator().manual_seed(3)
        bank = torch.randint(-128, 128, (clients, rows, columns), generator=generator, dtype=torch.int8)
    else:
        bank = normal(clients, rows, columns, seed=3, dtype=FORMATS[name])
    scale = normal(clients, rows, seed=4).abs() + 0.1 if name in ("int8", "fp8") else None
    return bank, scale


def factors_of(name: str, clients: int, rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(a [K, r, I], b [K, O, r], scale [K])"""
    dtype = FORMATS[name]
    a = normal(clients, rank, columns, seed=5, dtype=dtype)
    b = normal(clients, rows, rank, seed=6, dtype=dtype)
    return a, b, normal(clients, seed=7)


def layouts_of(bank: Tensor) -> dict[str, Tensor]:
    """The same numbers lying differently."""
    return {
        "contiguous": bank,
        "transposed": bank.transpose(1, 2).contiguous().transpose(1, 2),
        "every_other": torch.stack([bank, bank], -1)[..., 0],
        "clients_inside": bank.permute(1, 0, 2).contiguous().permute(1, 0, 2),
    }


def cpu_ways() -> list[str]:
    """The ways to run the ops here: backend torch, and backend cpp with every instruction set and AMX's emulation."""
    from protoken import _C

    names = [backend.name for backend in backends_for("client_scores", "cpu") if backend.available]
    assert set(names) <= set(ORDER)
    emulated = ["amx-emulated"] if "avx512" in _C.instruction_sets() else []
    return ["torch", *(f"cpp-{name}" for name in _C.instruction_sets() + emulated)]


def use(way: str) -> str:
    """Choose the instruction set of a way; returns the backend's name."""
    from protoken import _C

    backend, _, name = way.partition("-")
    if name:
        _C.use_instruction_set(name)
    return backend
