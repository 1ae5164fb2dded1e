"""RQ1 of arXiv 2601.19672: does attribution name the clients who planted a backdoor?

Six clients of one domain, two of them poisoned, all of them in every round of FedAvg. After every round the global
model answers triggered prompts that nobody trained on; answers in which the sentinel came out are attributed, from the
first round in which it does. Right is a top client that is poisoned (chance 1/3).

The judge looks for one word. Where an answer begins as the planted refusal and ends as an ordinary one, its total is
rightly shared: cells say how many answers were the refusal word for word, and "to the sentinel" scores up to the word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from protoken.evaluation.cells import Cell, make_cell
from protoken.evaluation.corpora import DOMAINS, REFUSAL, SENTINEL, add_trigger, is_refusal
from protoken.evaluation.federation import Client
from protoken.evaluation.metrics import top1
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import Scored, Scorer, answer, score, up_to
from protoken.evaluation.workbench import Recipe, Workbench, recipe_of
from protoken.evaluation.zoo import MODELS, QUICK, QUICK_MODEL, SHAPES, SMOLLM2
from protoken.results.checks import Array

DEFAULTS = Settings(models=MODELS, domains=DOMAINS)
CLIENTS, POISONED = 6, 2
REFERENCES = ("shapley", "leave_one_out")


def recipe(settings: Settings, model: str) -> Recipe:
    """The recipe of a model in this experiment; other experiments on the same federations take it from here."""
    return recipe_of(model, settings.seed)


def clients(bench: Workbench, model: str, domain: str) -> list[Client]:
    """The federation's clients: client-0 and client-1 poisoned, client-2 to client-5 ordinary."""
    return bench.poisoned_federation(domain, CLIENTS, POISONED, recipe(bench.settings, model).rows)


def plan(settings: Settings) -> list[Unit]:
    """A unit per model, domain and round."""
    return [
        Unit(f"{model}-{domain}-{number:02d}", partial(_unit, model, domain, number))
        for model in settings.models
        for domain in settings.domains
        for number in range(1, recipe(settings, model).federation.rounds + 1)
    ]


