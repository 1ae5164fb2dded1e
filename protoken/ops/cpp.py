"""The cpp backend: hands addresses, strides and dtype codes to the native module, which knows nothing of
torch.

A layer travels as one row of int64; the row layouts are those of the structs in csrc/<op>.h. Everything a row
points to is kept alive here until the call returns. The native side releases the GIL and uses
torch.get_num_threads() threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protoken import _C
from protoken.errors import ArgumentError
from protoken.ops.banks import DenseBank

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}


def _rows(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def launch_client_scores(out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[DenseBank]) -> None:
    clients, tokens = out.shape[1:]
    held = [(x.float().contiguous(), grad.float().contiguous()) for x, grad in zip(xs, grads, strict=True)]
    table = _rows(
        [
            [
                x.data_ptr(),
                grad.data_ptr(),
                bank.rows,
                bank.columns,
                CODES[bank.dtype],
                bank.pointers.data_ptr(),
                bank.stride_o,
                bank.stride_i,
                0 if bank.scale is None else bank.scale.data_ptr(),
            ]
            for (x, grad), bank in zip(held, banks, strict=True)
        ]
    )
    try:
        _C.client_scores(
            table.data_ptr(), table.shape[0], clients, tokens, out.data_ptr(), torch.get_num_threads()
        )
    except ValueError as error:
        raise ArgumentError("client_scores", got=str(error)) from error
