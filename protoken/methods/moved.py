"""A model evaluated at other values of some of its parameters, without writing to it (see twin.py).

Everything that does not move stays at G. Blocks below the first one that moves give the same hidden states at every
point: they run once per input, and each evaluation costs the moving blocks and the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from protoken.methods.weights import wide
from protoken.models.architectures import Architecture, architecture_of
from protoken.models.patching import Stopped, after, before, hidden_of, hooks
from protoken.models.twin import twin_of
from protoken.ways.replay import passed_through, replaced_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Entry:
    """Ids [B, s] and, unless the first block moves, the hidden states [B, s, d] that enter the first moving block."""

    ids: Tensor
    hidden: Tensor | None = None
    tuples: bool = False


class Moved:
    """`model` with some parameters at other values; it is never written to.

    A half-precision model is evaluated in fp32, from a widened copy that lives as long as this object.

    Attributes:
        parameters: name -> the model's own name of a parameter that moves (PEFT wraps and renames).
        values: name -> its value at G, fp32 (fp64 for a model in double precision).
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, parameters: Mapping[str, str]) -> None:
        self.model, self.parameters = twin_of(model), dict(parameters)
        self.architecture = architecture if self.model is model else architecture_of(self.model)
        known = dict(model.named_parameters(remove_duplicate=False))
        self.values = {name: wide(known[own].detach()) for name, own in parameters.items()}
        self._still = _widened(model, {id(known[own]) for own in parameters.values()})
        self.first_block = _first_moving(model, architecture, tuple(parameters.values()))

    def enter(self, ids: Tensor) -> Entry:
        """Run what does not move, once, for these ids [B, s]."""
        if not self.first_block:
            return Entry(ids)
        blocks = self.architecture.blocks
        kept: list[Tensor] = []
        tuples: list[bool] = []

        def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            tuples.append(isinstance(output, tuple))

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(hidden_of(args, kwargs).detach())
            raise Stopped

        handles = [
            after(blocks[self.first_block - 1], leave),
            before(blocks[self.first_block], stop),
        ]
        with torch.no_grad(), hooks(*handles), suppress(Stopped):
            self._call(self.values, ids)
        return Entry(ids, kept[0], tuples[0])

    def logits(self, weights: Mapping[str, Tensor], entry: Entry, rows: Tensor) -> Tensor:
        """Logits [B, rows, V] at the positions `rows`, with these values of the moving parameters."""
        with self._entered(entry):
            logits: Tensor = self._call(weights, entry.ids, logits_to_keep=rows).logits
        return logits

    def _call(self, weights: Mapping[str, Tensor], ids: Tensor, **arguments: Any) -> Any:
        moved = {own: weights[name] for name, own in self.parameters.items()}
        return functional_call(
            self.model, {**self._still, **moved}, (), {"input_ids": ids, "use_cache": False, **arguments}
        )

    @contextmanager
    def _entered(self, entry: Entry) -> Iterator[None]:
        """The blocks below the first moving one hand on what they gave at G."""
        with ExitStack() as stack:
            if entry.hidden is not None:
                stack.enter_context(hooks(replaced_input(self.architecture.blocks[self.first_block], entry.hidden)))
                stack.enter_context(passed_through(self.architecture, self.first_block, entry.tuples))
            yield


def _widened(model: nn.Module, moving: set[int]) -> dict[str, Tensor]:
    """fp32 copies of half-precision parameters and buffers but the moving ones, by name; empty for other models."""
    named = [*model.named_parameters(), *model.named_buffers()]
    half = (torch.bfloat16, torch.float16)
    return {name: value.detach().float() for name, value in named if value.dtype in half and id(value) not in moving}


def _first_moving(model: PreTrainedModel, architecture: Architecture, names: tuple[str, ...]) -> int:
    """Number of the first block that holds a moving parameter, or that one of them could reach; 0 if unsure.

    Parameters outside the blocks count as the deepest, unless they are the head's own and untied.
    """
    embedding = model.get_input_embeddings()
    head = {id(p) for p in architecture.head.parameters()} - {id(p) for p in embedding.parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    last = len(architecture.blocks) - 1
    first = last
    for name in names:
        if name.startswith(architecture.blocks_name + "."):
            first = min(first, architecture.block_of(name))
        elif id(parameters[name]) not in head:
            return 0
    return first
