"""What the kernels read: every client's matrix of one layer, checked once, as a table of addresses.

Building a bank costs Python time per client when the clients' tensors lie apart, so a caller with thousands
of clients builds it once and passes the object wherever an op takes ``bank``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protoken.errors import ArgumentError, ShapeError
from protoken.ops.checks import (
    BANK_DTYPES,
    FACTOR_DTYPES,
    FLOATS,
    SCALED_DTYPES,
    check_aligned,
    check_device,
    check_dtype,
    check_size,
    check_tensor,
    short,
)

# What the native modules call the dtypes they read: DtypeCode of csrc/dtypes.h, Format of csrc/cuda_tiles.cuh.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}


@dataclass(frozen=True, eq=False)
class DenseBank:
    """K matrices [O, I] of one layer: a strided tensor [K, O, I], or K tensors with common strides.

    ``scale`` [K, O] fp32 belongs to int8 and float8_e4m3fn: delta_k[o, i] = scale[k, o] * bank[k, o, i].
    Addresses stay right as long as the tensors held here are not resized in place.
    """

    tensor: Tensor | None  # [K, O, I] when the clients lie in one tensor
    parts: tuple[Tensor, ...]  # K x [O, I] otherwise
    scale: Tensor | None  # [K, O]
    pointers: Tensor  # int64 [K], on the CPU
    stride_o: int
    stride_i: int
    dtype: torch.dtype
    device: torch.device
    clients: int
    rows: int
    columns: int
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        bank: DenseBank | Tensor | Sequence[Tensor],
        scale: Tensor | None = None,
        *,
        shape: tuple[int, int] = (0, 0),
        name: str = "bank",
    ) -> DenseBank:
        """Check and wrap. ``shape`` is (O, I) for a sequence without clients, which does not know its own.

        Errors: `ShapeError`, `DtypeError`, `DeviceError`, `ArgumentError` (not a tensor, scale missing or not
        wanted, misaligned data).
        """
        if isinstance(bank, DenseBank):
            if scale is not None:
                raise ArgumentError("scale", expected="None, since the DenseBank holds its own", got="a tensor")
            return bank
        if isinstance(bank, Tensor):
            check_tensor(name, bank)
            if bank.dim() != 3:
                raise ShapeError(name, expected="[K, O, I]", got=tuple(bank.shape))
            return _dense_tensor(_stored(bank), scale, name)
        if not isinstance(bank, Sequence):
            raise ArgumentError(name, expected="a tensor [K, O, I] or K tensors [O, I]", got=type(bank).__name__)
        return _dense_parts([_stored(part) for part in _tensors(bank, name)], scale, shape, name)

    def device_pointers(self) -> Tensor:
        """`pointers` on the bank's device; copied at the first call."""
        if "pointers" not in self.cache:
            self.cache["pointers"] = self.pointers.to(self.device)
        return read_here(self.cache["pointers"])

    def matrix(self, client: int) -> Tensor:
        """Client's [O, I] as stored, without its scale."""
        return self.tensor[client] if self.tensor is not None else self.parts[client]

    def span(self, start: int, stop: int) -> Tensor:
        """fp32 [stop - start, O, I], scale applied."""
        if self.tensor is not None:
            values = self.tensor[start:stop].float()
        else:
            values = torch.stack([part.float() for part in self.parts[start:stop]])
        return values if self.scale is None else values * self.scale[start:stop, :, None]


@dataclass(frozen=True, eq=False)
class LowRankBank:
    """K pairs (A_k [r_k, I], B_k [O, r_k]) of one layer, delta_k = scale[k] * B_k @ A_k; ranks may differ."""

    a: Tensor | None  # [K, r, I] when all factors lie in one tensor
    b: Tensor | None  # [K, O, r]
    parts: tuple[tuple[Tensor, Tensor], ...]
    scale: Tensor  # fp32 [K]
    table: Tensor  # int64 [K, 7] on the CPU: A, stride_r, stride_i, B, stride_o, stride_r, rank
    max_rank: int
    dtype: torch.dtype
    device: torch.device
    clients: int
    rows: int
    columns: int
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        a: LowRankBank | Tensor | Sequence[Tensor],
        b: Tensor | Sequence[Tensor] | None = None,
        scale: Tensor | None = None,
        *,
        shape: tuple[int, int] = (0, 0),
    ) -> LowRankBank:
        """Check and wrap; ``scale`` None is 1 for every client. Errors as `DenseBank.of`."""
        if isinstance(a, LowRankBank):
            if b is not None or scale is not None:
                raise ArgumentError("b and scale", expected="None, since the LowRankBank holds its own", got="tensors")
            return a
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return _lowrank_tensor(_stored(a), _stored(b), scale)
        if isinstance(a, Sequence) and isinstance(b, Sequence):
            return _lowrank_parts(_tensors(a, "a"), _tensors(b, "b"), scale, shape)
        raise ArgumentError(
            "a and b",
            expected="two tensors [K, r, I] and [K, O, r], or two sequences of K matrices",
            got=f"{type(a).__name__} and {type(b).__name__}",
        )

    def device_table(self) -> Tensor:
        """`table` on the bank's device; copied at the first call."""
        if "table" not in self.cache:
            self.cache["table"] = self.table.to(self.device)
        return read_here(self.cache["table"])

    def pair(self, client: int) -> tuple[Tensor, Tensor]:
        """Client's (A [r, I], B [O, r]) as stored."""
        if self.a is not None and self.b is not None:
            return self.a[client], self.b[client]
        return self.parts[client]


