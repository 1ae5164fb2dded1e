"""A trace as one self-contained page, and the same inside a notebook.

What keeps hostile text harmless stands in page.py; the page's own script is the only one that runs, known by its hash.
"""

from __future__ import annotations

import os
from base64 import b64encode
from hashlib import sha256
from typing import Any

import numpy as np
from markupsafe import Markup

from protoken.report.page import framed, read, rendered, style
from protoken.report.palette import COLOURS
from protoken.report.sections import OBJECTIVES, facts, figures, grids, sentences, slot_name, slotted
from protoken.report.view import TokenView, View, accounting, build_view, gaps_of, weight_heading
from protoken.report.visible import name, pieces, visible
from protoken.results import Trace

_MAX_DATA = 400_000  # scores carried along for pointing at tokens; beyond, tooltips alone serve


def trace_html(trace: Trace, path: str | os.PathLike[str] | None = None) -> str:
    """The page as a str, also written to ``path`` if given. Nothing in it is requested from elsewhere."""
    return rendered("trace.html.jinja", _context(trace, build_view(trace)), path)


def notebook_html(trace: Trace) -> str:
    """The page in a frame, for a notebook."""
    return framed(trace_html(trace), "protoken trace")


def _context(trace: Trace, view: View) -> dict[str, Any]:
    script, info = read("script.html.jinja"), trace.info
    low, high = min(0.0, float(trace.totals.min())), max(0.0, float(trace.totals.max()))
    leading = [row for row in view.clients if row.led] or view.clients
    return {
        "title": "protoken trace: " + " ".join(name(trace.text.strip())[:60].split()),
        "heading": "Who taught this answer?",
        "created": visible(info.created, lines=False),
        "style": style(),
        "script": Markup(script),
        "script_hash": b64encode(sha256(script.encode()).digest()).decode(),
        "leader": slotted(view.clients[0]),
        "second": slotted(view.clients[1]) if len(view.clients) > 1 else None,
        "accounting": accounting(trace)[:1].upper() + accounting(trace)[1:] + ".",
        "gaps": gaps_of(trace),
        "unit": trace.unit,
        "weight": weight_heading(trace).capitalize(),
        "forced": info.forced,
        "objective_name": OBJECTIVES[info.objective],
        "prompt": list(pieces(trace.prompt.strip("\n"))),
        "tokens": [_token(trace, view, token) for token in view.tokens],
        "per_token": trace.token_scores is not None and bool(view.tokens),
        "full_lead": f"{view.full_lead:.2g}" if view.full_lead else "",
        "chips": [slotted(row) for row in leading[: len(COLOURS) + 2]],
        "clients": [slotted(row) for row in view.clients],
        "zero": round(-low / ((high - low) or 1.0) * 100, 2),
        "figures": figures(trace, view),
        "sentences": sentences(trace, view),
        "grids": grids(trace, view),
        "facts": facts(trace),
    }


def _token(trace: Trace, view: View, token: TokenView) -> dict[str, Any]:
    slot = "none" if token.place is None else slot_name(token.slot)
    kind = "none" if token.place is None else f"k{slot}"
    if token.special:
        kind += " special"
    if token.text.endswith("\n") and not token.text.strip():
        kind += " break"
    about = f"id {token.id}, {OBJECTIVES[trace.info.objective]} {token.objective} {trace.unit}"
    data, lines = "", [visible(token.text, lines=False), about]
    if trace.token_scores is not None:
        scores = trace.token_scores[token.index]
        if trace.token_scores.size <= _MAX_DATA:
            data = " ".join(f"{score:.4g}" for score in scores)
        best = np.argsort(-scores, kind="stable")[:8]
        lines += [f"{scores[k]:+.3g}  {view.by_place[k].client}" for k in best]
        if len(scores) > len(best):
            lines.append(f"and {len(scores) - len(best)} more clients")
    return {
        "kind": kind,
        "strength": token.strength,
        "slot": slot,
        "number": f"Token {trace.start + token.index}",
        "piece": visible(token.text, lines=False) or "(no visible character)",
        "facts": about,
        "data": data,
        "title": "\n".join(lines),
        "parts": list(pieces(token.text)),
    }
