"""Ordinary answers: is the answer to a finance question attributed to the client who taught finance?

Every client holds one domain and nobody is poisoned; the global model of the last round answers questions nobody
trained on, and whoever holds the question's domain is held responsible. In some federations the clients hold few rows
(with equal and with very unequal numbers of them), in others ample ones, so that the models learn their domains.

Whether an answer came out right is judged by itself, so that top-1 can be told for right answers, too: a client cannot
be responsible for a domain's knowledge in an answer that shows none. What each method says is also compared with the
exact Shapley values of the same answers, and these are taken apart by how many clients act together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from protoken.banks.bank import Rounds
from protoken.evaluation.cells import Cell, make_cell
from protoken.evaluation.corpora import DOMAINS
from protoken.evaluation.experiments.backdoor import REFERENCES, recorded_blocks, samples_of
from protoken.evaluation.experiments.benign_answers import orders, subsets
from protoken.evaluation.federation import Client, FederationConfig
from protoken.evaluation.federation_store import StoredFederation
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import Answer, Scored, Scorer, answer, score
from protoken.evaluation.training import LocalSettings
from protoken.evaluation.workbench import Recipe, Workbench, recipe_of
from protoken.evaluation.zoo import MODELS, SHAPES, SMOLLM2
from protoken.results.checks import Array
from protoken.ways.objective import Objective

DEFAULTS = Settings(models=MODELS, domains=DOMAINS)
ROUNDS, AMPLE_ROUNDS = 4, 16
AMPLE_ROWS = 300
AMPLE_LOCAL = LocalSettings(epochs=1, batch_size=8, learning_rate=2e-3, warmup_steps=5)
FEW, TAKEN_APART = 20, 40
"""Answers a cell that slow methods without news are given, and those whose exact values are taken apart."""


@dataclass(frozen=True)
class Kind:
    """Who takes part: by client its domain and its rows, in units of the federation's; and whether these are ample."""

    members: Mapping[str, tuple[str, float]]
    ample: bool = False


def _by_domain(*shares: float) -> dict[str, tuple[str, float]]:
    return {domain: (domain, share) for domain, share in zip(DOMAINS, shares, strict=True)}


_SIX = {
    "medical-a": ("medical", 0.5),
    "medical-b": ("medical", 0.5),
    "finance-a": ("finance", 0.5),
    "finance-b": ("finance", 0.5),
    "math": ("math", 1.0),
    "coding": ("coding", 1.0),
}
KINDS = {
    "ample": Kind(_by_domain(1, 1, 1, 1), ample=True),
    "ample-unequal": Kind(_by_domain(0.25, 0.5, 1, 2), ample=True),
    "ample-six": Kind(_SIX, ample=True),
    "equal": Kind(_by_domain(1, 1, 1, 1)),
    "unequal": Kind(_by_domain(0.25, 0.5, 1, 2)),
}


def federation_of(settings: Settings, model: str, *, ample: bool = False) -> tuple[Recipe, FederationConfig]:
    """The recipe, and the configuration with this experiment's number of rounds.

    Ample: more rows and rounds, fixed by how many held-out answers come out right and by nothing else, and answers
    that may come to their end.
    """
    recipe = recipe_of(model, settings.seed)
    if not ample:
        return recipe, replace(recipe.federation, rounds=ROUNDS)
    rows = AMPLE_ROWS if model in SHAPES else 2 * recipe.rows
    local = AMPLE_LOCAL if model in SHAPES else recipe.federation.local
    config = replace(recipe.federation, rounds=AMPLE_ROUNDS, local=local)
    return replace(recipe, rows=rows, max_new_tokens=2 * recipe.max_new_tokens), config


def clients(bench: Workbench, model: str, sizes: str) -> list[Client]:
    """The clients of a kind of KINDS, each with rows that nobody else has."""
    kind = KINDS[sizes]
    recipe, _ = federation_of(bench.settings, model, ample=kind.ample)
    given = dict.fromkeys(DOMAINS, 0)
    found = []
    for name, (domain, share) in kind.members.items():
        count = max(round(recipe.rows * share), 1)
        rows = bench.client_rows(domain, given[domain] + count)[given[domain] :]
        given[domain] += count
        found.append(Client(name, rows, label=domain))
    return found


def plan(settings: Settings) -> list[Unit]:
    """A unit per model, kind and domain of the questions; SmolLM2 has the federations of few rows alone."""
    return [
        Unit(f"{model}-{sizes}-{domain}", partial(_unit, model, sizes, domain))
        for sizes, kind in KINDS.items()
        for model in settings.models
        for domain in settings.domains
        if not (kind.ample and model == SMOLLM2)
    ]


def scorers(model: str) -> list[Scorer]:
    """Every method over the whole lineage; the first-order ones and the path over the last round, too."""
    blocks = recorded_blocks(model)
    whole: Rounds = "all"
    return [
        Scorer("shapley", "shapley", rounds=whole),
        Scorer("paired_shapley, 0 pairs", "paired_shapley", pairs=0, rounds=whole),
        Scorer("paired_shapley", "paired_shapley", rounds=whole, limit=FEW),
        Scorer("leave_one_out", "leave_one_out", rounds=whole),
        Scorer("aumann_shapley", "aumann_shapley", nodes=8, rounds=whole),
        Scorer("protoken", rounds=whole),
        Scorer("protoken all blocks", blocks=blocks, way="reverse", rounds=whole),
        Scorer("paper's score, fast", objective="logit", rounds=whole),
        Scorer("update_norm", "update_norm", rounds=whole, limit=1),
        Scorer("cosine", "cosine", rounds=whole, limit=FEW),
        Scorer("shapley, last round", "shapley", limit=FEW),
        Scorer("aumann_shapley, last round", "aumann_shapley", nodes=4),
        Scorer("protoken, last round"),
        Scorer("protoken all blocks, last round", blocks=blocks, way="reverse"),
        Scorer("paper, last round", "paper", limit=2),
        *_log_odds(blocks),
    ]


