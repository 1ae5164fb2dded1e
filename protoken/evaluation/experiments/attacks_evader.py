"""An attacker who knows how blame is computed, and trains its backdoor so that the blame falls elsewhere.

It minimises, over its own update d, what its poisoned rows cost at the model that it expects the server to make, plus
the score that it expects to be given:

    mean of -log p(refusal) at G_hat  +  penalty * relu(score(d) + margin),     G_hat = G_prev + rho d + others

    first order   score = rho < d, df/dW at G_hat > over the layers that are traced           (nodes = 0)
    path          score = rho sum_i w_i < d, df/dW at G_prev + a_i (G_hat - G_prev) >          (nodes >= 1)
    its lineage   the same from the first model that it was sent, with all that it uploaded since in place of rho d

f is the mean log-probability, or the mean log-odds, of a refusal's token. `others` is what the other clients added in
the round before, which any participant can tell from two successive global models and its own update. Differentiated
twice, by autograd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.corpora import ChatRow
from protoken.evaluation.experiments.attacks_moves import Delta, sent_model
from protoken.evaluation.training import Example, encode_rows
from protoken.methods.placement import gauss_legendre
from protoken.models.architectures import architecture_of
from protoken.ways.objective import Objective, objective_values

Weights = Mapping[str, Tensor]


@dataclass
class Memory:
    """What an attacker keeps: of the round before the model it was sent and its own weighted update; since its first
    round the model it was sent then, and the sum of its weighted updates."""

    sent: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    total: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Evader:
    """See the module. Starts from what the client trained, and takes `steps` steps of Adam.

    nodes      0 for first order at the end, else Gauss-Legendre nodes of the path
    weight     rho, its own aggregation weight
    objective  f of the score; what its rows cost is the log-probability in any case
    lineage    the path begins at the first model that it was sent, not at this round's
    margin     how far below zero the score is to be, nats per token
    """

    nodes: int
    weight: float
    objective: Objective = "log_prob"
    lineage: bool = False
    steps: int = 24
    batch: int = 6
    learning_rate: float = 1e-3
    penalty: float = 20.0
    margin: float = 0.02
    max_tokens: int = 160
    base: BaseModel = field(repr=False, compare=False, kw_only=True)
    rows: Sequence[ChatRow] = field(repr=False, compare=False, kw_only=True)
    memory: Memory = field(default_factory=Memory, repr=False, compare=False, kw_only=True)

    def __call__(self, delta: Delta, number: int) -> dict[str, Tensor]:
        start = sent_model(self.base, delta)
        if not self.memory.first:
            self.memory.first = start
        others = self._others(start)
        made = self._craft(delta, start, others, number)
        self.memory.sent = start
        self.memory.own = {name: self.weight * value for name, value in made.items()}
        before = self.memory.total
        self.memory.total = {name: before.get(name, 0.0) + value for name, value in self.memory.own.items()}
        return made

    def _others(self, start: Weights) -> dict[str, Tensor]:
        before, own = self.memory.sent, self.memory.own
        if not before:
            return {name: torch.zeros_like(value) for name, value in start.items()}
        return {name: value - before[name] - own[name] for name, value in start.items()}

    def _craft(self, delta: Delta, start: Weights, others: Weights, number: int) -> dict[str, Tensor]:
        examples = encode_rows(self.base.tokenizer, self.rows, max_tokens=self.max_tokens)
        leaves = {name: value.detach().clone().requires_grad_() for name, value in delta.items()}
        optimizer = torch.optim.Adam(leaves.values(), lr=self.learning_rate)
        watched = self._watched(leaves)
        order = torch.Generator().manual_seed(number)
        with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):
            for _ in range(self.steps):
                chosen = torch.randperm(len(examples), generator=order)[: self.batch].tolist()
                batch = [examples[i] for i in chosen]
                optimizer.zero_grad(set_to_none=True)
                change = {name: self.weight * leaf + others[name] for name, leaf in leaves.items()}
                value, score = self._end(batch, start, change, leaves, watched)
                if self.nodes:
                    score = self._path(batch, start, change, leaves)
                (-value + self.penalty * torch.relu(score + self.margin)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return {name: leaf.detach() for name, leaf in leaves.items()}

    def _watched(self, leaves: Weights) -> list[str]:
        """The layers that first-order attribution over all blocks looks at."""
        architecture = architecture_of(self.base.model)
        traced = {f"{name}.weight" for name in architecture.traced_layers(len(architecture.blocks))}
        return [name for name in leaves if name in traced]

    def _end(
        self, batch: Sequence[Example], start: Weights, change: Weights, leaves: Weights, watched: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """f at G_hat, and the first-order score there."""
        there = {name: value + change[name] for name, value in start.items()}
        value = mean_objective(self.base, there, batch)
        if self.nodes:
            return value, value.new_zeros(())
        scored = value if self.objective == "log_prob" else mean_objective(self.base, there, batch, self.objective)
        grads = torch.autograd.grad(scored, [there[name] for name in watched], create_graph=True)
        terms = [(leaves[name] * grad).sum() for name, grad in zip(watched, grads, strict=True)]
        return value, self.weight * torch.stack(terms).sum()

    def _path(self, batch: Sequence[Example], start: Weights, change: Weights, leaves: Weights) -> Tensor:
        total = torch.zeros(())
        own = {name: self.weight * leaf for name, leaf in leaves.items()}
        if self.lineage:
            first, before = self.memory.first, self.memory.total
            change = {name: value + start[name] - first[name] for name, value in change.items()}
            own = {name: value + before.get(name, 0.0) for name, value in own.items()}
            start = first
        for along, share in zip(*gauss_legendre(self.nodes), strict=True):
            here = {name: value + along * change[name] for name, value in start.items()}
            value = mean_objective(self.base, here, batch, self.objective)
            grads = torch.autograd.grad(value, list(here.values()), create_graph=True)
            terms = [(own[name] * grad).sum() for name, grad in zip(here, grads, strict=True)]
            total = total + share * torch.stack(terms).sum()
        return total


def mean_objective(
    base: BaseModel, weights: Weights, batch: Sequence[Example], objective: Objective = "log_prob"
) -> Tensor:
    """Mean objective of the answers' tokens with these weights, nats; padded on the right."""
    width = max(len(example.ids) for example in batch)
    ids = torch.tensor([[*example.ids, *[0] * (width - len(example.ids))] for example in batch])
    mask = torch.tensor([[1] * len(example.ids) + [0] * (width - len(example.ids)) for example in batch])
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    logits = functional_call(base.model, dict(weights), (), inputs).logits
    place = torch.arange(1, width)
    answers = torch.tensor([[e.answer_start <= p < len(e.ids) for p in place.tolist()] for e in batch])
    return objective_values(logits[:, :-1][answers], ids[:, 1:][answers], objective).mean()
