"""What `protoken bench kernels` measures: shapes of real models, banks of numbers, and the ways torch offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protoken.ops import (
    DenseBank,
    LowRankBank,
    client_scores,
    client_scores_lowrank,
    client_scores_lowrank_reference,
    client_scores_reference,
    client_totals,
    client_totals_reference,
)

Call = Callable[[], Tensor]

# layer: (outputs O, inputs I) of the attention's out-projection and of the last MLP layer
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "SmolLM2-135M": {"o_proj": (576, 576), "down_proj": (576, 1536)},
    "Qwen2.5-0.5B": {"o_proj": (896, 896), "down_proj": (896, 4864)},
    "Llama-3.2-1B": {"o_proj": (2048, 2048), "down_proj": (2048, 8192)},
    "Llama-3.1-8B": {"o_proj": (4096, 4096), "down_proj": (4096, 14336)},
    "Gemma-3-27B": {"o_proj": (5376, 4096), "down_proj": (5376, 21504)},
}
DENSE_CLIENTS = (6, 55)
LOWRANK_CLIENTS = (1000, 10000)
TOKENS = (1, 16, 128, 512)
RANK = 8
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
LOWRANK_FORMATS = ("fp32", "bf16")


@dataclass(frozen=True)
class Case:
    """One row's work: ``tokens`` is None for client_totals."""

    op: str
    model: str
    layer: str
    rows: int
    columns: int
    clients: int
    tokens: int | None
    format: str

    @property
    def inputs(self) -> torch.dtype:
        """Of the tokens' vectors, for every way: bf16 beside a narrower bank, as a model in bf16 hands them over."""
        return torch.float32 if self.format == "fp32" else torch.bfloat16

    @property
    def bank_bytes(self) -> int:
        size = torch.empty(0, dtype=FORMATS[self.format]).element_size()
        if self.op == "client_scores_lowrank":
            return self.clients * RANK * (self.rows + self.columns) * size
        scales = 4 * self.clients * self.rows if size == 1 else 0
        return self.clients * self.rows * self.columns * size + scales

    @property
    def bytes(self) -> int:
        """What must move at least: the bank once, the inputs once, the result once."""
        if self.tokens is None:
            return self.bank_bytes + 4 * self.rows * self.columns + 4 * self.clients
        inputs = self.inputs.itemsize * self.tokens * (self.rows + self.columns)
        return self.bank_bytes + inputs + 4 * self.tokens * self.clients

    @property
    def flops(self) -> int:
        width = RANK * (self.rows + self.columns) if self.op == "client_scores_lowrank" else self.rows * self.columns
        return 2 * self.clients * width * (self.tokens or 1)


def cases(
    models: Sequence[str] | None, tokens: Sequence[int], formats: Sequence[str], clients: Sequence[int]
) -> Iterator[Case]:
    for model, layers in SHAPES.items():
        if models and model not in models:
            continue
        for layer, shape in layers.items():
            for count in (k for k in DENSE_CLIENTS if k in clients):
                for name in formats:
                    for t in tokens:
                        yield Case("client_scores", model, layer, *shape, count, t, name)
                    yield Case("client_totals", model, layer, *shape, count, None, name)
            for count in (k for k in LOWRANK_CLIENTS if k in clients):
                for name in (n for n in formats if n in LOWRANK_FORMATS):
                    for t in tokens:
                        yield Case("client_scores_lowrank", model, layer, *shape, count, t, name)


