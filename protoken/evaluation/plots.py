"""Plots of the experiments, from what a run's folder holds. matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protoken.errors import MissingDependencyError
from protoken.evaluation.corpora import DOMAINS
from protoken.evaluation.runs import RunFolder

# Colour-blind safe (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


ACCURACY = (
    "protoken",
    "protoken, log-odds",
    "protoken, all rounds",
    "aumann_shapley, all rounds",
    "aumann_shapley m=1, log-odds, all rounds",
    "paper's score, fast",
)
SCALE = ("protoken all blocks", "protoken, log-odds", "aumann_shapley m=1, log-odds")


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure without a display, and its axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots", expected="matplotlib", got="no such package", remedy="Run `pip install 'protoken[evaluate]'`"
        ) from error
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes


def save(made: Any, file: Path) -> Path:
    """Write a PNG of moderate size."""
    made.savefig(file, dpi=110)
    return file


def accuracy_by_round(run: RunFolder, methods: Sequence[str] = ACCURACY) -> Path:
    """Top-1 accuracy per round, averaged over configurations, the lowest configuration dotted, chance grey."""
    cells = [cell for cell in run.cells() if cell.samples and cell.round is not None and cell.top1 is not None]
    made, axes = figure(8.4, 3.6)
    axis = axes[0, 0]
    for n, (colour, method) in enumerate(zip(COLOURS, methods, strict=False)):
        rounds = sorted({c.round for c in cells if c.method == method and c.round is not None})
        found = [[c.top1 or 0.0 for c in cells if c.method == method and c.round == r] for r in rounds]
        if rounds:
            # Lines that lie on each other: the first ones are the broadest.
            shown = [100 * float(np.mean(values)) for values in found]
            axis.plot(rounds, shown, color=colour, marker="o", ms=7 - n, lw=4.5 - n, label=method)
            axis.plot(rounds, [100 * min(values) for values in found], color=colour, ls=":", lw=1)
    chance = [c.chance for c in cells if c.chance is not None]
    if chance:
        axis.axhline(100 * float(np.mean(chance)), color="#999999", lw=1, ls="--", label="chance")
    axis.set(xlabel="round", ylabel="top client is poisoned, %", ylim=(0, 103))
    if axis.lines:
        axis.legend(
            frameon=False, title="mean (dotted: lowest)", title_fontsize=8, fontsize=8, loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )  # fmt: skip
    return save(made, run.folder / "accuracy.png")


def separation(run: RunFolder, methods: Sequence[str] = ("protoken", "aumann_shapley, all rounds")) -> Path:
    """Per method: the softmax shares of responsible and other clients over all samples, a pair of boxes per model."""
    made, axes = figure(4.6 * len(methods), 3.4, 1, len(methods))
    for axis, method in zip(axes[0], methods, strict=True):
        _boxes(axis, _shares(run, method))
        axis.set(title=method, ylabel="share of a client")
    return save(made, run.folder / "separation.png")


def _shares(run: RunFolder, method: str) -> dict[str, tuple[list[float], list[float]]]:
    """By model: shares of the responsible clients, and of the others."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for key, outcome in run.outcomes():
        model = outcome.cells[0].model if outcome.cells else key
        for record in outcome.samples:
            if record.get("method") == method:
                scores = np.asarray(record["scores"], dtype=np.float64)
                shares = np.exp(scores - scores.max(axis=1, keepdims=True))
                shares /= shares.sum(axis=1, keepdims=True)
                truth = np.asarray(record["responsible"], dtype=bool)
                guilty, others = found.setdefault(model, ([], []))
                guilty += shares[:, truth].ravel().tolist()
                others += shares[:, ~truth].ravel().tolist()
    return found


def _boxes(axis: Any, by_model: Mapping[str, tuple[list[float], list[float]]]) -> None:
    for n, (_, pair) in enumerate(sorted(by_model.items())):
        for shift, values, colour in zip((-0.2, 0.2), pair, (COLOURS[1], COLOURS[0]), strict=True):
            boxes = axis.boxplot(values, positions=[n + shift], widths=0.3, sym=".", patch_artist=True)
            boxes["boxes"][0].set(facecolor=colour, alpha=0.6)
            boxes["medians"][0].set(color="black")
            for flier in boxes["fliers"]:
                flier.set(markersize=2, markeredgecolor=colour)
    axis.set_xticks(range(len(by_model)), sorted(by_model), fontsize=8)
    axis.set_xlabel("left: poisoned clients, right: the others", fontsize=8)


