"""The attacks' tables: attacks down, methods across; failures like everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from protoken.evaluation.cells import Cell
from protoken.evaluation.report import mean, table

UPDATES = ("update norm", "update direction")


def attack_tables(cells: Sequence[Cell]) -> str:
    """Who is named for the backdoor, where the blame went, what was gained, what was seen."""
    blame = [c for c in cells if c.extra.get("goal") == "blame" and c.extra.get("attack") != "gauge"]
    share = [c for c in cells if c.extra.get("goal") == "share"]
    gauge = [c for c in cells if c.extra.get("attack") == "gauge"]
    parts = ["The backdoor came out, % of triggered answers:\n", _came_out(blame)] if blame else []
    for title, own, value in (
        ("A culprit is named for the backdoor, % of the triggered answers in which it came out:\n", blame, _top1),
        ("Blame shifted: points of the culprits' positive share lost against the undisguised attacker:\n", blame,
         _points("blame_shifted")),
        ("A culprit is detected (names an honest client), % of answers, at 1 % false alarms:\n", blame, _alarm),
        ("Ordinary answers: share of the dishonest, each client's positive part counted for itself, %:\n", share,
         _points("attacker_share_each")),
        ("Ordinary answers: the same, softmax shares as published, %:\n", share, _points("attacker_softmax")),
        ("Ordinary answers: share gained against honest work, the dishonest clients' scores summed first, points:\n",
         share, _points("share_gained")),
        ("Ordinary answers: a rightful client is on top, %:\n", share, _top1),
    ):  # fmt: skip
        if own:
            parts += [title, _grid([cell for cell in own if cell.method not in UPDATES], value)]
    parts += ["What the updates alone show, % of the culprits' updates flagged (of honest ones):\n", _updates(cells)]
    if gauge:
        rows = [[c.model, c.method, f"{c.extra['gauge_difference']:.1e}"] for c in gauge]
        parts += [f"{gauge[0].extra['description'].capitalize()}: largest change of a score over the largest score:\n"]
        parts += [table(("model", "method", "difference"), rows)]
    return "\n".join(parts)


def _grid(cells: Sequence[Cell], value: Callable[[Sequence[Cell]], str]) -> str:
    methods = list(dict.fromkeys(cell.method for cell in cells))
    rows = []
    for attack in dict.fromkeys(str(cell.extra["attack"]) for cell in cells):
        own = [cell for cell in cells if cell.extra["attack"] == attack]
        each = [value([cell for cell in own if cell.method == method]) for method in methods]
        rows.append([f"{attack}: {own[0].extra['description']}", str(max(cell.samples for cell in own)), *each])
    return table(("attack", "answers", *methods), rows)


def _came_out(cells: Sequence[Cell]) -> str:
    """Also where it did not: an attack that hides so well that nothing is left of it."""
    rows = []
    for attack in dict.fromkeys(str(cell.extra["attack"]) for cell in cells):
        rates = [cell.extra.get("came_out") for cell in cells if cell.extra["attack"] == attack]
        rows.append([attack, mean((None if rate is None else 100 * rate for rate in rates), 0)])
    return table(("attack", "came out"), rows)


def _top1(cells: Sequence[Cell]) -> str:
    return mean((None if cell.top1 is None else 100 * cell.top1 for cell in cells), 0)


def _points(name: str) -> Callable[[Sequence[Cell]], str]:
    def value(cells: Sequence[Cell]) -> str:
        known = [cell.extra.get(name) for cell in cells]
        return mean((None if number is None else 100 * number for number in known), 1)

    return value


def _alarm(cells: Sequence[Cell]) -> str:
    found, framed = _points("detected")(cells), _points("framed")(cells)
    return f"{found} ({framed})" if found else ""


def _updates(cells: Sequence[Cell]) -> str:
    own = [cell for cell in cells if cell.method in UPDATES]
    rows = []
    for attack in dict.fromkeys(str(cell.extra["attack"]) for cell in own):
        each = [_alarm([c for c in own if c.extra["attack"] == attack and c.method == name]) for name in UPDATES]
        rows.append([attack, *each])
    return table(("attack", *UPDATES), rows)
