"""RQ3 of arXiv 2601.19672: time and accuracy against the number of traced blocks, by way.

The backdoor's federation after its last round; triggered answers of which the sentinel came out. Every way traces the
last n blocks, n from 1 to all on record. `seconds` is the attribution of one answer; beside it stand the seconds of
generating one answer by itself and their ratio, taken in the same run. Ways that are slow see fewer samples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.cells import Cell, make_cell
from protoken.evaluation.corpora import add_trigger, is_refusal
from protoken.evaluation.experiments import backdoor
from protoken.evaluation.experiments.backdoor import recorded_blocks
from protoken.evaluation.plots import COLOURS, figure, save
from protoken.evaluation.report import PUBLISHED, groups, mean, samples_of, table, top1_of
from protoken.evaluation.runs import Outcome, RunFolder, Settings, Unit
from protoken.evaluation.scoring import Answer, Scorer, answer, score
from protoken.evaluation.workbench import Workbench
from protoken.evaluation.zoo import SHAPES
from protoken.ledger import Ledger

DEFAULTS = Settings(models=tuple(SHAPES), domains=("finance",))
SLOW, TIMED = 20, 10


def plan(settings: Settings) -> list[Unit]:
    """A unit per model and domain."""
    return [
        Unit(f"{model}-{domain}", partial(_unit, model, domain))
        for model in settings.models
        for domain in settings.domains
    ]


def scorers(blocks: int) -> list[Scorer]:
    """The last n blocks by every way that is exact for them; the published loop; a path integral over all on record."""
    found = [Scorer("local", blocks=1, way="local"), Scorer("reverse", blocks=1, way="reverse")]
    for n in range(2, blocks + 1):
        found += [Scorer("forward", blocks=n, way="forward"), Scorer("reverse", blocks=n, way="reverse")]
    for n in sorted({1, blocks}):
        found.append(Scorer("paper", "paper", blocks=n, limit=SLOW))
    for n in range(1, blocks + 1):
        found.append(Scorer("aumann_shapley, m = 4", "aumann_shapley", nodes=4, blocks=n, limit=SLOW))
    return found


def _unit(model: str, domain: str, bench: Workbench) -> Outcome:
    recipe = backdoor.recipe(bench.settings, model)
    members = backdoor.clients(bench, model, domain)
    stored = bench.federation(model, members, recipe.federation)
    number = recipe.federation.rounds
    base = bench.at_round(model, stored, number)
    asked = [add_trigger(row.question) for row in bench.rows(domain).test[: backdoor.samples_of(bench.settings, model)]]
    answers = answer(base, asked, max_new_tokens=recipe.max_new_tokens, batch=recipe.batch)
    refusals = [one for one in answers if is_refusal(one.text)]
    if not refusals:
        return Outcome(note=f"the sentinel came out in none of {len(answers)} answers")
    chosen = scorers(recorded_blocks(model))
    _warm_up(base, stored.ledger, refusals[:1], chosen, number)
    before = generation_seconds(base, refusals[:TIMED], recipe.max_new_tokens)
    found = score(
        base,
        stored.ledger,
        refusals,
        chosen,
        at_round=number,
        step=lambda name, done, total: bench.bars.step(name, done, total),
    )
    # Timed on both sides of what is compared with it, so that a machine that slows down does not speak for a method.
    plain = median([*before, *generation_seconds(base, refusals[:TIMED], recipe.max_new_tokens)])
    ids = [client.id for client in members]
    cells = [
        make_cell(
            one.of(ids),
            [client.poisoned for client in members],
            residuals=one.residuals,
            seconds=one.seconds,
            extra={
                "generate_seconds": plain,
                "ratio": median(one.seconds) / plain,
                "ratio_low": float(np.quantile(one.seconds, 0.25)) / plain,
                "ratio_high": float(np.quantile(one.seconds, 0.75)) / plain,
                "new_tokens": float(np.mean([r.response.new_tokens for r in refusals])),
            },
            experiment="overhead",
            model=model,
            domain=domain,
            method=one.scorer.name,
            blocks=one.scorer.blocks,
            round=number,
        )
        for one in found
    ]
    return Outcome(cells, note=f"{len(refusals)} answers, {plain:.3f} s to generate one")


def generation_seconds(base: BaseModel, answers: Sequence[Answer], max_new_tokens: int) -> list[float]:
    """Seconds of answering each question by itself, as a user would wait for it."""
    found = []
    for one in answers:
        began = time.perf_counter()
        answer(base, [one.question], max_new_tokens=max_new_tokens, batch=1)
        found.append(time.perf_counter() - began)
    return found


def _warm_up(base: BaseModel, ledger: Ledger, answers: Sequence[Answer], chosen: Sequence[Scorer], number: int) -> None:
    """Each way once: what is loaded on first use is no part of an answer's cost."""
    score(base, ledger, answers, chosen, at_round=number)
    generation_seconds(base, answers, 4)


def draw(run: RunFolder) -> list[Path]:
    """Time over generation against traced blocks, a line per way; accuracy above."""
    cells = [cell for cell in run.cells() if cell.samples]
    made, axes = figure(7.6, 3.4, columns=2)
    for colour, method in zip(COLOURS, dict.fromkeys(cell.method for cell in cells), strict=False):
        own = [cell for cell in cells if cell.method == method]
        numbers = sorted({cell.blocks for cell in own if cell.blocks is not None})
        ratios = [100 * _mean([c.extra["ratio"] for c in own if c.blocks == n]) for n in numbers]
        hits = [100 * _mean([c.top1 or 0.0 for c in own if c.blocks == n]) for n in numbers]
        axes[0, 0].plot(numbers, ratios, color=colour, marker="o", ms=4, label=method)
        axes[0, 1].plot(numbers, hits, color=colour, marker="o", ms=4)
    axes[0, 0].set(xlabel="traced blocks", ylabel="attribution, % of generating the answer", yscale="log")
    axes[0, 1].set(xlabel="traced blocks", ylabel="top client is poisoned, %", ylim=(0, 103))
    for axis in axes.flat:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return [save(made, run.folder / "overhead.png")]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def tables(cells: Sequence[Cell]) -> str:
    """Time over generation and accuracy by way and traced blocks, models pooled."""
    rows = [
        [f"published, gemma-3-270m-it, two H200 ({PUBLISHED})", "1 to all", "1.10 s to 1.42 s", "", "", "", "100"],
        [f"published, the deepest model ({PUBLISHED})", "all", "up to 1.87 s", "", "", "", "100"],
    ]
    for (method, blocks), own in groups(cells, lambda c: (c.method, str(c.blocks))).items():
        rows.append(
            [
                method,
                blocks,
                f"{mean((cell.seconds for cell in own), 3)} s",
                f"{mean((cell.extra['generate_seconds'] for cell in own), 3)} s",
                f"{mean((100 * cell.extra['ratio'] for cell in own), 1)} %",
                str(samples_of(own)),
                top1_of(own),
            ]
        )
    columns = ("way", "blocks", "attribution", "generating one answer", "ratio", "answers", "top-1 %")
    return table(columns, rows)