def read_here(held: Tensor) -> Tensor:
    """``held``, of which torch's allocator now knows that the current stream reads it.

    Tables live as long as their bank, which may be dropped while a kernel on another stream than the one they were
    made on is still under way; their memory must not be given to somebody else before that is done.
    """
    if held.is_cuda:
        held.record_stream(torch.cuda.current_stream(held.device))
    return held


def _stored(value: Tensor) -> Tensor:
    """The values alone, as they stand in memory: no autograd graph, no sign that torch only remembers."""
    return value.detach().resolve_neg()


def _tensors(values: Sequence[object], name: str) -> list[Tensor]:
    for index, value in enumerate(values):
        check_tensor(f"{name}[{index}]", value)
    return list(values)  # type: ignore[arg-type]


def _dense_tensor(bank: Tensor, scale: Tensor | None, name: str) -> DenseBank:
    clients, rows, columns = bank.shape
    check_dtype(name, bank.dtype, BANK_DTYPES)
    check_aligned(name, bank.data_ptr(), bank.element_size())
    check_size(name, clients, rows, columns, bank.element_size())
    step = bank.stride(0) * bank.element_size()
    pointers = torch.arange(clients, dtype=torch.int64) * step + bank.data_ptr()
    return DenseBank(
        tensor=bank,
        parts=(),
        scale=_row_scale(scale, bank.dtype, (clients, rows), bank.device),
        pointers=pointers,
        stride_o=bank.stride(1),
        stride_i=bank.stride(2),
        dtype=bank.dtype,
        device=bank.device,
        clients=clients,
        rows=rows,
        columns=columns,
    )


def _dense_parts(parts: list[Tensor], scale: Tensor | None, shape: tuple[int, int], name: str) -> DenseBank:
    if not parts:
        empty = torch.empty(0, *shape, device=scale.device if scale is not None else None)
        return _dense_tensor(empty, None, name)
    first = parts[0]
    if first.dim() != 2:
        raise ShapeError(f"{name}[0]", expected="[O, I]", got=tuple(first.shape))
    check_dtype(f"{name}[0]", first.dtype, BANK_DTYPES)
    for index, part in enumerate(parts):
        if part.shape != first.shape:
            raise ShapeError(f"{name}[{index}]", expected=f"{tuple(first.shape)} as {name}[0]", got=tuple(part.shape))
        check_dtype(f"{name}[{index}]", part.dtype, (first.dtype,))
        check_device(f"{name}[{index}]", part.device, first.device, f"{name}[0]")
        check_aligned(f"{name}[{index}]", part.data_ptr(), part.element_size())
    check_size(name, len(parts), first.numel(), first.element_size())
    strides, _ = Counter(part.stride() for part in parts).most_common(1)[0]
    # Kernels take one pair of strides per bank: the odd ones out are copied to the layout of the majority.
    parts = [part if part.stride() == strides else _restrided(part, strides) for part in parts]
    return DenseBank(
        tensor=None,
        parts=tuple(parts),
        scale=_row_scale(scale, first.dtype, (len(parts), first.shape[0]), first.device),
        pointers=torch.tensor([part.data_ptr() for part in parts], dtype=torch.int64),
        stride_o=strides[0],
        stride_i=strides[1],
        dtype=first.dtype,
        device=first.device,
        clients=len(parts),
        rows=first.shape[0],
        columns=first.shape[1],
    )


def _restrided(part: Tensor, strides: tuple[int, ...]) -> Tensor:
    copy = torch.empty_strided(part.shape, strides, dtype=part.dtype, device=part.device)
    return copy.copy_(part)


