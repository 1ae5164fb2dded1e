"""client_totals in Triton: S[k] = <m, delta_k>, each program a block of rows of one client.

A program takes 8 rows of one client, 512 columns at a time, and leaves one number; these are added in order. Programs
are numbered client first: neighbours read the same rows of m one after another, so m comes from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from protoken.kernels.client_scores import bank_aligned, scatter
from protoken.kernels.common import TYPES, alike, device_rows, load_bank, on_its_device, sum_parts, why_not_float8
from torch import Tensor

from protoken.ops.banks import DenseBank

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 8, 512, 4


@triton.jit
def _client_totals_kernel(
    table,
    parts,
    clients,
    rows,
    columns,
    m_o,
    m_i,
    w_o,
    w_i,
    programs,
    BANK: tl.constexpr,
    M: tl.constexpr,
    SCALED: tl.constexpr,
    FLOAT8: tl.constexpr,
    ALIGNED: tl.constexpr,
    M_ALIGNED: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    """parts[l, k, program]; table [L, 3]: addresses of m, the clients' addresses, scale."""
    pid = tl.program_id(0)
    client, rest = (pid % clients).to(tl.int64), pid // clients
    program, layer = rest % programs, (rest // programs).to(tl.int64)
    m = tl.load(table + layer * 3).to(tl.pointer_type(M))
    pointers = tl.load(table + layer * 3 + 1).to(tl.pointer_type(tl.int64))
    bank = tl.load(pointers + client).to(tl.pointer_type(BANK))
    if ALIGNED:
        bank = tl.multiple_of(bank, 16)
    if M_ALIGNED:
        m = tl.multiple_of(m, 16)
    o = program * BO + tl.arange(0, BO)
    o_in = o < rows
    o64 = o.to(tl.int64)
    total = tl.zeros([BO], tl.float32)
    for start in range(0, columns, BI):
        i = start + tl.arange(0, BI)
        inside = o_in[:, None] & (i < columns)[None, :]
        i64 = i.to(tl.int64)
        w = load_bank(bank + o64[:, None] * w_o + i64[None, :] * w_i, inside, FLOAT8)
        v = tl.load(m + o64[:, None] * m_o + i64[None, :] * m_i, mask=inside, other=0)
        total += tl.sum(w.to(tl.float32) * v.to(tl.float32), axis=1)
    if SCALED:
        scale = tl.load(table + layer * 3 + 2).to(tl.pointer_type(tl.float32))
        total *= tl.load(scale + client * rows + o64, mask=o_in, other=0)
    tl.store(parts + (layer * clients + client) * programs + program, tl.sum(total, axis=0))


def why_not_client_totals(ms: list[Tensor], banks: list[DenseBank]) -> str | None:
    return why_not_float8({bank.dtype for bank in banks}, banks[0].device) if banks else None


@on_its_device
def launch_client_totals(out: Tensor, ms: list[Tensor], banks: list[DenseBank]) -> None:
    """Two launches per kind of layer: the totals' parts, and their sum."""
    clients = out.shape[1]
    keys = [_kind(m, bank) for m, bank in zip(ms, banks, strict=True)]
    for layers in alike(keys):
        m, bank = ms[layers[0]], banks[layers[0]]
        programs = triton.cdiv(bank.rows, BLOCK_ROWS)
        parts = torch.empty(len(layers), clients, programs, dtype=torch.float32, device=out.device)
        scales = [banks[n].scale for n in layers]
        table = device_rows(
            (
                (ms[n].data_ptr(), banks[n].device_pointers().data_ptr(), 0 if scale is None else scale.data_ptr())
                for n, scale in zip(layers, scales, strict=True)
            ),
            out.device,
        )
        _client_totals_kernel[(len(layers) * clients * programs,)](
            table,
            parts,
            clients,
            bank.rows,
            bank.columns,
            *m.stride(),
            bank.stride_o,
            bank.stride_i,
            programs,
            BANK=TYPES[bank.dtype],
            M=TYPES[m.dtype],
            SCALED=bank.scale is not None,
            FLOAT8=bank.dtype == torch.float8_e4m3fn,
            ALIGNED=bank_aligned(bank),
            M_ALIGNED=m.data_ptr() % 16 == 0,
            BO=BLOCK_ROWS,
            BI=BLOCK_COLUMNS,
            num_warps=WARPS,
        )
        summed = out[layers[0] : layers[0] + 1] if len(layers) == 1 else torch.empty_like(out[: len(layers)])
        sum_parts(summed.view(-1, 1), parts.view(-1, programs, 1))
        if len(layers) > 1:
            scatter(out, layers, summed)


def _kind(m: Tensor, bank: DenseBank) -> tuple[object, ...]:
    """Layers of one kind share a launch."""
    stored = (bank.rows, bank.columns, bank.dtype, bank.stride_o, bank.stride_i, bank_aligned(bank))
    return (*stored, m.stride(), m.dtype, m.data_ptr() % 16 == 0)
