"""The ops as torch.library operators (schema, implementation, fake), so that they work under torch.compile.

Operators take tensors only, so a bank travels flattened: per layer one tensor [K, O, I] (count -1) or K tensors
[O, I] (count K). Eager calls never come here: they call the implementation directly. No operator is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from protoken.ops.banks import DenseBank, LowRankBank

Parts = Tensor | list[Tensor]

SCHEMAS = {
    "client_scores": "(Tensor[] xs, Tensor[] grads, Tensor[] banks, int[] counts, Tensor?[] scales, str backend)"
    " -> Tensor",
    "client_scores_lowrank": "(Tensor[] xs, Tensor[] grads, Tensor[] a, Tensor[] b, int[] counts, Tensor?[] scales,"
    " str backend) -> Tensor",
    "client_totals": "(Tensor[] ms, Tensor[] banks, int[] counts, Tensor?[] scales, str backend) -> Tensor",
    "relevance_head": "(Tensor hidden, Tensor targets, Tensor weight, Tensor? bias, Tensor? norm_weight,"
    " Tensor? norm_bias, str norm, float eps, float scale, float? softcap, str objective, str backend)"
    " -> (Tensor, Tensor)",
    "capture_append": "(Tensor(a!)[] buffers, Tensor[] steps, Tensor(b!) cursor, str backend) -> ()",
}


def flatten(banks: Sequence[Any], scales: Sequence[Tensor | None] | None) -> tuple[Any, Any, Any]:
    """(tensors of all layers, how many each layer has or -1, scales) of what `client_scores_grouped` takes."""
    tensors: list[Tensor] = []
    counts: list[int] = []
    kept: list[Tensor | None] = []
    for layer, bank in enumerate(banks):
        scale = scales[layer] if scales else None
        if isinstance(bank, DenseBank):
            scale = bank.scale
            bank = bank.tensor if bank.tensor is not None else bank.parts
        whole = isinstance(bank, Tensor)
        tensors.extend([bank] if whole else list(bank))
        counts.append(-1 if whole else len(bank))
        kept.append(scale)
    return tensors, counts, kept


def flatten_lowrank(banks: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """(A of all layers, B of all layers, counts, scales) of what `client_scores_lowrank_grouped` takes."""
    left: list[Tensor] = []
    right: list[Tensor] = []
    counts: list[int] = []
    scales: list[Tensor | None] = []
    for bank in banks:
        if isinstance(bank, LowRankBank):
            scale: Tensor | None = bank.scale
            if bank.a is not None and bank.b is not None:
                a, b = bank.a, bank.b
            else:
                a, b = [pair[0] for pair in bank.parts], [pair[1] for pair in bank.parts]  # type: ignore[assignment]
        else:
            a, b, scale = bank
        whole = isinstance(a, Tensor)
        left.extend([a] if whole else list(a))
        right.extend([b] if whole else list(b))
        counts.append(-1 if whole else len(a))
        scales.append(scale)
    return left, right, counts, scales


def _layers(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Parts]:
    layers: list[Parts] = []
    start = 0
    for count in counts:
        layers.append(tensors[start] if count < 0 else list(tensors[start : start + count]))
        start += max(count, 1) if count < 0 else count
    return layers


def _clients(layer: Parts) -> int:
    return layer.shape[0] if isinstance(layer, Tensor) else len(layer)


def _client_scores(
    xs: list[Tensor],
    grads: list[Tensor],
    banks: list[Tensor],
    counts: list[int],
    scales: list[Tensor | None],
    backend: str,
) -> Tensor:
    from protoken.ops.client_scores import client_scores_grouped

    return client_scores_grouped(xs, grads, _layers(banks, counts), scales=scales, backend=backend)


def _client_scores_fake(
    xs: list[Tensor], grads: list[Tensor], banks: list[Tensor], counts: list[int], *_: object
) -> Tensor:
    return xs[0].new_empty(len(xs), _clients(_layers(banks, counts)[0]), xs[0].shape[0], dtype=torch.float32)


def _client_scores_lowrank(
    xs: list[Tensor],
    grads: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    counts: list[int],
    scales: list[Tensor | None],
    backend: str,
) -> Tensor:
    from protoken.ops.client_scores_lowrank import client_scores_lowrank_grouped

    banks = list(zip(_layers(a, counts), _layers(b, counts), scales, strict=True))
    return client_scores_lowrank_grouped(xs, grads, banks, backend=backend)


def _client_scores_lowrank_fake(
    xs: list[Tensor], grads: list[Tensor], a: list[Tensor], b: list[Tensor], counts: list[int], *_: object
) -> Tensor:
    return xs[0].new_empty(len(xs), _clients(_layers(a, counts)[0]), xs[0].shape[0], dtype=torch.float32)


def _client_totals(
    ms: list[Tensor], banks: list[Tensor], counts: list[int], scales: list[Tensor | None], backend: str
) -> Tensor:
    from protoken.ops.client_totals import client_totals_grouped

    return client_totals_grouped(ms, _layers(banks, counts), scales=scales, backend=backend)


def _client_totals_fake(ms: list[Tensor], banks: list[Tensor], counts: list[int], *_: object) -> Tensor:
    return ms[0].new_empty(len(ms), _clients(_layers(banks, counts)[0]), dtype=torch.float32)


def _relevance_head(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    scale: float,
    softcap: float | None,
    objective: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    from protoken.ops.relevance_head import Head, relevance_head

    head = Head(weight, bias, norm, norm_weight, norm_bias, eps, scale, softcap, objective)
    return relevance_head(hidden, targets, head, backend=backend)


def _relevance_head_fake(hidden: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden, dtype=torch.float32), hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _capture_append(buffers: list[Tensor], steps: list[Tensor], cursor: Tensor, backend: str) -> None:
    from protoken.ops.capture_append import capture_append

    capture_append(buffers, steps, cursor, backend=backend)


def _capture_append_fake(buffers: list[Tensor], steps: list[Tensor], cursor: Tensor, backend: str) -> None:
    """Nothing comes out: the buffers and the cursor are changed in place."""


def register() -> None:
    """Define the operators; called once, when protoken.ops is imported."""
    functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "client_scores": (_client_scores, _client_scores_fake),
        "client_scores_lowrank": (_client_scores_lowrank, _client_scores_lowrank_fake),
        "client_totals": (_client_totals, _client_totals_fake),
        "relevance_head": (_relevance_head, _relevance_head_fake),
        "capture_append": (_capture_append, _capture_append_fake),
    }
    for op, (function, fake) in functions.items():
        name = f"protoken::{op}"
        torch.library.define(name, SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "CompositeExplicitAutograd")(function)
        torch.library.register_fake(name)(fake)
