"""Words, flags, counts and rates that callers hand in: what does not fit is refused by its name.

numpy's numbers and booleans count as numbers and booleans; a boolean is no number.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, TypeGuard

import numpy as np

from protoken.errors import ArgumentError, DtypeError, NonFiniteError


def check_word(argument: str, value: object, known: Collection[str]) -> None:
    """ArgumentError for what is none of the words known."""
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(argument, expected=f"one of {', '.join(known)}", got=repr(value))


def check_flag(argument: str, value: object) -> bool:
    """``value`` if it is True or False, else ArgumentError: "no" would count as a yes."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(argument, expected="True or False", got=repr(value))
    return bool(value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_count(argument: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as a Python int; ArgumentError unless it is a whole number from `low` to `high` (None: without end)."""
    if not is_whole(value) or value < low or (high is not None and value > high):
        bounds = f"of {low} or more" if high is None else f"from {low} to {high}"
        raise ArgumentError(argument, expected=f"a whole number {bounds}", got=repr(value))
    return int(value)


def check_rate(argument: str, value: object) -> None:
    """ArgumentError unless it is a number between 0 and 1, both excluded."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating) or not 0 < value < 1:
        raise ArgumentError(argument, expected="a number between 0 and 1", got=repr(value))


def finite(argument: str, value: object) -> float:
    """``value`` as a Python float; NaN, infinity and non-numbers are refused."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise DtypeError(argument, expected="a number", got=type(value).__name__)
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteError(argument, expected="a finite number", got=number)
    return number


def check_bound(argument: str, value: object) -> None:
    """ArgumentError unless it is a number of 0 or more, infinity included."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating) or not value >= 0:
        raise ArgumentError(argument, expected="a number of 0 or more", got=repr(value))


def generator_of(seed: int) -> np.random.Generator:
    """numpy's generator of that seed; ArgumentError for what is no seed."""
    check_count("seed", seed, 0)
    return np.random.default_rng(seed)


def whole(argument: str, value: object) -> int:
    """``value`` as a Python int; ArgumentError for what is no whole number."""
    if not is_whole(value):
        raise ArgumentError(argument, expected="a whole number", got=repr(value))
    return int(value)


def check_callable(argument: str, value: object) -> None:
    """ArgumentError for what is neither None nor can be called."""
    if value is not None and not callable(value):
        raise ArgumentError(argument, expected="a function, or None", got=f"a {type(value).__name__}")


def listed(argument: str, value: object, expected: str = "a list or tuple") -> tuple[Any, ...]:
    """What holds several, as a tuple; ArgumentError for what does not, and for one text."""
    if not isinstance(value, str | bytes | bytearray):
        try:
            return tuple(value)  # type: ignore[arg-type]
        except TypeError:  # no iterable, or an array without an axis
            pass
    raise ArgumentError(argument, expected=expected, got=f"a {type(value).__name__}")
