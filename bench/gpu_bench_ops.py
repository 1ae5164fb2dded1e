"""The rows of bench/gpu.py's bench step, one function per op: operands at a model's shapes, ours and torch's ways."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from gpu_bench import Ways, Work, our_ways
from gpu_device import DEVICE, DRY_RUN, DTYPES, bank_of, normal
from torch import Tensor

from protoken.ops import (
    DenseBank,
    Head,
    LowRankBank,
    capture_append,
    capture_append_reference,
    client_scores_grouped,
    client_scores_lowrank_grouped,
    client_scores_lowrank_reference,
    client_scores_reference,
    client_totals_grouped,
    client_totals_reference,
    relevance_head,
    relevance_head_reference,
)

# (hidden, inputs of o_proj, inputs of down_proj, vocabulary)
MODELS = {
    "SmolLM2-135M": (576, 576, 1536, 49152),
    "Qwen2.5-0.5B": (896, 896, 4864, 151936),
    "Llama-3.2-1B": (2048, 2048, 8192, 128256),
    "Llama-3.1-8B": (4096, 4096, 14336, 128256),
    "Gemma-3-27B": (5376, 4096, 21504, 262208),
}
SMALL = {name: tuple(max(size // 256, 4) for size in sizes) for name, sizes in MODELS.items()}
SIZES = SMALL if DRY_RUN else MODELS
FEW_CLIENTS = DRY_RUN or os.environ.get("PROTOKEN_GPU_FEW_CLIENTS") == "1"
# By whom the ops of a model's own tensors are served; a dry run has no cuda.
SERVED_BY = ("triton", "torch", "auto") if DRY_RUN else ("cuda", "triton", "torch", "auto")
GRAPHED_BYTES = 1 << 29  # below, launches weigh enough to be looked at without them


def _number(clients: int) -> int:
    """Of few clients so many that Triton compiles the same kernels: it tells numbers that 16 divides from others."""
    return clients if not FEW_CLIENTS else 16 if clients % 16 == 0 else 3


def _shapes(model: str) -> list[tuple[int, int]]:
    hidden, attention, mlp, _ = SIZES[model]
    return [(hidden, attention), (hidden, mlp)]


def _bytes(*values: Tensor | None) -> int:
    return sum(value.numel() * value.element_size() for value in values if value is not None)


def _ends(clients: int) -> list[int]:
    """The clients whose results are compared: the last one lies beyond 2^31 elements where the bank does."""
    return sorted({0, clients // 2, clients - 1})


def _some(bank: Tensor, clients: list[int]) -> Tensor:
    """bank[clients] of any dtype: by copies, which torch has for float8, too."""
    return torch.stack([bank[client].view(torch.uint8) for client in clients]).view(bank.dtype)


def dense(model: str, name: str, clients: int, tokens: int, blocks: int) -> Work:
    """client_scores of o_proj and down_proj, ``blocks`` times in one grouped call."""
    shapes = _shapes(model) * (min(blocks, 2) if DRY_RUN else blocks)
    clients = _number(clients)
    held = [bank_of(name, clients, *shape) for shape in shapes]
    exact = torch.bfloat16 if name in ("int8", "fp8") else DTYPES[name]
    xs = [normal(tokens, columns, seed=n, dtype=exact) for n, (_, columns) in enumerate(shapes)]
    grads = [normal(tokens, rows, seed=50 + n, dtype=exact) for n, (rows, _) in enumerate(shapes)]
    banks = [DenseBank.of(bank, scale) for bank, scale in held]
    ends = _ends(clients)
    parts = [(_some(bank, ends), None if scale is None else scale[ends]) for bank, scale in held[:2]]
    moved = sum(_bytes(*pair) for pair in held) + _bytes(*xs, *grads) + 4 * len(shapes) * clients * tokens
    shape = (len(shapes), clients, tokens)
    return Work(
        {
            "op": "client_scores",
            "format": name,
            "T": tokens,
            "K": clients,
            "shape": f"{model} x{blocks}" if blocks > 1 else model,
        },
        moved,
        our_ways("client_scores", (xs, grads, banks), shape, lambda: client_scores_grouped(xs, grads, banks)),
        _widened(xs, grads, held, exact) if name in ("int8", "fp8") else _dense_torch(xs, grads, [b for b, _ in held]),
        lambda got: [got[layer][ends].float() for layer in range(2)],
        [client_scores_reference(x, g, b, scale=s) for x, g, (b, s) in zip(xs, grads, parts, strict=False)],
        graphs=moved < GRAPHED_BYTES,
    )


def _dense_torch(xs: list[Tensor], grads: list[Tensor], banks: list[Tensor]) -> Ways:
    """The ways torch offers, in the bank's dtype."""

    def each(one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [one(x, g, w) for x, g, w in zip(xs, grads, banks, strict=True)]

    return {
        "torch.einsum": each(lambda x, g, w: torch.einsum("to,koi,ti->kt", g, w, x)),
        "torch.bmm": each(lambda x, g, w: (torch.matmul(x, w.transpose(1, 2)) * g).sum(-1)),
        "torch.loop": each(lambda x, g, w: torch.stack([((x @ one.T) * g).sum(-1) for one in w])),
    }


def _widened(
    xs: list[Tensor], grads: list[Tensor], held: list[tuple[Tensor, Tensor | None]], exact: torch.dtype
) -> Ways:
    """torch multiplies no int8 or float8 banks with row scales: it widens them first."""

    def widen() -> list[Tensor]:
        scores = []
        for x, g, (bank, scale) in zip(xs, grads, held, strict=True):
            assert scale is not None
            scores.append((torch.matmul(x, (bank.to(exact) * scale.to(exact)[:, :, None]).transpose(1, 2)) * g).sum(-1))
        return scores

    return {"torch.widen+bmm": widen}


def lowrank(model: str, clients: int, rank: int, tokens: int) -> Work:
    """client_scores_lowrank of o_proj and down_proj, bf16."""
    shapes, clients = _shapes(model), _number(clients)
    factors = [
        (
            normal(clients, rank, i, seed=n, dtype=torch.bfloat16),
            normal(clients, o, rank, seed=9 + n, dtype=torch.bfloat16),
        )
        for n, (o, i) in enumerate(shapes)
    ]
    xs = [normal(tokens, i, seed=20 + n, dtype=torch.bfloat16) for n, (_, i) in enumerate(shapes)]
    grads = [normal(tokens, o, seed=30 + n, dtype=torch.bfloat16) for n, (o, _) in enumerate(shapes)]
    banks = [LowRankBank.of(a, b, torch.ones(clients, device=DEVICE)) for a, b in factors]
    moved = sum(_bytes(*pair) for pair in factors) + 4 * 2 * clients * tokens

    def bmm() -> list[Tensor]:
        return [
            (torch.matmul(x, a.transpose(1, 2)) * torch.matmul(g, b)).sum(-1)
            for x, g, (a, b) in zip(xs, grads, factors, strict=True)
        ]

    ends = _ends(clients)
    public = lambda: client_scores_lowrank_grouped(xs, grads, banks)  # noqa: E731
    return Work(
        {"op": "client_scores_lowrank", "format": "bf16", "shape": model, "rank": rank, "T": tokens, "K": clients},
        moved,
        our_ways("client_scores_lowrank", (xs, grads, banks), (2, clients, tokens), public),
        {"torch.bmm": bmm},
        lambda got: [got[layer][ends].float() for layer in range(2)],
        [
            client_scores_lowrank_reference(x, g, a[ends], b[ends])
            for x, g, (a, b) in zip(xs, grads, factors, strict=True)
        ],
        graphs=moved < GRAPHED_BYTES,
    )


def totals(model: str, name: str, clients: int) -> Work:
    """client_totals of o_proj and down_proj."""
    shapes, clients = _shapes(model), _number(clients)
    held = [bank_of(name, clients, *shape) for shape in shapes]
    ms = [normal(*shape, seed=n) for n, shape in enumerate(shapes)]
    banks = [DenseBank.of(bank, scale) for bank, scale in held]
    low = [m.to(torch.bfloat16).flatten() for m in ms]
    theirs: Ways = {}
    if name == "bf16":
        theirs = {"torch.mv": lambda: [torch.mv(b.flatten(1), m) for (b, _), m in zip(held, low, strict=True)]}
    ends = _ends(clients)
    parts = [(_some(bank, ends), None if scale is None else scale[ends]) for bank, scale in held]
    return Work(
        {"op": "client_totals", "format": name, "shape": model, "T": 0, "K": clients},
        sum(_bytes(*pair) for pair in held) + _bytes(*ms),
        our_ways("client_totals", (ms, banks), (2, clients), lambda: client_totals_grouped(ms, banks)),
        theirs,
        lambda got: [got[layer][ends].float() for layer in range(2)],
        [client_totals_reference(m, b, scale=s) for m, (b, s) in zip(ms, parts, strict=True)],
        allowed=1e-4,  # two sums of 1e7 terms near zero
    )


def head(model: str, name: str, tokens: int) -> Work:
    """relevance_head of the log-probability; torch's way holds [T, V] twice."""
    width, _, _, vocabulary = SIZES[model]
    weight = normal(vocabulary, width, seed=1, dtype=DTYPES[name]) / width**0.5
    norm_weight = normal(width, seed=4, dtype=DTYPES[name])
    held = Head(weight, norm_weight=norm_weight)
    hidden, targets = normal(tokens, width, seed=2, dtype=DTYPES[name]), torch.arange(tokens, device=DEVICE)
    few = min(tokens, 2)

    def autograd() -> list[Tensor]:
        leaf = hidden.detach().requires_grad_()
        scaled = torch.nn.functional.rms_norm(leaf, (width,), norm_weight, held.eps)
        chosen = (scaled @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])
        return [torch.autograd.grad(chosen.sum(), leaf)[0], chosen.detach()[:, 0]]

    def ours(backend: str) -> Callable[[], list[Tensor]]:
        return lambda: list(relevance_head(hidden, targets, held, backend=backend))

    return Work(
        {"op": "relevance_head", "format": name, "shape": model, "T": tokens, "K": 0, "V": vocabulary},
        _bytes(weight) + _bytes(hidden) + 4 * hidden.numel(),
        {backend: ours(backend) for backend in SERVED_BY} | _read_twice(hidden, targets, held),
        {"torch.autograd": autograd},
        lambda got: [value[:few].float() for value in got],
        list(relevance_head_reference(hidden[:few], targets[:few], held)),
        graphs=False,
    )


