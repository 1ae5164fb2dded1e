"""The forward way, differentiated as a whole by torch.func: what forward.py falls back on.

The traced blocks are one function of what is added to the traced layers' outputs; its directional derivatives for all
clients are a vmap over jvp. Clients share the primal. Attention runs in its math form for this pass, since the fused
one has no forward mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from protoken.banks.layer_bank import LayerBank, directions
from protoken.models.architectures import Architecture
from protoken.models.layers import Layer, layer_of
from protoken.models.patching import Stopped, after, before, hidden_of, hooks, replaced_method
from protoken.models.quantised import linearised, recorded
from protoken.ways.capture import Capture, run_whole
from protoken.ways.dual import forward_mode_of_torch
from protoken.ways.relevance import LocalRelevance, Response, replay_error
from protoken.ways.replay import Tap, on_hidden_states_alone, passed_through, replaced_input, replay
from protoken.ways.sites import check_first_visit, check_visited, visited


def scores_by_autograd(
    model: nn.Module,
    architecture: Architecture,
    capture: Capture,
    response: Response,
    layers: Sequence[str],
    banks: Mapping[str, LayerBank],
    local: LocalRelevance,
    *,
    chunk: int = 64,
) -> Tensor:
    """Raw scores [K, T]; arguments and errors as of `forward.forward_scores`."""
    prompt, length = response.prompt_length, response.prompt_length - 1 + response.new_tokens
    rows = slice(prompt - 1, length)
    hidden = capture.sequence(length)
    first = min(architecture.block_of(name) for name in layers)
    with recorded(architecture.blocks[first:]) as records:
        taps = _layer_taps(model, architecture, capture, response, layers, first, hidden)
    clients = len(banks[layers[0]].updates)
    parts = []
    with torch.no_grad(), forward_mode_of_torch(), linearised(records):
        for start in range(0, clients, chunk):
            some = slice(start, start + chunk)
            pushed = [directions(banks[n], taps[n].x, taps[n].route, some).to(hidden.dtype) for n in layers]
            h, y = _push(model, architecture, response, layers, first, hidden, pushed, capture.returns_tuples)
            parts.append(_paired(h[:, 0, rows], local.hidden_grad) + _paired(y[:, 0, rows], local.projection_grad))
    return torch.cat(parts)


def _layer_taps(
    model: nn.Module,
    architecture: Architecture,
    capture: Capture,
    response: Response,
    layers: Sequence[str],
    first: int,
    hidden: Tensor,
) -> dict[str, Tap]:
    """x of every layer over all positions, [1, s, I]; the taps hold no graph."""
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
    prompt, count = response.prompt_length, response.new_tokens
    left = replayed.output[:, prompt - 1 : prompt - 1 + count]
    replay_error(left, capture.deciding(capture.outputs, prompt, count))
    return {name: Tap(tap.x, tap.y.detach(), tap.route) for name, tap in replayed.taps.items()}


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
        met: set[str] = set()

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached["h"] = hidden_of(args, kwargs)

        def leave(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            reached["y"] = output.reshape(*hidden.shape[:2], -1)
            raise Stopped

        values = dict(zip(layers, added, strict=True))

        def add(layer: Layer, _x: Tensor, y: Tensor, _route: Tensor | None) -> Tensor:
            check_first_visit(layer.name, met)
            met.add(layer.name)
            return y + values[layer.name].reshape(y.shape)

        handles = []
        if architecture.embeddings_name not in layers:
            handles.append(replaced_input(architecture.blocks[first], hidden))
        handles.append(before(last, enter))
        with hooks(*handles), ExitStack() as stack:
            stack.enter_context(passed_through(architecture, first, returns_tuples))
            stack.enter_context(visited([layer_of(model, n) for n in layers], add, architecture.blocks[first:]))
            stack.enter_context(hooks(after(projection, leave)))
            for block in architecture.blocks[first:]:
                use_plain_formulas(block, stack)
            with suppress(Stopped), on_hidden_states_alone():
                run_whole(model, response.seen)
        check_visited(layers, met)
        return reached["h"], reached["y"]

    primals = tuple(torch.zeros_like(direction[0]) for direction in directions)

    def tangent(*direction: Tensor) -> tuple[Tensor, Tensor]:
        # Without an auxiliary output jvp returns (values, tangents); its type also allows a third part.
        result: Any = torch.func.jvp(run, primals, direction)
        return result[1]  # type: ignore[no-any-return]

    pushed: tuple[Tensor, Tensor] = torch.func.vmap(tangent)(*directions)
    return pushed


def use_plain_formulas(block: nn.Module, stack: ExitStack) -> None:
    """Bloom's GELU is an autograd.Function without a forward mode; the formula it wraps has one."""
    from transformers.models.bloom.modeling_bloom import BloomGelu, bloom_gelu_forward

    for module in block.modules():
        if type(module) is BloomGelu:
            stack.enter_context(replaced_method(module, "forward", bloom_gelu_forward))
