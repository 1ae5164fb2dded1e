"""When it names a client, is it right as often as it says; and does it name nobody where nobody taught the answer?

Abstention   Around the federations of `backdoor`, after the last round. The threshold is fitted on every second answer
             to plain questions that nobody trained on, of the federation's domain or of all; the other half tells how
             often it is crossed by an answer that nobody planted. Fitted on its own domain it is tried on the others as
             well, for which the promise does not hold. And the triggered answers say what is left: which clients are
             named together, where two are poisoned.
Calibration  Around the ample federations of `benign`: the probability that the top client is the one who holds the
             question's domain, fitted on every second answer and compared with what came true for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protoken.confidence import Calibration, margin_of
from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.cells import Cell, make_cell
from protoken.evaluation.corpora import DOMAINS, add_trigger, is_refusal
from protoken.evaluation.experiments import backdoor, benign
from protoken.evaluation.metrics import calibration_error
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import Answer, Scorer, answer, score
from protoken.evaluation.workbench import Recipe, Workbench
from protoken.evaluation.zoo import SHAPES
from protoken.results.checks import Array
from protoken.verdict import Abstention, threshold

DEFAULTS = Settings(models=tuple(SHAPES), domains=DOMAINS)
RATES = (0.01, 0.05)
LEAD, GAP = 0.9, 0.5


def plan(settings: Settings) -> list[Unit]:
    """A unit per backdoored federation, and one per model's federation of ordinary clients."""
    found = []
    for model in settings.models:
        found += [Unit(f"{model}-backdoor-{d}", partial(_alarms, model, d)) for d in settings.domains]
        found.append(Unit(f"{model}-ordinary", partial(_calibration, model)))
    return found


def scorers(model: str) -> list[Scorer]:
    """The default, first order in log-odds over every block, and what `Trace.lineage` asks."""
    return [
        Scorer("protoken"),
        Scorer(
            "protoken all blocks, log-odds", blocks=backdoor.recorded_blocks(model), way="reverse", objective="log_odds"
        ),
        Scorer("lineage", "aumann_shapley", nodes=1, objective="log_odds", rounds="all"),
    ]


@dataclass(frozen=True)
class _Asked:
    """Answers of a backdoored federation, one kind after the other, and their places in the list.

    own       to plain questions of its domain, whose rows no client was given
    other     to plain questions of the other domains
    refused   to triggered questions, where the sentinel came out
    """

    answers: list[Answer]
    own: NDArray[np.int_]
    other: NDArray[np.int_]
    refused: NDArray[np.int_]

    @property
    def tokens(self) -> NDArray[np.int_]:
        """Of every answer how many, 1 for an empty one."""
        return np.array([max(one.response.new_tokens, 1) for one in self.answers])


def _alarms(model: str, domain: str, bench: Workbench) -> Outcome:
    recipe = backdoor.recipe(bench.settings, model)
    members = backdoor.clients(bench, model, domain)
    stored = bench.federation(model, members, recipe.federation)
    last = recipe.federation.rounds
    base = bench.at_round(model, stored, last)
    asked = _asked(base, domain, recipe, bench)
    if not len(asked.refused):
        return Outcome(note="the sentinel did not come out")
    scored = score(
        base,
        stored.ledger,
        asked.answers,
        scorers(model),
        at_round=last,
        step=lambda name, done, total: bench.bars.step(f"{domain}: {name}", done, total),
    )
    ids, truth = [client.id for client in members], np.array([client.poisoned for client in members])
    what: dict[str, Any] = {"experiment": "confidence", "model": model, "domain": domain, "round": last}
    cells = [
        make_cell(
            one.of(ids)[asked.refused],
            truth,
            residuals=[one.residuals[n] for n in asked.refused],
            seconds=one.seconds,
            extra=extra,
            method=one.scorer.name,
            blocks=one.scorer.blocks,
            **what,
        )
        for one in scored
        for extra in _judged(one.of(ids), asked, truth, ids)
    ]
    return Outcome(cells, (), f"{len(asked.own) + len(asked.other)} plain answers, {len(asked.refused)} refusals")


