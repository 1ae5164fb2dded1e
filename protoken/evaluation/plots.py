"""Plots of the experiments, from what a run's folder holds. matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protoken.errors import MissingDependencyError
from protoken.evaluation.runs import RunFolder

# Colour-blind safe (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


ACCURACY = ("protoken", "protoken, all rounds", "aumann_shapley, all rounds", "paper's score, fast")


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
    made, axes = figure(6.4, 3.6)
    axis = axes[0, 0]
    for colour, method in zip(COLOURS, methods, strict=False):
        rounds = sorted({c.round for c in cells if c.method == method and c.round is not None})
        found = [[c.top1 or 0.0 for c in cells if c.method == method and c.round == r] for r in rounds]
        if rounds:
            axis.plot(rounds, [100 * float(np.mean(v)) for v in found], color=colour, marker="o", ms=3, label=method)
            axis.plot(rounds, [100 * min(v) for v in found], color=colour, ls=":", lw=1)
    chance = [c.chance for c in cells if c.chance is not None]
    if chance:
        axis.axhline(100 * float(np.mean(chance)), color="#999999", lw=1, ls="--", label="chance")
    axis.set(xlabel="round", ylabel="top client is poisoned, %", ylim=(0, 103))
    axis.legend(frameon=False, title="mean (dotted: lowest configuration)", title_fontsize=8, fontsize=8)
    return save(made, run.folder / "accuracy.png")


def separation(run: RunFolder, method: str = "protoken") -> Path:
    """Softmax probabilities of responsible and other clients over all samples, a pair of boxes per model."""
    by_model: dict[str, tuple[list[float], list[float]]] = {}
    for key, outcome in run.outcomes():
        model = outcome.cells[0].model if outcome.cells else key
        for record in outcome.samples:
            if record.get("method") == method:
                scores = np.asarray(record["scores"], dtype=np.float64)
                shares = np.exp(scores - scores.max(axis=1, keepdims=True))
                shares /= shares.sum(axis=1, keepdims=True)
                truth = np.asarray(record["responsible"], dtype=bool)
                guilty, others = by_model.setdefault(model, ([], []))
                guilty += shares[:, truth].ravel().tolist()
                others += shares[:, ~truth].ravel().tolist()
    made, axes = figure(6.4, 3.6)
    axis = axes[0, 0]
    for n, (model, (guilty, others)) in enumerate(sorted(by_model.items())):
        for shift, values, colour in ((-0.2, guilty, COLOURS[1]), (0.2, others, COLOURS[0])):
            boxes = axis.boxplot(values, positions=[n + shift], widths=0.3, sym=".", patch_artist=True)
            boxes["boxes"][0].set(facecolor=colour, alpha=0.6)
            boxes["medians"][0].set(color="black")
            for flier in boxes["fliers"]:
                flier.set(markersize=2, markeredgecolor=colour)
        axis.text(n, 1.02, model, ha="center", fontsize=8)
    axis.set_xticks([n + s for n in range(len(by_model)) for s in (-0.2, 0.2)])
    axis.set_xticklabels(["poisoned", "others"] * len(by_model), fontsize=7)
    axis.set(ylabel=f"share of a client ({method})", ylim=(-0.02, 1.08))
    return save(made, run.folder / "separation.png")


def agreement(run: RunFolder) -> Path:
    """Per method: top-1 on the left, on the right the correlation with Shapley values, median and tenth percentile."""
    cells = [cell for cell in run.cells() if cell.samples and cell.top1 is not None]
    methods = [m for m in dict.fromkeys(c.method for c in cells) if not m.startswith("shapley")]
    made, axes = figure(8.4, 0.4 + 0.32 * max(len(methods), 3), 1, 2)
    left, right = axes[0]
    for n, method in enumerate(methods):
        own = [c for c in cells if c.method == method]
        hits = sum((c.top1 or 0.0) * c.samples for c in own) / sum(c.samples for c in own)
        left.barh(n, 100 * hits, color=COLOURS[0], alpha=0.7)
        left.plot([100 * (c.top1 or 0.0) for c in own], [n] * len(own), ".", color=COLOURS[1], ms=4)
        both = [(c.pearson_shapley, c.extra.get("pearson_shapley_p10")) for c in own]
        right.plot([a for a, _ in both if a is not None], [n] * sum(a is not None for a, _ in both), "|", ms=9)
        right.plot([b for _, b in both if b is not None], [n] * sum(b is not None for _, b in both), ".", ms=4)
    for axis in (left, right):
        axis.set_yticks(range(len(methods)))
        axis.invert_yaxis()
    left.set_yticklabels(methods, fontsize=7)
    right.set_yticklabels([])
    chance = [c.chance for c in cells if c.chance is not None]
    left.axvline(100 * float(np.mean(chance or [0.0])), color="#999999", ls="--", lw=1)
    left.set(xlabel="domain's client on top, % (dots: cells; dashed: chance)", xlim=(0, 103))
    right.set(xlabel="Pearson with exact Shapley (bar: median, dot: p10)", xlim=(-1.05, 1.05))
    return save(made, run.folder / "agreement.png")


def confusion(run: RunFolder, method: str) -> Path:
    """Share of each domain's answers in which each client is on top, of one method, all models together."""
    counts: dict[str, dict[str, float]] = {}
    for _, outcome in run.outcomes():
        for record in outcome.samples:
            if record["method"] == method and any(record["responsible"]):
                domain = next(c for c, own in zip(record["clients"], record["responsible"], strict=True) if own)
                row = counts.setdefault(domain, {})
                for scores in record["scores"]:
                    top = record["clients"][int(np.argmax(scores))]
                    row[top] = row.get(top, 0.0) + 1
    names = sorted(counts)
    table = np.array([[counts[a].get(b, 0.0) / sum(counts[a].values()) for b in names] for a in names])
    made, axes = figure(4.2, 3.6)
    axis = axes[0, 0]
    axis.imshow(table.reshape(len(names), len(names)), vmin=0, vmax=1, cmap="Blues")
    for i, row_of in enumerate(table):
        for j, value in enumerate(row_of):
            axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value > 0.5 else "black")
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel=f"client on top ({method}), %", ylabel="question's domain")
    return save(made, run.folder / "confusion.png")


