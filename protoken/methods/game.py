"""The game that every method beyond first order plays: how likely is this response at other weights?

    v(S) = f(start + sum_{k in S} rho_k delta_k),     f = sum_t f_t,   f_t = log-probability of generated token t

The response is fixed and replayed by teacher forcing. The parameters that move are all that the ledger holds for the
rounds, or those of the chosen layers; every other parameter stays at G (see moved.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from protoken.methods.moved import Moved
from protoken.methods.updates import Updates
from protoken.methods.weights import point
from protoken.models.architectures import Architecture
from protoken.models.patching import after, hooks
from protoken.ways.dual import forward_mode_of_torch
from protoken.ways.forward_autograd import use_plain_formulas
from protoken.ways.objective import Objective, objective_values
from protoken.ways.relevance import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Game:
    """One response, the updates, and f at any point between them; the model itself is never written to."""

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        response: Response,
        updates: Updates,
        objective: Objective = "log_prob",
        *,
        end: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`end`: where the path ends, by the updates' names, if that is not the model itself."""
        self.response = response
        self.updates, self.objective = updates, objective
        self._moved = Moved(model, architecture, updates.parameters)
        self.model, self.architecture = self._moved.model, self._moved.architecture
        self.end = self._moved.values if end is None else dict(end)
        self.start = {name: value - updates.change[name].to(value) for name, value in self.end.items()}
        self._entry = self._moved.enter(response.seen)

    # ---- values ------------------------------------------------------------------------------------------

    def value(self, coefficients: Tensor, along: float = 0.0) -> Tensor:
        """f_t at a point (see weights.py), fp64 [T] on the CPU."""
        return self.value_at(point(self.start, self.updates, coefficients, along))

    def value_at(self, weights: Mapping[str, Tensor]) -> Tensor:
        """f_t with these values of the moving parameters, fp64 [T] on the CPU."""
        with torch.no_grad():
            return self._values(weights).double().cpu()

    def value_at_end(self) -> Tensor:
        """f_t at the path's end (G, unless another was given), fp64 [T]."""
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
        with torch.enable_grad():
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
        with torch.no_grad(), forward_mode_of_torch(), ExitStack() as stack:
            for block in self.architecture.blocks:
                use_plain_formulas(block, stack)
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

        handles = [after(self.model.get_submodule(name), tap(name)) for name in layers]
        with torch.enable_grad(), hooks(*handles):
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
        logits = self._moved.logits(weights, self._entry, rows)
        return objective_values(logits[0], self.response.tokens, self.objective)
