"""Who can cheat? A dishonest client against every method: the share it gains, the blame it shifts, whether it is seen.

Each attack is a federation of its own (attacks_arena.py), trained like the honest one. After the last round

    share   ordinary questions of all domains are answered; the rightful clients are those who trained on the question's
            domain. `share_gained` is what the dishonest have together, less what the same client has when it is honest.
    blame   triggered questions are answered; where the backdoor's sentinel comes out, the dishonest are responsible.
            `blame_shifted` is what they lose of the share that the undisguised attacker has.

An alarm is raised where the best client's score per token exceeds what the honest federation's answers to the same
triggered questions ever show, at 1 % false alarms (conformal); `detected` counts alarms that name a culprit, `framed`
those that name an honest client. Two more cells look at the updates themselves, without any answer: their norms, and
the lowest cosine with another update. Failures stand in the results like everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from protoken.evaluation.cells import Cell, make_cell
from protoken.evaluation.experiments import attacks_measures as measures
from protoken.evaluation.experiments.attacks_arena import ATTACKS, Arena, Attack, attack_of
from protoken.evaluation.experiments.attacks_gauge import gauge_unit
from protoken.evaluation.experiments.attacks_play import Book, Found, evidence, places, scorers
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import Scored
from protoken.evaluation.workbench import Workbench

DEFAULTS = Settings(models=("llama",), domains=("finance",))


def plan(settings: Settings) -> list[Unit]:
    """A unit per model, domain and attack; then one for the factors' gauge."""
    book = Book()
    units = []
    for model in settings.models:
        for domain in settings.domains:
            units += [Unit(f"{model}-{domain}-{a.name}", partial(_unit, model, domain, a, book)) for a in ATTACKS]
            units.append(Unit(f"{model}-{domain}-gauge", partial(gauge_unit, model, domain, scorers)))
    return units


def _unit(model: str, domain: str, attack: Attack, book: Book, bench: Workbench) -> Outcome:
    arena = Arena(bench, model, domain)
    found = book.played(arena, attack)
    what = {"experiment": "attacks", "model": model, "domain": domain, "round": arena.config.rounds}
    came_out = len(found.answers) / found.asked if attack.goal == "blame" else None
    shared = {"attack": attack.name, "goal": attack.goal, "description": attack.text, "came_out": came_out}
    cells = _update_cells(arena, attack, found, shared, what)
    if found.answers:
        mine = places(found, attack)
        before = book.share(arena, "honest" if attack.goal == "share" else "poison", attack)
        limits = book.limits(arena) if attack.goal == "blame" else {}
        cells += [_cell(one, found, attack, mine, before, limits, shared, what) for one in found.scored]
    note = f"{len(found.answers)} of {found.asked} answers to attribute"
    return Outcome(cells, _kept(found), note)


def _cell(
    one: Scored,
    found: Found,
    attack: Attack,
    mine: Sequence[int],
    before: dict[str, float],
    limits: dict[str, float | None],
    shared: dict[str, Any],
    what: dict[str, Any],
) -> Cell:
    scores, name = one.of(found.ids), one.scorer.name
    together = measures.positive_share(scores, mine)
    change = together - before[name]
    extra = {
        **shared,
        "rounds": str(one.scorer.rounds),
        "attacker_share": together,
        "attacker_share_each": measures.each_positive_share(scores, mine),
        "attacker_softmax": measures.softmax_share(scores, mine),
        "attacker_score": float(scores[:, list(mine)].sum(1).mean()),
        "first_identity_share": measures.each_positive_share(scores, mine[:1]),
        "share_gained": change if attack.goal == "share" else None,
        "blame_shifted": -change if attack.goal == "blame" else None,
        **measures.alarms(evidence(one, found), limits.get(name), mine),
    }
    return make_cell(
        scores,
        found.truth[: len(scores)],
        residuals=one.residuals,
        seconds=one.seconds,
        extra=extra,
        method=name,
        blocks=one.scorer.blocks,
        **what,
    )


def _update_cells(
    arena: Arena, attack: Attack, found: Found, shared: dict[str, Any], what: dict[str, Any]
) -> list[Cell]:
    """How many of the culprits' updates, and how many honest ones, leave what honest updates show."""
    honest = arena.bench.federation(arena.model, attack_of("honest").members(arena), arena.config)
    quiet = np.concatenate([measures.update_features(honest.ledger, r)[1] for r in honest.ledger.rounds])
    here = [measures.update_features(found.stored.ledger, r) for r in found.stored.ledger.rounds]
    guilty = np.array([name in attack.culprits for ids, _ in here for name in ids])
    values = np.concatenate([table for _, table in here])
    cells = []
    for place, name in enumerate(("update norm", "update direction")):
        low, high = measures.prediction_limits(quiet[:, place], lower_only=place == 1)
        seen = (values[:, place] < low) | (values[:, place] > high)
        extra = {
            **shared,
            "detected": float(seen[guilty].mean()),
            "framed": float(seen[~guilty].mean()),
            "calibrated_on": len(quiet),
        }
        cells.append(Cell(method=name, blocks=None, samples=int(guilty.sum()), extra=extra, **what))
    return cells


def _kept(found: Found) -> list[dict[str, object]]:
    return [
        {
            "method": one.scorer.name,
            "clients": found.ids,
            "responsible": found.truth[: len(one.scores)],
            "scores": [[float(f"{value:.4g}") for value in row] for row in one.of(found.ids)],
        }
        for one in found.scored
    ]


def draw(run: RunFolder) -> list[Path]:
    """Attacks against methods: who is named for the backdoor, and what share is gained."""
    from protoken.evaluation.experiments.attacks_plots import grids

    return [grids(run)]


def tables(cells: Sequence[Cell]) -> str:
    """Markdown of the run's cells."""
    from protoken.evaluation.experiments.attacks_tables import attack_tables

    return attack_tables(cells)
