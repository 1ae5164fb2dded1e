"""What the ablation compares: blocks by themselves and together, with and without gradient, nodes of the path, samples.

Every variant is a scorer and what tells it from the others in the results. Costs are given in forward passes over all
that moves, a gradient counted as three (one forward, and a backward of twice its work).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from protoken.banks.bank import Rounds
from protoken.evaluation.scoring import Scorer
from protoken.models.architectures import Architecture
from protoken.ways.objective import Objective

OBJECTIVES: dict[str, Objective] = {"": "log_prob", ", log-odds": "log_odds"}
"""What is compared with the exact values of the same objective, by the suffix of its name."""
NODES = (1, 2, 4, 8)
PAIRS = (0, None)
GRADIENT = 3


@dataclass(frozen=True)
class Variant:
    """A scorer, and its place in the ablation.

    study    "block" (one block by itself), "blocks" (the last n together) or "cost" (agreement against cost)
    block    number of the only traced block, from 0, or None
    gradient whether the score is weighted by the gradient
    passes   forward passes it costs, or None where it is not a matter of passes over everything that moves
    """

    scorer: Scorer
    study: str
    block: int | None = None
    gradient: bool = True
    passes: int | None = None
    extra: dict[str, object] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """Keys for a cell, beside the harness's own."""
        return {
            "study": self.study,
            "block": self.block,
            "gradient": self.gradient,
            "objective": self.scorer.objective or "log_prob",
            "rounds": str(self.scorer.rounds),
            "nodes": self.scorer.nodes,
            "forward_passes": self.passes,
            **self.extra,
        }


def variants(
    architecture: Architecture, numbers: Sequence[int], clients: int, rounds: Rounds, few: int
) -> list[Variant]:
    """All of them, the references last.

    Args:
        numbers: the blocks whose weights are on record, ascending.
        few: samples for what is compared with exact values, and for these.
    """
    found = _single(architecture, numbers, rounds)
    for suffix, objective in OBJECTIVES.items():
        shared = {"rounds": rounds, "objective": objective}
        found += _together(len(numbers), suffix, shared)
        found += _cost(len(numbers), clients, suffix, {**shared, "limit": few})
    return found


def _single(architecture: Architecture, numbers: Sequence[int], rounds: Rounds) -> list[Variant]:
    """Each block by itself: its out-projection and its MLP's last layer, by every objective and without gradient."""
    reach = len(architecture.blocks)
    weightings: dict[str, Objective] = {"log-probability": "log_prob", "log-odds": "log_odds", "logit": "logit"}
    found = []
    for number in numbers:
        layers = tuple(
            architecture.layer_name(number, name)
            for name in (architecture.out_projection, architecture.final_of(number))
        )
        where: dict[str, Any] = {"blocks": reach, "layers": layers, "rounds": rounds}
        for name, objective in weightings.items():
            found.append(
                Variant(Scorer(f"block, {name}", way="reverse", objective=objective, **where), "block", number)
            )
        plain = Scorer("block, activation only", "activation_only", **where)
        found.append(Variant(plain, "block", number, gradient=False))
    return found


def _together(count: int, suffix: str, shared: Mapping[str, Any]) -> list[Variant]:
    """The last n blocks, for every n, and every linear layer of all blocks."""
    found = [
        Variant(Scorer(f"last {n} blocks{suffix}", blocks=n, way="reverse", **shared), "blocks")
        for n in range(1, count + 1)
    ]
    every = Scorer(f"every linear layer{suffix}", blocks=count, layers=("*",), way="reverse", **shared)
    return [*found, Variant(every, "blocks")]


def _cost(count: int, clients: int, suffix: str, shared: Mapping[str, Any]) -> list[Variant]:
    """Everything that moves, by the path's nodes and the sampled coalitions; the path over fewer layers, too."""
    found = [
        Variant(Scorer(f"path, m = {m}{suffix}", "aumann_shapley", nodes=m, **shared), "cost", passes=GRADIENT * m)
        for m in NODES
    ]
    found += [
        Variant(Scorer(f"path, last {n} blocks{suffix}", "aumann_shapley", nodes=4, blocks=n, **shared), "cost")
        for n in sorted({1, count})
    ]
    for pairs in PAIRS:
        sampled = clients if pairs is None else pairs
        scorer = Scorer(f"paired, {sampled} pairs{suffix}", "paired_shapley", pairs=pairs, **shared)
        found.append(Variant(scorer, "cost", passes=min(2 * clients + 2 + 2 * sampled, 2**clients)))
    return [
        *found,
        Variant(Scorer(f"leave_one_out{suffix}", "leave_one_out", **shared), "cost", passes=clients + 2),
        Variant(Scorer(f"shapley{suffix}", "shapley", **shared), "cost", passes=2**clients),
    ]
