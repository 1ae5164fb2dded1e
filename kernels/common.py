"""What the Triton kernels share: exact products, ordered sums, tables of layers.

Every product is exact before it is added in fp32: 16-bit values of one dtype go to the matrix units as they are;
an fp32 operand against one that bf16 holds exactly is split into three bf16 planes; all else is multiplied in
fp32 ("ieee"). No sum depends on timing: blocks are fixed per call shape and partial sums are added in order.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.int8,  # see load_bank
    torch.int64: tl.int64,
}
NATIVE, PLANES, IEEE = 0, 1, 2
# Terms that the matrix units add to one sum before it is put aside: they cut off what does not fit into fp32 where
# other units round, so the error of a long sum would grow with its length (to 2e-5 at 14336 terms) and not its root.
DEPTH = 1024
# Triton's interpreter multiplies the bits of bf16 operands: there they are widened, which changes no product.
_WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
BF16_HOLDS = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def dot_mode(left: torch.dtype, right: torch.dtype) -> int:
    """How `exact_dot` multiplies: the left operand is the bank's (or the head's), the right the tokens'."""
    if left == right == torch.float16 or (left in BF16_HOLDS and right == torch.bfloat16):
        return NATIVE
    return PLANES if left in BF16_HOLDS else IEEE


@triton.jit
def _dot16(left, right, acc):
    """acc + left @ right of two 16-bit operands."""
    if _WIDEN:
        acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def to_bf16(value):
    """Exact for int8, float8_e4m3fn and bf16; through fp32, the one way that every Triton knows."""
    return value if value.dtype == tl.bfloat16 else value.to(tl.float32).to(tl.bfloat16)


@triton.jit
def load_bank(at, inside, FLOAT8: tl.constexpr):
    """Bank values, 0 where not inside; float8_e4m3fn is addressed as int8, since it has no constant 0."""
    value = tl.load(at, mask=inside, other=0)
    return value.to(tl.float8e4nv, bitcast=True) if FLOAT8 else value


@triton.jit
def exact_dot(left, right, acc, MODE: tl.constexpr):
    """acc + left @ right, fp32; modes of `dot_mode`."""
    if MODE == 0:
        if left.dtype == tl.float16:
            acc = _dot16(left, right, acc)
        else:
            acc = _dot16(to_bf16(left), right.to(tl.bfloat16), acc)
    elif MODE == 1:
        narrow = to_bf16(left)
        value = right.to(tl.float32)
        first = value.to(tl.bfloat16)
        rest = value - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        acc = _dot16(narrow, third, acc)
        acc = _dot16(narrow, second, acc)
        acc = _dot16(narrow, first, acc)
    else:
        acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    return acc


@triton.jit
def _sum_parts_kernel(parts, out, inner, count, BLOCK: tl.constexpr):
    """out[n, i] = parts[n, 0, i] + parts[n, 1, i] + .. in that order."""
    blocks = tl.cdiv(inner, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        total += tl.load(parts + (n * count + part) * inner + i, mask=i < inner, other=0.0)
    tl.store(out + n * inner + i, total, mask=i < inner)


def on_its_device(launch: Callable[..., None]) -> Callable[..., None]:
    """Triton launches on whatever device is current: for the length of the call, that of the first operand is."""

    @functools.wraps(launch)
    def launched(first: Tensor | list[Tensor], *operands: Any) -> None:
        device = (first[0] if isinstance(first, list) else first).device
        if device.type == "cuda":
            with torch.cuda.device(device):
                launch(first, *operands)
        else:
            launch(first, *operands)

    return launched


def sum_parts(out: Tensor, parts: Tensor) -> None:
    """out [N, inner] <- ordered sum over the middle dimension of parts [N, count, inner]."""
    rows, count, inner = parts.shape
    block = min(triton.next_power_of_2(inner), 256)
    _sum_parts_kernel[(rows * triton.cdiv(inner, block),)](parts, out, inner, count, BLOCK=block)


def device_rows(rows: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    """An int64 table on the device, copied without waiting for it.

    While a CUDA graph is captured the numbers travel inside the graph: a replayed copy would read host memory that
    is long used for something else.
    """
    values = [list(row) for row in rows]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        held = torch.empty(len(values), len(values[0]), dtype=torch.int64, device=device)
        for place, row in zip(held, values, strict=True):
            for entry, value in zip(place, row, strict=True):
                entry.fill_(value)
        return held
    table = torch.tensor(values, dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def alike(keys: Sequence[Any]) -> list[list[int]]:
    """Numbers of the layers that share a launch: equal keys, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def token_block(tokens: int) -> int:
    """16, 32, 64 or 128: the narrowest block that holds the tokens."""
    return min(128, max(16, triton.next_power_of_2(tokens)))


def why_not_float8(dtypes: Iterable[torch.dtype], device: torch.device) -> str | None:
    """Triton has no float8_e4m3fn before compute capability 8.9."""
    if torch.float8_e4m3fn in dtypes and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "float8_e4m3fn needs compute capability 8.9 in Triton"
    return None
