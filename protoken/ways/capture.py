"""What tracing keeps while the model generates: hidden states entering the traced blocks, and little else.

Positions are counted over the whole sequence, prompt first. Token t of T generated ones is chosen by the logits at
position P - 1 + t, where P is the prompt's (padded) length; the last generated token never enters the model, so
P - 1 + T positions are seen. Left padding keeps this true for every row of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from protoken.errors import ModelError
from protoken.models.architectures import Architecture
from protoken.models.patching import after, before, hidden_of, hooks


@dataclass
class Capture:
    """Recorded tensors of one generation; the lists hold one entry per forward pass.

    Attributes:
        every: rows of every position are kept, [B, s, .] per pass; otherwise only the pass's last one, [B, 1, .].
        steps: (B, s) of every forward pass.
        sequence_hidden: inputs of the first traced block at all positions, if asked for.
        hidden: rows entering the last block.
        projection_inputs, projections: rows entering and leaving the last block's out-projection.
        outputs: rows leaving the last block: what a replay must reproduce.
        returns_tuples: whether the family's blocks return (hidden, ...) or the hidden states alone.
    """

    every: bool
    steps: list[tuple[int, int]] = field(default_factory=list)
    sequence_hidden: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    projection_inputs: list[Tensor] = field(default_factory=list)
    projections: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    returns_tuples: bool = False

    def is_plain_decoding(self, prompt_length: int, new_tokens: int, batch: int = 1) -> bool:
        """Whether the forward passes were one prefill of the prompt and then one token at a time.

        Anything else (beams, drafts, chunked prefill, guidance) must be recorded again by teacher forcing. One pass
        past the last token is allowed: with its stop check deferred, transformers runs one that it throws away.
        """
        expected = [(batch, prompt_length)] + [(batch, 1)] * (new_tokens - 1)
        return self.steps in (expected, [*expected, (batch, 1)])

    def deciding(self, kept: list[Tensor], prompt_length: int, new_tokens: int) -> Tensor:
        """Rows of the positions that chose the new tokens, [B, T, .], out of one of the lists of rows."""
        first = prompt_length - 1 if self.every else 0
        return torch.cat(kept, dim=1)[:, first : first + new_tokens]

    def mapped(self, fn: Callable[[list[Tensor]], list[Tensor]]) -> Capture:
        """The same with `fn` of each list of rows; what entered the first traced block stays as it is."""
        return replace(
            self,
            hidden=fn(self.hidden),
            projection_inputs=fn(self.projection_inputs),
            projections=fn(self.projections),
            outputs=fn(self.outputs),
        )

    def row(self, number: int, padding: int) -> Capture:
        """What was recorded of one row of the batch, as if it had run alone and without its left padding."""

        def of(kept: list[Tensor]) -> list[Tensor]:
            return [tensor[number : number + 1] for tensor in kept]

        whole = [torch.cat(of(self.sequence_hidden), dim=1)[:, padding:]] if self.sequence_hidden else []
        return replace(self.mapped(of), sequence_hidden=whole)

    def sequence(self, length: int) -> Tensor:
        """Hidden states entering the first traced block at the first `length` positions, [B, length, d]."""
        return torch.cat(self.sequence_hidden, dim=1)[:, :length]


@contextmanager
def capturing(
    architecture: Architecture, first_block: int, *, sequence: bool, every: bool = False
) -> Iterator[Capture]:
    """Record every forward pass that this thread makes inside the `with`.

    Args:
        first_block: number of the first traced block.
        sequence: keep its input at all positions (reverse and forward ways), not only the deciding rows (local way).
        every: keep rows of every position; needed when the pass is a whole sequence at once (teacher forcing).
    """
    kept = Capture(every)
    last = architecture.blocks[-1]

    def rows(tensor: Tensor) -> Tensor:
        # A clone, so that the prefill's activations are freed and in-place adds further on cannot reach us.
        return (tensor if every else tensor[:, -1:]).detach().clone()

    def enter_first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.sequence_hidden.append(hidden_of(args, kwargs).detach().clone())

    def enter_last(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_of(args, kwargs)
        check_one_stream(hidden)
        kept.steps.append((hidden.shape[0], hidden.shape[1]))
        kept.hidden.append(rows(hidden))

    def project(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # OPT hands its layers [B * s, d]; what entered the block says what s is.
        batch, length = kept.steps[-1]
        kept.projection_inputs.append(rows(args[0].reshape(batch, length, -1)))
        kept.projections.append(rows(output.reshape(batch, length, -1)))

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        kept.returns_tuples = isinstance(output, tuple)
        kept.outputs.append(rows(output[0] if kept.returns_tuples else output))

    handles = [
        before(last, enter_last),
        after(last.get_submodule(architecture.out_projection), project),
        after(last, leave),
    ]
    if sequence:
        first = architecture.blocks[first_block]
        handles.append(before(first, enter_first))
    with hooks(*handles):
        yield kept


def check_one_stream(hidden: Tensor) -> None:
    """Refuse families that keep several residual streams side by side.

    Raises:
        ModelError: what enters a block is not [B, s, d].
    """
    if hidden.dim() != 3:
        raise ModelError(
            "model",
            expected="one residual stream, hidden states [B, s, d] between the blocks",
            got=f"hidden states of shape {tuple(hidden.shape)}",
            remedy="protoken models lists the families that are known",
        )


def run_whole(model: nn.Module, ids: Tensor, attention_mask: Tensor | None = None, **extra: Any) -> Any:
    """One uncached pass over ids [B, S], with the position ids that decoding uses under left padding.

    Leaving the position ids out is wrong by more than half in relative terms for models with absolute positions.
    """
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False, **extra}
    if attention_mask is not None and not bool(attention_mask.all()):
        arguments["attention_mask"] = attention_mask
        if _takes_position_ids(model):
            arguments["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return model(**arguments)


def _takes_position_ids(model: nn.Module) -> bool:
    """Bloom's ALiBi takes none and refuses the argument."""
    return "position_ids" in inspect.signature(model.forward).parameters
