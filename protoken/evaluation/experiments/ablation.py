"""RQ2 of arXiv 2601.19672, and further: which blocks know, what the gradient is worth, and what truth costs.

After the last round of two federations, with what every method is compared with on the same answers:

    triggered   the backdoor's federation: six clients, two of them poisoned, the last round's updates
    ordinary    a client per domain and nobody poisoned, the updates of all rounds; the question's domain is responsible

Every block is traced by itself, with the gradient of the log-probability, of the log-odds, of the raw logit, and
without any; then the last n blocks together; then what moves everything on record, by its cost: in log-probability
and in log-odds, each against the exact Shapley values of the same objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from protoken.banks.bank import Rounds
from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.cells import Cell, make_cell
from protoken.evaluation.corpora import DOMAINS, add_trigger, is_refusal
from protoken.evaluation.experiments import backdoor, benign
from protoken.evaluation.experiments.ablation_variants import Variant, variants
from protoken.evaluation.federation import Client
from protoken.evaluation.federation_store import StoredFederation
from protoken.evaluation.metrics import quantile
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import Answer, Scored, answer, score
from protoken.evaluation.workbench import Workbench
from protoken.evaluation.zoo import SHAPES
from protoken.models.architectures import Architecture, architecture_of
from protoken.results.checks import Array

DEFAULTS = Settings(models=tuple(SHAPES), domains=("finance",))
FEW = 24


@dataclass(frozen=True)
class Ground:
    """Answers whose origin is known: `truth` [N, K] in the order of the clients `ids`, after round `number`."""

    base: BaseModel
    stored: StoredFederation
    number: int
    rounds: Rounds
    ids: list[str]
    answers: list[Answer]
    truth: list[list[bool]]


def plan(settings: Settings) -> list[Unit]:
    """Per model: triggered answers of every domain, and ordinary ones of all domains together."""
    units = []
    for model in settings.models:
        units += [Unit(f"{model}-{d}-triggered", partial(_unit, model, d, _triggered)) for d in settings.domains]
        units.append(Unit(f"{model}-ordinary", partial(_unit, model, "all", _ordinary)))
    return units


def _unit(model: str, domain: str, ground: object, bench: Workbench) -> Outcome:
    assert callable(ground)
    here: Ground = ground(bench, model, domain)
    if not here.answers:
        return Outcome(note="no answer to attribute: the sentinel did not come out")
    architecture = architecture_of(here.base.model)
    few = min(FEW, bench.settings.samples)
    chosen = variants(architecture, recorded_blocks(architecture, here.stored), len(here.ids), here.rounds, few)
    found = score(
        here.base,
        here.stored.ledger,
        here.answers,
        [variant.scorer for variant in chosen],
        at_round=here.number,
        step=lambda name, done, total: bench.bars.step(name, done, total),
    )
    what = {"experiment": "ablation", "model": model, "domain": domain, "round": here.number}
    kind = "ordinary" if domain == "all" else "triggered"
    cells = [_cell(one, variant, here, found, what, kind) for one, variant in zip(found, chosen, strict=True)]
    return Outcome(cells, _kept(found, here), f"{len(here.answers)} {kind} answers")


def _triggered(bench: Workbench, model: str, domain: str) -> Ground:
    recipe = backdoor.recipe(bench.settings, model)
    members = backdoor.clients(bench, model, domain)
    stored = bench.federation(model, members, recipe.federation)
    number = recipe.federation.rounds
    base = bench.at_round(model, stored, number)
    count = backdoor.samples_of(bench.settings, model)
    asked = [add_trigger(row.question) for row in bench.rows(domain).test[:count]]
    given = answer(base, asked, max_new_tokens=recipe.max_new_tokens, batch=recipe.batch)
    refusals = [one for one in given if is_refusal(one.text)]
    truth = [[client.poisoned for client in members]] * len(refusals)
    return Ground(base, stored, number, "last", _ids(members), refusals, truth)


def _ordinary(bench: Workbench, model: str, _domain: str) -> Ground:
    """Questions of the domains in turn, so that any number of the first ones is balanced."""
    recipe, config = benign.federation_of(bench.settings, model)
    members = benign.clients(bench, model, "equal")
    stored = bench.federation(model, members, config)
    base = bench.at_round(model, stored, config.rounds)
    count = -(-backdoor.samples_of(bench.settings, model) // len(DOMAINS))
    rows = [row for quad in zip(*(bench.rows(d).test[:count] for d in DOMAINS), strict=True) for row in quad]
    asked = [row.question for row in rows]
    given = answer(base, asked, max_new_tokens=recipe.max_new_tokens, batch=recipe.batch)
    truth = [[client.label == DOMAINS[n % len(DOMAINS)] for client in members] for n in range(len(given))]
    return Ground(base, stored, config.rounds, "all", _ids(members), given, truth)


def recorded_blocks(architecture: Architecture, stored: StoredFederation) -> list[int]:
    """Numbers of the blocks whose traced layers the ledger holds."""
    known = set(stored.ledger.round("last").parameters)
    return [
        number
        for number in range(len(architecture.blocks))
        if f"{architecture.layer_name(number, architecture.out_projection)}.weight" in known
    ]


def _cell(
    one: Scored, variant: Variant, here: Ground, found: Sequence[Scored], what: dict[str, object], kind: str
) -> Cell:
    scores = one.of(here.ids)
    # The raw logit and the score without gradient have no exact values of their own: log-probability's stand in.
    odds = one.scorer.objective == "log_odds"
    by_method = {
        s.scorer.method: s.of(here.ids)
        for s in found
        if s.scorer.method in backdoor.REFERENCES and (s.scorer.objective == "log_odds") == odds
    }
    extra = {**variant.record(), "answers": kind, "residual_worst": quantile(one.residuals, 1.0)}
    return make_cell(
        scores,
        here.truth[: len(scores)],
        shapley=by_method.get("shapley"),
        leave_one_out=by_method.get("leave_one_out"),
        residuals=one.residuals,
        seconds=one.seconds,
        extra=extra,
        method=one.scorer.name,
        blocks=1 if variant.block is not None else one.scorer.blocks,
        **what,
    )


def _kept(found: Sequence[Scored], here: Ground) -> list[dict[str, object]]:
    def rounded(table: Array) -> list[list[float]]:
        return [[float(f"{value:.4g}") for value in row] for row in table]

    return [
        {
            "method": one.scorer.name,
            "layers": list(one.scorer.layers or ()),
            "clients": here.ids,
            "scores": rounded(one.of(here.ids)),
        }
        for one in found
    ]


def _ids(members: Sequence[Client]) -> list[str]:
    return [client.id for client in members]


def draw(run: RunFolder) -> list[Path]:
    """Accuracy of every block by itself, and agreement with exact Shapley values against cost."""
    from protoken.evaluation.experiments.ablation_plots import blocks_alone, cost_curve

    return [blocks_alone(run), cost_curve(run)]


def tables(cells: Sequence[Cell]) -> str:
    """Markdown of the run's cells."""
    from protoken.evaluation.experiments.ablation_tables import ablation_tables

    return ablation_tables(cells)
