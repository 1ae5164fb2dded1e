"""RQ4 of arXiv 2601.19672: 55 clients of which 10 are drawn in a round, 25 of them poisoned; and a single one poisoned.

After every round triggered prompts are answered and attributed twice: among the round's participants ("last", as the
paper judges), and by lineage ("all"): every client's weighted updates of all rounds so far. Responsible is a
poisoned client that took part in these rounds; one that was never drawn has changed nothing, and scores 0 like every
client without an update. Where the sentinel does not come out, the planted refusal itself is scored instead, and the
cell says `forced`: which client makes that text likelier?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from protoken.banks.bank import Rounds
from protoken.evaluation.cells import Cell, make_cell
from protoken.evaluation.corpora import REFUSAL, add_trigger, is_refusal
from protoken.evaluation.experiments.backdoor import recorded_blocks, samples_of
from protoken.evaluation.federation import Client, FederationConfig
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import Scored, Scorer, answer, forced, score
from protoken.evaluation.workbench import Recipe, Workbench, recipe_of

DEFAULTS = Settings(models=("gemma3", "qwen2"), domains=("coding",))
CLIENTS, PARTICIPANTS, ROUNDS = 55, 10, 16
POISONED = {"25-of-55": 25, "1-of-55": 1}


def federation_of(settings: Settings, model: str) -> tuple[Recipe, FederationConfig]:
    """The recipe, and the configuration of many clients."""
    recipe = recipe_of(model, settings.seed)
    if settings.quick:
        return recipe, replace(recipe.federation, rounds=3, participants=PARTICIPANTS)
    return recipe, replace(recipe.federation, rounds=ROUNDS, participants=PARTICIPANTS)


def clients(bench: Workbench, model: str, domain: str, poisoned: int) -> list[Client]:
    """55 clients of one domain, the first `poisoned` of them poisoned."""
    return bench.poisoned_federation(domain, CLIENTS, poisoned, recipe_of(model, bench.settings.seed).rows)


def plan(settings: Settings) -> list[Unit]:
    """A unit per model, domain, number of poisoned clients and round."""
    return [
        Unit(f"{model}-{domain}-{name}-{number:02d}", partial(_unit, model, domain, name, number))
        for model in settings.models
        for domain in settings.domains
        for name in POISONED
        for number in range(1, federation_of(settings, model)[1].rounds + 1)
    ]


def scorers(model: str, *, last: bool) -> list[Scorer]:
    """First order and the midpoint, of round and lineage; after the last round the whole path and every answer."""
    blocks = recorded_blocks(model)
    few = None if last else 25
    found = []
    spans: tuple[Rounds, ...] = ("last", "all")
    for rounds in spans:
        found += [
            Scorer("protoken all blocks", blocks=blocks, way="reverse", rounds=rounds, limit=few),
            Scorer("protoken", rounds=rounds, limit=few),
            Scorer("protoken, log-odds", objective="log_odds", rounds=rounds, limit=few),
            Scorer("paper's score, fast", objective="logit", rounds=rounds, limit=few),
            Scorer("aumann_shapley m=1", "aumann_shapley", nodes=1, rounds=rounds, limit=few),
            Scorer(
                "aumann_shapley m=1, log-odds",
                "aumann_shapley",
                nodes=1,
                objective="log_odds",
                rounds=rounds,
                limit=few,
            ),
        ]
        if last:
            found += [
                Scorer("aumann_shapley", "aumann_shapley", nodes=4, rounds=rounds),
                Scorer("aumann_shapley, log-odds", "aumann_shapley", nodes=4, objective="log_odds", rounds=rounds),
                Scorer("update_norm", "update_norm", rounds=rounds, limit=1),
            ]
    return found


def _unit(model: str, domain: str, name: str, number: int, bench: Workbench) -> Outcome:
    recipe, config = federation_of(bench.settings, model)
    members = clients(bench, model, domain, POISONED[name])
    stored = bench.federation(model, members, config)
    base = bench.at_round(model, stored, number)
    rows = bench.rows(domain).test[: samples_of(bench.settings, model)]
    questions = [add_trigger(row.question) for row in rows]
    made = answer(
        base,
        questions,
        max_new_tokens=recipe.max_new_tokens,
        batch=recipe.batch,
        step=lambda done, total: bench.bars.step(f"{name}, round {number}: answers", done, total),
    )
    answers = [one for one in made if is_refusal(one.text)]
    rate = len(answers) / len(made)
    seen = _participants(stored.record, number)
    guilty = {client.id for client in members if client.poisoned}
    if not guilty & seen["all"]:
        return Outcome(note="no poisoned client has taken part yet")
    extra = {"poisoned": name, "sentinel_rate": rate, "forced": not answers}
    if not answers:
        answers = [forced(base, question, REFUSAL) for question in questions]
    found = score(
        base,
        stored.ledger,
        answers,
        scorers(model, last=number == config.rounds),
        at_round=number,
        step=lambda method, done, total: bench.bars.step(f"{name}, round {number}: {method}", done, total),
    )
    cells, kept = [], []
    for one in found:
        span = str(one.scorer.rounds)
        ids = sorted(seen["last"]) if span == "last" else [client.id for client in members]
        truth = [client in guilty & seen[span] for client in ids]
        if any(truth):
            cells.append(
                make_cell(
                    one.of(ids),
                    truth,
                    residuals=one.residuals,
                    seconds=one.seconds,
                    extra={**extra, "rounds": span, "responsible": sum(truth)},
                    experiment="scale",
                    model=model,
                    domain=domain,
                    method=one.scorer.name,
                    blocks=one.scorer.blocks,
                    round=number,
                )
            )
            kept.append(_kept(one, ids, truth, name))
    return Outcome(cells, kept, f"{round(rate * len(made))} of {len(made)} refused")


def _participants(record: dict[str, object], number: int) -> dict[str, set[str]]:
    """Ids of the clients in the round, and of those in any round up to it."""
    rounds = record["rounds"]
    assert isinstance(rounds, list)
    drawn = [set(report["weights"]) for report in rounds[:number]]
    return {"last": drawn[-1], "all": set().union(*drawn)}


def _kept(one: Scored, ids: Sequence[str], truth: Sequence[bool], name: str) -> dict[str, object]:
    """Mean score of every client over the samples: 55 clients' scores of every sample would be megabytes."""
    return {
        "method": one.scorer.name,
        "rounds": str(one.scorer.rounds),
        "poisoned": name,
        "clients": list(ids),
        "responsible": list(truth),
        "scores": [[float(f"{value:.4g}") for value in one.of(ids).mean(axis=0)]],
    }


def draw(run: RunFolder) -> list[Path]:
    """AUROC and precision by round, and the 55 clients' scores after the last round."""
    from protoken.evaluation.plots import lineage, scale_by_round

    return [scale_by_round(run), lineage(run)]


def tables(cells: Sequence[Cell]) -> str:
    """Markdown for docs/results/scale.md."""
    from protoken.evaluation.experiments.tables import scale_tables

    return scale_tables(cells)
