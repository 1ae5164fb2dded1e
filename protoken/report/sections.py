"""The page's tables and lists below the answer, as plain data for the template."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from protoken.report.view import ClientRow, View, number_format, percent, seconds
from protoken.report.visible import pieces, visible
from protoken.results import Trace
from protoken.results.checks import Array

OBJECTIVES = {"log_prob": "log-probability", "log_odds": "log-odds", "logit": "logit"}
_MAX_CELLS = 20_000  # a page stays a page: larger tables are in the JSON
_LONGEST_VALUE = 200  # characters of a generation argument


def slot_name(slot: int | None) -> str:
    """Class suffix of a colour: "0" to "9", "x" for grey."""
    return "x" if slot is None else str(slot)


def slotted(row: ClientRow) -> dict[str, Any]:
    """A ranking row for the template, its colour as a class suffix."""
    return {**vars(row), "slot": slot_name(row.slot)}


def figures(trace: Trace, view: View) -> list[tuple[str, str, str]]:
    """(label, value, note) of the figures that stand in large type."""
    info, number = trace.info, view.number
    figures = [
        (
            "Sum of client scores",
            f"{number(float(trace.totals.sum()))} {trace.unit}",
            f"{len(trace.client_ids)} clients, {len(trace.token_list)} tokens",
        ),
        (
            "Residual",
            f"{trace.residual:+.2g} {trace.unit}",
            f"{trace.conservation_residual:.1g} of the scores' size",
        ),
    ]
    if info.objective == "log_prob" and view.tokens:
        each = float(trace.objective_values.mean())
        note = f"{each:+.3g} nats per token"
        figures.append(("Log-probability", f"{trace.objective_values.sum():+.4g} nats", note))
    plain, whole = info.seconds_generate, info.seconds_trace
    extra = f", +{(whole / plain - 1) * 100:.0f}\u00a0% to trace" if 0 < plain <= whole else ""
    figures.append(
        (
            "Time, traced",
            seconds(whole),
            f"{seconds(plain)} to generate{extra}" if plain > 0 else "nothing was generated",
        )
    )
    return figures


def sentences(trace: Trace, view: View) -> list[dict[str, Any]]:
    """Each sentence with its top client; empty where there is one sentence only, or totals only."""
    parts = trace.sentences() if trace.token_scores is not None else []
    if not 1 < len(parts) <= 200:
        return []
    return [{"parts": list(pieces(part.text.strip())), **_leader(part, view)} for part in parts]


def _leader(part: Trace, view: View) -> dict[str, Any]:
    """The top client of a part, in the colour that it has on the whole page."""
    best = float(part.totals.max())
    top = min((k for k in np.flatnonzero(part.totals == best)), key=lambda k: part.client_ids[k])
    number = number_format([*part.totals, part.change])
    row = slotted(view.by_place[top])
    return {"row": {**row, "score": number(best), "share": percent(float(part.shares[top]))}}


def grids(trace: Trace, view: View) -> list[dict[str, Any]]:
    """Scores per token and client, per layer and client, per position and client, where the trace has them."""
    found = []
    if trace.token_scores is not None and view.tokens and trace.token_scores.size <= _MAX_CELLS:
        labels = [
            [[(str(token.index), False)], list(pieces(token.text, lines=False)), [(token.objective, False)]]
            for token in view.tokens
        ]
        heads = ["#", "Token", OBJECTIVES[trace.info.objective]]
        found.append(_grid("Every token, every client", heads, labels, trace.token_scores, trace, view))
    layers = trace.layer_totals
    if layers is not None and len(layers) and layers.size <= _MAX_CELLS:
        labels = [[list(pieces(layer, lines=False))] for layer in trace.info.layers]
        found.append(_grid("Layer by layer", ["Layer"], labels, layers, trace, view))
    positions = trace.position_scores
    if positions is not None and len(positions) and positions.size <= _MAX_CELLS:
        ids = [*trace.prompt_ids, *(token.id for token in trace.token_list)]
        labels = [[[(str(place), False)], [(str(ids[place]), False)]] for place in range(len(positions))]
        found.append(_grid("Position by position", ["Position", "Token id"], labels, positions, trace, view))
    return found


def _grid(title: str, heads: list[str], labels: list[Any], values: Array, trace: Trace, view: View) -> dict[str, Any]:
    """A table of [rows, K] scores, clients in order of rank; positive ones are tinted by size."""
    number, order = number_format(values.reshape(-1)), view.clients
    most = float(values.max()) if values.size and values.max() > 0 else 1.0
    tint = np.clip(values / most, 0.0, 1.0)
    rows = [
        (parts, [(slot_name(c.slot), f"{tint[i, c.place]:.2f}", number(values[i, c.place])) for c in order])
        for i, parts in enumerate(labels)
    ]
    clients = [row.client for row in order]
    return {"title": f"{title} ({trace.unit})", "heads": heads + clients, "labels": len(heads), "rows": rows}


def facts(trace: Trace) -> list[tuple[str, str]]:
    """(label, value) of how the scores came to be; empty ones are left out."""
    info = trace.info
    entries: list[tuple[str, str]] = [
        ("Method", f"{info.method}, {info.way} way"),
        ("Why this way", info.reason),
        ("Settings", _as_json(info.settings) if info.settings else ""),
        ("Objective", f"{OBJECTIVES[info.objective]} of each generated token, in {trace.unit}"),
        ("Model", info.model),
        ("Ledger", info.ledger),
        ("Rounds", ", ".join(map(str, info.rounds))),
        ("Layers", "\n".join(info.layers)),
        ("Backend", info.backend),
        ("Seed", "" if info.seed is None else str(info.seed)),
        ("Response", "handed in, not generated by this model" if info.forced else ""),
        ("Generation", _as_json(info.generate_arguments) if info.generate_arguments else ""),
        ("Versions", "\n".join(f"{package} {version}" for package, version in info.versions.items())),
        ("Prompt tokens", str(len(trace.prompt_ids))),
        ("Change", f"{trace.change!r} {trace.unit}, all scores and the residual together"),
        ("Residual", f"{trace.residual!r} {trace.unit}"),
        ("Created", info.created),
    ]
    return [(label, visible(value)) for label, value in entries if value]


def _as_json(entries: dict[str, Any]) -> str:
    """An object on one line; of a long list, ids by the thousand say, its beginning."""
    return f"{{{', '.join(f'{json.dumps(name, ensure_ascii=False)}: {_brief(entries[name])}' for name in entries)}}}"


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if isinstance(value, str) or len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ..."
