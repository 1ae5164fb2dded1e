"""JSON as the ledger writes and reads it: one canonical form out, nothing unexpected in.

Caps are looked at before the parser runs, since a small file can ask for much memory: size, number of
containers, number of items. Duplicate keys, NaN, Infinity, numbers that overflow and integers of more than
19 digits are refused (RFC 8259 leaves all of these to the reader).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from protoken.errors import ArgumentError, LedgerFormatError

MAX_DEPTH = 24
MAX_CONTAINERS = 1_000_000
MAX_ITEMS = 4_000_000


def dump(value: object) -> bytes:
    """Canonical bytes: keys sorted, no spaces, ASCII only, floats in Python's shortest form, one newline at the end."""
    try:
        text = json.dumps(
            value,
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=True,
            allow_nan=False,
            check_circular=True,
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError("metadata", expected="finite plain JSON values", got=str(error)) from error
    return text.encode("ascii") + b"\n"


def digest(value: object) -> str:
    """SHA-256 of the canonical bytes, in hex."""
    return hashlib.sha256(dump(value)).hexdigest()


def load(data: bytes, *, limit: int, what: str) -> Any:
    """Parse bytes, or raise LedgerFormatError; ``what`` names the file in the message."""
    if len(data) > limit:
        raise LedgerFormatError(what, expected=f"at most {limit} bytes of JSON", got=len(data))
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS or data.count(b",") > MAX_ITEMS:
        raise LedgerFormatError(what, expected=f"at most {MAX_CONTAINERS} lists and objects", got="more")
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LedgerFormatError(what, expected="strict JSON", got=_short(error)) from error


def check_metadata(metadata: Mapping[str, object] | None, *, limit: int = 1 << 20) -> dict[str, Any]:
    """A deep plain copy of the metadata; ArgumentError when it is not JSON, too deep or too large."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ArgumentError("metadata", expected="a mapping, or None", got=f"a {type(metadata).__name__}")
    data = dump(dict(metadata))
    if len(data) > limit or depth(metadata) > MAX_DEPTH:
        raise ArgumentError(
            "metadata",
            expected=f"at most {limit} bytes and {MAX_DEPTH} levels of JSON",
            got=f"{len(data)} bytes",
        )
    try:
        copy = load(data, limit=limit, what="metadata")
    except LedgerFormatError as error:
        raise ArgumentError("metadata", expected="integers of at most 19 digits", got=str(error)) from error
    assert isinstance(copy, dict)
    return copy


def depth(value: object) -> int:
    """Levels of nesting: 0 for a scalar, 1 for a flat list or object."""
    deepest, stack = 0, [(value, 0)]
    while stack:
        item, level = stack.pop()
        if isinstance(item, (Mapping, list, tuple)):
            deepest = max(deepest, level + 1)
            children = item.values() if isinstance(item, Mapping) else item
            stack.extend((child, level + 1) for child in children)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object with a key twice")
    return result


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number too large for a double")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"the constant {text}")


def _short(error: BaseException) -> str:
    text = ascii(str(error) or type(error).__name__).strip("'\"")
    return text if len(text) <= 120 else f"{text[:117]}..."


# One for all: a ledger of 100,000 shards has twice as many small pieces of JSON.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
