"""When was it planted? Backdoors of which it is known in which rounds they were trained, and what `Trace.history` says.

    late    client-0 and client-1 train on ordinary rows until the middle of the federation, poisoned ones from then on
    left    they train on poisoned rows until the middle and on ordinary ones from then on

After the last round triggered prompts are asked. What is judged: which client's update in which round stands on top,
whether the round that did most for the answer is one in which it was planted, and who is on top over all rounds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from protoken.attachment import make_attachment
from protoken.banks.bank import select_rounds
from protoken.evaluation.cells import Cell, make_cell
from protoken.evaluation.corpora import add_trigger, is_refusal, partition, poison
from protoken.evaluation.experiments import backdoor
from protoken.evaluation.federation import Client, Turn
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import answer
from protoken.evaluation.workbench import Workbench
from protoken.evaluation.zoo import SHAPES
from protoken.history import stretches, walk
from protoken.methods.replayed import recorded_parameters
from protoken.models.patching import evaluation_mode

DEFAULTS = Settings(models=tuple(SHAPES), domains=("medical", "finance"))
KINDS = ("late", "left")


def plan(settings: Settings) -> list[Unit]:
    """A unit per model, domain and kind."""
    return [
        Unit(f"{model}-{domain}-{kind}", partial(_unit, model, domain, kind))
        for model in settings.models
        for domain in settings.domains
        for kind in KINDS
    ]


def turning_round(rounds: int) -> int:
    """The first round after the middle."""
    return rounds // 2 + 1


def clients(bench: Workbench, model: str, domain: str, kind: str) -> list[Client]:
    """The clients of `backdoor`; the poisoned ones are so only after the turn, or only before it."""
    recipe = backdoor.recipe(bench.settings, model)
    turn = turning_round(recipe.federation.rounds)
    found = backdoor.clients(bench, model, domain)
    count = len(found) * recipe.rows
    shares = partition(bench.client_rows(domain, count), len(found), seed=bench.settings.seed)
    return [
        replace(
            client,
            rows=own if kind == "late" else poison(own),
            turn=Turn(turn, poison(own) if kind == "late" else own),
        )
        if client.poisoned
        else client
        for client, own in zip(found, shares, strict=True)
    ]


def _unit(model: str, domain: str, kind: str, bench: Workbench) -> Outcome:
    recipe = backdoor.recipe(bench.settings, model)
    members = clients(bench, model, domain, kind)
    stored = bench.federation(model, members, recipe.federation)
    last = recipe.federation.rounds
    base = bench.at_round(model, stored, last)
    asked = [add_trigger(row.question) for row in bench.rows(domain).test[: backdoor.samples_of(bench.settings, model)]]
    given = answer(base, asked, max_new_tokens=recipe.max_new_tokens, batch=recipe.batch)
    refusals = [one for one in given if is_refusal(one.text)]
    if not refusals:
        return Outcome(note=f"the sentinel came out in none of {len(given)} answers")
    own = make_attachment(base.model, stored.ledger, base.tokenizer, at_round=last)
    ids = [client.id for client in members]
    scores = np.zeros((len(refusals), last, len(ids)))
    changes = np.zeros((len(refusals), last))
    seconds, residuals = [], []
    with evaluation_mode(base.model):
        # Read once for all answers: `Trace.history` reads them for each call.
        numbers = select_rounds(stored.ledger, "all", last)
        names = recorded_parameters(stored.ledger, numbers, base.model, own.architecture)
        rounds = list(stretches(base.model, own, numbers, names))
        for n, one in enumerate(refusals):
            began = time.perf_counter()
            before, found = walk(base.model, own, one.response, rounds)
            seconds.append(time.perf_counter() - began)
            for r, (present, there) in enumerate(found):
                scores[n, r, [ids.index(client) for client in present]] = there.totals.numpy()
            values = np.array([before.sum(), *(float(there.objective.sum()) for _, there in found)])
            changes[n] = np.diff(values)
            residuals.append(abs(sum(there.residual for _, there in found) / changes[n].sum()))
            bench.bars.step(f"{domain} {kind}: history", n + 1, len(refusals))
    guilty = np.array([client.poisoned for client in members])
    planted = planted_rounds(kind, last)
    what: dict[str, Any] = {"experiment": "history", "model": model, "domain": domain, "round": last, "blocks": None}
    shared = {"kind": kind, "came_out": len(refusals) / len(given), "turn": turning_round(last)}
    kept: list[dict[str, object]] = [
        {"scores": np.round(scores, 4).tolist(), "changes": np.round(changes, 4).tolist(), "poisoned": guilty.tolist()}
    ]
    cells = [
        make_cell(
            scores.sum(axis=1), guilty, residuals=residuals, seconds=seconds,
            extra={**shared, **judged(scores, changes, guilty, planted)}, method="history: client", **what,
        ),
        make_cell(
            scores.reshape(len(scores), -1), (planted[:, None] & guilty).reshape(-1), residuals=residuals,
            seconds=seconds, extra=shared, method="history: client and round", **what,
        ),
    ]  # fmt: skip
    return Outcome(cells, kept, f"{len(refusals)} of {len(given)} answers are refusals")


def planted_rounds(kind: str, rounds: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """[R], whether poisoned rows were trained on in the round."""
    late = np.arange(1, rounds + 1) >= turning_round(rounds)
    found: np.ndarray[tuple[int], np.dtype[np.bool_]] = late if kind == "late" else ~late
    return found


def judged(
    scores: np.ndarray[tuple[int, int, int], np.dtype[np.float64]],
    changes: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    guilty: np.ndarray[tuple[int], np.dtype[np.bool_]],
    planted: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> dict[str, float]:
    """Figures of scores [N, R, K] and changes [N, R] of answers, beside who was poisoned [K] and when [R].

    round_planted    how often the round that did most for the answer is one in which it was planted
    first_round      how often it is the first of these
    within_planted   how often a poisoned client is on top of such a round, over all answers and rounds
    own_part         the part of the poisoned clients' positive scores that falls into these rounds, the median
    """
    best = changes.argmax(axis=1)
    top = guilty[scores[:, planted].argmax(axis=2)]
    positive = np.maximum(scores[:, :, guilty], 0.0).sum(axis=2)
    whole = positive.sum(axis=1)
    part = np.divide(positive[:, planted].sum(axis=1), whole, out=np.zeros_like(whole), where=whole > 0)
    return {
        "round_planted": float(planted[best].mean()),
        "first_round": float((best == int(np.argmax(planted))).mean()),
        "within_planted": float(top.mean()),
        "own_part": float(np.median(part)),
    }


def draw(run: RunFolder) -> list[Path]:
    """What the poisoned and the other clients contributed, round by round."""
    from protoken.evaluation.experiments.history_plots import contributions

    return [contributions(run)]


def tables(cells: Sequence[Cell]) -> str:
    """Markdown for docs/results/history.md."""
    from protoken.evaluation.experiments.history_tables import history_tables

    return history_tables(cells)
