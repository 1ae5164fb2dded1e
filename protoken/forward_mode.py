"""The forward way: exact scores per token over any number of blocks, one tangent per client.

    s[k, t] = d f_t / d eps   when eps * delta_k x is added to the output y of every traced layer

A client's tangent starts at the traced layers and is pushed forward through the traced blocks up to two places in
the last block: its input h and its out-projection's output y. From there on no position talks to another, so what
the tangents do to f_t is a dot product with the local gradients at the deciding position,

    s[k, t] = < df_t/dh[t], dh_k[t] > + < df_t/dy[t], dy_k[t] > + the last block's own layers, scored locally,

and neither the last MLP nor the head ever sees K tangents. Clients share the primal and run as one batch
(torch.func: vmap over jvp). Attention runs in its math form for this pass; the fused one has no forward mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.bloom.modeling_bloom import BloomGelu, bloom_gelu_forward

from .architectures import Architecture
from .capture import Capture, run_whole
from .patching import hooks, replaced_method
from .relevance import LocalRelevance, Response
from .replay import passed_through, replaced_input, replay


class _Reached(Exception):
    """The pass has computed all it is for; ends the model's forward from inside a hook."""


def forward_scores(
    model: nn.Module,
    architecture: Architecture,
    capture: Capture,
    response: Response,
    layers: Sequence[str],
    deltas: Mapping[str, Sequence[Tensor]],
    local: LocalRelevance,
    *,
    chunk: int = 64,
) -> Tensor:
    """Raw scores (no aggregation weight) of K updates to layers that other positions can see, fp32 or fp64 [K, T].

    Args:
        layers: traced layers below the last block's out-projection.
        deltas: per layer K matrices [O, I].
        local: the local gradients at the deciding positions.
        chunk: how many clients' tangents run at once; bounds the memory, not the result.
    """
    prompt, length = response.prompt_length, response.prompt_length - 1 + response.new_tokens
    rows = slice(prompt - 1, length)
    hidden = capture.sequence(length)
    first = min(architecture.block_of(name) for name in layers)
    inputs = _layer_inputs(model, architecture, capture, response, layers, first, hidden)
    parts = []
    # The fused attention has no forward mode; its math form computes the same thing.
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        for start in range(0, len(deltas[layers[0]]), chunk):
            directions = [
                torch.stack([inputs[n] @ delta.to(inputs[n].dtype).T for delta in deltas[n][start : start + chunk]])
                for n in layers
            ]
            h, y = _push(model, architecture, response, layers, first, hidden, directions, capture.returns_tuples)
            parts.append(_paired(h[:, 0, rows], local.hidden_grad) + _paired(y[:, 0, rows], local.projection_grad))
    return torch.cat(parts)


def _layer_inputs(
    model: nn.Module,
    architecture: Architecture,
    capture: Capture,
    response: Response,
    layers: Sequence[str],
    first: int,
    hidden: Tensor,
) -> dict[str, Tensor]:
    """x of every layer over all positions, [1, s, I]."""
    replayed = replay(
        model,
        architecture,
        first_block=first,
        hidden=hidden,
        ids=response.seen,
        layers=layers,
        blocks_return_tuples=capture.returns_tuples,
        logits_rows=torch.zeros(1, dtype=torch.long, device=hidden.device),
    )
    return {name: replayed.taps[name].x for name in layers}


def _paired(tangent: Tensor, gradient: Tensor) -> Tensor:
    """<tangent[k, t], gradient[t]>, accumulated in fp32 or better: [K, T, d] and [T, d] give [K, T]."""
    wide = torch.promote_types(tangent.dtype, torch.float32)
    return torch.einsum("ktd,td->kt", tangent.to(wide), gradient.to(wide))


def _push(
    model: nn.Module,
    architecture: Architecture,
    response: Response,
    layers: Sequence[str],
    first: int,
    hidden: Tensor,
    directions: Sequence[Tensor],
    returns_tuples: bool,
) -> tuple[Tensor, Tensor]:
    """Tangents of the last block's input and of its out-projection's output, [K, 1, s, .], for K tangents per layer."""
    last = architecture.blocks[-1]
    projection = last.get_submodule(architecture.out_projection)

    def run(*added: Tensor) -> tuple[Tensor, Tensor]:
        reached: dict[str, Tensor] = {}

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached["h"] = args[0] if args else kwargs["hidden_states"]

        def leave(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            reached["y"] = output.reshape(*hidden.shape[:2], -1)
            raise _Reached

        handles = [
            replaced_input(architecture.blocks[first], hidden),
            last.register_forward_pre_hook(enter, with_kwargs=True),
            *(_added(model.get_submodule(name), value) for name, value in zip(layers, added, strict=True)),
            projection.register_forward_hook(leave),
        ]
        with hooks(*handles), ExitStack() as stack:
            stack.enter_context(passed_through(architecture, first, returns_tuples))
            for block in architecture.blocks[first:]:
                _use_plain_formulas(block, stack)
            with suppress(_Reached):
                run_whole(model, response.seen)
        return reached["h"], reached["y"]

    primals = tuple(torch.zeros_like(direction[0]) for direction in directions)

    def tangent(*direction: Tensor) -> tuple[Tensor, Tensor]:
        # Without an auxiliary output jvp returns (values, tangents); its type also allows a third part.
        result: Any = torch.func.jvp(run, primals, direction)
        return result[1]  # type: ignore[no-any-return]

    pushed: tuple[Tensor, Tensor] = torch.func.vmap(tangent)(*directions)
    return pushed


def _use_plain_formulas(block: nn.Module, stack: ExitStack) -> None:
    """Bloom's GELU is an autograd.Function without a forward mode; the formula it wraps has one."""
    for module in block.modules():
        if type(module) is BloomGelu:
            stack.enter_context(replaced_method(module, "forward", bloom_gelu_forward))


def _added(module: nn.Module, value: Tensor) -> torch.utils.hooks.RemovableHandle:
    return module.register_forward_hook(lambda _module, _args, output: output + value.reshape(output.shape))