def _row_scale(scale: Tensor | None, dtype: torch.dtype, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    if dtype not in SCALED_DTYPES:
        if scale is not None:
            raise ArgumentError("scale", expected=f"None for a {short(dtype)} bank", got="a tensor")
        return None
    if scale is None:
        raise ArgumentError(
            "scale", expected=f"[K, O] = {shape} for a {short(dtype)} bank", got=None, remedy="Pass it."
        )
    check_tensor("scale", scale)
    if tuple(scale.shape) != shape:
        raise ShapeError("scale", expected=f"[K, O] = {shape}", got=tuple(scale.shape))
    check_dtype("scale", scale.dtype, FLOATS)
    check_device("scale", scale.device, device, "the bank")
    return _stored(scale).float().contiguous()


def _lowrank_tensor(a: Tensor, b: Tensor, scale: Tensor | None) -> LowRankBank:
    check_tensor("a", a)
    check_tensor("b", b)
    if a.dim() != 3:
        raise ShapeError("a", expected="[K, r, I]", got=tuple(a.shape))
    if b.dim() != 3 or b.shape[0] != a.shape[0] or b.shape[2] != a.shape[1]:
        raise ShapeError("b", expected=f"[{a.shape[0]}, O, {a.shape[1]}] to match a", got=tuple(b.shape))
    _check_pair("a", a, "b", b, a)
    clients, rank, columns = a.shape
    index = torch.arange(clients, dtype=torch.int64)
    table = torch.empty(clients, 7, dtype=torch.int64)
    table[:, 0] = index * (a.stride(0) * a.element_size()) + a.data_ptr()
    table[:, 3] = index * (b.stride(0) * b.element_size()) + b.data_ptr()
    for column, value in ((1, a.stride(1)), (2, a.stride(2)), (4, b.stride(1)), (5, b.stride(2)), (6, rank)):
        table[:, column] = value
    return LowRankBank(
        a=a,
        b=b,
        parts=(),
        scale=_client_scale(scale, clients, a.device),
        table=table,
        max_rank=rank if clients else 0,
        dtype=a.dtype,
        device=a.device,
        clients=clients,
        rows=b.shape[1],
        columns=columns,
    )


def _lowrank_parts(a: list[Tensor], b: list[Tensor], scale: Tensor | None, shape: tuple[int, int]) -> LowRankBank:
    if len(a) != len(b):
        raise ShapeError("b", expected=f"{len(a)} matrices, one per matrix of a", got=len(b))
    if not a:
        rows, columns = shape
        return _lowrank_tensor(torch.empty(0, 1, columns), torch.empty(0, rows, 1), scale)
    pairs, table = [], []
    for index, (left, right) in enumerate(zip(a, b, strict=True)):
        left, right = _stored(left), _stored(right)
        if left.dim() != 2 or left.shape[1] != a[0].shape[-1]:
            raise ShapeError(f"a[{index}]", expected=f"[r, {a[0].shape[-1]}]", got=tuple(left.shape))
        if right.dim() != 2 or right.shape[1] != left.shape[0] or right.shape[0] != b[0].shape[0]:
            expected = f"[{b[0].shape[0]}, {left.shape[0]}] to match a[{index}] and b[0]"
            raise ShapeError(f"b[{index}]", expected=expected, got=tuple(right.shape))
        _check_pair(f"a[{index}]", left, f"b[{index}]", right, a[0])
        pairs.append((left, right))
        table.append([left.data_ptr(), *left.stride(), right.data_ptr(), *right.stride(), left.shape[0]])
    return LowRankBank(
        a=None,
        b=None,
        parts=tuple(pairs),
        scale=_client_scale(scale, len(a), a[0].device),
        table=torch.tensor(table, dtype=torch.int64),
        max_rank=max(row[6] for row in table),
        dtype=a[0].dtype,
        device=a[0].device,
        clients=len(a),
        rows=b[0].shape[0],
        columns=a[0].shape[1],
    )


def _check_pair(a_name: str, a: Tensor, b_name: str, b: Tensor, anchor: Tensor) -> None:
    check_dtype(a_name, a.dtype, FACTOR_DTYPES)
    for name, value in ((a_name, a), (b_name, b)):
        check_dtype(name, value.dtype, (anchor.dtype,))
        check_device(name, value.device, anchor.device, "a")
        check_aligned(name, value.data_ptr(), value.element_size())
        check_size(name, value.numel(), value.element_size())


def _client_scale(scale: Tensor | None, clients: int, device: torch.device) -> Tensor:
    if scale is None:
        return torch.ones(clients, device=device)
    check_tensor("scale", scale)
    if tuple(scale.shape) != (clients,):
        raise ShapeError("scale", expected=f"[K] = ({clients},)", got=tuple(scale.shape))
    check_dtype("scale", scale.dtype, FLOATS)
    check_device("scale", scale.device, device, "the bank")
    return _stored(scale).float().contiguous()
