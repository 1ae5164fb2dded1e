"""Ten colours for clients, and grey for the rest.

Okabe and Ito's colours (Color Universal Design, 2008) without black and yellow, which vanish on one of the
two backgrounds, and four of Paul Tol's (Colour Schemes, 2021). The tests hold every pair apart under
protanopia, deuteranopia and tritanopia. Colour is never alone: names stand beside it everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

# (on a light page, on a dark page)
COLOURS: tuple[tuple[str, str], ...] = (
    ("#d55e00", "#f0803c"),  # vermillion
    ("#0072b2", "#3d9be0"),  # blue
    ("#009e73", "#1fc49a"),  # green
    ("#cc79a7", "#e79ac6"),  # pink
    ("#56b4e9", "#8fd3ff"),  # sky
    ("#e69f00", "#f2b632"),  # orange
    ("#882255", "#c04a86"),  # wine
    ("#332288", "#7a6ae0"),  # indigo
    ("#999933", "#d6dc82"),  # olive
    ("#5b4636", "#a08670"),  # brown
)
GREY = ("#8a8f98", "#8a8f98")


def colour_slots(clients: Sequence[str], ranked: Sequence[str]) -> dict[str, int | None]:
    """Slot in COLOURS per client; None is grey.

    Up to ten clients keep the slot of their place in the list, so that two traces of one federation agree
    on colours. Of more, the ten best-ranked get them, in order of rank.
    """
    chosen = clients if len(clients) <= len(COLOURS) else ranked[: len(COLOURS)]
    slots = {client: slot for slot, client in enumerate(chosen)}
    return {client: slots.get(client) for client in clients}


def mix(colour: str, base: str, amount: float) -> str:
    """``amount`` of colour over ``base``, channel by channel; both "#rrggbb"."""
    pairs = zip(_channels(colour), _channels(base), strict=True)
    return "#" + "".join(f"{round(amount * over + (1 - amount) * under):02x}" for over, under in pairs)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
