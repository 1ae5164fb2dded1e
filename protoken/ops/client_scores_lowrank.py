"""s[k, t] = scale[k] < B_k^T grad[t], A_k x[t] >: scores of low-rank updates delta_k = scale[k] B_k A_k.

The product is scored, never A and B apart: (c A, B / c) is the same update and gets the same score.
Formula: arXiv 2601.19672 with delta_k for the client's weights; adapters as in LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protoken.dispatch import launcher, shortcut
from protoken.ops.banks import LowRankBank
from protoken.ops.checks import check_inputs, check_layers, check_same_clients, check_size, check_tensor, narrow, spread
from protoken.ops.library import flatten_lowrank

Factors = Tensor | Sequence[Tensor]
SCRATCH_BYTES = 4 << 20


def client_scores_lowrank_reference(
    x: Tensor,
    grad: Tensor,
    a: Factors,
    b: Factors,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """s[k, t] = scale[k] sum_r (sum_o grad[t, o] b[k, o, r]) (sum_i a[k, r, i] x[t, i]); [K, T] in ``dtype``."""
    x, grad = x.to(dtype), grad.to(dtype)
    rows = [((grad @ right.to(dtype)) * (x @ left.to(dtype).T)).sum(-1) for left, right in zip(a, b, strict=True)]
    scores = torch.stack(rows) if rows else x.new_zeros(0, x.shape[0])
    return scores if scale is None else scores * scale.to(dtype)[:, None]


def client_scores_lowrank(
    x: Tensor,
    grad: Tensor,
    a: LowRankBank | Factors,
    b: Factors | None = None,
    scale: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Scores of all clients' low-rank updates for all tokens at one layer.

    x [T, I] layer inputs, grad [T, O] relevance; fp32, bf16, fp16 or fp64, any strides.
    a [K, r, I] and b [K, O, r], or sequences of K matrices [r_k, I] and [O, r_k] with ranks of their own, or
    a `LowRankBank` as ``a``; fp32, bf16 or fp16, any strides. scale [K] (alpha / r in LoRA); None is 1.
    Returns fp32 [K, T], accumulated in fp32; the same bits on every run, for every order of clients and
    number of threads.

    Errors: `ShapeError`, `DtypeError`, `DeviceError`, `ArgumentError`, `BackendError`.
    """
    if torch.compiler.is_compiling():
        if not isinstance(a, LowRankBank):
            return client_scores_lowrank_grouped([x], [grad], [(a, b, scale)], backend=backend)[0]  # type: ignore[list-item]
    elif backend == "auto" and b is None and scale is None and type(a) is LowRankBank:
        serve = shortcut("client_scores_lowrank")
        if serve is not None and (scores := serve(x, grad, a)) is not None:
            return scores
    shape = _last(grad), _last(x)
    return client_scores_lowrank_grouped([x], [grad], [LowRankBank.of(a, b, scale, shape=shape)], backend=backend)[0]


def _last(value: object) -> int:
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() else 0


def client_scores_lowrank_grouped(
    xs: Sequence[Tensor],
    grads: Sequence[Tensor],
    banks: Sequence[LowRankBank | tuple[Factors, Factors, Tensor | None]],
    *,
    backend: str = "auto",
) -> Tensor:
    """`client_scores_lowrank` of L layers in one call: fp32 [L, K, T]. ``banks``: per layer (a, b, scale) or
    a `LowRankBank`. Layers share T and K; O, I and ranks may differ."""
    if torch.compiler.is_compiling():
        a, b, counts, scales = flatten_lowrank(banks)
        return torch.ops.protoken.client_scores_lowrank(xs, grads, a, b, counts, scales, backend)  # type: ignore[no-any-return]
    check_layers(xs=xs, grads=grads, banks=banks)
    wrapped = [bank if isinstance(bank, LowRankBank) else LowRankBank.of(*bank) for bank in banks]
    for layer, bank in enumerate(wrapped):
        check_same_clients(layer, bank.clients, wrapped[0].clients)
        check_tensor(f"x[{layer}]", xs[layer])
    clients = wrapped[0].clients if wrapped else 0
    tokens = xs[0].shape[0] if xs and xs[0].dim() else 0
    device = wrapped[0].device if wrapped else torch.device("cpu")
    check_inputs(xs, grads, [(bank.rows, bank.columns) for bank in wrapped], device)
    check_size("scores", len(wrapped), clients, tokens, 4)
    full = [
        layer
        for layer, bank in enumerate(wrapped)
        if clients and tokens and bank.rows and bank.columns and bank.max_rank
    ]
    if not full:
        return torch.zeros(len(wrapped), clients, tokens, dtype=torch.float32, device=device)
    kept = [wrapped[layer] for layer in full]
    operands = [narrow(xs[layer]) for layer in full], [narrow(grads[layer]) for layer in full], kept
    launch = launcher("client_scores_lowrank", backend, device, *operands)
    out = torch.empty(len(full), clients, tokens, dtype=torch.float32, device=device)
    launch(out, *operands)
    return out if len(full) == len(wrapped) else spread(out, full, len(wrapped))


def launch_client_scores_lowrank(out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[LowRankBank]) -> None:
    """The torch backend: two batched matmuls per chunk of clients, or two per client when ranks differ."""
    for layer, bank in enumerate(banks):
        x, grad = xs[layer].float(), grads[layer].float()
        if bank.a is None or bank.b is None:
            for client in range(bank.clients):
                a, b = bank.pair(client)
                out[layer, client] = ((grad @ b.float()) * (x @ a.float().T)).sum(-1)
        else:
            per_client = 4 * bank.max_rank * (2 * x.shape[0] + bank.rows + bank.columns)
            step = max(1, SCRATCH_BYTES // per_client)
            for start in range(0, bank.clients, step):
                stop = min(start + step, bank.clients)
                left = torch.matmul(x, bank.a[start:stop].float().transpose(1, 2))  # [k, T, r]
                right = torch.matmul(grad, bank.b[start:stop].float())  # [k, T, r]
                out[layer, start:stop] = left.mul_(right).sum(-1)
        out[layer] *= bank.scale[:, None]