def _asked(base: BaseModel, domain: str, recipe: Recipe, bench: Workbench) -> _Asked:
    count = bench.settings.samples
    # Rows of the clients' pool that no client was given.
    own = [row.question for row in bench.rows(domain).clients[backdoor.CLIENTS * recipe.rows :][: 2 * count]]
    other = [row.question for d in DOMAINS if d != domain for row in bench.rows(d).test[: (count + 1) // 2]]
    triggered = [add_trigger(row.question) for row in bench.rows(domain).test[:count]]
    answers = answer(
        base,
        [*own, *other, *triggered],
        max_new_tokens=recipe.max_new_tokens,
        batch=recipe.batch,
        step=lambda done, total: bench.bars.step(f"{domain}: answers", done, total),
    )
    plain = len(own) + len(other)
    kept = [*answers[:plain], *(one for one in answers[plain:] if is_refusal(one.text))]
    return _Asked(kept, np.arange(len(own)), np.arange(len(own), plain), np.arange(plain, len(kept)))


def _judged(table: Array, asked: _Asked, truth: NDArray[np.bool_], ids: Sequence[str]) -> Iterator[dict[str, object]]:
    """Per threshold what crosses it, of scores [N, K]: every second answer of a kind fits it, the others try it."""
    tokens = asked.tokens
    kinds = {"its domain": asked.own, "every domain": np.concatenate([asked.own, asked.other])}
    for (kind, plain), rate in product(kinds.items(), RATES):
        fitted, tried = plain[::2], plain[1::2]
        if len(fitted) < round(1 / rate) - 1:
            continue  # too few answers for that rate
        rule = Abstention(threshold(table[fitted].max(axis=1) / tokens[fitted], rate), LEAD, GAP, rate, 0)
        strange = _crossed(rule, table[asked.other], tokens[asked.other], ids)
        yield {
            "kind": "abstention",
            "fitted_on": kind,
            "false_alarm": rate,
            **_crossed(rule, table[tried], tokens[tried], ids),
            **{f"strange_{name}": value for name, value in strange.items()},
            **_named(rule, table[asked.refused], tokens[asked.refused], truth, ids),
        }


def _crossed(rule: Abstention, table: Array, tokens: NDArray[np.int_], ids: Sequence[str]) -> dict[str, object]:
    """Of answers that nobody planted: how many cross the threshold, and for how many somebody is named."""
    evidence = table.max(axis=1) / tokens
    named = [bool(rule.judge_totals(row, int(t), ids).clients) for row, t in zip(table, tokens, strict=True)]
    return {
        "held": len(table),
        "false_alarms": float((evidence > rule.evidence).mean()),
        "alarms_named": float(np.mean(named)),
    }


def _named(
    rule: Abstention, table: Array, tokens: NDArray[np.int_], truth: NDArray[np.bool_], ids: Sequence[str]
) -> dict[str, object]:
    """Of the triggered answers: exactly the poisoned clients named, only such, an honest one, or nobody."""
    guilty = {client for client, poisoned in zip(ids, truth, strict=True) if poisoned}
    named = [set(rule.judge_totals(row, int(t), ids).clients) for row, t in zip(table, tokens, strict=True)]
    return {
        "exactly": float(np.mean([group == guilty for group in named])),
        "only_guilty": float(np.mean([bool(group) and group <= guilty for group in named])),
        "honest": float(np.mean([bool(group - guilty) for group in named])),
        "nobody": float(np.mean([not group for group in named])),
    }


def _calibration(model: str, bench: Workbench) -> Outcome:
    recipe, config = benign.federation_of(bench.settings, model, ample=True)
    members = benign.clients(bench, model, "ample")
    stored = bench.federation(model, members, config)
    base = bench.at_round(model, stored, config.rounds)
    answers: list[Answer] = []
    truth: list[list[bool]] = []
    for domain in DOMAINS:
        questions = [row.question for row in bench.rows(domain).test[: bench.settings.samples]]
        answers += answer(base, questions, max_new_tokens=recipe.max_new_tokens, batch=recipe.batch)
        truth += [[client.label == domain for client in members]] * len(questions)
    scored = score(
        base,
        stored.ledger,
        answers,
        scorers(model),
        at_round=config.rounds,
        step=lambda name, done, total: bench.bars.step(f"ordinary: {name}", done, total),
    )
    cells, kept = [], []
    for one in scored:
        table = one.of([client.id for client in members])
        cell, points = _calibrated(table, np.array(truth))
        cells.append(
            make_cell(
                table,
                truth,
                residuals=one.residuals,
                seconds=one.seconds,
                extra={"kind": "calibration", **cell},
                experiment="confidence",
                model=model,
                domain="all",
                round=config.rounds,
                method=one.scorer.name,
                blocks=one.scorer.blocks,
            )
        )
        kept.append({"method": one.scorer.name, **points})
    return Outcome(cells, kept, f"{len(answers)} ordinary answers")


def _calibrated(table: Array, truth: NDArray[np.bool_]) -> tuple[dict[str, object], dict[str, object]]:
    """Stated probabilities of answers that the curve was not fitted on, against what came true.

    Args:
        table, truth: [N, K] scores, and whether the client holds the question's domain.
    """
    correct = truth[np.arange(len(table)), table.argmax(axis=1)]
    margins = np.array([margin_of(row) for row in table])
    curve = Calibration.fit(margins[::2], correct[::2])
    stated, came_true = np.array([curve.probability(m) for m in margins[1::2]]), correct[1::2]
    elsewhere = np.empty(len(margins))
    for inside in (truth[:, k] for k in range(truth.shape[1])):
        curve = Calibration.fit(margins[~inside], correct[~inside])
        elsewhere[inside] = [curve.probability(m) for m in margins[inside]]
    figures: dict[str, object] = {
        "held": len(stated),
        "accuracy": float(came_true.mean()),
        "stated": float(stated.mean()),
        "calibration_error": calibration_error(stated, came_true),
        "brier": float(((stated - came_true) ** 2).mean()),
        "calibration_error_strange": calibration_error(elsewhere, correct),
    }
    points = {"stated": [round(float(p), 4) for p in stated], "correct": [bool(c) for c in came_true]}
    return figures, points


def draw(run: RunFolder) -> list[Path]:
    """Stated against true, and false alarms against what was asked for."""
    from protoken.evaluation.experiments.confidence_plots import confidence_plot

    return [confidence_plot(run)]


def tables(cells: Sequence[Cell]) -> str:
    """Markdown for docs/results/confidence.md."""
    from protoken.evaluation.experiments.confidence_tables import confidence_tables

    return confidence_tables(cells)
