"""A trace as JSON.

The JSON is plain and schema-versioned; floats are written in Python's shortest exact form, so they come
back bit for bit. Reading trusts nothing: size cap, no duplicate keys, no NaN, every field checked.
"""

from __future__ import annotations

import json
import os
import stat
from functools import partial
from typing import Any

from protoken.errors import ArgumentError, ProtokenError, TraceFormatError
from protoken.paths import path_of, write_text, write_whole
from protoken.results.parts import Token, TraceInfo
from protoken.results.result import Trace

FORMAT, SCHEMA = "protoken.trace", 1
MAX_BYTES = 64 * 2**20
"""Larger files are refused: 64 MiB hold about 3 million scores."""


def to_dict(trace: Trace) -> dict[str, Any]:
    """The trace in JSON's own types; `from_dict` is its inverse."""
    info, scores, residuals = trace.info, trace.token_scores, trace.token_residual
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "prompt": trace.prompt,
        "prompt_ids": list(trace.prompt_ids),
        "response": trace.response,
        "start": trace.start,
        "tokens": [{"id": t.id, "text": t.text, "special": t.special} for t in trace.token_list],
        "clients": list(trace.client_ids),
        "weights": trace.weights.tolist(),
        "unit": trace.unit,
        "totals": trace.totals.tolist(),
        "shares": trace.shares.tolist(),
        "token_scores": None if scores is None else scores.tolist(),
        "objective_values": trace.objective_values.tolist(),
        "token_residual": None if residuals is None else residuals.tolist(),
        "residual": trace.residual,
        "change": trace.change,
        "conservation_residual": trace.conservation_residual,
        "layer_totals": None if trace.layer_totals is None else trace.layer_totals.tolist(),
        "standard_errors": None if trace.standard_errors is None else trace.standard_errors.tolist(),
        "token_layer_scores": None if trace.token_layer_scores is None else trace.token_layer_scores.tolist(),
        "position_scores": None if trace.position_scores is None else trace.position_scores.tolist(),
        "info": {
            "method": info.method,
            "way": info.way,
            "objective": info.objective,
            "layers": list(info.layers),
            "rounds": list(info.rounds),
            "backend": info.backend,
            "model": info.model,
            "ledger": info.ledger,
            "versions": dict(info.versions),
            "seed": info.seed,
            "seconds_generate": info.seconds_generate,
            "seconds_trace": info.seconds_trace,
            "generate_arguments": info.generate_arguments,
            "settings": info.settings,
            "granularity": info.granularity,
            "reason": info.reason,
            "forced": info.forced,
            "created": info.created,
        },
    }


# Written for the reader, computed from the rest when read.
_DERIVED = {"unit", "shares", "conservation_residual"}
# Not yet there in the first files of this schema.
_LATER = {"standard_errors", "token_layer_scores", "position_scores"}
_LATER_FACTS = {"settings", "granularity", "reason", "forced"}


