"""S[k] = < m, delta_k >: a client's score of a whole sequence at one layer, from the gradient of its weights.

With m = sum_t grad[t] x[t]^T, S[k] = sum_t s[k, t] of `client_scores`. One pass over each client's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protoken.dispatch import launcher, shortcut
from protoken.ops.banks import DenseBank
from protoken.ops.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_layers,
    check_matrix,
    check_same_clients,
    check_size,
    check_tensor,
    is_plain,
    narrow,
    spread,
)
from protoken.ops.library import flatten

Bank = DenseBank | Tensor | Sequence[Tensor]
SCRATCH_BYTES = 4 << 20


def client_totals_reference(
    m: Tensor, bank: Tensor, *, scale: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """S[k] = sum_{o,i} m[o, i] scale[k, o] bank[k, o, i]; [K] in ``dtype``."""
    delta = bank.to(dtype) if scale is None else bank.to(dtype) * scale.to(dtype)[:, :, None]
    return torch.einsum("oi,koi->k", m.to(dtype), delta)


def client_totals(m: Tensor, bank: Bank, *, scale: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Totals of all clients at one layer.

    m [O, I] gradient of the objective with respect to the layer's weight; fp32, bf16, fp16 or fp64, any
    strides. bank and scale as in `client_scores`. Returns fp32 [K], accumulated in fp32 or better; the same
    bits on every run, for every order of clients and number of threads.

    Errors: `ShapeError`, `DtypeError`, `DeviceError`, `ArgumentError`, `BackendError`.
    """
    if backend == "auto" and scale is None and not torch.compiler.is_compiling() and type(bank) is DenseBank:
        serve = shortcut("client_totals")
        if serve is not None and (totals := serve(m, bank)) is not None:
            return totals
    return client_totals_grouped([m], [bank], scales=[scale], backend=backend)[0]


def client_totals_grouped(
    ms: Sequence[Tensor],
    banks: Sequence[Bank],
    *,
    scales: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """`client_totals` of L layers in one call: fp32 [L, K]. Layers share K; O and I may differ."""
    if torch.compiler.is_compiling():
        tensors, counts, kept = flatten(banks, scales)
        return torch.ops.protoken.client_totals(ms, tensors, counts, kept, backend)  # type: ignore[no-any-return]
    check_layers(scales, ms=ms, banks=banks)
    wrapped = [_wrap(layer, ms[layer], bank, scales[layer] if scales else None) for layer, bank in enumerate(banks)]
    clients = wrapped[0].clients if wrapped else 0
    device = wrapped[0].device if wrapped else torch.device("cpu")
    for layer, bank in enumerate(wrapped):
        check_same_clients(layer, bank.clients, clients)
    check_size("totals", len(wrapped), clients, 4)
    full = [layer for layer, bank in enumerate(wrapped) if clients and bank.rows and bank.columns]
    if not full:
        return torch.zeros(len(wrapped), clients, dtype=torch.float32, device=device)
    kept_ms, kept_banks = [narrow(ms[layer]) for layer in full], [wrapped[layer] for layer in full]
    launch = launcher("client_totals", backend, device, kept_ms, kept_banks)
    out = torch.empty(len(full), clients, dtype=torch.float32, device=device)
    launch(out, kept_ms, kept_banks)
    return out if len(full) == len(wrapped) else spread(out, full, len(wrapped))


def _wrap(layer: int, m: Tensor, bank: Bank, scale: Tensor | None) -> DenseBank:
    if isinstance(bank, DenseBank) and scale is None and is_plain(m, bank.rows, bank.columns, bank.device):
        return bank
    check_tensor(f"m[{layer}]", m)
    shape = (m.shape[0], m.shape[1]) if m.dim() == 2 else (0, 0)
    wrapped = DenseBank.of(bank, scale, shape=shape)
    expected = f"[{wrapped.rows}, {wrapped.columns}] to match the bank"
    check_matrix(f"m[{layer}]", m, expected, wrapped.rows, wrapped.columns)
    check_dtype(f"m[{layer}]", m.dtype, FLOATS)
    check_device(f"m[{layer}]", m.device, wrapped.device, "the bank")
    return wrapped


def launch_client_totals(out: Tensor, ms: list[Tensor], banks: list[DenseBank]) -> None:
    """The torch backend: one matrix-vector product per chunk of clients."""
    for layer, bank in enumerate(banks):
        m = ms[layer].float()
        copies = bank.tensor is None or bank.dtype != torch.float32 or not bank.tensor.is_contiguous()
        step = max(1, SCRATCH_BYTES // (4 * bank.rows * bank.columns)) if copies else bank.clients
        for start in range(0, bank.clients, step):
            stop = min(start + step, bank.clients)
            flat = bank.span(start, stop).reshape(stop - start, -1)
            out[layer, start:stop] = torch.mv(flat, m.reshape(-1))
