"""client_scores in Triton: a program takes some rows of one client and one block of tokens.

s[k, t] = sum_o grad[t, o] scale[k, o] sum_i bank[k, o, i] x[t, i]. The products [rows, tokens] stay in registers,
are weighed with the relevance there and summed over the rows; each program leaves one number per token, and these
are added in order. Layers of equal shape and layout share one launch through a table of addresses.

Configuration, by block of tokens (rows x columns of a bank tile, warps, stages): no timing decides it, so results
are the same bits in every process. All of them fit into the 99 KB of shared memory that a block may have on the
smallest GPUs served (compute capability 8.6, 8.9 and 12.0).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from protoken.kernels import common
from protoken.kernels.common import (
    TYPES,
    alike,
    device_rows,
    dot_mode,
    exact_dot,
    load_bank,
    on_its_device,
    sum_parts,
    token_block,
    why_not_float8,
)
from torch import Tensor

from protoken.ops.banks import DenseBank

ROWS_PER_PROGRAM = 256
CONFIGS = {16: (64, 128, 4, 4), 32: (64, 128, 4, 4), 64: (64, 64, 4, 4), 128: (64, 64, 4, 3)}
FP32_CONFIGS = {16: (64, 64, 4, 4), 32: (64, 64, 4, 3), 64: (64, 32, 4, 3), 128: (64, 32, 4, 3)}  # bank or tokens


@triton.jit
def _client_scores_kernel(
    table,
    parts,
    tokens,
    clients,
    rows,
    columns,
    x_t,
    x_i,
    g_t,
    g_o,
    w_o,
    w_i,
    programs,
    BANK: tl.constexpr,
    X: tl.constexpr,
    G: tl.constexpr,
    MODE: tl.constexpr,
    SCALED: tl.constexpr,
    FLOAT8: tl.constexpr,
    ALIGNED: tl.constexpr,
    X_ALIGNED: tl.constexpr,
    G_ALIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """parts[l, k, program, t]; table [L, 4]: addresses of x, grad, the clients' addresses, scale."""
    tiles = tl.cdiv(tokens, BT)
    pid = tl.program_id(0)
    tile, rest = pid % tiles, pid // tiles
    program, rest = rest % programs, rest // programs
    client, layer = (rest % clients).to(tl.int64), (rest // clients).to(tl.int64)
    x = tl.load(table + layer * 4).to(tl.pointer_type(X))
    grad = tl.load(table + layer * 4 + 1).to(tl.pointer_type(G))
    pointers = tl.load(table + layer * 4 + 2).to(tl.pointer_type(tl.int64))
    bank = tl.load(pointers + client).to(tl.pointer_type(BANK))
    # An address from a table has no known alignment, and what has none is loaded value by value.
    if ALIGNED:
        bank = tl.multiple_of(bank, 16)
    if X_ALIGNED:
        x = tl.multiple_of(x, 16)
    if G_ALIGNED:
        grad = tl.multiple_of(grad, 16)
    t = tile * BT + tl.arange(0, BT)
    t_in = t < tokens
    t64 = t.to(tl.int64)
    total = tl.zeros([BT], tl.float32)
    for first in range(program * SPAN, min((program + 1) * SPAN, rows), BO):
        o = first + tl.arange(0, BO)
        o_in = o < rows
        o64 = o.to(tl.int64)
        for piece in range(0, columns, DEPTH):
            acc = tl.zeros([BO, BT], tl.float32)
            for start in range(piece, min(piece + DEPTH, columns), BI):
                i = start + tl.arange(0, BI)
                i_in = i < columns
                i64 = i.to(tl.int64)
                w = load_bank(bank + o64[:, None] * w_o + i64[None, :] * w_i, o_in[:, None] & i_in[None, :], FLOAT8)
                v = tl.load(x + i64[:, None] * x_i + t64[None, :] * x_t, mask=i_in[:, None] & t_in[None, :], other=0)
                acc = exact_dot(w, v, acc, MODE)
            if SCALED:
                scale = tl.load(table + layer * 4 + 3).to(tl.pointer_type(tl.float32))
                acc = acc * tl.load(scale + client * rows + o64, mask=o_in, other=0)[:, None]
            g = tl.load(grad + o64[:, None] * g_o + t64[None, :] * g_t, mask=o_in[:, None] & t_in[None, :], other=0)
            total += tl.sum(acc * g.to(tl.float32), axis=0)
    at = ((layer * clients + client) * programs + program) * tokens + t64
    tl.store(parts + at, total, mask=t_in)


def why_not_client_scores(xs: list[Tensor], grads: list[Tensor], banks: list[DenseBank]) -> str | None:
    return why_not_float8({bank.dtype for bank in banks}, banks[0].device) if banks else None


@on_its_device
def launch_client_scores(out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[DenseBank]) -> None:
    """Two launches per kind of layer: the scores' parts, and their sum."""
    clients, tokens = out.shape[1:]
    for layers in alike([_kind(x, grad, bank) for x, grad, bank in zip(xs, grads, banks, strict=True)]):
        x, grad, bank = xs[layers[0]], grads[layers[0]], banks[layers[0]]
        programs = triton.cdiv(bank.rows, ROWS_PER_PROGRAM)
        parts = torch.empty(len(layers), clients, programs, tokens, dtype=torch.float32, device=out.device)
        block = token_block(tokens)
        rows, columns, warps, stages = (FP32_CONFIGS if torch.float32 in (bank.dtype, x.dtype) else CONFIGS)[block]
        table = device_rows([_addresses(xs[n], grads[n], banks[n]) for n in layers], out.device)
        _client_scores_kernel[(len(layers) * clients * programs * triton.cdiv(tokens, block),)](
            table,
            parts,
            tokens,
            clients,
            bank.rows,
            bank.columns,
            *x.stride(),
            *grad.stride(),
            bank.stride_o,
            bank.stride_i,
            programs,
            BANK=TYPES[bank.dtype],
            X=TYPES[x.dtype],
            G=TYPES[grad.dtype],
            MODE=dot_mode(bank.dtype, x.dtype),
            SCALED=bank.scale is not None,
            FLOAT8=bank.dtype == torch.float8_e4m3fn,
            ALIGNED=bank_aligned(bank),
            X_ALIGNED=x.data_ptr() % 16 == 0,
            G_ALIGNED=grad.data_ptr() % 16 == 0,
            SPAN=ROWS_PER_PROGRAM,
            BT=block,
            BO=rows,
            BI=columns,
            DEPTH=common.DEPTH,
            num_warps=warps,
            num_stages=stages,
        )
        summed = out[layers[0] : layers[0] + 1] if len(layers) == 1 else torch.empty_like(out[: len(layers)])
        sum_parts(summed.view(-1, tokens), parts.view(-1, programs, tokens))
        if len(layers) > 1:
            scatter(out, layers, summed)


def _kind(x: Tensor, grad: Tensor, bank: DenseBank) -> tuple[object, ...]:
    """Layers of one kind share a launch: same shapes, strides, dtypes and alignment."""
    stored = (bank.rows, bank.columns, bank.dtype, bank.stride_o, bank.stride_i, bank_aligned(bank))
    aligned = x.data_ptr() % 16 == 0, grad.data_ptr() % 16 == 0
    return (*stored, x.stride(), x.dtype, grad.stride(), grad.dtype, *aligned)


def scatter(out: Tensor, layers: list[int], values: Tensor) -> None:
    """out[layers] <- values; one copy when the layers stand in a row or evenly apart."""
    step = layers[1] - layers[0]
    if layers == list(range(layers[0], layers[-1] + 1, step)):
        out[layers[0] : layers[-1] + 1 : step].copy_(values)
    else:
        for place, value in zip(layers, values, strict=True):
            out[place].copy_(value)


def bank_aligned(bank: DenseBank) -> bool:
    """Whether all clients' addresses are multiples of 16; looked at once per bank."""
    if "aligned16" not in bank.cache:
        bank.cache["aligned16"] = not bool((bank.pointers % 16).any())
    return bool(bank.cache["aligned16"])


def _addresses(x: Tensor, grad: Tensor, bank: DenseBank) -> tuple[int, int, int, int]:
    """A layer's row of the kernel's table."""
    scale = 0 if bank.scale is None else bank.scale.data_ptr()
    return x.data_ptr(), grad.data_ptr(), bank.device_pointers().data_ptr(), scale
