"""Run the traced blocks once more on recorded hidden states, through the model's own code.

The model's own `forward` is called; the blocks below the traced ones are passed through, and the first traced block
is handed the recorded hidden states. Masks, rotary embeddings, sliding windows, norms, soft-caps and scalings are
therefore the model's own in every family, and the cost is that of the traced blocks, the final norm and the head on
the rows asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from protoken.errors import GenerationError, ProtokenError
from protoken.models.architectures import Architecture
from protoken.models.layers import Layer, layer_of
from protoken.models.patching import after, before, hidden_of, hooks, replaced_method
from protoken.models.quantised import straight_through
from protoken.ways.capture import run_whole
from protoken.ways.sites import Visit, check_first_visit, check_visited, visited


@dataclass
class Tap:
    """Input and output of one traced layer during a replay: x [B, s, I], y [B, s, O] with y in the gradient's graph.

    Experts with n slots per token have x [B, s, n I], y of B s n rows, and `route` [B, s, n]: the expert of each slot.
    An embedding table has the token ids as x, [B, s, 1].
    """

    x: Tensor
    y: Tensor
    route: Tensor | None = None


@dataclass
class Replayed:
    """What a replay yields: logits of the deciding rows, the layers' taps, and the blocks' input and output [B, s, d].

    `hidden` is the leaf that entered the first replayed block.
    """

    logits: Tensor
    hidden: Tensor
    taps: dict[str, Tap]
    output: Tensor


def replay(
    model: nn.Module,
    architecture: Architecture,
    *,
    first_block: int,
    hidden: Tensor,
    ids: Tensor,
    layers: Sequence[str],
    blocks_return_tuples: bool,
    attention_mask: Tensor | None = None,
    logits_rows: Tensor | None = None,
    given_outputs: dict[str, Tensor] | None = None,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Replayed:
    """Replay blocks `first_block`.. on `hidden`, with gradients enabled from there on.

    Args:
        model, architecture: the model, left as it was found.
        first_block: number of the first block that computes.
        hidden: [B, s, d] hidden states entering it.
        ids: [B, s] token ids of those positions; they only feed the embedding that is then replaced.
        layers: full names of the layers to tap. With the embeddings among them everything runs, and `hidden` only
            says of what shape.
        blocks_return_tuples: how this family's blocks return their hidden states, as seen while capturing.
        attention_mask: [B, s] for left-padded batches.
        logits_rows: positions (a 1-d index) at which logits are wanted; all if None.
        given_outputs: outputs to put in place of a tapped layer's own, [B, s, O] per name: they become leaves.
        head: called instead of the output head on its [B, rows, d] input.

    Raises:
        GenerationError: a traced layer never ran, or more than once, or the blocks do not run on hidden states alone.
    """
    taps: dict[str, Tap] = {}
    output: list[Tensor] = []

    leaf = hidden.detach().requires_grad_()

    def leave(_module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
        output.append((result[0] if isinstance(result, tuple) else result).detach())

    handles = [after(architecture.blocks[-1], leave)]
    if architecture.embeddings_name not in layers:
        handles.append(replaced_input(architecture.blocks[first_block], leaf))
    tapped = [layer_of(model, name) for name in layers]
    tap = _tap(taps, hidden.shape[:2], given_outputs or {})
    rows: dict[str, Any] = {} if logits_rows is None else {"logits_to_keep": logits_rows}
    with hooks(*handles), ExitStack() as stack, torch.enable_grad():
        stack.enter_context(passed_through(architecture, first_block, blocks_return_tuples))
        running = [*architecture.blocks[first_block:], architecture.head]
        stack.enter_context(straight_through(running))
        stack.enter_context(visited(tapped, tap, running))
        if head is not None:
            stack.enter_context(replaced_method(architecture.head, "forward", _of_rows(head, logits_rows)))
        with on_hidden_states_alone():
            logits = run_whole(model, ids, attention_mask, **rows).logits
        check_visited(layers, taps)
        return Replayed(_rows_of(logits, logits_rows), leaf, taps, output[-1])


def _rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows asked for of x [B, s or rows, .]: some families take no `logits_to_keep` and give those of all."""
    return x if rows is None or x.dim() < 3 or x.shape[1] == len(rows) else x[:, rows]


def _of_rows(head: Callable[[Tensor], Tensor], rows: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda hidden: head(_rows_of(hidden, rows))


@contextmanager
def on_hidden_states_alone() -> Iterator[None]:
    """What a model's own code raises where its blocks are run once more on recorded hidden states, as our error.

    Raises:
        GenerationError: the code did not run; the cause is chained.
    """
    try:
        yield
    except (ProtokenError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise GenerationError(
            "model",
            expected="blocks that run on the hidden states entering them, the mask and the positions",
            got=f"{type(error).__name__}: {error}",
            remedy="Blocks that share more with those below cannot be run apart; protoken models lists what is known",
        ) from error


def _tap(taps: dict[str, Tap], shape: Sequence[int], given_outputs: dict[str, Tensor]) -> Visit:
    def visit(layer: Layer, x: Tensor, y: Tensor, route: Tensor | None) -> Tensor:
        check_first_visit(layer.name, taps)
        given = given_outputs.get(layer.name)
        if given is not None:
            y = given.detach().reshape(y.shape).requires_grad_()
        elif not y.requires_grad:
            # Nothing upstream carries a gradient: the output itself becomes the leaf.
            y = y.detach().requires_grad_()
        taps[layer.name] = Tap(
            by_position(layer, x.detach(), shape), y, None if route is None else route.reshape(*shape, -1)
        )
        # The clone keeps an in-place add of the residual (Falcon) away from the leaf.
        return y.clone()

    return visit


def by_position(layer: Layer, x: Tensor, shape: Sequence[int]) -> Tensor:
    """A layer's input as [B, s, .]: some families flatten the positions, experts have several rows for each.

    The head sees only the positions whose logits are wanted, and keeps its own shape.
    """
    per_row = 1 if layer.kind == "embedding" else layer.columns
    rows = x.numel() // per_row
    return x if rows < shape[0] * shape[1] else x.reshape(*shape, -1)


def replaced_input(block: nn.Module, hidden: Tensor) -> torch.utils.hooks.RemovableHandle:
    """Hand a block these hidden states whatever it is called with; remove the handle afterwards."""

    def enter(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

    return before(block, enter)


@contextmanager
def passed_through(architecture: Architecture, count: int, as_tuple: bool) -> Iterator[None]:
    """The first `count` blocks return what they are given, in the form in which this family's blocks return it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(args, kwargs)
        return (hidden, None) if as_tuple else hidden

    with ExitStack() as stack:
        for block in architecture.blocks[:count]:
            stack.enter_context(replaced_method(block, "forward", forward))
        yield