def scale_by_round(run: RunFolder, method: str = "protoken all blocks") -> Path:
    """AUROC and precision by lineage, and top-1 among a round's participants, after every round."""
    cells = [c for c in run.cells() if c.samples and c.method == method]
    kinds = sorted({str(c.extra.get("poisoned")) for c in cells})
    made, axes = figure(4.2 * max(len(kinds), 1), 3.4, 1, max(len(kinds), 1))
    for axis, kind in zip(axes[0], kinds, strict=False):
        for model, style in zip(sorted({c.model for c in cells}), ("-", "--", ":", "-."), strict=False):
            own = sorted(
                (c for c in cells if c.model == model and c.extra.get("poisoned") == kind), key=lambda c: c.round or 0
            )
            whole = [c for c in own if c.extra.get("rounds") == "all"]
            last = [c for c in own if c.extra.get("rounds") == "last"]
            lines = (
                ("AUROC, lineage", whole, [c.auroc for c in whole], COLOURS[0]),
                ("precision, lineage", whole, [c.extra.get("precision_at_poisoned") for c in whole], COLOURS[2]),
                ("top-1, round", last, [c.top1 for c in last], COLOURS[1]),
            )
            for label, shown, values, colour in lines:
                axis.plot([c.round for c in shown], values, style, color=colour, label=f"{label} ({model})", lw=1.2)
        axis.set(title=f"{kind} poisoned, {method}", xlabel="round", ylim=(0, 1.03))
        axis.legend(frameon=False, fontsize=6)
    return save(made, run.folder / "scale.png")


def lineage(run: RunFolder, method: str = "protoken all blocks") -> Path:
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
        axis.set_title(f"{name}: mean score of a triggered answer, nats", fontsize=8)
        axis.set_xlabel("client (red: poisoned and drawn)", fontsize=7)
    return save(made, run.folder / "lineage.png")
