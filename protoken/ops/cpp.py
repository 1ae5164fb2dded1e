"""The cpp backend: hands addresses, strides and dtype codes to the native module, which knows nothing of torch.

A layer travels as one row of int64; the rows are the structs in csrc/<op>.h. Everything a row points to is kept
alive here until the call returns. The native side releases the GIL and uses torch.get_num_threads() threads.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from protoken import _C
from protoken.errors import ArgumentError
from protoken.ops.banks import CODES, DenseBank, LowRankBank
from protoken.ops.gated_tail import GatedBlock, GatedValues
from protoken.ops.relevance_head import Head, normalise, own_rows, pull_through_norm

FLOAT32, STRIDED = torch.float32, torch.strided
MOST_SCORES = 1 << 40  # that a call answers at once: where sizes could overflow they are looked at one by one


def launch_client_scores(out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[DenseBank]) -> None:
    held = [_plain(value) for value in (*xs, *grads)]
    rows = []
    for layer, bank in enumerate(banks):
        inputs = [held[layer].data_ptr(), held[len(banks) + layer].data_ptr()]
        rows.append([*inputs, *_matrices(bank)])
    _call(_C.client_scores, rows, *out.shape[1:], out.data_ptr())


def launch_client_scores_lowrank(out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[LowRankBank]) -> None:
    held = [_plain(value) for value in (*xs, *grads)]
    rows = []
    for layer, bank in enumerate(banks):
        inputs = [held[layer].data_ptr(), held[len(banks) + layer].data_ptr()]
        rows.append([*inputs, *_factors(bank)])
    _call(_C.client_scores_lowrank, rows, *out.shape[1:], out.data_ptr())


def launch_client_totals(out: Tensor, ms: list[Tensor], banks: list[DenseBank]) -> None:
    held, rows = [], []
    for m, bank in zip(ms, banks, strict=True):
        fields = _matrices(bank)
        if bank.scale is None and bank.stride_o == 1 and bank.stride_i != 1:
            # < m, D > = < m^T, D^T >: a transposed bank is read along its contiguous side.
            m = m.t()
            rows_, columns, code, pointers, stride_o, stride_i, scale = fields
            fields = array("q", [columns, rows_, code, pointers, stride_i, stride_o, scale])
        held.append(_plain(m))
        rows.append([held[-1].data_ptr(), *fields])
    _call(_C.client_totals, rows, out.shape[1], out.data_ptr())


def serve_client_scores(x: Tensor, grad: Tensor, bank: DenseBank) -> Tensor | None:
    """fp32 [K, T] of one layer, whole, where x and grad lie as the native module reads them and it read this bank
    before; None where anything needs a closer look, be it for an error.

    A small model's call is over in 150 us. The checks one by one, the ways of a group and of other backends take as
    long again where other work has put their code out of the caches.
    """
    return _serve_scores(_C.client_scores_one, x, grad, bank)


def serve_client_scores_lowrank(x: Tensor, grad: Tensor, bank: LowRankBank) -> Tensor | None:
    """fp32 [K, T] of one layer on the terms of `serve_client_scores`."""
    return _serve_scores(_C.client_scores_lowrank_one, x, grad, bank)


def serve_client_totals(m: Tensor, bank: DenseBank) -> Tensor | None:
    """fp32 [K] of one layer on the terms of `serve_client_scores`."""
    fields = bank.cache.get("cpp")
    if fields is None or bank.stride_i != 1 or not _ready(m, bank.rows, bank.columns):
        return None
    out = torch.empty(bank.clients, dtype=FLOAT32, device=bank.device)
    _call_one(_C.client_totals_one, fields, m.data_ptr(), bank.clients, out.data_ptr())
    return out


def _serve_scores(native: Callable[..., None], x: Tensor, grad: Tensor, bank: DenseBank | LowRankBank) -> Tensor | None:
    fields = bank.cache.get("cpp")
    tokens = x.shape[0] if type(x) is Tensor and x.dim() == 2 else 0
    if fields is None or not (_ready(x, tokens, bank.columns) and _ready(grad, tokens, bank.rows)):
        return None
    if not 0 < bank.clients * tokens < MOST_SCORES:
        return None
    out = torch.empty(bank.clients, tokens, dtype=FLOAT32, device=bank.device)
    _call_one(native, fields, x.data_ptr(), grad.data_ptr(), bank.clients, tokens, out.data_ptr())
    return out


def _ready(value: object, rows: int, columns: int) -> bool:
    """Whether this is an fp32 matrix [rows, columns] that the native module can read where it lies."""
    return (
        type(value) is Tensor
        and value.dtype is FLOAT32
        and value.shape == (rows, columns)
        and value.is_cpu
        and value.layout is STRIDED
        and value.is_contiguous()
        and not value.is_neg()
    )


def why_not_relevance_head(hidden: Tensor, targets: Tensor, head: Head) -> str | None:
    if hidden.shape[0] > _C.head_tokens and head.objective == "log_prob":
        return f"reads the head once for up to {_C.head_tokens} tokens; more are work for torch's matmul"
    if head.weight.dtype == torch.float64:
        return "takes fp32, bf16 and fp16 heads, not float64"
    if head.weight.shape[1] < 2 or head.weight.stride(1) != 1 or head.weight.stride(0) < head.weight.shape[1]:
        return "takes heads whose rows are contiguous"
    return None


def launch_relevance_head(grad: Tensor, value: Tensor, hidden: Tensor, targets: Tensor, head: Head) -> None:
    normed, direction, inverse = normalise(hidden, head)
    upstream = own_rows(value, normed, targets, head)
    if head.objective == "log_prob":
        mean, mass, normed = torch.empty_like(normed), torch.empty_like(value), normed.contiguous()
        weight = head.weight.detach()
        bias = None if head.bias is None else _plain(head.bias.detach())
        sizes = [*normed.shape, weight.shape[0], CODES[weight.dtype], weight.data_ptr(), weight.stride(0)]
        table = array("q", [normed.data_ptr(), *sizes, 0 if bias is None else bias.data_ptr()])
        outputs = mean.data_ptr(), mass.data_ptr(), torch.get_num_threads()
        try:
            _C.relevance_head(table.buffer_info()[0], head.scale, head.softcap or 0.0, *outputs)
        except ValueError as error:
            raise ArgumentError("relevance_head", got=str(error)) from error
        value.sub_(mass)
        upstream = upstream - mean
    pull_through_norm(grad, upstream, direction, inverse, head)


def launch_gated_tail(out: Tensor, block: GatedBlock, values: GatedValues, upstream: Tensor) -> None:
    """out fp32 [2, d]: d f / d b and d f / d a. Weights are fp32 with contiguous rows."""
    inner, width = block.gate.shape
    held = [_plain(x) for x in (upstream, values.entering, values.leaving, values.gate, values.up)]
    weights = (block.norm, block.final_norm, block.gate, block.up, block.down)
    strides = [block.gate.stride(0), block.up.stride(0), block.down.stride(0)]
    table = array("q", [width, inner, *strides, *(x.data_ptr() for x in (*held, *weights))])
    outputs = out.data_ptr(), out.data_ptr() + out.stride(0) * 4
    try:
        _C.gated_tail(table.buffer_info()[0], block.epsilon, block.final_epsilon, *outputs, torch.get_num_threads())
    except ValueError as error:
        raise ArgumentError("gated_tail", got=str(error)) from error


def _plain(value: Tensor) -> Tensor:
    if value.dtype is torch.float32 and value.is_contiguous():
        return value
    return value.to(torch.float32).contiguous()


def _matrices(bank: DenseBank) -> array[int]:
    """Rows, columns and what else the native module wants to know of a bank; it stays the same as long as the bank."""
    fields: array[int] | None = bank.cache.get("cpp")
    if fields is None:
        scale = 0 if bank.scale is None else bank.scale.data_ptr()
        layout = [CODES[bank.dtype], bank.pointers.data_ptr(), bank.stride_o, bank.stride_i, scale]
        fields = bank.cache["cpp"] = array("q", [bank.rows, bank.columns, *layout])
    return fields


def _factors(bank: LowRankBank) -> array[int]:
    fields: array[int] | None = bank.cache.get("cpp")
    if fields is None:
        layout = [CODES[bank.dtype], bank.table.data_ptr(), bank.scale.data_ptr()]
        fields = bank.cache["cpp"] = array("q", [bank.rows, bank.columns, *layout])
    return fields


def _call(function: Callable[..., None], rows: list[list[int]], *sizes: int) -> None:
    table = array("q", chain.from_iterable(rows))  # a tensor would cost as much as a small call's work
    try:
        function(table.buffer_info()[0], len(rows), *sizes, torch.get_num_threads())
    except ValueError as error:
        raise ArgumentError(function.__name__, got=str(error)) from error


def _call_one(function: Callable[..., None], fields: array[int], *rest: int) -> None:
    try:
        function(fields.buffer_info()[0], *rest, torch.get_num_threads())
    except ValueError as error:
        raise ArgumentError(function.__name__.removesuffix("_one"), got=str(error)) from error
