"""The game that every method beyond first order plays: how likely is this response at other weights?

    v(S) = f(start + sum_{k in S} rho_k delta_k),     f = sum_t f_t,   f_t = log-probability of generated token t

The response is fixed and replayed by teacher forcing. The parameters that move are all that the ledger holds for the
rounds, or those of the chosen layers; every other parameter stays at G. Blocks below the first one that moves give
the same hidden states at every point: they run once, and each evaluation costs the moving blocks and the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ..architectures import Architecture
from ..forward_mode import _use_plain_formulas
from ..patching import hooks
from ..relevance import Objective, Response, objective_values
from ..replay import passed_through, replaced_input
from .weights import Updates, point, wide


class Game:
    """One response, the updates, and f at any point between them.

    A half-precision model is evaluated in fp32, from a widened copy that lives as long as the game. The model itself
    is never written to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        response: Response,
        updates: Updates,
        objective: Objective = "log_prob",
    ) -> None:
        self.model, self.architecture, self.response = model, architecture, response
        self.updates, self.objective = updates, objective
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.end = {name: wide(parameters[own].detach()) for name, own in updates.parameters.items()}
        self.start = {name: value - updates.change[name].to(value) for name, value in self.end.items()}
        moving = {id(parameters[own]) for own in updates.parameters.values()}
        self._still = _widened(model, moving)
        self._first = _first_moving(model, architecture, tuple(updates.parameters.values()))
        self._hidden: Tensor | None = None
        self._tuples = False
        if self._first:
            self._record_entry()

    # ---- values ------------------------------------------------------------------------------------------

    def value(self, coefficients: Tensor, along: float = 0.0) -> Tensor:
        """f_t at a point (see weights.py), fp64 [T] on the CPU."""
        return self.value_at(point(self.start, self.updates, coefficients, along))

    def value_at(self, weights: Mapping[str, Tensor]) -> Tensor:
        """f_t with these values of the moving parameters, fp64 [T] on the CPU."""
        with torch.no_grad(), self._entered():
            return self._values(weights).double().cpu()

    def value_at_end(self) -> Tensor:
        """f_t at G, fp64 [T]."""
        return self.value_at(self.end)

    def value_at_start(self) -> Tensor:
        """f_t where the rounds' change is taken back, fp64 [T]."""
        return self.value_at(self.start)

    def on_path(self, along: float) -> dict[str, Tensor]:
        """The moving parameters at start + along * (G - start)."""
        return {name: value.add(self.updates.change[name].to(value), alpha=along) for name, value in self.start.items()}

    def coalition(self, members: Tensor) -> Tensor:
        """v(S) per token for a mask [K] of members."""
        return self.value(members.double())

    # ---- derivatives -------------------------------------------------------------------------------------

    def gradient(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """f_t [T] and the gradient of their sum with respect to every moving parameter: one backward pass."""
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        with torch.enable_grad(), self._entered():
            values = self._values(leaves)
            grads = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
        found = {
            name: torch.zeros_like(value) if grad is None else grad
            for (name, value), grad in zip(leaves.items(), grads, strict=True)
        }
        return values.detach().double().cpu(), found

    def tangent(self, weights: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensor:
        """d f_t / d eps at weights + eps * direction, fp64 [T]: one forward-mode pass for all tokens."""
        primal = {name: value.detach() for name, value in weights.items()}
        moved = {name: direction[name].to(value) for name, value in primal.items()}
        with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]), ExitStack() as stack:
            stack.enter_context(self._entered())
            for block in self.architecture.blocks:
                _use_plain_formulas(block, stack)
            result: Any = jvp(self._values, (primal,), (moved,))
        tangent: Tensor = result[1]
        return tangent.double().cpu()

    def taps(self, layers: Sequence[str]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Input [T, I], output [T, O] and df/d output [T, O] of layers at the deciding positions, at G."""
        prompt, count = self.response.prompt_length, self.response.new_tokens
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def tap(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                # Frozen or not: adding a zero that wants a gradient starts the graph here.
                output = output + torch.zeros_like(output).requires_grad_()
                seen[name] = (args[0].detach(), output)
                return output.clone()

            return hook

        handles = [self.model.get_submodule(name).register_forward_hook(tap(name)) for name in layers]
        with torch.enable_grad(), self._entered(), hooks(*handles):
            total = self._values(self.end).sum()
            grads = torch.autograd.grad(total, [seen[name][1] for name in layers])

        def rows(tensor: Tensor) -> Tensor:
            flat = tensor.detach().reshape(-1, tensor.shape[-1])
            # The head is already given the deciding positions only.
            return flat if flat.shape[0] == count else flat[prompt - 1 : prompt - 1 + count]

        return {n: (rows(seen[n][0]), rows(seen[n][1]), rows(g)) for n, g in zip(layers, grads, strict=True)}

    # ---- the replay --------------------------------------------------------------------------------------

    def _values(self, weights: Mapping[str, Tensor]) -> Tensor:
        prompt, count = self.response.prompt_length, self.response.new_tokens
        rows = torch.arange(prompt - 1, prompt - 1 + count, device=self.response.ids.device)
        arguments = {"input_ids": self.response.seen, "use_cache": False, "logits_to_keep": rows}
        moved = {own: weights[name] for name, own in self.updates.parameters.items()}
        output: Any = functional_call(self.model, {**self._still, **moved}, (), arguments)
        return objective_values(output.logits[0], self.response.tokens, self.objective)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """The blocks below the first moving one stand still: hand on what they gave at G."""
        if self._hidden is None:
            yield
            return
        blocks = self.architecture.blocks
        entered = hooks(replaced_input(blocks[self._first], self._hidden))
        with entered, passed_through(self.architecture, self._first, self._tuples):
            yield

    def _record_entry(self) -> None:
        kept: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args[0] if args else kwargs["hidden_states"]).detach())

        def leave(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._tuples = isinstance(output, tuple)

        block = self.architecture.blocks[self._first]
        with (
            hooks(block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)),
            torch.no_grad(),
        ):
            self._values(self.end)
        self._hidden = kept[-1]


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
