"""The reverse way in pieces: gradients at the rows of layers of any depth, for any groups of tokens, block by block.

What the objective of token t is to the layers below the last block's out-projection, it is through two places of its
deciding position only: the last block's input h and its out-projection's output y. The local way has both gradients,
so a backward pass starts there and never sees the last MLP or the head:

    g_c = sum over t in group c of  (dh/dy_l)^T df_t/dh[t]  +  (dy/dy_l)^T df_t/dy[t]          one pass per group

One group of all tokens gives totals, and each position's part in them; one group per token gives each token's own.
Blocks may be run a few at a time, from the last to the first: each piece starts from hidden states that one pass
without gradients has left at its entrance, and hands its gradient at the entrance on to the piece below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from protoken.models.architectures import Architecture
from protoken.models.layers import Layer, layer_of
from protoken.models.patching import Stopped, after, before, hidden_of, hooks
from protoken.models.quantised import straight_through
from protoken.ways.capture import Capture, run_whole
from protoken.ways.relevance import LocalRelevance, Response, replay_error
from protoken.ways.replay import Tap, by_position, on_hidden_states_alone, passed_through, replaced_input
from protoken.ways.sites import check_first_visit, check_visited, visited


@dataclass
class LayerRows:
    """One layer: its tap x [1, S, I] (embeddings: ids [1, S, 1]; with n slots n I, and their route), g [C, S, O]."""

    layer: Layer
    tap: Tap
    grads: Tensor


@dataclass
class _Piece:
    """Blocks first..stop-1 with gradients: `start` entered, `ends` came out, `taps` were met on the way."""

    start: Tensor
    ends: list[Tensor]
    taps: dict[str, Tap]


@dataclass(frozen=True)
class PulledBack:
    """One response whose gradients can be asked for, layer by layer.

    Attributes:
        layers: below the last block's out-projection, in the model's order.
        local: the local gradients at the deciding positions.
        blocks: how many blocks are run at a time.
    """

    model: nn.Module
    architecture: Architecture
    capture: Capture
    response: Response
    layers: Sequence[str]
    local: LocalRelevance
    blocks: int

    def rows(self, groups: Sequence[slice]) -> Iterator[list[LayerRows]]:
        """Of every piece, last blocks first, the layers' rows for C groups of tokens."""
        length = self.response.prompt_length - 1 + self.response.new_tokens
        last = len(self.architecture.blocks) - 1
        first = min(self.architecture.block_of(name) for name in self.layers)
        starts = sorted(
            {max(first, last + 1 - n) for n in range(self.blocks, last + 1 - first + self.blocks, self.blocks)}
        )
        entrances = self._entrances(self.capture.sequence(length), starts)
        stop: int | None = None
        upstream = self._cotangents(groups, length)
        for start in reversed(starts):
            names = [
                n for n in self.layers if start <= self.architecture.block_of(n) < (last + 1 if stop is None else stop)
            ]
            piece = self._run(start, stop, entrances.pop(), names)
            found, upstream = self._pull(piece, names, upstream, entrance=start > first)
            yield found
            stop = start

    def _cotangents(self, groups: Sequence[slice], length: int) -> list[list[Tensor]]:
        """Per group the gradients at h and y over all positions, [1, S, .] each."""
        prompt, found = self.response.prompt_length, []
        for group in groups:
            rows = slice(prompt - 1 + group.start, prompt - 1 + group.stop)
            pair = []
            for grad in (self.local.hidden_grad, self.local.projection_grad):
                whole = grad.new_zeros(1, length, grad.shape[-1])
                whole[0, rows] = grad[group]
                pair.append(whole)
            found.append(pair)
        return found

    def _entrances(self, hidden: Tensor, starts: Sequence[int]) -> list[Tensor]:
        """Hidden states entering these blocks, the first of which is where the recorded ones belong."""
        if len(starts) == 1:
            return [hidden]
        kept: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(hidden_of(args, kwargs).detach().clone())
            if len(kept) == len(starts) - 1:
                raise Stopped

        blocks = self.architecture.blocks
        handles = [before(blocks[n], enter) for n in starts[1:]]
        with hooks(*handles), torch.no_grad():
            self._forward(starts[0], hidden, [])
        return [hidden, *kept]

    def _run(self, start: int, stop: int | None, hidden: Tensor, names: Sequence[str]) -> _Piece:
        """Run a piece with gradients; `stop` is the block at whose entrance it ends, None for y of the last block."""
        blocks, shape = self.architecture.blocks, hidden.shape[:2]
        leaf = hidden.detach().requires_grad_()
        # A clone: the entrance may also be an end, and gradients at both must add up.
        piece = _Piece(leaf, [], {})

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            piece.ends.append(hidden_of(args, kwargs))
            if stop is not None:
                raise Stopped

        def leave(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            piece.ends.append(output.reshape(*shape, -1))
            raise Stopped

        def visit(layer: Layer, x: Tensor, y: Tensor, route: Tensor | None) -> Tensor:
            check_first_visit(layer.name, piece.taps)
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            slots = None if route is None else route.reshape(*shape, -1)
            piece.taps[layer.name] = Tap(by_position(layer, x.detach(), shape), y, slots)
            return y.clone()

        with torch.enable_grad(), ExitStack() as stack:
            entered = leaf.clone()
            # Before the visit, which would take an output without gradient for one that nothing reaches.
            stack.enter_context(straight_through(blocks[start:stop]))
            stack.enter_context(visited([layer_of(self.model, n) for n in names], visit, blocks[start:stop]))
            if stop is None:
                projection = blocks[-1].get_submodule(self.architecture.out_projection)
                stack.enter_context(hooks(after(projection, leave)))
            # Hooks see what those before them have put in place, so this one comes after the replacement.
            self._forward(start, entered, names, (blocks[-1 if stop is None else stop], enter))
        check_visited(names, piece.taps)
        if stop is None:
            self._check_ends(*piece.ends)
        return piece

    def _check_ends(self, hidden: Tensor, projected: Tensor) -> None:
        """GenerationError where what reached the last block is not what the generation computed there."""
        prompt, count, capture = self.response.prompt_length, self.response.new_tokens, self.capture
        rows = slice(prompt - 1, prompt - 1 + count)
        for reached, recorded in ((hidden, capture.hidden), (projected, capture.projections)):
            replay_error(reached[:, rows].detach(), capture.deciding(recorded, prompt, count))

    def _forward(
        self, start: int, hidden: Tensor, names: Sequence[str], end: tuple[nn.Module, Any] | None = None
    ) -> None:
        """The model's own forward, entered at block `start` with these hidden states, until a hook has seen enough."""
        architecture = self.architecture
        with ExitStack() as stack:
            if architecture.embeddings_name not in names:
                stack.enter_context(hooks(replaced_input(architecture.blocks[start], hidden)))
            if end is not None:
                stack.enter_context(hooks(before(*end)))
            stack.enter_context(passed_through(architecture, start, self.capture.returns_tuples))
            with suppress(Stopped), on_hidden_states_alone():
                run_whole(self.model, self.response.seen)

    def _pull(
        self, piece: _Piece, names: Sequence[str], upstream: list[list[Tensor]], *, entrance: bool
    ) -> tuple[list[LayerRows], list[list[Tensor]]]:
        """Gradients of the piece's layers, [C, S, O] each, and what is handed on to the piece below."""
        found = [layer_of(self.model, name) for name in names]
        sources = [*([piece.start] if entrance else []), *(piece.taps[name].y for name in names)]
        pulled = []
        for number, cotangents in enumerate(upstream):
            # Ends that nothing upstream of them reaches (the first block's input) carry no gradient.
            pairs = [(e, c.to(e)) for e, c in zip(piece.ends, cotangents, strict=True) if e.requires_grad]
            grads = torch.autograd.grad(
                [end for end, _ in pairs],
                sources,
                [cotangent for _, cotangent in pairs],
                retain_graph=number + 1 < len(upstream),
                allow_unused=True,
            )
            pulled.append([torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads, strict=True)])
        below = [[grads[0]] for grads in pulled] if entrance else []
        rows = []
        for index, layer in enumerate(found, start=int(entrance)):
            tap = piece.taps[layer.name]
            positions = tap.x.shape[1]
            stacked = torch.stack([one[index].reshape(positions, -1) for one in pulled])
            rows.append(LayerRows(layer, Tap(tap.x, tap.y.detach(), tap.route), stacked))
        return rows, below
