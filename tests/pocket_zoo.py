"""The experiments' quick model, shrunk until a federation of it takes a second: for tests of the experiments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from protoken.evaluation import zoo
from protoken.evaluation.experiments import attacks_arena, attacks_play, backdoor, benign
from protoken.evaluation.federation import FederationConfig
from protoken.evaluation.runs import Settings
from protoken.evaluation.training import LocalSettings
from protoken.evaluation.workbench import Recipe, Workbench

POCKET = replace(
    zoo.QUICK,
    width=32,
    inner=48,
    vocabulary=400,
    rows=12,
    pretraining=LocalSettings(epochs=1, batch_size=8, learning_rate=2e-3, warmup_steps=2),
)


RECIPE = Recipe(
    6,
    FederationConfig(
        rounds=2, local=LocalSettings(epochs=1, batch_size=4, learning_rate=3e-3, warmup_steps=1), max_tokens=160
    ),
    max_new_tokens=6,
)


@contextmanager
def pocket_bench(cache: Path, samples: int = 4) -> Iterator[Workbench]:
    """A workbench whose model "quick" is the pocket one; real corpora, real training, real federations."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(zoo, "QUICK", POCKET))
        for module in (attacks_arena, attacks_play, backdoor, benign):
            stack.enter_context(patch.object(module, "recipe_of", lambda model, seed: RECIPE))
        yield Workbench(Settings((zoo.QUICK_MODEL,), ("finance",), samples=samples, quick=True), cache)
