"""The forward way: exact scores per token over any number of blocks, one tangent per client.

    s[k, t] = d f_t / d eps   when eps * delta_k x is added to the output y of every traced layer

The traced blocks run once more on the recorded hidden states, and the tangents of all clients ride along (dual.py):
they start where the first traced layer adds delta_k x, and end at two places in the last block, its input h and its
out-projection's input a. From there on no position talks to another, so what the tangents do to f_t is a dot product
with the local gradients at the deciding position,

    s[k, t] = < df_t/dh[t], dh_k[t] > + < df_t/da[t], da_k[t] > + the last block's own layers, scored locally,

and neither the last MLP nor the head ever sees K tangents. Code that tangents cannot ride through is differentiated
as a whole, by torch.func (forward_autograd.py): slower, and just as exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from protoken.banks.layer_bank import LayerBank, directions
from protoken.models.architectures import Architecture
from protoken.models.layers import Layer, layer_of
from protoken.models.patching import Stopped, after, before, current_method, hidden_of, hooks, replaced_method
from protoken.models.quantised import dequantised, quantised_linears, straight_through
from protoken.ways import dual_rules  # noqa: F401 - its rules are what makes tangents cheap
from protoken.ways.capture import Capture, run_whole
from protoken.ways.dual import Dual, NoRule, tangent_of, value_of
from protoken.ways.dual_attention import only_rows
from protoken.ways.forward_autograd import scores_by_autograd, use_plain_formulas
from protoken.ways.relevance import LocalRelevance, Response, replay_error
from protoken.ways.replay import by_position, on_hidden_states_alone, passed_through, replaced_input
from protoken.ways.sites import check_first_visit, check_visited, visited

# Bytes of one activation with all its tangents: more directions at once bring no more speed, only memory.
_AT_ONCE = 128 << 20


@dataclass
class _Arrived:
    """What reached the last block, plain or `Dual`: its input h [1, s, d], its out-projection's input a [1, s, I]."""

    h: list[Tensor] = field(default_factory=list)
    a: list[Tensor] = field(default_factory=list)


