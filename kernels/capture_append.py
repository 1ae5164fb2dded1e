"""capture_append in Triton: one launch per buffer casts and places a step's rows; the cursor moves afterwards.

A program takes one row and up to 1024 columns. The row's place is computed from the cursor on the device, so nothing
waits and a CUDA graph can hold the call.
"""

from __future__ import annotations

import triton
import triton.language as tl
from protoken.kernels.common import on_its_device
from torch import Tensor

WARPS = 4


@triton.jit
def _capture_append_kernel(
    buffer, step, cursor, capacity, width, skipped, b_t, s_t, s_n, NARROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) + skipped
    place = (tl.load(cursor) + row) % capacity
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < width
    n64 = n.to(tl.int64)
    value = tl.load(step + row * s_t + n64 * s_n, mask=inside)
    if NARROWS:
        value = value.to(buffer.dtype.element_ty, fp_downcast_rounding="rtne")
    tl.store(buffer + place * b_t + n64, value.to(buffer.dtype.element_ty), mask=inside)


@on_its_device
def launch_capture_append(buffers: list[Tensor], steps: list[Tensor], cursor: Tensor) -> None:
    capacity, tokens = buffers[0].shape[0], steps[0].shape[0]
    skipped = max(tokens - capacity, 0)
    for buffer, step in zip(buffers, steps, strict=True):
        width = buffer.shape[1]
        if not width:
            continue
        block = min(1024, triton.next_power_of_2(width))
        _capture_append_kernel[(tokens - skipped, triton.cdiv(width, block))](
            buffer,
            step,
            cursor,
            capacity,
            width,
            skipped,
            buffer.stride(0),
            *step.stride(),
            NARROWS=buffer.element_size() < step.element_size(),
            BLOCK=block,
            num_warps=WARPS,
        )
    cursor += tokens