def _numbers(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Random numbers, the same few million over and over: drawing each would take longer than measuring."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(*shape, dtype=dtype, device=device)
    flat = out.view(-1)
    drawn = torch.randn(min(flat.numel(), (1 << 22) + 37), generator=generator)
    drawn = (drawn * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else drawn.to(dtype)
    drawn = drawn.to(device)
    for start in range(0, flat.numel(), drawn.numel()):
        piece = flat[start : start + drawn.numel()]
        piece.copy_(drawn[: piece.numel()])
    return out


@dataclass(frozen=True)
class Work:
    """A case with its numbers: ours by backend, torch's ways by name, and fp64 scores of the first clients."""

    ours: Callable[[str], Tensor]
    torch_ways: dict[str, Call]
    reference: Tensor


def prepare(case: Case, device: torch.device) -> Work:
    dtype = FORMATS[case.format]
    if case.op == "client_scores_lowrank":
        return _lowrank(case, dtype, device)
    bank = _numbers((case.clients, case.rows, case.columns), dtype, device, 3)
    quantised = case.format in ("int8", "fp8")
    scale = _numbers((case.clients, case.rows), torch.float32, device, 4).abs_() if quantised else None
    wrapped = DenseBank.of(bank, scale)
    first, first_scale = bank[:2].cpu(), None if scale is None else scale[:2].cpu()
    if case.tokens is None:
        m = _numbers((case.rows, case.columns), torch.float32, device, 8)
        reference = client_totals_reference(m.cpu(), first, scale=first_scale)
        return Work(lambda b: client_totals(m, wrapped, backend=b), _totals_ways(m, bank, scale), reference)
    x = _numbers((case.tokens, case.columns), case.inputs, device, 1)
    grad = _numbers((case.tokens, case.rows), case.inputs, device, 2)
    few = slice(0, min(case.tokens, 16))
    reference = client_scores_reference(x[few].cpu(), grad[few].cpu(), first, scale=first_scale)
    return Work(lambda b: client_scores(x, grad, wrapped, backend=b), _dense_ways(x, grad, bank, scale), reference)


def _dense_ways(x: Tensor, grad: Tensor, bank: Tensor, scale: Tensor | None) -> dict[str, Call]:
    """einsum, bmm then multiply-and-sum, and one matmul per client, each in the bank's own dtype where torch can
    multiply in it, and converted to fp32."""
    wide_x, wide_grad = x.float(), grad.float()

    def dense(part: Tensor, rows: slice | int) -> Tensor:
        return part.float() if scale is None else part.float() * scale[rows].unsqueeze(-1)

    def per_client(x: Tensor, grad: Tensor, converted: bool) -> Tensor:
        scores = []
        for k in range(bank.shape[0]):
            weights = dense(bank[k], k) if converted else bank[k]
            scores.append(((x @ weights.T) * grad).sum(1))
        return torch.stack(scores)

    if bank.dtype == torch.float32:
        return {
            "einsum": lambda: torch.einsum("to,koi,ti->kt", grad, bank, x),
            "bmm": lambda: (torch.matmul(x, bank.transpose(1, 2)) * grad).sum(-1),
            "matmul per client": lambda: per_client(x, grad, False),
        }
    ways: dict[str, Call] = {"converted, matmul per client": lambda: per_client(wide_x, wide_grad, True)}
    if scale is None:
        ways["einsum"] = lambda: torch.einsum("to,koi,ti->kt", grad, bank, x)
        ways["bmm"] = lambda: (torch.matmul(x, bank.transpose(1, 2)) * grad).sum(-1)
        ways["matmul per client"] = lambda: per_client(x, grad, False)
    return ways


def _totals_ways(m: Tensor, bank: Tensor, scale: Tensor | None) -> dict[str, Call]:
    flat = m.reshape(-1)

    def per_client() -> Tensor:
        if scale is None:
            return torch.stack([torch.dot(bank[k].float().reshape(-1), flat) for k in range(bank.shape[0])])
        return torch.stack([(bank[k].float() * m).sum(1).dot(scale[k]) for k in range(bank.shape[0])])

    ways: dict[str, Call] = {"dot per client": per_client}
    if bank.dtype == torch.float32:
        ways["einsum"] = lambda: torch.einsum("oi,koi->k", m, bank)
        ways["matrix times vector"] = lambda: torch.mv(bank.view(bank.shape[0], -1), flat)
    elif scale is None:
        # m is as large as a client and comes in fp32: torch's way pays for the cast that its product needs.
        ways["matrix times vector"] = lambda: torch.mv(bank.view(bank.shape[0], -1), flat.to(bank.dtype))
    return ways


def _lowrank(case: Case, dtype: torch.dtype, device: torch.device) -> Work:
    assert case.tokens is not None
    a = _numbers((case.clients, RANK, case.columns), dtype, device, 5)
    b = _numbers((case.clients, case.rows, RANK), dtype, device, 6)
    x = _numbers((case.tokens, case.columns), case.inputs, device, 1)
    grad = _numbers((case.tokens, case.rows), case.inputs, device, 2)
    wrapped = LowRankBank.of(a, b)

    def einsum() -> Tensor:
        return (torch.einsum("kri,ti->ktr", a, x) * torch.einsum("kor,to->ktr", b, grad)).sum(-1)

    def bmm() -> Tensor:
        return (torch.matmul(x, a.transpose(1, 2)) * torch.matmul(grad, b)).sum(-1)

    def flat() -> Tensor:
        left = (x @ a.view(-1, a.shape[2]).T).view(x.shape[0], -1, RANK)
        return (left.transpose(0, 1) * torch.matmul(grad, b)).sum(-1)

    def per_client() -> Tensor:
        return torch.stack([((x @ a[k].T) * (grad @ b[k])).sum(1) for k in range(a.shape[0])])

    few = slice(0, min(case.tokens, 16))
    reference = client_scores_lowrank_reference(x[few].cpu(), grad[few].cpu(), a[:2].cpu(), b[:2].cpu())
    ways: dict[str, Call] = {"einsum": einsum, "bmm": bmm, "one matmul for A, bmm": flat}
    if case.clients <= 1000:
        ways["matmul per client"] = per_client
    return Work(lambda name: client_scores_lowrank(x, grad, wrapped, backend=name), ways, reference)


def max_error(got: Any, reference: Tensor) -> float:
    """max |got - reference| / max |reference| over the clients and tokens of the reference."""
    part = got[tuple(slice(0, size) for size in reference.shape)].double().cpu()
    return float((part - reference).abs().max() / reference.abs().max())