def forward_scores(
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
    """Raw scores (no aggregation weight) of K updates to layers that other positions can see, fp32 or fp64 [K, T].

    Args:
        layers: traced layers below the last block's out-projection.
        banks: per layer K updates; low-rank ones are applied factor by factor.
        local: the local gradients at the deciding positions.
        chunk: how many clients' tangents run at once at most; bounds the memory, not the result.

    Raises:
        GenerationError: the blocks compute something else than they did while generating, or a layer did not run.
    """
    clients = len(banks[layers[0]].updates)
    chunk = max(1, min(chunk, _AT_ONCE // _bytes_per_direction(model, capture, response, layers)))
    found = []
    with torch.no_grad():
        try:
            upstream: Tensor | None = None
            for start in range(0, clients, chunk):
                some = slice(start, start + chunk)
                reached = _pushed(model, architecture, capture, response, layers, banks, some)
                if upstream is None:
                    upstream = _through_projection(architecture, _rows(reached.a[0], response), local.projection_grad)
                    for found_there, kept in ((reached.h, capture.hidden), (reached.a, capture.projection_inputs)):
                        decided = capture.deciding(kept, response.prompt_length, response.new_tokens)
                        replay_error(_rows(found_there[0], response), decided)
                size = min(chunk, clients - start)
                found.append(
                    _paired(reached.h[0], local.hidden_grad, response, size)
                    + _paired(reached.a[0], upstream, response, size)
                )
        except NoRule:
            return scores_by_autograd(model, architecture, capture, response, layers, banks, local, chunk=chunk)
    return torch.cat(found)


def _bytes_per_direction(model: nn.Module, capture: Capture, response: Response, layers: Sequence[str]) -> int:
    length = response.prompt_length - 1 + response.new_tokens
    found = [layer_of(model, name) for name in layers]
    widest = max([layer.rows for layer in found] + [layer.columns for layer in found if layer.kind != "embedding"])
    return length * widest * capture.sequence_hidden[0].element_size()


def _pushed(
    model: nn.Module,
    architecture: Architecture,
    capture: Capture,
    response: Response,
    layers: Sequence[str],
    banks: Mapping[str, LayerBank],
    clients: slice,
) -> _Arrived:
    """Run the traced blocks with some clients' tangents, up to the last block's out-projection."""
    length = response.prompt_length - 1 + response.new_tokens
    hidden, arrived = capture.sequence(length), _Arrived()
    first = min(architecture.block_of(name) for name in layers)
    running, last = architecture.blocks[first:], architecture.blocks[-1]
    met: set[str] = set()

    def add(layer: Layer, x: Tensor, y: Tensor, route: Tensor | None) -> Tensor:
        check_first_visit(layer.name, met)
        met.add(layer.name)
        bank = banks[layer.name]
        if _is_still(bank):
            return y
        seen = by_position(layer, value_of(x), hidden.shape[:2])
        slots = None if route is None else route.reshape(*hidden.shape[:2], -1)
        moved = directions(bank, seen, slots, clients).to(y.dtype)
        moved = moved.reshape(moved.shape[0], *y.shape)
        before = tangent_of(y)
        return Dual.of(value_of(y), moved if before is None else before + moved)

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived.h.append(hidden_of(args, kwargs))
        stack.enter_context(only_rows(slice(response.prompt_length - 1, length)))

    def stop(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        arrived.a.append(args[0].reshape(*hidden.shape[:2], -1))
        raise Stopped

    with ExitStack() as stack:
        if architecture.embeddings_name not in layers:
            stack.enter_context(hooks(replaced_input(architecture.blocks[first], hidden)))
        stack.enter_context(passed_through(architecture, first, capture.returns_tuples))
        stack.enter_context(visited([layer_of(model, name) for name in layers], add, running))
        projection = last.get_submodule(architecture.out_projection)
        stack.enter_context(hooks(before(last, enter), before(projection, stop)))
        for module in quantised_linears(running):
            stack.enter_context(replaced_method(module, "forward", _with_tangents(module)))
        for block in running:
            use_plain_formulas(block, stack)
        with suppress(Stopped), on_hidden_states_alone():
            run_whole(model, response.seen)
    check_visited(layers, met)
    return arrived


def _is_still(bank: LayerBank) -> bool:
    """Whether no client changes this layer; its output then starts no tangent."""
    return all(update.factors is not None and update.factors.rank == 0 for update in bank.updates)


def _with_tangents(module: nn.Linear) -> Any:
    """A quantised layer's own values; tangents through its dequantised weight."""
    own = current_method(module, "forward")

    def forward(x: Tensor) -> Tensor:
        y: Tensor = own(value_of(x))
        moved = tangent_of(x)
        if moved is None:
            return y
        weight = dequantised(module, module.weight.detach()).to(moved)
        return Dual.of(y, nn.functional.linear(moved, weight).to(y.dtype))

    return forward


def _rows(x: Tensor, response: Response) -> Tensor:
    """The deciding positions of a plain or dual [1, s, n]: plain [1, T, n]."""
    start = response.prompt_length - 1
    plain: Tensor = value_of(x)
    return plain[:, start : start + response.new_tokens]


def _through_projection(architecture: Architecture, rows: Tensor, grad: Tensor) -> Tensor:
    """df_t/da [T, I] from df_t/dy [T, O], through the out-projection as it is: adapters, packed weights."""
    projection = architecture.blocks[-1].get_submodule(architecture.out_projection)
    own: list[tuple[Tensor, Tensor]] = []

    def apart(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # Without what hooks of the user's make of the input and of the output.
        own.append((args[0], output))

    with torch.enable_grad(), straight_through([projection]), hooks(after(projection, apart)):
        projection(rows.detach().clone().requires_grad_())
        x, y = own[0]
        found: Tensor = torch.autograd.grad(y, x, grad.reshape(y.shape).to(y.dtype))[0]
    return found[0]


def _paired(reached: Tensor, gradient: Tensor, response: Response, clients: int) -> Tensor:
    """<tangent[k, t], gradient[t]> at the deciding positions, accumulated in fp32 or better: [K, T]."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    tangent, start = tangent_of(reached), response.prompt_length - 1
    if tangent is None:
        return torch.zeros(clients, response.new_tokens, dtype=wide, device=gradient.device)
    rows = tangent[:, 0, start : start + response.new_tokens]
    return torch.einsum("ktd,td->kt", rows.to(wide), gradient.to(rows.device, wide)).to(gradient.device)