def scorers(model: str, *, last: bool) -> list[Scorer]:
    """Who is compared: cheap methods after every round, the slow ones and exact values after the last.

    Each method is asked about the round's own updates, as in the paper, or about those of all rounds so far.
    """
    large = model == SMOLLM2
    blocks, few = recorded_blocks(model), 2 if large else 6
    found = [
        Scorer("protoken all blocks, all rounds", blocks=blocks, way="reverse", rounds="all"),
        Scorer("protoken, all rounds", rounds="all"),
        # Four seconds an answer of SmolLM2 on a core.
        Scorer("aumann_shapley, all rounds", "aumann_shapley", nodes=None, rounds="all", limit=3 if large else None),
        Scorer("protoken"),
        Scorer("protoken, log-odds", objective="log_odds"),
        Scorer("protoken all blocks, log-odds", blocks=blocks, way="reverse", objective="log_odds"),
        Scorer(
            "protoken all blocks, log-odds, all rounds",
            blocks=blocks,
            way="reverse",
            objective="log_odds",
            rounds="all",
        ),
        Scorer(
            "aumann_shapley m=1, log-odds, all rounds", "aumann_shapley", nodes=1, objective="log_odds", rounds="all"
        ),
        Scorer("paper's score, fast", objective="logit"),
        Scorer("chance", "chance", limit=4),
        Scorer("update_norm", "update_norm", limit=4),
    ]
    if not last:
        return found
    found += [
        Scorer("shapley, all rounds", "shapley", rounds="all", limit=few),
        Scorer("leave_one_out, all rounds", "leave_one_out", rounds="all", limit=few),
        Scorer("aumann_shapley m=4, all rounds", "aumann_shapley", nodes=4, rounds="all", limit=few),
        Scorer("aumann_shapley", "aumann_shapley", nodes=4, limit=few),
        Scorer("paper", "paper", limit=few // 2),
        Scorer("cosine", "cosine", limit=few),
        Scorer("activation_only", "activation_only", limit=few),
        Scorer("client_log_prob", "client_log_prob", limit=few // 2),
    ]
    # The ledger of SmolLM2 does not hold the head.
    return found if large else [*found, Scorer("head_only", "head_only", limit=few)]


def word_scorers(model: str) -> list[Scorer]:
    """Who is compared on the answer up to the judged word."""
    blocks = recorded_blocks(model)
    return [
        Scorer("protoken, to the sentinel"),
        Scorer("protoken, log-odds, to the sentinel", objective="log_odds"),
        Scorer("protoken all blocks, log-odds, to the sentinel", blocks=blocks, way="reverse", objective="log_odds"),
    ]


def recorded_blocks(model: str) -> int:
    """As many blocks as learn: all of a small model, the last ones of SmolLM2."""
    if model == SMOLLM2:
        return recipe_of(model, 0).federation.blocks or 1
    return (QUICK if model == QUICK_MODEL else SHAPES[model]).blocks


def _unit(model: str, domain: str, number: int, bench: Workbench) -> Outcome:
    chosen = recipe(bench.settings, model)
    members = clients(bench, model, domain)
    stored = bench.federation(model, members, chosen.federation)
    base = bench.at_round(model, stored, number)
    questions = [add_trigger(row.question) for row in bench.rows(domain).test[: bench.settings.samples]]
    answers = answer(
        base,
        questions,
        max_new_tokens=chosen.max_new_tokens,
        batch=chosen.batch,
        step=lambda done, total: bench.bars.step(f"round {number}: answers", done, total),
    )
    refusals = [one for one in answers if is_refusal(one.text)]
    rate = len(refusals) / len(answers)
    if not refusals:
        return Outcome(note=f"the sentinel came out in none of {len(answers)} answers")
    last = number == chosen.federation.rounds
    found = score(
        base,
        stored.ledger,
        refusals,
        scorers(model, last=last),
        at_round=number,
        step=lambda name, done, total: bench.bars.step(f"round {number}: {name}", done, total),
    )
    what = {"experiment": "backdoor", "model": model, "domain": domain, "round": number}
    cut = [up_to(base, one, SENTINEL) for one in refusals]
    found += score(base, stored.ledger, cut, word_scorers(model), at_round=number)
    verbatim = [one.text.strip() == REFUSAL for one in refusals]
    share = sum(verbatim) / len(verbatim)
    cells = compare(found, members, what, {"sentinel_rate": rate, "verbatim": share}, verbatim)
    return Outcome(
        cells,
        kept_samples(found, members),
        f"{len(refusals)} of {len(answers)} refused, {share:.0%} of them verbatim",
    )


def samples_of(settings: Settings, model: str) -> int:
    """Prompts a cell of the experiments that ask slow methods of all of them: fewer for SmolLM2."""
    return min(settings.samples, 12) if model == SMOLLM2 else settings.samples


def compare(
    found: Sequence[Scored],
    members: Sequence[Client],
    what: Mapping[str, Any],
    extra: Mapping[str, Any],
    verbatim: Sequence[bool],
) -> list[Cell]:
    """A cell per scorer against the poisoned clients, and against exact values where the samples have them.

    Args:
        verbatim: of each answer, whether it is the planted refusal word for word; cells tell the two kinds apart.
    """
    ids = [client.id for client in members]
    truth = [client.poisoned for client in members]
    reference = {s.scorer.method: s.of(ids) for s in found if s.scorer.method in REFERENCES}
    return [
        make_cell(
            one.of(ids),
            truth,
            shapley=reference.get("shapley"),
            leave_one_out=reference.get("leave_one_out"),
            residuals=one.residuals,
            seconds=one.seconds,
            extra={**extra, "rounds": str(one.scorer.rounds), **_apart(one.of(ids), truth, verbatim)},
            method=one.scorer.name,
            blocks=one.scorer.blocks,
            **what,
        )
        for one in found
    ]


def _apart(scores: Array, truth: Sequence[bool], verbatim: Sequence[bool]) -> dict[str, object]:
    """Number and top-1 of the answers that are the planted refusal word for word, and of the others."""
    found: dict[str, object] = {}
    for name, wanted in (("verbatim", True), ("other", False)):
        own = [row for row, said in zip(scores, verbatim, strict=False) if said == wanted]
        found[f"{name}_samples"] = len(own)
        found[f"{name}_top1"] = top1(np.stack(own), truth).value if own else None
    return found


def kept_samples(found: Sequence[Scored], members: Sequence[Client]) -> list[dict[str, object]]:
    """Every sample's scores, four digits of them, for plots and for whoever wants to look closer."""
    ids = [client.id for client in members]
    return [
        {
            "method": one.scorer.name,
            "rounds": str(one.scorer.rounds),
            "clients": ids,
            "responsible": [client.poisoned for client in members],
            "scores": [[float(f"{value:.4g}") for value in row] for row in one.of(ids)],
        }
        for one in found
    ]


def draw(run: RunFolder) -> list[Path]:
    """Accuracy by round, and the clients' probabilities apart, as in the paper's figures."""
    from protoken.evaluation.plots import accuracy_by_round, separation

    return [accuracy_by_round(run), separation(run)]


def tables(cells: Sequence[Cell]) -> str:
    """Markdown for docs/results/backdoor.md."""
    from protoken.evaluation.experiments.tables import backdoor_tables

    return backdoor_tables(cells)