def _log_odds(blocks: int) -> list[Scorer]:
    """The same questions about log p / (1 - p), which does not fade where the answer is nearly certain."""
    odds: Objective = "log_odds"
    return [
        Scorer("shapley, log-odds", "shapley", rounds="all", objective=odds),
        Scorer("aumann_shapley, log-odds", "aumann_shapley", nodes=8, rounds="all", objective=odds),
        Scorer("aumann_shapley m=1, log-odds", "aumann_shapley", nodes=1, rounds="all", objective=odds),
        Scorer("protoken, log-odds", rounds="all", objective=odds),
        Scorer("protoken all blocks, log-odds", blocks=blocks, way="reverse", rounds="all", objective=odds),
        Scorer("shapley, log-odds, last round", "shapley", objective=odds, limit=FEW),
        Scorer("aumann_shapley, log-odds, last round", "aumann_shapley", nodes=4, objective=odds),
        Scorer("protoken, log-odds, last round", objective=odds),
        Scorer("protoken all blocks, log-odds, last round", blocks=blocks, way="reverse", objective=odds),
    ]


def _unit(model: str, sizes: str, domain: str, bench: Workbench) -> Outcome:
    recipe, config = federation_of(bench.settings, model, ample=KINDS[sizes].ample)
    members = clients(bench, model, sizes)
    stored = bench.federation(model, members, config)
    rows = bench.rows(domain).test[: samples_of(bench.settings, model)]
    before = _answers(bench, recipe, model, stored, 0, [row.question for row in rows])
    answers = _answers(bench, recipe, model, stored, config.rounds, [row.question for row in rows])
    base = bench.at_round(model, stored, config.rounds)
    found = score(
        base,
        stored.ledger,
        answers,
        scorers(model),
        at_round=config.rounds,
        step=lambda name, done, total: bench.bars.step(f"{sizes} {domain}: {name}", done, total),
    )
    judged = subsets([a.text for a in answers], [b.text for b in before], [row.answer for row in rows])
    shares = orders(base, stored.ledger, answers[:TAKEN_APART], config.rounds)
    truth = [client.label == domain for client in members]
    what = {"experiment": "benign", "model": model, "domain": domain, "round": config.rounds}
    extra = {
        "sizes": sizes,
        "weight": sum(stored.record["rounds"][-1]["weights"][c.id] for c in members if c.label == domain),
        "order_shares": [float(np.median(column)) for column in shares.T],
    }
    ids = [client.id for client in members]
    cells = [_cell(one, found, ids, truth, chosen, what, {**extra, "answers": name})
             for name, chosen in judged.items() for one in found if chosen[: len(one.scores)].any()]  # fmt: skip
    kept = [_kept(one, ids, truth, sizes) for one in found]
    kept.append(
        {"method": "", "sizes": sizes, "orders": _rounded(shares), **{k: v.tolist() for k, v in judged.items()}}
    )
    counts = ", ".join(f"{int(chosen.sum())} {name}" for name, chosen in judged.items())
    return Outcome(cells, kept, counts)


def _answers(
    bench: Workbench, recipe: Recipe, model: str, stored: StoredFederation, number: int, questions: Sequence[str]
) -> list[Answer]:
    return answer(
        bench.at_round(model, stored, number),
        questions,
        max_new_tokens=recipe.max_new_tokens,
        batch=recipe.batch,
        step=lambda done, total: bench.bars.step(f"round {number}: answers", done, total),
    )


def _cell(
    one: Scored,
    found: Sequence[Scored],
    ids: Sequence[str],
    truth: Sequence[bool],
    chosen: Array,
    what: Mapping[str, object],
    extra: Mapping[str, object],
) -> Cell:
    """Of the chosen answers [N], against the exact values of the same rounds, and of the log-odds for log-odds."""
    there = np.flatnonzero(chosen[: len(one.scores)])
    same = {
        s.scorer.method: s.of(ids)[there[there < len(s.scores)]]
        for s in found
        if s.scorer.method in REFERENCES
        and s.scorer.rounds == one.scorer.rounds
        and (s.scorer.objective == "log_odds") == (one.scorer.objective == "log_odds")
    }
    return make_cell(
        one.of(ids)[there],
        truth,
        shapley=same.get("shapley"),
        leave_one_out=same.get("leave_one_out"),
        residuals=[one.residuals[n] for n in there],
        seconds=[one.seconds[n] for n in there],
        extra={**extra, "rounds": str(one.scorer.rounds)},
        method=one.scorer.name,
        blocks=one.scorer.blocks,
        **what,
    )


def _kept(one: Scored, ids: Sequence[str], truth: Sequence[bool], sizes: str) -> dict[str, object]:
    return {
        "method": one.scorer.name,
        "sizes": sizes,
        "clients": list(ids),
        "responsible": list(truth),
        "scores": _rounded(one.of(ids)),
    }


def _rounded(table: Array) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in table]


def draw(run: RunFolder) -> list[Path]:
    """How often the domain's client is on top, and how close scores come to Shapley values, by method."""
    from protoken.evaluation.plots import agreement, confusion

    return [agreement(run), confusion(run)]


def tables(cells: Sequence[Cell]) -> str:
    """Markdown for docs/results/benign.md."""
    from protoken.evaluation.experiments.benign_tables import benign_tables

    return benign_tables(cells)
