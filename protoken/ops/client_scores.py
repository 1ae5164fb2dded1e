"""s[k, t] = < grad[t], delta_k x[t] >: what client k's update of one layer adds to the objective of token t.

Formula: arXiv 2601.19672, with the client's weights replaced by its update delta_k. First order, in the unit
of the objective (nats for a log-probability).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protoken.dispatch import launcher, shortcut
from protoken.ops.banks import DenseBank
from protoken.ops.checks import check_inputs, check_layers, check_same_clients, check_size, check_tensor, narrow, spread
from protoken.ops.library import flatten

Bank = DenseBank | Tensor | Sequence[Tensor]
# Clients whose products the torch way holds at once: what it writes stays within a core's share of the cache.
SCRATCH_BYTES = 4 << 20


def client_scores_reference(
    x: Tensor, grad: Tensor, bank: Tensor, *, scale: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """s[k, t] = sum_o grad[t, o] scale[k, o] sum_i bank[k, o, i] x[t, i]; [K, T] in ``dtype``."""
    delta = bank.to(dtype) if scale is None else bank.to(dtype) * scale.to(dtype)[:, :, None]
    return torch.einsum("to,koi,ti->kt", grad.to(dtype), delta, x.to(dtype))


def client_scores(x: Tensor, grad: Tensor, bank: Bank, *, scale: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Scores of all clients for all tokens at one layer.

    x [T, I] layer inputs, grad [T, O] relevance at the layer's output; fp32, bf16, fp16 or fp64, any strides.
    bank [K, O, I], or K tensors [O, I], or a `DenseBank`; fp32, bf16, fp16, or int8 / float8_e4m3fn with
    scale [K, O]; any strides (a transposed view of (in, out) weights is read as it lies).
    Returns fp32 [K, T], accumulated in fp32; the same bits on every run, for every order of clients and
    number of threads. NaN and infinity pass through.

    Errors: `ShapeError`, `DtypeError`, `DeviceError`, `ArgumentError`, `BackendError` (see `protoken.dispatch`).
    """
    if backend == "auto" and scale is None and not torch.compiler.is_compiling() and type(bank) is DenseBank:
        serve = shortcut("client_scores")
        if serve is not None and (scores := serve(x, grad, bank)) is not None:
            return scores
    return client_scores_grouped([x], [grad], [bank], scales=[scale], backend=backend)[0]


def client_scores_grouped(
    xs: Sequence[Tensor],
    grads: Sequence[Tensor],
    banks: Sequence[Bank],
    *,
    scales: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """`client_scores` of L layers in one call: fp32 [L, K, T]. Layers share T and K; O and I may differ."""
    if torch.compiler.is_compiling():
        tensors, counts, kept = flatten(banks, scales)
        return torch.ops.protoken.client_scores(xs, grads, tensors, counts, kept, backend)  # type: ignore[no-any-return]
    wrapped = wrap_banks(xs, grads, banks, scales)
    clients = wrapped[0].clients if wrapped else 0
    device = wrapped[0].device if wrapped else torch.device("cpu")
    check_inputs(xs, grads, [(bank.rows, bank.columns) for bank in wrapped], device)
    tokens = xs[0].shape[0] if xs else 0
    check_size("scores", len(wrapped), clients, tokens, 4)
    full = [layer for layer, bank in enumerate(wrapped) if clients and tokens and bank.rows and bank.columns]
    if not full:
        return torch.zeros(len(wrapped), clients, tokens, dtype=torch.float32, device=device)
    kept = [wrapped[layer] for layer in full]
    operands = [narrow(xs[layer]) for layer in full], [narrow(grads[layer]) for layer in full], kept
    launch = launcher("client_scores", backend, device, *operands)
    out = torch.empty(len(full), clients, tokens, dtype=torch.float32, device=device)
    launch(out, *operands)
    return out if len(full) == len(wrapped) else spread(out, full, len(wrapped))


def wrap_banks(
    xs: Sequence[Tensor],
    grads: Sequence[Tensor],
    banks: Sequence[Bank],
    scales: Sequence[Tensor | None] | None,
) -> list[DenseBank]:
    """The layers' banks, checked, with one number of clients."""
    check_layers(scales, xs=xs, grads=grads, banks=banks)
    wrapped: list[DenseBank] = []
    for layer, bank in enumerate(banks):
        scale = scales[layer] if scales else None
        if isinstance(bank, DenseBank):
            wrapped.append(DenseBank.of(bank, scale))
        else:
            check_tensor(f"x[{layer}]", xs[layer])
            check_tensor(f"grad[{layer}]", grads[layer])
            shape = (
                grads[layer].shape[-1] if grads[layer].dim() else 0,
                xs[layer].shape[-1] if xs[layer].dim() else 0,
            )
            wrapped.append(DenseBank.of(bank, scale, shape=shape))
        check_same_clients(layer, wrapped[-1].clients, wrapped[0].clients)
    return wrapped


def launch_client_scores(out: Tensor, xs: list[Tensor], grads: list[Tensor], banks: list[DenseBank]) -> None:
    """The torch backend: a batch of clients per matmul, sized so that [clients, T, O] stays small."""
    for layer, bank in enumerate(banks):
        x, grad = xs[layer].float(), grads[layer].float()
        # What a step holds: [k, T, O] products, and [k, O, I] converted weights when the bank is no fp32
        # tensor.
        per_client = 4 * x.shape[0] * bank.rows
        if bank.tensor is None or bank.dtype != torch.float32:
            per_client += 4 * bank.rows * bank.columns
        step = max(1, SCRATCH_BYTES // per_client)
        for start in range(0, bank.clients, step):
            stop = min(start + step, bank.clients)
            products = torch.matmul(x, bank.span(start, stop).transpose(1, 2))  # [k, T, O]
            out[layer, start:stop] = products.mul_(grad).sum(-1)
