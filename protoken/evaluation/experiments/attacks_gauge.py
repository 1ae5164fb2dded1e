"""The same low-rank update in other factors: (M A, B / M) is what (A, B) is, and must be given the same score."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.cells import make_cell
from protoken.evaluation.corpora import REFUSAL, add_trigger
from protoken.evaluation.experiments.attacks_arena import ATTACKER, Arena, attack_of
from protoken.evaluation.experiments.backdoor import recorded_blocks
from protoken.evaluation.metrics import Array
from protoken.evaluation.runs import Outcome
from protoken.evaluation.scoring import Scorer, forced, score
from protoken.evaluation.workbench import Workbench
from protoken.ledger import ClientUpdate, Ledger, LowRank, Round

RANK, PROMPTS, FACTOR = 4, 6, 100.0


def gauge_unit(model: str, domain: str, scorers: Callable[..., list[Scorer]], bench: Workbench) -> Outcome:
    """The undisguised attacker's last update as factors of rank 4, in two gauges; refusals scored under both.

    A cell per method: `gauge_difference` = max |s' - s| / max |s| over answers and clients.
    """
    arena = Arena(bench, model, domain)
    members = attack_of("poison").members(arena)
    stored = bench.federation(model, members, arena.config)
    number = arena.config.rounds
    record = stored.ledger.round(number)
    base = bench.at_round(model, stored, number - 1)
    names = tuple(record.parameters)
    start = {name: base.model.get_parameter(name).detach().clone() for name in names}
    questions = [row.question for row in bench.rows(domain).test[:PROMPTS]]
    answers = [forced(base, add_trigger(question), REFUSAL) for question in questions]
    chosen = [scorer for scorer in scorers(recorded_blocks(model)) if scorer.rounds == "last"]
    factors = _factors(record, [n for n in names if len(record.parameters[n].shape) == 2])
    end = {n: v + _mean(record, n, factors) for n, v in start.items()}
    with tempfile.TemporaryDirectory() as folder:
        _put(base, end)
        pair = []
        for place, gauge in enumerate((factors, _turned(factors))):
            ledger = _commit(Path(folder) / str(place), record, start, end, gauge)
            pair.append(score(base, ledger, answers, chosen, at_round=1))
        _put(base, start)
    ids = [client.id for client in members]
    truth = [client.id == ATTACKER for client in members]
    cells = [
        make_cell(
            after.of(ids),
            truth,
            residuals=after.residuals,
            seconds=after.seconds,
            extra={
                "attack": "gauge",
                "goal": "blame",
                "description": f"the same update in factors scaled by {FACTOR:g} and rotated",
                "gauge_difference": _difference(before.of(ids), after.of(ids)),
            },
            experiment="attacks",
            model=model,
            domain=domain,
            method=before.scorer.name,
            blocks=before.scorer.blocks,
            round=number,
        )
        for before, after in zip(*pair, strict=True)
    ]
    worst = max(float(cell.extra["gauge_difference"]) for cell in cells)
    return Outcome(cells, note=f"largest difference {worst:.1e}")


def _factors(record: Round, names: list[str]) -> dict[str, LowRank]:
    """The attacker's update of these matrices, cut to rank 4."""
    found = {}
    for name, delta in record.deltas(ATTACKER, names):
        u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
        root = s[:RANK].sqrt()
        found[name] = LowRank(root[:, None] * v[:RANK], u[:, :RANK] * root)
    return found


def _turned(factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """(M A, B M^-1) with M a rotation times a factor."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, pair in factors.items():
        rotation, _ = torch.linalg.qr(torch.randn(pair.rank, pair.rank, generator=generator, dtype=torch.float64))
        a, b = FACTOR * rotation @ pair.a.double(), pair.b.double() @ rotation.T / FACTOR
        found[name] = LowRank(a.float(), b.float(), pair.scale)
    return found


def _mean(record: Round, name: str, factors: Mapping[str, LowRank]) -> Tensor:
    total = torch.zeros(tuple(record.parameters[name].shape))
    for client in record.clients:
        own = client.client == ATTACKER and name in factors
        delta = factors[name].dense() if own else record.delta(client.client, name)
        total.add_(delta.float(), alpha=client.weight)
    return total


def _commit(
    folder: Path, record: Round, start: dict[str, Tensor], end: dict[str, Tensor], factors: dict[str, LowRank]
) -> Ledger:
    """One round with the attacker's factors in place of its matrices."""
    updates = []
    for client in record.clients:
        delta: dict[str, Any] = {name: record.delta(client.client, name) for name in start}
        if client.client == ATTACKER:
            delta.update(factors)
        updates.append(ClientUpdate(client.client, client.weight, delta=delta))
    ledger = Ledger.create(folder)
    ledger.commit_round(start, end, updates)
    return ledger


@torch.no_grad()
def _put(base: BaseModel, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        base.model.get_parameter(name).copy_(value)


def _difference(before: Array, after: Array) -> float:
    return float(np.abs(after - before).max() / np.abs(before).max())
