"""The leaf tap: relevance at the last block's layers while the model generates, without running anything twice.

After the last attention no position talks to another, so what the newest token's relevance needs is the rest of one
row: from the traced layers' outputs y through norm and head to the objective f. In a decoding step the first traced
layer's output is made a leaf, gradients are recorded from there to the logits and nowhere else, and once the token is
chosen the graph is pulled back:

    y ── residual, norm ──▶ h ┆ head ┆ z ── soft-cap, scaling ──▶ f        g = d f / d y

The graph is cut before and after the head's matmul, which autograd would go through densely: with v = d f / d z,

    d f / d h = v W        one row v[t] W[t] for the logit, since what follows the head is elementwise
                           one vector-matrix product for the log-probability

Where the graph in between is that of a gated MLP and two norms it is not recorded at all: see gated_tail.py.

A pass over several positions (the prompt, or decoding without a cache) keeps one row of activations instead of the
whole block's, and its token is replayed alone, the local way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from protoken.errors import GenerationError
from protoken.generation import Generated
from protoken.models.architectures import Architecture
from protoken.models.layers import Layer, layer_of
from protoken.models.patching import after, hidden_of, hooks
from protoken.streaming.gated_tail import GatedTail
from protoken.ways.capture import Capture, check_one_stream
from protoken.ways.objective import (
    Objective,
    is_last_row,
    is_plain,
    objective_values,
    pull_from_head,
    pull_through_head,
)
from protoken.ways.relevance import Response, local_relevance
from protoken.ways.sites import visited

# How often a pass looks whether the generation shall be abandoned.
_CHECKS = 6


@dataclass
class _Pass:
    """What one forward pass has shown so far; x and y by layer, rows in `capture` when it was of many positions.

    `graph`: gradients are recorded, as the pull-back goes through autograd.
    """

    length: int = 0
    x: dict[str, Tensor] = field(default_factory=dict)
    y: dict[str, Tensor] = field(default_factory=dict)
    routes: dict[str, Tensor] = field(default_factory=dict)
    head_input: Tensor | None = None
    head_output: Tensor | None = None
    logits: Tensor | None = None
    capture: Capture = field(default_factory=lambda: Capture(every=False))
    graph: bool = True


@dataclass
class TokenRelevance:
    """One token: per layer x [1, I], g = d f / d y [1, O] and, for experts, the route [1, n]; objective value f [1]."""

    x: dict[str, Tensor]
    grad: dict[str, Tensor]
    objective: Tensor
    routes: dict[str, Tensor]


class LeafTap:
    """Relevance of each newly chosen token at layers of the last block.

    Only passes of the thread that installed the tap count; others go through the model as if there were no hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        layers: Sequence[str],
        objective: Objective,
        backend: str = "auto",
    ) -> None:
        self.model, self.architecture = model, architecture
        self.layers, self.objective = tuple(layers), objective
        self._found = [layer_of(model, name) for name in self.layers]
        self._pass = _Pass()
        self._lengths: list[int] = []
        self._chosen = 0
        self._thread: int | None = None
        self._backend = backend
        self._tail: GatedTail | None = None
        self.replayed: Generated | None = None
        """The last token that was replayed alone, with what was captured for it."""

    @contextmanager
    def installed(self, check: Callable[[], None] | None = None) -> Iterator[None]:
        """Hooks on the last block, the traced layers, the head and the model; grad mode is put back on leaving.

        Args:
            check: called before some of the blocks; raises where generation shall be abandoned.
        """
        last, grad_mode = self.architecture.blocks[-1], torch.is_grad_enabled()
        if self._cuts_head:
            self._tail = GatedTail.of(self.model, self.architecture, self.layers, self._backend)
        with ExitStack() as stack:
            stack.callback(self._forget)
            stack.callback(torch.set_grad_enabled, grad_mode)
            if check is not None:
                stack.enter_context(hooks(*self._checked(check)))
            projection = last.get_submodule(self.architecture.out_projection)
            handles = [
                last.register_forward_pre_hook(self._enter_block, with_kwargs=True),
                after(projection, self._project),
                after(last, self._leave_block),
                _language_model(self.model).register_forward_hook(self._leave_model),
            ]
            if self._cuts_head:
                # Before any hook of the user's on the head: what that does to the logits is part of the graph.
                handles.append(self.architecture.head.register_forward_pre_hook(self._enter_head))
                handles.append(self.architecture.head.register_forward_hook(self._leave_head, prepend=True))
            stack.enter_context(hooks(*handles))
            stack.enter_context(visited(self._found, self._tap))
            if self._tail is not None:
                stack.enter_context(self._tail.watched(lambda: self._own_thread and self._pass.length == 1))
            self._thread = threading.get_ident()
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The hooks let everything pass: for somebody else's use of the model in between."""
        thread, self._thread = self._thread, None
        grad_mode = torch.is_grad_enabled()
        try:
            yield
        finally:
            self._thread = thread
            torch.set_grad_enabled(grad_mode)

    def relevance(self, ids: Tensor) -> TokenRelevance:
        """Of the last of ids [1, n + 1], which the pass just seen has chosen.

        Raises:
            GenerationError: the model did not run once, on the position before, through every traced layer.
        """
        seen, lengths = self._pass, self._lengths
        # A long prompt may come in chunks, the last of which has chosen the first token.
        chunks = not self._chosen and sum(lengths) == ids.shape[1] - 1
        self._chosen += 1
        self._forget_pass()
        whole = seen.length > 1 or (set(seen.y) == set(self.layers) and seen.logits is not None)
        if not whole or not (chunks or len(lengths) == 1):
            raise GenerationError(
                "model",
                expected="one forward pass per token, through every traced layer",
                got=f"{len(lengths)} passes, the last through {sorted(seen.y) or 'none of them'}",
                remedy="Compiled models and processors that call the model cannot be streamed: use protoken.trace",
            )
        if seen.length > 1:
            return self._replayed(seen, ids)
        assert seen.logits is not None
        return self._pulled_back(seen, ids[0, -1:].to(seen.logits.device))

    # ---- hooks ---------------------------------------------------------------------------------------

    @property
    def _own_thread(self) -> bool:
        return self._thread == threading.get_ident()

    @property
    def _cuts_head(self) -> bool:
        """Only around a plain head whose weight is at hand, and which is not itself traced."""
        head = self.architecture.head
        return is_plain(head) and "forward" not in head.__dict__ and all(x.module is not head for x in self._found)

    def _checked(self, check: Callable[[], None]) -> list[torch.utils.hooks.RemovableHandle]:
        def before(_module: nn.Module, _args: tuple[Any, ...]) -> None:
            if self._own_thread:
                check()

        # A hook costs every token a little, and leaving some blocks later does no harm.
        blocks = self.architecture.blocks
        return [block.register_forward_pre_hook(before) for block in blocks[:: max(1, len(blocks) // _CHECKS)]]

    def _enter_block(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._own_thread:
            return
        hidden = hidden_of(args, kwargs)
        check_one_stream(hidden)
        batch, length = hidden.shape[:2]
        if batch != 1:
            raise GenerationError(
                "generate",
                expected="one sequence to stream",
                got=f"{batch} rows",
                remedy="Use protoken.tracing for several",
            )
        self._lengths.append(length)
        self._pass = _Pass(length)
        self._pass.graph = length > 1 or self._tail is None or not self._tail.ready()
        if length > 1:
            self._pass.capture.hidden.append(_last_row(hidden))

    def _project(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self._own_thread and self._pass.length > 1:
            length, kept = self._pass.length, self._pass.capture
            kept.projection_inputs.append(_last_row(args[0].reshape(1, length, -1)))
            kept.projections.append(_last_row(output.reshape(1, length, -1)))

    def _leave_block(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._own_thread and self._pass.length > 1:
            kept = self._pass.capture
            kept.returns_tuples = isinstance(output, tuple)
            kept.outputs.append(_last_row(output[0] if kept.returns_tuples else output))

    def _tap(self, layer: Layer, x: Tensor, y: Tensor, route: Tensor | None) -> Tensor:
        if not self._own_thread or self._pass.length != 1:
            return y
        self._pass.x[layer.name] = x.detach().reshape(1, -1).clone()
        if not self._pass.graph:
            self._pass.y[layer.name] = y
            return y
        torch.set_grad_enabled(True)
        tapped = y if y.requires_grad else y.detach().requires_grad_()
        self._pass.y[layer.name] = tapped
        if route is not None:
            self._pass.routes[layer.name] = route.reshape(1, -1)
        # The clone keeps an in-place add of the residual (Falcon) away from the leaf.
        return tapped.clone()

    def _enter_head(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._own_thread and self._pass.y:
            self._pass.head_input = args[0]
            torch.set_grad_enabled(False)

    def _leave_head(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not (self._own_thread and self._pass.y):
            return None
        if not self._pass.graph:
            self._pass.head_output = output
            return None
        torch.set_grad_enabled(True)
        self._pass.head_output = output.detach().requires_grad_()
        return self._pass.head_output.clone()

    def _leave_model(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._own_thread and self._pass.y:
            self._pass.logits = output.logits[:, -1]
            torch.set_grad_enabled(False)

    # ---- pulling back --------------------------------------------------------------------------------

    def _pulled_back(self, seen: _Pass, token: Tensor) -> TokenRelevance:
        assert seen.logits is not None
        ys = [seen.y[name] for name in self.layers]
        grads: Sequence[Tensor]
        if seen.head_output is None:
            with torch.enable_grad():
                value = objective_values(seen.logits, token, self.objective)
            grads = torch.autograd.grad(value, ys)
        else:
            value, grads = self._around_head(seen, seen.logits, seen.head_output, ys, token)
        found = {name: grad.reshape(1, -1) for name, grad in zip(self.layers, grads, strict=True)}
        return TokenRelevance(seen.x, found, value.detach(), seen.routes)

    def _around_head(
        self, seen: _Pass, logits: Tensor, z: Tensor, ys: list[Tensor], token: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """f [1] and d f / d y of each layer."""
        weight: Tensor = self.architecture.head.weight  # type: ignore[assignment]
        if not seen.graph:
            assert self._tail is not None
            if logits.data_ptr() != z.data_ptr():
                raise GenerationError(
                    "model",
                    expected="logits that the head computed, as for the tokens before",
                    got="others",
                    remedy='Stream with backend="torch", or use protoken.trace',
                )
            value, upstream = pull_from_head(weight, logits, token, self.objective)
            return value, self._tail.pull(upstream)
        assert seen.head_input is not None
        # Where nothing follows the head v is known, and autograd would go over the vocabulary several times for it.
        plain = is_last_row(logits, z)
        if plain:
            value, upstream = pull_from_head(weight, logits, token, self.objective)
        else:
            value, upstream = pull_through_head(weight, logits, z, token, self.objective)
        shaped = upstream.to(seen.head_input.dtype).reshape(seen.head_input.shape)
        grads = torch.autograd.grad(seen.head_input, ys, shaped)
        if plain and self._tail is not None:
            self._tail.compare(upstream, grads)
        return value, grads

    def _replayed(self, seen: _Pass, ids: Tensor) -> TokenRelevance:
        response = Response(ids, ids.shape[1] - 1)
        self.replayed = Generated(response, seen.capture)
        with self.paused():
            found = local_relevance(self.model, self.architecture, seen.capture, response, self.layers, self.objective)
        return TokenRelevance(found.x, found.grad, found.objective, found.routes)

    def _forget_pass(self) -> None:
        self._pass, self._lengths = _Pass(), []

    def _forget(self) -> None:
        self._thread = self.replayed = None
        self._forget_pass()


def _last_row(hidden: Tensor) -> Tensor:
    return hidden[:, -1:].detach().clone()


def _language_model(model: nn.Module) -> nn.Module:
    """The module that `generate` calls: PEFT wraps it, and its own forward is then not on the way."""
    from transformers import GenerationMixin

    return next((module for module in model.modules() if isinstance(module, GenerationMixin)), model)
