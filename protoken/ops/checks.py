"""Checks shared by the ops: each raises one typed error that names the argument, and returns nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protoken.errors import ArgumentError, DeviceError, DtypeError, ShapeError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BANK_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn)
LARGEST = 2**63 - 1


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ArgumentError(name, expected="a torch.Tensor", got=type(value).__name__)
    if value.layout is not torch.strided:
        raise ArgumentError(name, expected="a strided tensor", got=str(value.layout), remedy="Call .to_dense().")
    if value.device.type == "meta":
        raise DeviceError(name, expected="a tensor with storage", got="device meta", remedy="Load the weights first.")


def is_plain(value: object, rows: int, columns: int, device: torch.device) -> bool:
    """Whether an operand passes all the checks of a matrix [rows, columns] at a glance; ``device`` is that of
    checked tensors. A small call would spend its time in the checks one by one; they are for operands that need a
    closer look or an error."""
    return (
        type(value) is Tensor
        and value.shape == (rows, columns)
        and value.dtype in FLOATS
        and value.device == device
        and value.layout is torch.strided
    )


def check_dtype(name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype]) -> None:
    if dtype not in allowed:
        raise DtypeError(name, expected=" or ".join(short(d) for d in allowed), got=short(dtype))


def check_device(name: str, got: torch.device, expected: torch.device, anchor: str) -> None:
    if got != expected:
        raise DeviceError(
            name,
            expected=f"{expected}, where {anchor} is",
            got=str(got),
            remedy=f"Move it: {name}.to({str(expected)!r}).",
        )


def check_matrix(name: str, value: Tensor, shape: str, rows: int | None = None, columns: int | None = None) -> None:
    """A 2-D tensor; ``shape`` is how the message calls it, ``rows``/``columns`` what they must be where given."""
    check_tensor(name, value)
    fits = value.dim() == 2 and rows in (None, value.shape[0]) and columns in (None, value.shape[1])
    if not fits:
        raise ShapeError(name, expected=shape, got=tuple(value.shape))


def check_size(name: str, *factors: int) -> None:
    """The product of the factors (a size in bytes) must fit into 64 bits."""
    size = 1
    for factor in factors:
        size *= max(factor, 1)
    if size > LARGEST:
        raise ShapeError(name, expected=f"at most {LARGEST} bytes", got=f"{size} bytes", remedy="Split the call.")


def check_aligned(name: str, address: int, itemsize: int) -> None:
    if address % itemsize:
        raise ArgumentError(
            name,
            expected=f"data aligned to {itemsize} bytes",
            got=f"address {address:#x}",
            remedy="Clone the tensor.",
        )


def check_inputs(
    xs: Sequence[Tensor],
    grads: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    device: torch.device | None,
) -> None:
    """x [T, I_l] and grad [T, O_l] of every layer fit the banks' (O_l, I_l), and all layers share T."""
    tokens: int | None = None
    for layer, (x, grad, (rows, columns)) in enumerate(zip(xs, grads, shapes, strict=True)):
        if tokens is None and type(x) is Tensor and x.dim():
            tokens = x.shape[0]
        if (
            device is not None
            and tokens is not None
            and is_plain(x, tokens, columns, device)
            and is_plain(grad, tokens, rows, device)
        ):
            continue
        where = f"[{layer}]" if len(xs) > 1 else ""
        check_matrix(f"x{where}", x, f"[T, {columns}] to match the bank", tokens, columns)
        tokens = x.shape[0]
        check_matrix(f"grad{where}", grad, f"[{tokens}, {rows}] to match x and the bank", tokens, rows)
        anchor = device if device is not None else x.device
        for name, value in (("x", x), ("grad", grad)):
            check_dtype(name + where, value.dtype, FLOATS)
            check_device(name + where, value.device, anchor, "the bank")


def check_sequence(name: str, entries: object) -> None:
    if not isinstance(entries, Sequence | Tensor) or isinstance(entries, str | bytes):
        raise ArgumentError(name, expected="a list of tensors", got=f"a {type(entries).__name__}")


def check_layers(scales: Sequence[object] | None = None, **values: Sequence[object]) -> None:
    """Every sequence has one entry per layer, as the first one has."""
    if scales is not None:
        values["scales"] = scales
    for name, entries in values.items():
        check_sequence(name, entries)
    anchor, first = next(iter(values.items()))
    for name, entries in values.items():
        if len(entries) != len(first):
            raise ShapeError(name, expected=f"{len(first)} entries, one per layer as in {anchor}", got=len(entries))


def check_same_clients(layer: int, got: int, expected: int) -> None:
    """A call's layers share their clients."""
    if got != expected:
        raise ShapeError(
            f"bank[{layer}]",
            expected=f"{expected} clients as bank[0]",
            got=got,
            remedy="Give an absent client an update of zeros, or call once per layer.",
        )


def narrow(value: Tensor) -> Tensor:
    """float64 becomes fp32, in which every op computes; all else stays as it is. No autograd graph is kept, and no
    sign that torch only remembers (the imaginary part of a conjugate), since kernels read what is stored."""
    value = value.detach() if value.requires_grad else value
    value = value.resolve_neg() if value.is_neg() else value
    return value.float() if value.dtype == torch.float64 else value


def spread(values: Tensor, layers: list[int], count: int) -> Tensor:
    """Results of the layers that hold something among ``count``; a sum over nothing is 0."""
    out = values.new_zeros(count, *values.shape[1:])
    out[torch.tensor(layers, device=values.device)] = values
    return out
