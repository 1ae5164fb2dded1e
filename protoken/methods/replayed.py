"""The methods that replay the finished response at other weights, by name: what each moves and who computes it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from protoken.errors import ArgumentError, LayerError
from protoken.ledger import Ledger
from protoken.methods.aumann_shapley import aumann_shapley_scores
from protoken.methods.baselines import BASELINES, baseline_scores
from protoken.methods.game import Game
from protoken.methods.leave_one_out import leave_one_out_scores
from protoken.methods.paired_shapley import paired_shapley_scores
from protoken.methods.placement import gauss_legendre
from protoken.methods.shapley import shapley_scores
from protoken.methods.updates import Updates
from protoken.models.adapters import recorded_as
from protoken.models.architectures import Architecture
from protoken.models.layers import layer_of
from protoken.models.parameters import parameter_of
from protoken.ways.objective import Objective
from protoken.ways.projection import Scores
from protoken.ways.relevance import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPLAYED = ("aumann_shapley", "shapley", "paired_shapley", "leave_one_out", *BASELINES)
"""Everything but the first-order methods, which work on what was captured while the model generated."""

TRACED_LAYERS_ONLY = ("activation_only",)
"""Baselines about layers' inputs: without a choice they look at the layers that the first-order methods trace."""


@dataclass(frozen=True)
class Settings:
    """How a replayed method computes.

    nodes: Gauss-Legendre nodes of aumann_shapley, None for as many as the path asks for.
    pairs: sampled pairs of shapley (orders) and paired_shapley (coalitions), None for their defaults.
    per_token: aumann_shapley by the forward way. seed: of the sampled orders.
    """

    nodes: int | None = None
    pairs: int | None = None
    per_token: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.nodes is not None:
            gauss_legendre(self.nodes)
        if self.pairs is not None and (type(self.pairs) is not int or self.pairs < 0):
            raise ArgumentError("pairs", expected="a whole number of 0 or more, or None", got=self.pairs)


def moving_parameters(
    method: str,
    ledger: Ledger,
    rounds: Sequence[int],
    model: nn.Module,
    architecture: Architecture,
    blocks: int | None,
    layers: list[str] | None,
) -> tuple[str, ...]:
    """The parameters in a method's game: `recorded_parameters`, or what the method looks at by itself.

    Raises:
        LayerError: the rounds have no parameter in common, or no head, for head_only.
    """
    if method == "head_only":
        return (_head_parameter(model, architecture, _in_every_round(ledger, rounds)),)
    if blocks is None and layers is None and method in TRACED_LAYERS_ONLY:
        blocks = 1
    return recorded_parameters(ledger, rounds, model, architecture, blocks, layers)


def recorded_parameters(
    ledger: Ledger,
    rounds: Sequence[int],
    model: nn.Module,
    architecture: Architecture,
    blocks: int | None = None,
    layers: list[str] | None = None,
) -> tuple[str, ...]:
    """All that every one of the rounds holds, or of that the traced layers of some blocks, or layers by pattern.

    Raises:
        LayerError: the rounds have no parameter in common, or do not hold a layer.
    """
    recorded = _in_every_round(ledger, rounds)
    if blocks is None and layers is None:
        return _in_the_models_order(model, recorded)
    if blocks is None:
        blocks = len(architecture.blocks)
    found = [
        recorded_as(model, layer_of(model, name), recorded, f"rounds {list(rounds)}").names
        for name in architecture.traced_layers(blocks, layers)
    ]
    return tuple(dict.fromkeys(name for names in found for name in names))


def replayed_scores(
    method: str,
    model: PreTrainedModel,
    architecture: Architecture,
    response: Response,
    updates: Updates,
    ledger: Ledger,
    *,
    objective: Objective = "log_prob",
    settings: Settings | None = None,
    backend: str = "auto",
) -> Scores:
    """Scores of a finished response by one of `REPLAYED`.

    Args:
        model: the global model G, in evaluation mode.
        updates: what moves, from `read_updates`.
    """
    settings = settings or Settings()
    if response.new_tokens == 0:
        return Scores.empty(len(updates.names), len(updates.clients))
    game = Game(model, architecture, response, updates, objective)
    if method == "aumann_shapley":
        return aumann_shapley_scores(game, settings.nodes, per_token=settings.per_token, backend=backend)
    if method == "shapley":
        return shapley_scores(game, pairs=settings.pairs, seed=settings.seed)
    if method == "paired_shapley":
        return paired_shapley_scores(game, pairs=settings.pairs, seed=settings.seed)
    if method == "leave_one_out":
        return leave_one_out_scores(game, ledger)
    return baseline_scores(method, game, ledger)


def _in_every_round(ledger: Ledger, rounds: Sequence[int]) -> set[str]:
    held = {number: set(ledger.round(number).parameters) for number in rounds}
    common = set.intersection(*held.values())
    if not common:
        first, other = next((a, b) for a, b in itertools.pairwise(held) if held[a] != held[b])
        raise LayerError(
            "rounds",
            expected="rounds that record some parameter in common, to move it over all of them",
            got=f"none in {list(rounds)}: round {first} has {min(held[first])}, round {other} {min(held[other])}",
            remedy="Ask about the rounds one by one, rounds=1, say",
        )
    return common


def _in_the_models_order(model: nn.Module, recorded: set[str]) -> tuple[str, ...]:
    """Recorded names; a tied weight is one parameter under two names, and moves once. What the model lacks comes last,
    so that reading it is refused by name."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    own = {name: parameter_of(model, name, tensors) for name in sorted(recorded)}
    place = {name: index for index, name in enumerate(tensors)}
    ordered = sorted(own, key=lambda name: place.get(own[name] or "", len(place)))
    seen: set[int] = set()
    kept = []
    for name in ordered:
        inside = own[name]
        if inside is None or id(tensors[inside]) not in seen:
            kept.append(name)
            seen.add(id(tensors[inside]) if inside is not None else 0)
    return tuple(kept)


def _head_parameter(model: nn.Module, architecture: Architecture, recorded: set[str]) -> str:
    weight = architecture.head.weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is weight and name in recorded:
            return name
    raise LayerError(
        "layers",
        expected="a ledger that holds the output head, which head_only looks at",
        got=f"{len(recorded)} recorded parameters without it",
        remedy="Record the head when committing rounds, or use another method",
    )
