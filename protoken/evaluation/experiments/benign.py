"""Ordinary answers: is the answer to a finance question attributed to the client who taught finance?

Every client holds another domain and nobody is poisoned, with equal and with very unequal numbers of rows. The global
model of the last round answers questions nobody trained on; the client of the question's domain is held responsible.
What each method says is also compared with the exact Shapley values of the same answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from protoken.bank import Rounds
from protoken.evaluation.cells import Cell, make_cell
from protoken.evaluation.corpora import DOMAINS
from protoken.evaluation.experiments.backdoor import REFERENCES, recorded_blocks, samples_of
from protoken.evaluation.federation import Client, FederationConfig
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import Scored, Scorer, answer, score
from protoken.evaluation.workbench import Recipe, Workbench, recipe_of
from protoken.evaluation.zoo import MODELS

DEFAULTS = Settings(models=MODELS, domains=DOMAINS, samples=20)
ROUNDS = 4
SHARES = {"equal": (1.0, 1.0, 1.0, 1.0), "unequal": (0.25, 0.5, 1.0, 2.0)}
"""Rows of the clients of medical, finance, math and coding, in units of the recipe's."""


def federation_of(settings: Settings, model: str) -> tuple[Recipe, FederationConfig]:
    """The recipe, and the configuration with this experiment's number of rounds."""
    recipe = recipe_of(model, settings.seed)
    return recipe, replace(recipe.federation, rounds=ROUNDS)


def clients(bench: Workbench, model: str, sizes: str) -> list[Client]:
    """A client per domain, named after it."""
    rows = recipe_of(model, bench.settings.seed).rows
    counts = {domain: max(round(rows * share), 1) for domain, share in zip(DOMAINS, SHARES[sizes], strict=True)}
    return [Client(domain, bench.client_rows(domain, counts[domain]), label=domain) for domain in DOMAINS]


def plan(settings: Settings) -> list[Unit]:
    """A unit per model, sizes and domain of the questions."""
    return [
        Unit(f"{model}-{sizes}-{domain}", partial(_unit, model, sizes, domain))
        for model in settings.models
        for sizes in SHARES
        for domain in settings.domains
    ]


def scorers(model: str) -> list[Scorer]:
    """Every method over the whole lineage, and the first-order ones over the last round, too."""
    blocks = recorded_blocks(model)
    whole: Rounds = "all"
    return [
        Scorer("shapley", "shapley", rounds=whole),
        Scorer("leave_one_out", "leave_one_out", rounds=whole),
        Scorer("paired_shapley", "paired_shapley", rounds=whole),
        Scorer("aumann_shapley", "aumann_shapley", rounds=whole),
        Scorer("protoken", rounds=whole),
        Scorer("protoken all blocks", blocks=blocks, way="reverse", rounds=whole),
        Scorer("protoken all linear layers", blocks=blocks, layers=("*",), way="reverse", rounds=whole),
        Scorer("paper's score, fast", objective="logit", rounds=whole),
        Scorer("update_norm", "update_norm", rounds=whole),
        Scorer("cosine", "cosine", rounds=whole),
        Scorer("protoken, last round"),
        Scorer("protoken all blocks, last round", blocks=blocks, way="reverse"),
        Scorer("paper, last round", "paper", limit=2),
    ]


def _unit(model: str, sizes: str, domain: str, bench: Workbench) -> Outcome:
    recipe, config = federation_of(bench.settings, model)
    members = clients(bench, model, sizes)
    stored = bench.federation(model, members, config)
    base = bench.at_round(model, stored, config.rounds)
    rows = bench.rows(domain).test[: samples_of(bench.settings, model)]
    answers = answer(
        base,
        [row.question for row in rows],
        max_new_tokens=recipe.max_new_tokens,
        batch=recipe.batch,
        step=lambda done, total: bench.bars.step(f"{sizes} {domain}: answers", done, total),
    )
    found = score(
        base,
        stored.ledger,
        answers,
        scorers(model),
        at_round=config.rounds,
        step=lambda name, done, total: bench.bars.step(f"{sizes} {domain}: {name}", done, total),
    )
    ids = [client.id for client in members]
    extra = {"sizes": sizes, "weight": stored.record["rounds"][-1]["weights"][domain]}
    cells = [_cell(one, found, ids, domain, model, config.rounds, extra) for one in found]
    kept = [
        {
            "method": one.scorer.name,
            "clients": ids,
            "responsible": [client == domain for client in ids],
            "scores": [[float(f"{value:.4g}") for value in row] for row in one.of(ids)],
        }
        for one in found
    ]
    same = sum(one.text.strip() == row.answer.strip() for one, row in zip(answers, rows, strict=True))
    return Outcome(cells, kept, f"{same} of {len(answers)} answered word for word")


def _cell(
    one: Scored, found: list[Scored], ids: list[str], domain: str, model: str, number: int, extra: dict[str, object]
) -> Cell:
    """Against the exact values of the same rounds."""
    same = {
        s.scorer.method: s.of(ids)
        for s in found
        if s.scorer.method in REFERENCES and s.scorer.rounds == one.scorer.rounds
    }
    return make_cell(
        one.of(ids),
        [client == domain for client in ids],
        shapley=same.get("shapley"),
        leave_one_out=same.get("leave_one_out"),
        residuals=one.residuals,
        seconds=one.seconds,
        extra={**extra, "rounds": str(one.scorer.rounds)},
        experiment="benign",
        model=model,
        domain=domain,
        method=one.scorer.name,
        blocks=one.scorer.blocks,
        round=number,
    )


def draw(run: RunFolder) -> list[Path]:
    """How often the domain's client is on top, and how close scores come to Shapley values, by method."""
    from protoken.evaluation.plots import agreement, confusion

    return [agreement(run), confusion(run)]


def tables(cells: Sequence[Cell]) -> str:
    """Markdown for docs/results.md."""
    from protoken.evaluation.experiments.tables import benign_tables

    return benign_tables(cells)
