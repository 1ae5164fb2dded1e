"""What there is to show of a trace, computed once for the page and for the terminal.

A token takes the colour of its top client. How strong: the top client's lead over the mean of the others,
relative to the 90th percentile of all leads. The lead over the runner-up alone would hide two clients who
taught the same thing (a colluding pair), since each keeps the other's lead near zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor, log10

import numpy as np

from protoken.report.palette import colour_slots
from protoken.report.visible import name
from protoken.results import Trace
from protoken.results.checks import Array


@dataclass(frozen=True)
class ClientRow:
    """A line of the ranking. ``bar`` is (left, width) in percent of the axis that holds zero."""

    place: int
    rank: int
    client: str
    slot: int | None
    score: str
    share: str
    weight: str
    bar: tuple[float, float]
    negative: bool
    led: int


@dataclass(frozen=True)
class TokenView:
    """A token to draw: ``place`` of its client (None: uncoloured) and ``strength`` from 0 to 1."""

    index: int
    id: int
    text: str
    special: bool
    objective: str
    place: int | None
    slot: int | None
    strength: float


@dataclass(frozen=True)
class View:
    """``full_lead`` is the lead, in the trace's unit, from which on a token has its full colour."""

    clients: list[ClientRow]
    tokens: list[TokenView]
    full_lead: float
    number: Callable[[float], str]

    @cached_property
    def by_place(self) -> list[ClientRow]:
        """The same clients in the trace's own order."""
        return sorted(self.clients, key=lambda row: row.place)


def number_format(values: Iterable[float]) -> Callable[[float], str]:
    """One signed format for a column: four figures for the largest value, exponents only if they must be."""
    largest = max((abs(float(value)) for value in values), default=0.0)
    if largest and not 1e-4 <= largest < 1e7:
        return lambda value: f"{value:+.3e}"
    decimals = max(0, min(7, 3 - floor(log10(largest)))) if largest else 3
    return lambda value: f"{value if abs(value) * 10**decimals >= 0.5 else 0.0:+.{decimals}f}"


def leads(trace: Trace) -> tuple[Array, Array, Array]:
    """Per token: place of the top client (-1 if none is drawn), its lead in the trace's unit, strength.

    A token no client raised (no positive score) is not drawn. The paper's scores share an offset common
    to all clients, so their sign says nothing, and there the lead alone decides.
    """
    scores = trace.token_scores
    if scores is None or not len(scores):
        none = np.zeros(len(trace.token_list))
        return none - 1, none, none
    by_id = np.array(sorted(range(len(trace.client_ids)), key=trace.client_ids.__getitem__))
    tops = by_id[scores[:, by_id].argmax(axis=1)]  # of equal ones the first by id
    best = scores[np.arange(len(scores)), tops]
    others = scores.shape[1] - 1
    lead = best - (scores.sum(axis=1) - best) / others if others else np.abs(best)
    drawn = (lead > 0) & ((best > 0) | (trace.info.method == "paper"))
    lead = np.where(drawn, lead, 0.0)
    full = float(np.quantile(lead[drawn], 0.9)) if drawn.any() else 0.0
    strength = np.clip(lead / full, 0.0, 1.0) if full > 0 else np.zeros_like(lead)
    return np.where(drawn, tops, -1), lead, strength


def build_view(trace: Trace) -> View:
    """Rows, tokens and figures of a trace, ready to draw; names are already harmless."""
    ranked = trace.clients
    slots = colour_slots(trace.client_ids, [client.client for client in ranked])
    places, lead, strength = leads(trace)
    number = number_format([*trace.totals, trace.change])
    low, high = min(0.0, float(trace.totals.min())), max(0.0, float(trace.totals.max()))
    width = (high - low) or 1.0
    place_of = {client: place for place, client in enumerate(trace.client_ids)}
    led = np.bincount(places[places >= 0].astype(np.int64), minlength=len(ranked))
    rows = []
    for client in ranked:
        place = place_of[client.client]
        left = (min(0.0, client.score) - low) / width * 100
        rows.append(
            ClientRow(
                place=place,
                rank=client.rank,
                client=name(client.client),
                slot=slots[client.client],
                score=number(client.score),
                share=percent(client.share),
                weight=f"{client.weight:.3f}",
                bar=(round(left, 2), round(abs(client.score) / width * 100, 2)),
                negative=client.score < 0,
                led=int(led[place]),
            )
        )
    objective = number_format(trace.objective_values)
    tokens = []
    for index, token in enumerate(trace.token_list):
        at = int(places[index]) if places[index] >= 0 else None
        tokens.append(
            TokenView(
                index=index,
                id=token.id,
                text=token.text,
                special=token.special,
                objective=objective(float(trace.objective_values[index])),
                place=at,
                slot=None if at is None else slots[trace.client_ids[at]],
                strength=round(float(strength[index]), 3),
            )
        )
    full = float(lead[strength >= 1.0].min()) if (strength >= 1.0).any() else 0.0
    return View(rows, tokens, full, number)


def percent(share: float) -> str:
    """A share for people: "0.4 %" rather than "0 %", and never "100 %" while others hold something."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{share * 100:.1f} %"


def seconds(value: float) -> str:
    """Seconds with a unit: "34 ms", "1.84 s", "94 s"."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def timing(trace: Trace) -> str:
    """What tracing cost: "generated in 1.80 s, traced in 1.84 s (+2 %)"."""
    plain, whole = trace.info.seconds_generate, trace.info.seconds_trace
    if plain <= 0:
        # Handed in, or asked again: nothing was generated.
        return f"attributed in {seconds(whole)}" if whole > 0 else "not timed"
    extra = f" ({(whole / plain - 1) * 100:+.0f} %)" if 0 < plain <= whole else ""
    return f"generated in {seconds(plain)}, traced in {seconds(whole)}{extra}"


def weight_heading(trace: Trace) -> str:
    """Of the column of aggregation weights."""
    return "mean weight" if len(trace.info.rounds) > 1 else "weight"


def gaps_note(rounds: Sequence[int]) -> str:
    """What the record lacks, in a sentence; empty where it lacks nothing."""
    if not rounds:
        return ""
    several = ", ".join(map(str, rounds))
    who = f"Round {several} does" if len(rounds) == 1 else f"Rounds {several} do"
    return (
        f"{who} not start where the round before ended: what changed in between is on no record, and in no client's "
        "score."
    )


def gaps_of(trace: Trace) -> str:
    """`gaps_note` of a trace over several rounds; its settings may come from a file, so anything may be in them."""
    found = trace.info.settings.get("gaps")
    return gaps_note([number for number in found if isinstance(number, int)]) if isinstance(found, list) else ""


def accounting(trace: Trace) -> str:
    """Conservation in a sentence."""
    relative = trace.conservation_residual
    if not relative:
        return "clients account for the whole change exactly"
    if relative < 1e-3:
        return f"clients account for the whole change (off by {relative:.1e} of it)"
    return f"{percent(min(relative, 1.0))} of the scores' size belongs to no client"
