"""The small records a `Trace` is made of and gives out. See results.py."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from protoken.errors import ArgumentError
from protoken.results_checks import finite, plain, utf8

Objective = Literal["log_prob", "log_odds", "logit"]
UNITS: dict[str, str] = {"log_prob": "nats", "log_odds": "nats of log-odds", "logit": "logit units"}

WITHOUT_CONSERVATION: dict[str, str | None] = {
    "paper": None,
    "chance": "random units",
    "aggregation_weight": "weight",
    "update_norm": "norm units",
    "cosine": "cosine",
    "client_log_prob": None,
    "activation_only": "activation units",
    "head_only": None,
    "tracefl": "standard deviations",
}
"""Methods whose scores need not add up to the change, with the unit of their scores; None: the objective's."""


@dataclass(frozen=True)
class Token:
    """One generated token. ``text`` keeps its whitespace; it may be "" when a character spans tokens."""

    id: int
    text: str
    special: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", operator.index(self.id))
        utf8("token text", self.text)


@dataclass(frozen=True)
class TraceInfo:
    """How the scores came to be.

    method              "protoken", "paper", ...
    way                 "local", "reverse", "forward" or the oracle's own name
    granularity         "sequence", "token", "layer" (token and layer) or "position"
    reason              why this way was taken
    objective           "log_prob" (scores in nats), "log_odds" (in nats of log-odds) or "logit" (in logit units)
    layers, rounds      traced module names; ledger rounds, 1-based
    backend             which implementation did the projection
    seconds_generate    wall seconds of plain generation
    seconds_trace       wall seconds of the whole trace, generation included
    generate_arguments  as given to ``generate``, in JSON's types
    settings            the method's own: nodes, sampled orders, evaluations
    created             ISO 8601 with time zone
    """

    method: str
    way: str
    objective: Objective
    layers: tuple[str, ...]
    rounds: tuple[int, ...]
    backend: str = ""
    model: str = ""
    ledger: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    seconds_generate: float = 0.0
    seconds_trace: float = 0.0
    generate_arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    granularity: str = ""
    reason: str = ""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if self.objective not in UNITS:
            raise ArgumentError("objective", expected=" or ".join(UNITS), got=self.objective)
        clean: dict[str, Any] = {
            name: utf8(name, getattr(self, name))
            for name in ("method", "way", "granularity", "reason", "backend", "model", "ledger", "created")
        }
        clean["layers"] = tuple(utf8("layers", layer) for layer in self.layers)
        clean["rounds"] = tuple(operator.index(number) for number in self.rounds)
        clean["versions"] = {utf8("versions", k): utf8("versions", v) for k, v in self.versions.items()}
        clean["seed"] = None if self.seed is None else operator.index(self.seed)
        clean["generate_arguments"] = plain(self.generate_arguments)
        clean["settings"] = plain(self.settings)
        for name in ("seconds_generate", "seconds_trace"):
            clean[name] = finite(name, getattr(self, name))
        for name, value in clean.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class ClientScore:
    """One client's raw ``score`` (objective's unit), softmax ``share``, ``rank`` from 1, and ``weight``."""

    client: str
    score: float
    share: float
    rank: int
    weight: float


@dataclass(frozen=True)
class TokenScore:
    """One token: its ``objective`` value under the model, its score per client, the highest scorer."""

    index: int
    id: int
    text: str
    objective: float
    scores: dict[str, float] | None
    top: str | None