def _read_twice(hidden: Tensor, targets: Tensor, held: Head) -> Ways:
    """The path that cuda takes for more than 4 tokens, where it takes the other one by itself."""
    if DRY_RUN or hidden.shape[0] > 4:
        return {}
    from protoken.ops import cuda

    def twice() -> list[Tensor]:
        outs = [torch.empty(hidden.shape, device=DEVICE), torch.empty(hidden.shape[:1], device=DEVICE)]
        cuda.launch_relevance_head(outs[0], outs[1], hidden, targets, held, path=cuda.TWICE)
        return outs

    return {"cuda-twice": twice}


def append(model: str, tokens: int) -> Work:
    """capture_append of four blocks' layer inputs and hidden states, bf16."""
    hidden, attention, mlp, _ = SIZES[model]
    widths = [attention, mlp, hidden] * 4
    capacity = max(tokens, 8 if DRY_RUN else 4096)
    steps = [normal(tokens, width, seed=n, dtype=torch.bfloat16) for n, width in enumerate(widths)]
    buffers = [torch.zeros(capacity, width, dtype=torch.bfloat16, device=DEVICE) for width in widths]
    cursor, places = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.arange(tokens, device=DEVICE)

    def ours(backend: str) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            cursor.zero_()
            capture_append(buffers, steps, cursor, backend=backend)
            return buffers

        return run

    def copies() -> list[Tensor]:
        for buffer, step in zip(buffers, steps, strict=True):
            buffer.index_copy_(0, places, step)
        return buffers

    wanted = [torch.zeros_like(buffer) for buffer in buffers]
    capture_append_reference([value[:tokens] for value in wanted], steps, torch.zeros_like(cursor))
    return Work(
        {"op": "capture_append", "format": "bf16", "shape": model, "T": tokens, "K": 0},
        2 * _bytes(*steps),
        {backend: ours(backend) for backend in SERVED_BY},
        {"torch.index_copy": copies},
        lambda got: [value.double() for value in got],
        [value.double() for value in wanted],
        allowed=0.0,
        graphs=True,
    )
