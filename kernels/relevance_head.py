"""relevance_head in Triton: chunks of the vocabulary, three kernels per chunk, a running maximum between chunks.

For the log-probability: one kernel writes the chunk's logits [T, chunk], one brings maximum and
mass up to date, one rescales the running sum and adds the chunk's probabilities times the head's rows.
Only [T, CHUNK] is ever held of [T, V]. Norm and own rows are [T, d] work and stay with torch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from protoken.kernels.common import dot_mode, exact_dot, on_its_device, token_block
from torch import Tensor

from protoken.ops.relevance_head import Head, normalise, own_rows, pull_through_norm

CHUNK, BLOCK_V, BLOCK_D = 16384, 64, 64


@triton.jit
def _soft_capped(logits, cap):
    """(cap * tanh(z / cap), its slope 1 / cosh^2), both from exp(-2 |z / cap|) so that neither cancels."""
    inner = logits / cap
    fall = tl.exp(-2.0 * tl.abs(inner))
    size = (1.0 - fall) / (1.0 + fall)
    return cap * tl.where(inner < 0, -size, size), 4.0 * fall / ((1.0 + fall) * (1.0 + fall))


@triton.jit
def _base_of(top):
    """What exponents are taken relative to: the maximum, or 0 where nothing but masked rows has been seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _logits_kernel(
    normed,
    weight,
    bias,
    logits,
    tokens,
    width,
    start,
    count,
    w_v,
    w_d,
    b_v,
    scale,
    pitch,
    MODE: tl.constexpr,
    BIAS: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """logits[t, v - start] = scale * (W[v] . normed[t] + b[v]), before any soft-cap."""
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    v_in, t_in = v < count, t < tokens
    v64, t64 = v.to(tl.int64) + start, t.to(tl.int64)
    acc = tl.zeros([BV, BT], tl.float32)
    for first in range(0, width, BD):
        d = first + tl.arange(0, BD)
        d_in = d < width
        w = tl.load(
            weight + v64[:, None] * w_v + d.to(tl.int64)[None, :] * w_d, mask=v_in[:, None] & d_in[None, :], other=0
        )
        n = tl.load(normed + t64[None, :] * width + d[:, None], mask=t_in[None, :] & d_in[:, None], other=0)
        acc = exact_dot(w, n, acc, MODE)
    if BIAS:
        acc += tl.load(bias + v64 * b_v, mask=v_in, other=0).to(tl.float32)[:, None]
    acc *= scale
    tl.store(logits + t64[None, :] * pitch + v[:, None], acc, mask=v_in[:, None] & t_in[None, :])


@triton.jit
def _stats_kernel(logits, top, mass, shrink, count, pitch, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """The running maximum and mass of one token, and what earlier sums are multiplied by."""
    t = tl.program_id(0).to(tl.int64)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, count, BLOCK):
        v = first + tl.arange(0, BLOCK)
        z = tl.load(logits + t * pitch + v, mask=v < count, other=float("-inf"))
        if CAPPED:
            z = tl.where(v < count, _soft_capped(tl.where(v < count, z, 0.0), cap)[0], float("-inf"))
        highest = tl.maximum(highest, z)
    before = tl.load(top + t)
    now = tl.maximum(before, tl.max(highest, axis=0))
    base = _base_of(now)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        v = first + tl.arange(0, BLOCK)
        z = tl.load(logits + t * pitch + v, mask=v < count, other=float("-inf"))
        if CAPPED:
            z = tl.where(v < count, _soft_capped(tl.where(v < count, z, 0.0), cap)[0], float("-inf"))
        total += tl.exp(z - base)
    factor = tl.exp(before - base)
    tl.store(mass + t, tl.load(mass + t) * factor + tl.sum(total, axis=0))
    tl.store(top + t, now)
    tl.store(shrink + t, factor)


@triton.jit
def _mean_kernel(
    logits,
    weight,
    top,
    shrink,
    mean,
    tokens,
    width,
    start,
    count,
    w_v,
    w_d,
    cap,
    pitch,
    MODE: tl.constexpr,
    CAPPED: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """mean[t, d] = shrink[t] * mean[t, d] + sum_v exp(logits[t, v] - top[t]) * slope * W[v, d]."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    d_in, t_in = d < width, t < tokens
    d64, t64 = d.to(tl.int64), t.to(tl.int64)
    highest = _base_of(tl.load(top + t64, mask=t_in, other=0))
    acc = tl.zeros([BD, BT], tl.float32)
    for first in range(0, count, BV):
        v = first + tl.arange(0, BV)
        v_in = v < count
        inside = v_in[:, None] & t_in[None, :]
        z = tl.load(logits + t64[None, :] * pitch + v[:, None], mask=inside, other=0.0)
        slope = tl.full([BV, BT], 1.0, tl.float32)
        if CAPPED:
            z, slope = _soft_capped(z, cap)
        p = tl.where(inside, tl.exp(z - highest[None, :]) * slope, 0.0)
        w = tl.load(
            weight + (v.to(tl.int64) + start)[None, :] * w_v + d64[:, None] * w_d,
            mask=v_in[None, :] & d_in[:, None],
            other=0,
        )
        acc = exact_dot(w, p, acc, MODE)
    inside = d_in[:, None] & t_in[None, :]
    at = mean + t64[None, :] * width + d64[:, None]
    factor = tl.load(shrink + t64, mask=t_in, other=0)
    tl.store(at, tl.load(at, mask=inside, other=0) * factor[None, :] + acc, mask=inside)


def why_not_relevance_head(hidden: Tensor, targets: Tensor, head: Head) -> str | None:
    return "float64 heads are computed by torch" if head.weight.dtype == torch.float64 else None


@on_its_device
def launch_relevance_head(grad: Tensor, value: Tensor, hidden: Tensor, targets: Tensor, head: Head) -> None:
    normed, direction, inverse = normalise(hidden, head)
    upstream = own_rows(value, normed, targets, head)
    if head.objective == "log_prob":
        mean, log_mass = _expected_row(normed.contiguous(), head.weight.detach(), head)
        upstream -= mean * head.scale
        value.sub_(log_mass)
    pull_through_norm(grad, upstream, direction, inverse, head)


def _expected_row(normed: Tensor, weight: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(sum_v softmax(z)[v] slope[v] W[v] [T, d], log sum_v exp z[v] [T])."""
    tokens, width = normed.shape
    vocabulary = weight.shape[0]
    chunk = min(CHUNK, vocabulary)
    logits = normed.new_empty(tokens, chunk)
    top, mass = normed.new_full((tokens,), -math.inf), normed.new_zeros(tokens)
    shrink, mean = normed.new_zeros(tokens), torch.zeros_like(normed)
    bias = head.bias.detach() if head.bias is not None else weight
    capped, cap = head.softcap is not None, head.softcap or 1.0
    block = min(64, token_block(tokens))
    mode, tiles = dot_mode(weight.dtype, torch.float32), triton.cdiv(tokens, block)
    for start in range(0, vocabulary, chunk):
        count = min(chunk, vocabulary - start)
        _logits_kernel[(triton.cdiv(count, BLOCK_V), tiles)](
            normed,
            weight,
            bias,
            logits,
            tokens,
            width,
            start,
            count,
            *weight.stride(),
            bias.stride(0),
            float(head.scale),
            chunk,
            MODE=mode,
            BIAS=head.bias is not None,
            BT=block,
            BV=BLOCK_V,
            BD=BLOCK_D,
            num_warps=4,
        )
        _stats_kernel[(tokens,)](
            logits, top, mass, shrink, count, chunk, float(cap), CAPPED=capped, BLOCK=1024, num_warps=4
        )
        _mean_kernel[(triton.cdiv(width, BLOCK_D), tiles)](
            logits,
            weight,
            top,
            shrink,
            mean,
            tokens,
            width,
            start,
            count,
            *weight.stride(),
            float(cap),
            chunk,
            MODE=mode,
            CAPPED=capped,
            BT=block,
            BV=BLOCK_V,
            BD=BLOCK_D,
            num_warps=4,
        )
    return mean / mass[:, None], top + mass.log()
