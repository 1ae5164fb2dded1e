"""Every choice of one attribution, in one place: what `trace`, `tracing` and `estimate` take alike.

Their signatures stay explicit, for readers and editors; each hands its arguments on as one `Options`, and a test holds
the three signatures against its fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from protoken.arguments import check_word, is_whole, listed
from protoken.banks.bank import Rounds
from protoken.dispatch import ORDER
from protoken.errors import ArgumentError
from protoken.ways.objective import Objective

Way = Literal["auto", "local", "reverse", "forward"]
Granularity = Literal["auto", "sequence", "token", "layer", "position"]
Method = Literal[
    "protoken",
    "paper",
    "aumann_shapley",
    "shapley",
    "paired_shapley",
    "leave_one_out",
    "chance",
    "aggregation_weight",
    "update_norm",
    "cosine",
    "client_log_prob",
    "activation_only",
    "head_only",
    "tracefl",
]

# Which methods have a choice of how many.
_OF_METHODS = {"nodes": ("aumann_shapley",), "pairs": ("shapley", "paired_shapley")}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The choices as the caller gave them; `protoken.trace` says what each means.

    Raises:
        ArgumentError: a word that is none of those known, a count that is no whole number or that the method does not
            have, one text in the place of a list, or a memory limit that is no size.
    """

    rounds: Rounds = "last"
    blocks: int | None = None
    layers: Sequence[str] | None = None
    way: Way = "auto"
    granularity: Granularity = "auto"
    objective: Objective | None = None
    method: Method = "protoken"
    backend: str = "auto"
    nodes: int | None = None
    pairs: int | None = None
    memory_limit: int | str | None = None

    def __post_init__(self) -> None:
        check_word("method", self.method, get_args(Method))
        check_word("way", self.way, get_args(Way))
        check_word("granularity", self.granularity, get_args(Granularity))
        check_word("backend", self.backend, ("auto", *ORDER))
        check_word("objective", self.resolved_objective, get_args(Objective))
        for argument in ("blocks", "nodes", "pairs"):
            value = getattr(self, argument)
            if value is not None and not is_whole(value):
                raise ArgumentError(argument, expected="a whole number, or None", got=repr(value))
            object.__setattr__(self, argument, None if value is None else int(value))
        for argument, methods in _OF_METHODS.items():
            if getattr(self, argument) is not None and self.method not in methods:
                raise ArgumentError(
                    argument,
                    expected=f"None for method {self.method!r}: it is for {' and '.join(methods)}",
                    got=getattr(self, argument),
                    remedy=f"Leave {argument} out, or choose method={methods[0]!r}",
                )
        if self.layers is not None:
            object.__setattr__(self, "layers", names_of(self.layers))
        object.__setattr__(self, "memory_limit", bytes_of(self.memory_limit))

    @property
    def resolved_objective(self) -> Objective:
        """The published method attributes the raw logit, all others the log-probability."""
        default: Objective = "logit" if self.method == "paper" else "log_prob"
        return default if self.objective is None else self.objective

    @property
    def limit(self) -> int | None:
        """The memory limit in bytes."""
        assert not isinstance(self.memory_limit, str)
        return self.memory_limit


def bytes_of(size: int | str | None) -> int | None:
    """A size in bytes: a whole number, or a text like "2GB" (10^9), "512 MiB" (2^20), "1.5G".

    Raises:
        ArgumentError: neither, or less than one byte.
    """
    if size is None:
        return None
    count: float = -1
    if isinstance(size, str):
        text = size.strip().lower().removesuffix("b")
        unit = text.lstrip("0123456789. ")
        number = text[: len(text) - len(unit)].strip()
        if unit in _UNITS and number.count(".") <= 1 and number.strip("."):
            count = float(number) * _UNITS[unit]
    elif is_whole(size):
        count = int(size)
    if count < 1:
        raise ArgumentError(
            "memory_limit", expected='a number of bytes above 0, or a size like "2GB" or "512MiB"', got=size
        )
    return int(count)


def names_of(layers: Iterable[str]) -> tuple[str, ...]:
    """Names or patterns of layers, as a tuple.

    Raises:
        ArgumentError: one text in the place of a list, none, or what is no text.
    """
    expected = "a list of names or patterns, one at least"
    names = listed("layers", layers, expected)
    if not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError("layers", expected=expected, got=repr(layers))
    return names