def from_dict(data: object) -> Trace:
    """The trace that `to_dict` described. TraceFormatError names the first thing that does not fit."""
    entry = _object("trace", data)
    if entry.get("format") != FORMAT:
        raise TraceFormatError("format", expected=FORMAT, got=repr(entry.get("format"))[:80])
    if type(entry.get("schema")) is not int or entry["schema"] != SCHEMA:
        remedy = "Written by another version of protoken: install that or a newer one"
        raise TraceFormatError("schema", expected=SCHEMA, got=repr(entry.get("schema"))[:80], remedy=remedy)
    names = "prompt prompt_ids response start tokens clients weights totals token_scores objective_values"
    names += " token_residual residual change layer_totals info"
    _keys("trace", entry, {*names.split(), "format", "schema"}, {*_DERIVED, *_LATER})
    facts = _object("info", entry["info"])
    _keys("info", facts, set(TraceInfo.__dataclass_fields__) - _LATER_FACTS, _LATER_FACTS)
    try:
        return Trace(
            prompt=entry["prompt"],
            prompt_ids=tuple(_integers("prompt_ids", entry["prompt_ids"])),
            response=entry["response"],
            token_list=tuple(_token(item) for item in _list("tokens", entry["tokens"])),
            client_ids=tuple(_list("clients", entry["clients"])),
            weights=_numbers("weights", entry["weights"], 1),
            token_scores=_optional_numbers("token_scores", entry["token_scores"], 2),
            totals=_numbers("totals", entry["totals"], 1),
            objective_values=_numbers("objective_values", entry["objective_values"], 1),
            token_residual=_optional_numbers("token_residual", entry["token_residual"], 1),
            residual=entry["residual"],
            change=entry["change"],
            layer_totals=_optional_numbers("layer_totals", entry["layer_totals"], 2),
            info=_info(facts),
            start=_integers("start", [entry["start"]])[0],
            standard_errors=_optional_numbers("standard_errors", entry.get("standard_errors"), 1),
            token_layer_scores=_optional_numbers("token_layer_scores", entry.get("token_layer_scores"), 3),
            position_scores=_optional_numbers("position_scores", entry.get("position_scores"), 2),
        )
    except TraceFormatError:
        raise
    except (ProtokenError, TypeError, ValueError, OverflowError) as error:
        raise TraceFormatError("trace", expected="a consistent trace", got=str(error)[:300]) from error


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write `to_dict` as UTF-8 JSON; the file appears whole or not at all. OSError names it."""
    content = json.dumps(to_dict(trace), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    write_whole(path_of("path", path), partial(write_text, text=content))


def load(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Trace:
    """Read what `save` wrote. FileNotFoundError as usual; TraceFormatError for anything not a trace."""
    # O_NONBLOCK: opening a named pipe must not wait for a writer that never comes.
    descriptor = os.open(path_of("path", path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TraceFormatError("path", expected="a regular file", got=os.fspath(path))
    with os.fdopen(descriptor, "rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        remedy = "Raise protoken.results.export.load(path, max_bytes=...) if you trust the file"
        raise TraceFormatError("path", expected=f"at most {max_bytes} bytes", got="more", remedy=remedy)
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except TraceFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise TraceFormatError("path", expected="UTF-8 JSON", got=str(error)[:300]) from error
    return from_dict(data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise TraceFormatError("path", expected="JSON objects without duplicate keys")
    return found


def _no_constant(name: str) -> float:
    raise TraceFormatError("path", expected="finite numbers", got=name)


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TraceFormatError(name, expected="a JSON object", got=type(value).__name__)
    return value


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TraceFormatError(name, expected="a JSON array", got=type(value).__name__)
    return value


def _keys(name: str, entry: dict[str, Any], needed: set[str], optional: set[str]) -> None:
    wrong = sorted((needed - entry.keys()) | (entry.keys() - needed - optional))
    if wrong:
        raise TraceFormatError(name, expected=sorted(needed), got=f"missing or unknown {wrong[:8]}"[:200])


def _integers(name: str, value: object) -> list[int]:
    items = _list(name, value)
    if not all(type(item) is int for item in items):
        raise TraceFormatError(name, expected="whole numbers")
    return items


def _numbers(name: str, value: object, axes: int) -> Any:
    """Nested lists of numbers, ``axes`` deep; Trace checks lengths and finiteness."""
    items = _list(name, value)
    if axes > 1:
        return [_numbers(name, item, axes - 1) for item in items]
    if not all(type(item) in (int, float) for item in items):
        raise TraceFormatError(name, expected="numbers")
    return items


def _optional_numbers(name: str, value: object, axes: int) -> Any:
    return None if value is None else _numbers(name, value, axes)


def _token(value: object) -> Token:
    entry = _object("tokens", value)
    _keys("tokens", entry, {"id", "text", "special"}, set())
    if type(entry["special"]) is not bool:
        raise TraceFormatError("tokens", expected="special: true or false")
    return Token(_integers("tokens", [entry["id"]])[0], entry["text"], entry["special"])


def _info(facts: dict[str, Any]) -> TraceInfo:
    lists = {
        "layers": tuple(_list("layers", facts["layers"])),
        "rounds": tuple(_integers("rounds", facts["rounds"])),
    }
    for name in ("versions", "generate_arguments", "settings"):
        _object(name, facts.get(name, {}))
    if facts["seed"] is not None:
        _integers("seed", [facts["seed"]])
    if not isinstance(facts["objective"], str):
        raise ArgumentError("objective", expected="a str", got=type(facts["objective"]).__name__)
    return TraceInfo(**{**facts, **lists})
