"""client_scores_lowrank in Triton: a program takes the clients whose ranks fill 64 rows, and a block of tokens.

s[k, t] = scale[k] sum_r <A_k[r], x_t> <B_k[:, r], g_t>. Both inner products [rows, tokens] are taken 64 columns at a
time and stay in registers; their product is summed over each client's rows. Clients of a layer are grouped by rank and
strides, one launch per group: within one, row (client, r) of a factor is found by arithmetic alone. A program has at
most 16 clients, since it goes through them one by one to add up their rows; a rank above 64 has a wider tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from protoken.kernels import common
from protoken.kernels.common import TYPES, dot_mode, exact_dot, on_its_device, token_block
from torch import Tensor

from protoken.ops.banks import LowRankBank, read_here

ROWS, MOST_CLIENTS, COLUMNS = 64, 16, 64


@triton.jit
def _inner_products(
    base_table,
    address_column,
    numbers,
    first,
    clients,
    stride_r,
    stride_c,
    values,
    v_t,
    v_c,
    length,
    t,
    t_in,
    rank,
    BANK: tl.constexpr,
    X: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLIENTS: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[BR, BT]: row (client, r) of a factor times the tokens' vectors, summed over its other dimension."""
    row = tl.arange(0, BR)
    member = first + row // rank
    row_in = (row < CLIENTS * rank) & (member < clients)
    number = tl.load(numbers + member, mask=row_in, other=0)
    bases = tl.load(base_table + number * 7 + address_column, mask=row_in, other=0).to(tl.pointer_type(BANK))
    if ALIGNED:  # addresses from a table have no known alignment, and what has none is loaded value by value
        bases = tl.multiple_of(bases, 16)
    rows = bases + (row % rank).to(tl.int64) * stride_r
    total = tl.zeros([BR, BT], tl.float32)
    for piece in range(0, length, DEPTH):
        acc = tl.zeros([BR, BT], tl.float32)
        for start in range(piece, min(piece + DEPTH, length), BC):
            c = start + tl.arange(0, BC)
            c_in = c < length
            c64 = c.to(tl.int64)
            w = tl.load(rows[:, None] + c64[None, :] * stride_c, mask=row_in[:, None] & c_in[None, :], other=0)
            v = tl.load(
                values + c64[:, None] * v_c + t.to(tl.int64)[None, :] * v_t, mask=c_in[:, None] & t_in[None, :], other=0
            )
            acc = exact_dot(w, v, acc, MODE)
        total += acc
    return total


@triton.jit
def _client_scores_lowrank_kernel(
    table,
    numbers,
    scale,
    x,
    grad,
    out,
    tokens,
    clients,
    rows,
    columns,
    x_t,
    x_i,
    g_t,
    g_o,
    a_r,
    a_i,
    b_o,
    b_r,
    rank,
    BANK: tl.constexpr,
    X: tl.constexpr,
    G: tl.constexpr,
    MODE_X: tl.constexpr,
    MODE_G: tl.constexpr,
    A_ALIGNED: tl.constexpr,
    B_ALIGNED: tl.constexpr,
    CLIENTS: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BT)
    first = (tl.program_id(0) // tiles).to(tl.int64) * CLIENTS
    t = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    t_in = t < tokens
    # Columns 0 and 3 of the table are the addresses of A and B.
    left = _inner_products(
        table, 0, numbers, first, clients, a_r, a_i, x, x_t, x_i, columns,
        t, t_in, rank, BANK, X, MODE_X, A_ALIGNED, CLIENTS, BR, BT, BC, DEPTH,
    )  # fmt: skip
    right = _inner_products(
        table, 3, numbers, first, clients, b_r, b_o, grad, g_t, g_o, rows,
        t, t_in, rank, BANK, G, MODE_G, B_ALIGNED, CLIENTS, BR, BT, BC, DEPTH,
    )  # fmt: skip
    product = left * right
    slot = tl.arange(0, BR) // rank
    for client in tl.static_range(CLIENTS):
        number = tl.load(numbers + tl.minimum(first + client, clients - 1))
        score = tl.sum(tl.where((slot == client)[:, None], product, 0.0), axis=0) * tl.load(scale + number)
        tl.store(out + number * tokens + t, score, mask=t_in & (first + client + t * 0 < clients))


@on_its_device
def launch_client_scores_lowrank(out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[LowRankBank]) -> None:
    """One launch per layer and kind of client."""
    tokens = out.shape[2]
    block = min(64, token_block(tokens))
    for layer, bank in enumerate(banks):
        if "triton_groups" not in bank.cache:
            bank.cache["triton_groups"] = _groups(bank)
        if bool(bank.cache["triton_groups"][1]):
            out[layer].zero_()  # rank 0 scores 0
        x, grad = xs[layer], grads[layer]
        for (a_r, a_i, b_o, b_r, rank), (a_aligned, b_aligned), numbers in bank.cache["triton_groups"][0]:
            rows = max(ROWS, triton.next_power_of_2(rank))
            together = min(MOST_CLIENTS, rows // rank)
            grid = (triton.cdiv(len(numbers), together) * triton.cdiv(tokens, block),)
            _client_scores_lowrank_kernel[grid](
                bank.device_table(),
                read_here(numbers),
                bank.scale,
                x,
                grad,
                out[layer],
                tokens,
                len(numbers),
                bank.rows,
                bank.columns,
                *x.stride(),
                *grad.stride(),
                a_r,
                a_i,
                b_o,
                b_r,
                rank,
                BANK=TYPES[bank.dtype],
                X=TYPES[x.dtype],
                G=TYPES[grad.dtype],
                MODE_X=dot_mode(bank.dtype, x.dtype),
                MODE_G=dot_mode(bank.dtype, grad.dtype),
                A_ALIGNED=a_aligned,
                B_ALIGNED=b_aligned,
                CLIENTS=together,
                BR=rows,
                BT=block,
                BC=COLUMNS,
                DEPTH=common.DEPTH,
                num_warps=4,
                num_stages=3,
            )


def _groups(bank: LowRankBank) -> tuple[list[tuple[list[int], list[bool], Tensor]], bool]:
    """Per kind of client (strides of A and B, rank) whether all addresses of A and of B are multiples of 16, and the
    clients' numbers; and whether any has rank 0."""
    kinds, kind_of = torch.unique(bank.table[:, [1, 2, 4, 5, 6]], dim=0, return_inverse=True)
    groups = []
    for index, kind in enumerate(kinds.tolist()):
        numbers = torch.nonzero(kind_of == index).flatten()
        if kind[4]:
            aligned = (bank.table[numbers][:, [0, 3]] % 16 == 0).all(0).tolist()
            groups.append((kind, aligned, numbers.to(bank.device)))
    return groups, len(groups) < len(kinds)