def agreement(run: RunFolder, sizes: str = "ample") -> Path:
    """Per method: top-1 on the left, on the right the correlation with Shapley values, median and tenth percentile.

    Of all answers in the federations `sizes`; in all federations, where the run has none of these.
    """
    counted = [cell for cell in run.cells() if cell.samples and cell.top1 is not None]
    whole = [cell for cell in counted if cell.extra.get("answers", "all") == "all"]
    cells = [cell for cell in whole if cell.extra.get("sizes") == sizes] or whole
    methods = [m for m in dict.fromkeys(c.method for c in cells) if not m.startswith("shapley")]
    made, axes = figure(9.0, 0.8 + 0.3 * max(len(methods), 3), 1, 2)
    left, right = axes[0]
    for n, method in enumerate(methods):
        own = [c for c in cells if c.method == method]
        hits = sum((c.top1 or 0.0) * c.samples for c in own) / sum(c.samples for c in own)
        left.barh(n, 100 * hits, color=COLOURS[0], alpha=0.7)
        left.plot([100 * (c.top1 or 0.0) for c in own], [n] * len(own), ".", color=COLOURS[1], ms=4)
        middles = [c.pearson_shapley for c in own if c.pearson_shapley is not None]
        tenths = [c.extra["pearson_shapley_p10"] for c in own if c.extra.get("pearson_shapley_p10") is not None]
        right.plot(middles, [n] * len(middles), "|", ms=10, color=COLOURS[0])
        right.plot(tenths, [n] * len(tenths), ".", ms=4, color=COLOURS[1])
    for axis in (left, right):
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.tick_params(labelsize=7)
    left.set_yticks(range(len(methods)), methods)
    right.set_yticks(range(len(methods)), [])
    chance = [c.chance for c in cells if c.chance is not None]
    left.axvline(100 * float(np.mean(chance or [0.0])), color="#999999", ls="--", lw=1)
    left.set_xlim(0, 103)
    right.set_xlim(-1.05, 1.05)
    left.set_xlabel("domain's client on top, %\n(dots: cells, dashed: chance)", fontsize=8)
    right.set_xlabel(
        "correlation with exact Shapley values\n(bars: medians of cells, dots: tenth percentiles)", fontsize=8
    )
    return save(made, run.folder / "agreement.png")


def confusion(
    run: RunFolder, methods: Sequence[str] = ("protoken", "aumann_shapley", "shapley"), sizes: str = "ample"
) -> Path:
    """Share of each domain's answers in which each client is on top, where every domain has one client: all models.

    In the federations `sizes`; in all of them, where the run has none of these.
    """
    made, axes = figure(4.0 * len(methods), 3.6, 1, len(methods))
    for axis, method in zip(axes[0], methods, strict=True):
        counts: dict[str, dict[str, int]] = {}
        clients: list[str] = []
        records = [r for _, outcome in run.outcomes() for r in outcome.samples if r["method"] == method]
        single = [r for r in records if sorted(r["clients"]) == sorted(DOMAINS)]
        for record in [r for r in single if r.get("sizes") == sizes] or single:
            clients = list(record["clients"])
            row = counts.setdefault(clients[record["responsible"].index(True)], dict.fromkeys(clients, 0))
            for scores in record["scores"]:
                row[clients[int(np.argmax(scores))]] += 1
        domains = [client for client in clients if client in counts]
        table = [[counts[d][c] / sum(counts[d].values()) for c in clients] for d in domains]
        if table:
            axis.imshow(np.array(table), vmin=0, vmax=1, cmap="Blues")
        for i, values in enumerate(table):
            for j, value in enumerate(values):
                colour = "white" if value > 0.5 else "black"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(clients)), clients, fontsize=8)
        axis.set_yticks(range(len(domains)), domains, fontsize=8)
        axis.set_title(f"{method}, %", fontsize=9)
        axis.set(xlabel="client on top", ylabel="question's domain")
    return save(made, run.folder / "confusion.png")


def scale_by_round(run: RunFolder, methods: Sequence[str] = SCALE) -> Path:
    """AUROC over all clients by their lineage, after every round: methods by colour, models by stroke."""
    cells = [c for c in run.cells() if c.samples and c.extra.get("rounds") == "all"]
    kinds = sorted({str(c.extra.get("poisoned")) for c in cells})
    made, axes = figure(4.6 * max(len(kinds), 1), 3.4, 1, max(len(kinds), 1))
    for axis, kind in zip(axes[0], kinds, strict=False):
        for model, style in zip(sorted({c.model for c in cells}), ("-", "--", ":", "-."), strict=False):
            for method, colour in zip(methods, COLOURS, strict=False):
                own = sorted(
                    (c for c in cells if (c.model, c.method, c.extra.get("poisoned")) == (model, method, kind)),
                    key=lambda c: c.round or 0,
                )
                rounds = [c.round for c in own]
                axis.plot(rounds, [c.auroc for c in own], style, color=colour, label=f"{method} ({model})", lw=1.2)
        axis.set(title=f"{kind} poisoned: AUROC over the lineage", xlabel="round", ylim=(0, 1.03))
        axis.legend(frameon=False, fontsize=6)
    return save(made, run.folder / "scale.png")


def lineage(run: RunFolder, method: str = SCALE[-1]) -> Path:
    """Every client's mean score over all rounds after the last finished one, poisoned clients in red."""
    latest: dict[str, Mapping[str, Any]] = {}
    for key, outcome in run.outcomes():
        for record in outcome.samples:
            if record["method"] == method and record["rounds"] == "all":
                latest[key.rpartition("-")[0]] = record
    made, axes = figure(7.2, 1.9 * max(len(latest), 1), max(len(latest), 1), 1)
    for axis, (name, record) in zip(axes[:, 0], sorted(latest.items()), strict=False):
        scores, truth = record["scores"][0], record["responsible"]
        colours = [COLOURS[1] if own else COLOURS[0] for own in truth]
        axis.bar(range(len(scores)), scores, color=colours)
        axis.axhline(0, color="black", lw=0.6)
        axis.set_title(f"{name}: mean score of a triggered answer, {method}", fontsize=8)
        axis.set_xlabel("client (red: poisoned and drawn)", fontsize=7)
    return save(made, run.folder / "lineage.png")
