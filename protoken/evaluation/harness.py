"""Run an experiment: its units one after the other, each kept when it is finished, then results.json and the plots.

An experiment is a module of `EXPERIMENTS` with two functions and a default:

    plan(settings: Settings) -> list[Unit]        the units, in the order in which they share models and federations
    draw(run: RunFolder) -> list[Path]            plots from what is finished; called only where matplotlib is installed
    DEFAULTS: Settings                            what `protoken evaluate <name>` takes where nothing was said
"""

from __future__ import annotations

import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, cast

from rich.console import Console

from protoken.errors import ArgumentError
from protoken.evaluation.cells import Cell
from protoken.evaluation.corpora import DOMAINS
from protoken.evaluation.experiments import EXPERIMENTS
from protoken.evaluation.progress import Bars
from protoken.evaluation.runs import RunFolder, Settings, Unit
from protoken.evaluation.workbench import Workbench
from protoken.evaluation.zoo import QUICK_MODEL, check_model


class Experiment(Protocol):
    """What a module of EXPERIMENTS offers."""

    DEFAULTS: Settings

    def plan(self, settings: Settings) -> list[Unit]:
        """The units of a run."""
        ...

    def draw(self, run: RunFolder) -> list[Path]:
        """Plots of what is finished."""
        ...


def experiment_of(name: str) -> Experiment:
    """The module of an experiment.

    Raises:
        ArgumentError: there is none of that name.
    """
    if name not in EXPERIMENTS:
        raise ArgumentError("experiment", expected=f"one of {', '.join(EXPERIMENTS)}", got=repr(name))
    return cast(Experiment, import_module(f"protoken.evaluation.experiments.{name}"))


def quick_settings(name: str) -> Settings:
    """One small model and domain, and few samples: minutes on a core."""
    defaults = experiment_of(name).DEFAULTS
    domains = defaults.domains if name == "benign" else ("finance",)
    return replace(defaults, models=(QUICK_MODEL,), domains=domains, samples=12, quick=True)


def run_experiment(
    name: str,
    settings: Settings,
    out: Path,
    *,
    cache: Path | None = None,
    console: Console | None = None,
    only: int | None = None,
) -> list[Cell]:
    """Run what is not finished yet of an experiment; all its cells, those of earlier runs included.

    Args:
        out: the run's folder is `out/name`.
        cache: base models and federations; `out/cache` if None.
        only: stop after so many new units (for tests of resuming).

    Raises:
        ArgumentError: an unknown experiment, model or domain, or a folder with a run of other settings.
    """
    experiment = experiment_of(name)
    for model in settings.models:
        check_model(model)
    for domain in settings.domains:
        if domain not in DOMAINS:
            raise ArgumentError("domains", expected=f"one of {', '.join(DOMAINS)}", got=repr(domain))
    run = RunFolder(out / name, name, settings)
    units = experiment.plan(settings)
    todo = [unit for unit in units if not run.has(unit)]
    console = console or Console()
    console.print(f"{name}: {len(units)} units, {len(units) - len(todo)} of them finished before")
    with Bars(console) as bars:
        bench = Workbench(settings, cache or out / "cache", bars)
        for number, unit in enumerate(todo[:only]):
            bars.unit(unit.key, len(units) - len(todo) + number, len(units))
            began = time.perf_counter()
            outcome = unit.run(bench)
            run.save(unit, outcome)
            run.write_results()
            bars.say(f"{unit.key}: {time.perf_counter() - began:.1f} s {outcome.note}")
    run.write_results()
    if find_spec("matplotlib") is not None:
        for plot in experiment.draw(run):
            console.print(f"plot {plot}", soft_wrap=True)
    return run.cells()
