"""The cpp backend: hands addresses, strides and dtype codes to the native module, which knows nothing of torch.

A layer travels as one row of int64; the rows are the structs in csrc/<op>.h. Everything a row points to is kept
alive here until the call returns. The native side releases the GIL and uses torch.get_num_threads() threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from protoken import _C
from protoken.errors import ArgumentError
from protoken.ops.banks import DenseBank, LowRankBank

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}


def launch_client_scores(out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[DenseBank]) -> None:
    held = [_plain(value) for value in (*xs, *grads)]
    rows = []
    for layer, bank in enumerate(banks):
        inputs = [held[layer].data_ptr(), held[len(banks) + layer].data_ptr()]
        rows.append([*inputs, bank.rows, bank.columns, *_matrices(bank)])
    _call(_C.client_scores, rows, *out.shape[1:], out.data_ptr())


def launch_client_scores_lowrank(out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[LowRankBank]) -> None:
    held = [_plain(value) for value in (*xs, *grads)]
    rows = []
    for layer, bank in enumerate(banks):
        inputs = [held[layer].data_ptr(), held[len(banks) + layer].data_ptr()]
        factors = [CODES[bank.dtype], bank.table.data_ptr(), bank.scale.data_ptr()]
        rows.append([*inputs, bank.rows, bank.columns, *factors])
    _call(_C.client_scores_lowrank, rows, *out.shape[1:], out.data_ptr())


def launch_client_totals(out: Tensor, ms: list[Tensor], banks: list[DenseBank]) -> None:
    held, rows = [], []
    for m, bank in zip(ms, banks, strict=True):
        shape, fields = [bank.rows, bank.columns], _matrices(bank)
        if bank.scale is None and bank.stride_o == 1 and bank.stride_i != 1:
            # < m, D > = < m^T, D^T >: a transposed bank is read along its contiguous side.
            m = m.t()
            shape.reverse()
            fields[2], fields[3] = fields[3], fields[2]
        held.append(_plain(m))
        rows.append([held[-1].data_ptr(), *shape, *fields])
    _call(_C.client_totals, rows, out.shape[1], out.data_ptr())


def _plain(value: Tensor) -> Tensor:
    return value.to(torch.float32).contiguous()


def _matrices(bank: DenseBank) -> list[int]:
    scale = 0 if bank.scale is None else bank.scale.data_ptr()
    return [CODES[bank.dtype], bank.pointers.data_ptr(), bank.stride_o, bank.stride_i, scale]


def _call(function: Callable[..., None], rows: list[list[int]], *sizes: int) -> None:
    table = torch.tensor(rows, dtype=torch.int64)
    try:
        function(table.data_ptr(), len(rows), *sizes, torch.get_num_threads())
    except ValueError as error:
        raise ArgumentError(function.__name__, got=str(error)) from error
