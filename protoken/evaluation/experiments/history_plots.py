"""The picture of history: contributions by round, of poisoned clients and of all others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from protoken.evaluation.experiments.history_tables import KINDS
from protoken.evaluation.plots import COLOURS, figure, save
from protoken.evaluation.runs import RunFolder


def contributions(run: RunFolder) -> Path:
    """Mean score of a client per round, a thin line per federation and a thick one for their mean."""
    made, axes = figure(8.8, 3.4, columns=len(KINDS))
    for axis, (kind, title) in zip(axes[0], KINDS.items(), strict=True):
        tables: dict[bool, list[np.ndarray[tuple[int], np.dtype[np.float64]]]] = {True: [], False: []}
        turn = None
        own = [outcome for _, outcome in run.outcomes() if outcome.cells and outcome.cells[0].extra["kind"] == kind]
        for outcome in own:
            turn = outcome.cells[0].extra["turn"]
            for record in outcome.samples:
                scores = np.array(record["scores"]).mean(axis=0)
                guilty = np.array(record["poisoned"])
                tables[True].append(scores[:, guilty].mean(axis=1))
                tables[False].append(scores[:, ~guilty].mean(axis=1))
        for poisoned, colour in ((True, COLOURS[1]), (False, COLOURS[0])):
            for line in tables[poisoned]:
                axis.plot(range(1, len(line) + 1), line, color=colour, lw=0.8, alpha=0.4)
            if tables[poisoned]:
                middle = np.mean(tables[poisoned], axis=0)
                label = "poisoned clients" if poisoned else "the others"
                axis.plot(range(1, len(middle) + 1), middle, color=colour, lw=2.4, marker="o", ms=4, label=label)
        if turn is not None:
            axis.axvline(turn - 0.5, color="#999999", ls="--", lw=1)
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.axhline(0.0, color="#999999", lw=0.8)
        axis.set(xlabel="round (dashed: the turn)", title=title)
    axes[0, 0].set(ylabel="mean score of a client\n(log-odds, nats)")
    if axes[0, 0].lines:
        axes[0, 0].legend(frameon=False, fontsize=8)
    return save(made, run.folder / "contributions.png")
