"""Ring buffers of what the traced layers saw: a decoding step's rows are cast and appended in one call.

    buffers[j][(cursor + t) mod C] = steps[j][t]   for t = 0 .. T-1,   then cursor <- cursor + T

The cursor is a tensor where the buffers are, so that no step waits for the device and a CUDA graph can hold the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protoken.dispatch import launcher
from protoken.errors import ArgumentError, ShapeError
from protoken.ops.checks import FLOATS, check_device, check_dtype, check_matrix, check_sequence, check_tensor


def capture_append_reference(buffers: Sequence[Tensor], steps: Sequence[Tensor], cursor: Tensor) -> None:
    """The formula above, row by row, in place."""
    for buffer, step in zip(buffers, steps, strict=True):
        for t in range(step.shape[0]):
            buffer[(int(cursor) + t) % buffer.shape[0]] = step[t].to(buffer.dtype)
    if steps:
        cursor += steps[0].shape[0]


def capture_append(
    buffers: Sequence[Tensor], steps: Sequence[Tensor], cursor: Tensor, *, backend: str = "auto"
) -> None:
    """Append one step to all ring buffers, in place.

    buffers: tensors [C, n_j] of one capacity C, rows contiguous; steps: tensors [T, n_j], any strides; both
    fp32, bf16, fp16 or fp64, cast with rounding to nearest even. cursor int64 [1]: rows appended so far. Of a
    step longer than the buffer the last C rows stay.

    Errors: `ShapeError`, `DtypeError`, `DeviceError`, `ArgumentError`, `BackendError`.
    """
    if torch.compiler.is_compiling():
        torch.ops.protoken.capture_append(buffers, steps, cursor, backend)
        return
    check_tensor("cursor", cursor)
    if tuple(cursor.shape) != (1,):
        raise ShapeError("cursor", expected="(1,)", got=tuple(cursor.shape))
    check_dtype("cursor", cursor.dtype, (torch.int64,))
    for name, entries in (("buffers", buffers), ("steps", steps)):
        check_sequence(name, entries)
        for index, entry in enumerate(entries):
            check_tensor(f"{name}[{index}]", entry)
    if len(buffers) != len(steps):
        raise ShapeError("steps", expected=f"{len(buffers)} tensors, one per buffer", got=len(steps))
    for index, (buffer, step) in enumerate(zip(buffers, steps, strict=True)):
        _check_pair(index, buffer, step, buffers[0], steps[0], cursor)
    if not buffers or not steps[0].shape[0]:
        return
    operands = [buffer.detach() for buffer in buffers], [step.detach() for step in steps], cursor
    launch = launcher("capture_append", backend, cursor.device, *operands)
    launch(*operands)


def _check_pair(
    index: int, buffer: Tensor, step: Tensor, first_buffer: Tensor, first_step: Tensor, cursor: Tensor
) -> None:
    capacity, tokens = first_buffer.shape[0], first_step.shape[0] if first_step.dim() else 0
    check_matrix(f"buffers[{index}]", buffer, f"[{capacity}, n]", capacity)
    check_matrix(f"steps[{index}]", step, f"[{tokens}, {buffer.shape[1]}]", tokens, buffer.shape[1])
    if buffer.shape[1] > 1 and buffer.stride(1) != 1:
        raise ArgumentError(f"buffers[{index}]", expected="rows with stride 1", got=f"strides {buffer.stride()}")
    if not capacity:
        raise ShapeError(f"buffers[{index}]", expected="a capacity of at least 1 row", got=tuple(buffer.shape))
    for name, value in ((f"buffers[{index}]", buffer), (f"steps[{index}]", step)):
        check_dtype(name, value.dtype, FLOATS)
        check_device(name, value.device, cursor.device, "cursor")


def launch_capture_append(buffers: list[Tensor], steps: list[Tensor], cursor: Tensor) -> None:
    """The torch backend: at most two slice copies per buffer on the CPU, an indexed copy on other devices."""
    capacity, tokens = buffers[0].shape[0], steps[0].shape[0]
    skipped = max(tokens - capacity, 0)
    if cursor.device.type == "cpu":
        start = (int(cursor) + skipped) % capacity
        head = min(tokens - skipped, capacity - start)
        for buffer, step in zip(buffers, steps, strict=True):
            buffer[start : start + head].copy_(step[skipped : skipped + head])
            if skipped + head < tokens:
                buffer[: tokens - skipped - head].copy_(step[skipped + head :])
    else:
        places = (cursor + torch.arange(skipped, tokens, device=cursor.device)) % capacity
        for buffer, step in zip(buffers, steps, strict=True):
            buffer.index_copy_(0, places, step[skipped:].to(buffer.dtype))
    cursor += tokens
