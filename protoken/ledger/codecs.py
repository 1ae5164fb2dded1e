"""Codecs: how a client's update is laid out in its shard.

| codec     | stored per parameter                        | error                                          |
|-----------|---------------------------------------------|------------------------------------------------|
| fp32      | fp32 [...]                                  | 0                                              |
| bf16      | bf16 [...]                                  | 2^-8 of the element                            |
| fp16      | fp16 [...]                                  | 2^-11 of the element; overflow is refused      |
| int8      | int8 [O, I], fp32 scale [O]                 | scale / 2, scale = largest of the row / 127    |
| fp8       | fp8-e4m3 [O, I], fp32 scale [O]             | 2^-4 of the element, scale = largest / 448     |
| lowrank-r | a [r, I], b [O, r], truncated SVD           | sqrt(sum of dropped sigma^2), stated per matrix |
| lora      | a, b and alpha/r as the client trained them | 0                                              |

A row is the last dimension. A LowRank update is always kept as lora; under lowrank-r, anything but a matrix
larger than its factors is kept as fp32. What a codec loses is not lost from sight: conservation is checked on
what is stored, so it stands in the round's residual.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from protoken.errors import ArgumentError, LedgerFormatError, NonFiniteError
from protoken.ledger.tensors import LowRank, is_finite, norm

CODECS = ("fp32", "bf16", "fp16", "int8", "fp8", "lowrank-r")
_PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PLAIN_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_LIMITS = {"int8": 127.0, "fp8": 448.0}
_LOWRANK = re.compile(r"lowrank-([1-9][0-9]{0,4})")
# Parts of a stored parameter; "::" cannot stand in a parameter's name.
VALUES, SCALE, FACTOR_A, FACTOR_B = "::values", "::scale", "::a", "::b"


@dataclass(frozen=True)
class Encoded:
    """One parameter as it is stored: the layout's name, its parts by suffix, and the stated error (Frobenius)."""

    layout: str
    parts: dict[str, Tensor]
    bound: float = 0.0


def check_codec(codec: object) -> str:
    """The codec's name, or ArgumentError with the list of names."""
    if isinstance(codec, str) and (codec in _PLAIN or codec in _LIMITS or _LOWRANK.fullmatch(codec)):
        return codec
    raise ArgumentError("codec", expected=f"one of {', '.join(CODECS)} (r a number)", got=ascii(codec))


def encode(codec: str, value: Tensor | LowRank) -> Encoded:
    """Lay out one finite update. NonFiniteError when fp16 would overflow."""
    if isinstance(value, LowRank):
        scale = torch.tensor(value.scale, dtype=torch.float64)
        return Encoded("lora", {FACTOR_A: _kept(value.a), FACTOR_B: _kept(value.b), SCALE: scale})
    if codec in _PLAIN:
        stored = value.detach().to(_PLAIN[codec])
        if codec == "fp16" and not is_finite(stored):
            raise NonFiniteError("delta", expected="at most 65504 under fp16", got="more", remedy="Use bf16.")
        return Encoded(codec, {"": stored}, 0.0 if codec == "fp32" else norm(stored.float() - value.float()))
    if codec in _LIMITS:
        return _quantise(codec, value.detach().float())
    match = _LOWRANK.fullmatch(codec)
    assert match is not None, codec
    return _truncate(value.detach().float(), int(match[1]))


def decode(layout: str, parts: dict[str, Tensor]) -> Tensor:
    """The dense update: as stored for fp32, bf16 and fp16, otherwise materialised in fp32."""
    if layout in _PLAIN:
        return parts[""]
    if layout in _LIMITS:
        return scaled(parts[VALUES], parts[SCALE])
    return factors(parts).dense()


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """values * scale per row, in fp32: what int8 and fp8 stand for."""
    return values.to(torch.float32) * scale.unsqueeze(-1)


def factors(parts: dict[str, Tensor]) -> LowRank:
    """The two factors of a lora or lowrank layout."""
    return LowRank(parts[FACTOR_A], parts[FACTOR_B], float(parts[SCALE]))


def expected_parts(
    layout: object, shape: tuple[int, ...], what: str
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Suffix -> (dtypes allowed, shape; -1 is the rank) of such a parameter; LedgerFormatError if impossible."""
    if layout in _PLAIN:
        return {"": ((_PLAIN_NAMES[str(layout)],), shape)}
    if layout in _LIMITS and shape:
        dtype = "I8" if layout == "int8" else "F8_E4M3"
        return {VALUES: ((dtype,), shape), SCALE: (("F32",), shape[:-1])}
    if layout in ("lora", "lowrank") and len(shape) == 2:
        kept = ("F32", "BF16", "F16")
        return {FACTOR_A: (kept, (-1, shape[1])), FACTOR_B: (kept, (shape[0], -1)), SCALE: (("F64",), ())}
    raise LedgerFormatError(what, expected=f"a layout that fits {shape}", got=ascii(layout)[:80])


def _kept(tensor: Tensor) -> Tensor:
    """Factors keep their dtype; fp64 becomes fp32."""
    return tensor.detach().float() if tensor.dtype == torch.float64 else tensor.detach()


def _quantise(codec: str, value: Tensor) -> Encoded:
    """Symmetric, one scale per row: q = value / scale, scale = max |row| / limit; a zero row has scale 0."""
    if value.ndim == 0:
        return Encoded("fp32", {"": value})
    largest = value.abs().amax(-1) if value.shape[-1] else value.new_zeros(value.shape[:-1])
    scale = largest / _LIMITS[codec]
    # Rows so small that the scale is subnormal would be divided by a number with few bits: they are called
    # zero.
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.zeros_like(scale), scale)
    divisor = torch.where(scale == 0, torch.full_like(scale, float("inf")), scale).unsqueeze(-1)
    quotient = (value / divisor).clamp(-_LIMITS[codec], _LIMITS[codec])
    values = quotient.round().to(torch.int8) if codec == "int8" else quotient.to(torch.float8_e4m3fn)
    error = norm(values.to(torch.float32) * scale.unsqueeze(-1) - value)
    return Encoded(codec, {VALUES: values, SCALE: scale}, error)


def _truncate(value: Tensor, rank: int) -> Encoded:
    """Best rank-r approximation; the singular values are split evenly over both factors."""
    if value.ndim != 2 or rank * sum(value.shape) >= value.numel():
        return Encoded("fp32", {"": value})
    left, sigma, right = torch.linalg.svd(value, full_matrices=False)
    root = sigma[:rank].sqrt()
    a, b = (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()
    error = norm(b @ a - value)  # the dropped singular values, plus what rounding adds
    parts = {FACTOR_A: a, FACTOR_B: b, SCALE: torch.tensor(1.0, dtype=torch.float64)}
    return Encoded("lowrank", parts, error)
