"""What a result may hold: finite float64 arrays of the right shape, and text that UTF-8 can carry.

Kept apart from result.py so that the dataclasses there read as the contract they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from protoken.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError

if TYPE_CHECKING:
    from protoken.results.result import Trace

Array = NDArray[np.float64]

# How far a sum may miss, relative to the magnitudes in it: float32 scores added up in another order.
SUM_TOLERANCE = 1e-5


def frozen_array(name: str, value: object, shape: tuple[int, ...], axes: str) -> Array:
    """A private, read-only, finite float64 copy of ``value``; ``axes`` names ``shape`` in the message."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DtypeError(name, expected=f"numbers {axes}", got=type(value).__name__) from error
    if array.size == 0 and 0 in shape and array.ndim == 1:
        array = array.reshape(shape)  # [] from JSON or an empty list stands for [0, K]
    if array.shape != shape:
        raise ShapeError(name, expected=f"{axes} = {shape}", got=array.shape)
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise NonFiniteError(name, expected="finite numbers", got=f"{bad} NaN or infinite")
    array.setflags(write=False)
    return array


def vector(name: str, value: object) -> Array:
    """``value`` as a finite float64 array of one axis, a copy."""
    many = isinstance(value, Sized) and not isinstance(value, str | bytes | bytearray) and getattr(value, "ndim", 1) > 0
    return frozen_array(name, value, (len(value) if many else 0,), "[n]")  # type: ignore[arg-type]


def utf8(name: str, value: object) -> str:
    """``value`` if it is a str without lone surrogates, which neither UTF-8 nor JSON round-trips."""
    if not isinstance(value, str):
        raise DtypeError(name, expected="a str", got=type(value).__name__)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArgumentError(name, expected="text that UTF-8 can hold", got="a lone surrogate") from error
    return value


def plain(value: object) -> Any:
    """``value`` in JSON's own types, so that a saved trace loads back equal.

    Tuples become lists, numpy scalars Python numbers; what JSON cannot carry (tensors, criteria objects,
    infinities) becomes a short description, since it is a note for the reader and is never run again.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(plain(str(key))): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def check_parts(trace: Trace) -> None:
    """ArgumentError for a field of a trace that is of another kind altogether."""
    from protoken.results.parts import Token, TraceInfo

    if not isinstance(trace.info, TraceInfo):
        raise ArgumentError("info", expected="a TraceInfo", got=f"a {type(trace.info).__name__}")
    odd = [token for token in trace.token_list if not isinstance(token, Token)]
    if odd:
        raise ArgumentError("token_list", expected="Token each", got=f"a {type(odd[0]).__name__}")


def check_sums(trace: Trace) -> None:
    """Conservation, and totals that are the sums of their tokens; else numbers on one page contradict.

    sum(totals) + residual == change (but for "paper" and the baselines), and per token sums likewise, within
    SUM_TOLERANCE of the magnitudes.
    """
    from protoken.results.parts import WITHOUT_CONSERVATION

    totals, scores, inside = trace.totals, trace.token_scores, trace.token_residual
    size = float(np.abs(totals).sum()) + abs(trace.residual) + abs(trace.change)
    sums = [("change", float(totals.sum()) + trace.residual, trace.change)]
    if trace.info.method in WITHOUT_CONSERVATION:
        # The published scores are of full weights, and baselines of nothing that adds up: only their tokens do.
        sums = []
    if scores is not None and inside is not None:
        size += float(np.abs(scores).sum()) + float(np.abs(inside).sum())
        named = zip(trace.client_ids, scores.sum(axis=0), totals, strict=True)
        sums += [(f"totals of {client}", float(total), float(given)) for client, total, given in named]
        sums.append(("residual", float(inside.sum()), trace.residual))
    for name in ("position_scores", "token_layer_scores"):
        parts = getattr(trace, name)
        if parts is not None:
            size += float(np.abs(parts).sum())
            whole = parts.reshape(-1, len(totals)).sum(axis=0)
            pairs = zip(trace.client_ids, whole, totals, strict=True)
            sums += [(f"{name} of {client}", float(total), float(given)) for client, total, given in pairs]
    for name, expected, got in sums:
        if abs(expected - got) > SUM_TOLERANCE * size:
            raise ArgumentError(name, expected=f"{expected:.9g} as its parts add up to", got=f"{got:.9g}")
