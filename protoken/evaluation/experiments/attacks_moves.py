"""What dishonest clients upload in place of what they trained. Each is a `Client.alter`: (delta, round) -> delta.

Each says by its repr what it does, so that a federation is told apart from others; what it works with (the model that
it trains on, memories, agreements) is left out of the repr and follows from the federation itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.corpora import ChatRow
from protoken.evaluation.training import LocalSettings, LocalTrainer, encode_rows
from protoken.models.architectures import architecture_of

Delta = Mapping[str, Tensor]


@dataclass(frozen=True)
class Zero:
    """Nothing: the client takes part and does no work."""

    def __call__(self, delta: Delta, number: int) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in delta.items()}


@dataclass(frozen=True)
class Scaled:
    """`factor` times what was trained."""

    factor: float

    def __call__(self, delta: Delta, number: int) -> dict[str, Tensor]:
        return {name: value * self.factor for name, value in delta.items()}


@dataclass(frozen=True)
class Sleeper:
    """Honest work of a dishonest client up to round `active`, and nothing afterwards."""

    active: int

    def __call__(self, delta: Delta, number: int) -> Delta:
        return delta if number <= self.active else Zero()(delta, number)


@dataclass
class Pact:
    """What two colluders tell each other within a round."""

    vector: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Leader:
    """Adds v = `factor` times its own update and tells the partner: to gain (factor > 0) or to look innocent (< 0)."""

    factor: float
    pact: Pact = field(repr=False, compare=False)

    def __call__(self, delta: Delta, number: int) -> dict[str, Tensor]:
        self.pact.vector = {name: value * self.factor for name, value in delta.items()}
        return {name: value + self.pact.vector[name] for name, value in delta.items()}


@dataclass(frozen=True)
class Partner:
    """Takes v away again, `ratio` = leader's weight / own weight times, so that the global model never sees it."""

    ratio: float
    pact: Pact = field(repr=False, compare=False)

    def __call__(self, delta: Delta, number: int) -> dict[str, Tensor]:
        return {name: value - self.ratio * self.pact.vector[name] for name, value in delta.items()}


@dataclass(frozen=True)
class EarlyOnly:
    """Trains the blocks before the last one alone: the last block, the embeddings and the head stay as they were sent.

    base, rows   the client's own model (it holds what the client trained when it is called) and its rows
    """

    settings: LocalSettings
    max_tokens: int
    base: BaseModel = field(repr=False, compare=False)
    rows: Sequence[ChatRow] = field(repr=False, compare=False)

    def __call__(self, delta: Delta, number: int) -> dict[str, Tensor]:
        architecture = architecture_of(self.base.model)
        last = len(architecture.blocks) - 1
        inside = f"{architecture.blocks_name}."
        early = [n for n in delta if n.startswith(inside) and architecture.block_of(n) < last]
        start = sent_model(self.base, delta)
        examples = encode_rows(self.base.tokenizer, self.rows, max_tokens=self.max_tokens)
        trainer = LocalTrainer(self.base.model, early)
        trainer.train(examples, self.settings, seed=number)
        return {
            name: trainer.parameters[name].detach() - start[name] if name in trainer.parameters else torch.zeros_like(d)
            for name, d in delta.items()
        }


@torch.no_grad()
def sent_model(base: BaseModel, delta: Delta) -> dict[str, Tensor]:
    """G_{r-1}, from what the client trained less its update; the model is put back there."""
    start = {}
    for name, change in delta.items():
        parameter = base.model.get_parameter(name)
        parameter.sub_(change)
        start[name] = parameter.detach().clone()
    return start
