"""What a client's records scored: ranked, drawn, and kept without their text. Nothing here imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from protoken.arguments import finite, listed
from protoken.errors import ArgumentError
from protoken.paths import file_to_read, path_of, write_text, write_whole
from protoken.results.checks import Array, frozen_array, utf8

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 10


@dataclass(frozen=True)
class RecordScore:
    """One record: `score` in nats per answer token (see probe.py), its place by score from 1, and its names."""

    rank: int
    index: int
    key: str
    client: str | None
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class RecordScores:
    """The scores of N records under one probe; arrays are read-only float64.

    keys        [N] the records' ids, or their positions
    clients     [N] who holds them, None where unknown
    loss_up     [N] mean -log p of each answer's tokens at W+, where the response is likelier, nats per token
    loss_down   [N] the same at W-
    step, steps how far and how often the weights were moved
    texts       [N] the answers, for the eye: not saved, not sent
    """

    keys: tuple[str, ...]
    clients: tuple[str | None, ...]
    loss_up: Array
    loss_down: Array
    step: float
    steps: int = 1
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("keys", "clients", "texts"):
            object.__setattr__(self, name, listed(name, getattr(self, name)))
        count = len(self.keys)
        for name, allowed in (("clients", (count,)), ("texts", (0, count))):
            if (got := len(getattr(self, name))) not in allowed:
                raise ArgumentError(name, expected=f"one for each of {count} records", got=got)
        object.__setattr__(self, "keys", tuple(utf8("keys", key) for key in self.keys))
        clients = tuple(None if client is None else utf8("clients", client) for client in self.clients)
        object.__setattr__(self, "clients", clients)
        for name in ("loss_up", "loss_down"):
            object.__setattr__(self, name, frozen_array(name, getattr(self, name), (count,), "[N]"))
        object.__setattr__(self, "step", finite("step", self.step))

    @property
    def scores(self) -> Array:
        """[N] (loss_down - loss_up) / 2: positive where the record is learned along with the response."""
        half: Array = (self.loss_down - self.loss_up) / 2
        return half

    @property
    def ranked(self) -> tuple[RecordScore, ...]:
        """All records by descending score; equal ones in their own order."""
        scores = self.scores
        order = np.argsort(-scores, kind="stable")
        return tuple(
            RecordScore(rank, int(i), self.keys[i], self.clients[i], float(scores[i]))
            for rank, i in enumerate(order, start=1)
        )

    def by_client(self) -> dict[str, float]:
        """Mean score of each client's records, by descending mean."""
        held = {name for name in self.clients if name is not None}
        scores = self.scores
        means = {
            name: float(np.mean([s for s, owner in zip(scores, self.clients, strict=True) if owner == name]))
            for name in sorted(held)
        }
        return dict(sorted(means.items(), key=lambda item: -item[1]))

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        best = f", highest {self.ranked[0].key!r} {self.ranked[0].score:+.4f}" if len(self) else ""
        return f"RecordScores({len(self)} records{best} nats per token)"

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        from protoken.report.visible import name, visible

        table = Table(title=f"the {min(SHOWN, len(self))} highest of {len(self)} records")
        for column in ("rank", "record", "client", "nats per token", "answer"):
            table.add_column(column, overflow="ellipsis", no_wrap=column != "answer")
        for entry in self.ranked[:SHOWN]:
            text = self.texts[entry.index] if self.texts else ""
            table.add_row(
                str(entry.rank),
                Text(name(entry.key)),
                Text(name(entry.client or "")),
                f"{entry.score:+.4f}",
                Text(visible(text, lines=False)[:80]),
            )
        return table

    def save(self, path: str | PathLike[str]) -> None:
        """Write the numbers and names as JSON, whole or not at all; the records' text is left out. OSError names it."""
        content = {
            "schema": 1,
            "kind": "protoken record scores",
            "step": self.step,
            "steps": self.steps,
            "keys": list(self.keys),
            "clients": list(self.clients),
            "loss_up": self.loss_up.tolist(),
            "loss_down": self.loss_down.tolist(),
        }
        text = json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(path_of("path", path), partial(write_text, text=text))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RecordScores:
        """Read what `save` wrote.

        Raises:
            ArgumentError: the file is something else, or damaged.
        """
        path = file_to_read("path", path, "a file written by RecordScores.save")
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["kind"] != "protoken record scores" or content["schema"] != 1:
                raise ValueError(f"schema {content['schema']!r} of {content['kind']!r}")
            return cls(
                keys=tuple(content["keys"]),
                clients=tuple(content["clients"]),
                loss_up=content["loss_up"],
                loss_down=content["loss_down"],
                step=content["step"],
                steps=int(content["steps"]),
            )
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise ArgumentError(
                "path", expected="a file written by RecordScores.save", got=f"{path}: {error}"
            ) from error
