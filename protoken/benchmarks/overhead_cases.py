"""What `protoken bench overhead` times: ways of tracing, over a federation of random updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from protoken.errors import ArgumentError
from protoken.ledger import ClientUpdate, Ledger
from protoken.models.architectures import Architecture
from protoken.streaming import stream
from protoken.trace import trace

WAYS = ("local", "streaming", "forward", "reverse")
DEPTH = 4


@dataclass(frozen=True)
class Case:
    """One way of tracing to be timed.

    Attributes:
        name: as it is shown.
        way: one of WAYS.
        blocks: how many are traced.
        arguments: of `trace` or `stream`.
    """

    name: str
    way: str
    blocks: int
    arguments: dict[str, Any]

    def runner(self, model: Any, ids: Sequence[int], **generation: Any) -> Callable[[], object]:
        """A call that generates and traces once."""
        if self.way == "streaming":
            return partial(_streamed, model, list(ids), **self.arguments, **generation)
        return partial(trace, model, list(ids), **self.arguments, **generation)


def cases(blocks: int, ways: Sequence[str] = WAYS) -> list[Case]:
    """The chosen ways for a model of so many blocks: one block with both objectives, tokens over four, totals over all.

    Raises:
        ArgumentError: an unknown way.
    """
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise ArgumentError("ways", expected=f"some of {', '.join(WAYS)}", got=", ".join(unknown))
    some = min(DEPTH, blocks)
    found = [
        *(
            Case(f"{way}, {f}", way, 1, {"objective": f})
            for way in ("local", "streaming")
            for f in ("logit", "log_prob")
        ),
        Case(f"forward, log_prob, {some} blocks", "forward", some, {"blocks": some, "way": "forward"}),
        Case(f"reverse, log_prob, {some} blocks", "reverse", some, {"blocks": some, "way": "reverse"}),
        Case(f"reverse, log_prob, {blocks} blocks", "reverse", blocks, {"blocks": blocks, "way": "reverse"}),
    ]
    # A model of four blocks or fewer has the same totals twice.
    return list({case.name: case for case in found if case.way in ways}.values())


def random_ledger(
    path: Path, model: Any, architecture: Architecture, clients: int, blocks: int | None = None
) -> Ledger:
    """A one-round ledger of random updates to the last blocks' two traced layers, whose aggregate is the model itself.

    The values of updates do not change what they cost.
    """
    layers = architecture.traced_layers(len(architecture.blocks) if blocks is None else blocks)
    names = [f"{layer}.weight" for layer in layers]
    aggregate = {name: model.get_parameter(name).detach().cpu() for name in names}
    generator = torch.Generator().manual_seed(0)
    common = {name: torch.randn(p.shape, generator=generator) * 1e-4 for name, p in aggregate.items()}
    base = {name: p - common[name] for name, p in aggregate.items()}
    # Clients differ by a factor only, and their factors average to one: quick to make, and the average is right.
    factors = [1 + (k - (clients - 1) / 2) / clients for k in range(clients)]
    with Ledger.create(path, model="benchmark").begin_round(base) as writer:
        for k, factor in enumerate(factors):
            writer.add(ClientUpdate(f"client-{k}", 1 / clients, delta={n: c * factor for n, c in common.items()}))
        writer.commit(aggregate)
    return Ledger.open(path)


def _streamed(model: Any, ids: list[int], **arguments: Any) -> int:
    """Take every token as it comes; how many there were."""
    with stream(model, ids, **arguments) as tokens:
        return sum(1 for _ in tokens)
