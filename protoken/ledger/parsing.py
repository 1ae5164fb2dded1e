"""Reading ledger.json, HEAD and manifests back, trusting nothing.

Presence, type and range of every field are checked, and nothing may be left over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

from protoken.errors import ArgumentError, LedgerFormatError
from protoken.ledger import manifest as m
from protoken.ledger import names, strictjson
from protoken.ledger.codecs import check_codec
from protoken.ledger.shards import MAX_DIMENSIONS, ShardRef
from protoken.ledger.tensors import DTYPES, FLOATS

_HASH = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_SHARD_FILE = re.compile(r"(change|residual|clients/[0-9]{6})\.safetensors")
T = TypeVar("T")


def parse_genesis(data: bytes, what: str = "ledger.json") -> m.Genesis:
    """Validate ledger.json."""
    with _Fields(_load(data, m.GENESIS_LIMIT, what), what) as fields:
        return m.Genesis(
            run=fields.named("run", names.check_run),
            model=fields.text("model", 4096),
            metadata=fields.metadata(),
            server_key=fields.optional("server_key", fields.hash),
            created=fields.integer("created", 0, m.MAX_SECONDS),
        )


def parse_head(data: bytes, what: str = "HEAD") -> m.Head:
    """Validate HEAD; its bytes must be the canonical ones, so that no byte of it can change unseen."""
    with _Fields(_load(data, m.HEAD_LIMIT, what), what) as fields:
        head = m.Head(
            fields.named("run", names.check_run), fields.integer("round", 0, m.MAX_ROUND), fields.hash("sha256")
        )
    if head.dump() != data:
        raise LedgerFormatError(what, expected="canonical JSON", got="another spelling")
    return head


def parse_manifest(data: bytes, what: str) -> m.Manifest:
    """Validate a manifest by itself; its place in the chain is the reader's matter."""
    with _Fields(_load(data, m.MANIFEST_LIMIT, what), what) as fields:
        manifest = m.Manifest(
            run=fields.named("run", names.check_run),
            round=fields.integer("round", 1, m.MAX_ROUND),
            previous=fields.hash("previous"),
            rule=fields.named("rule", names.check_rule),
            codec=fields.named("codec", check_codec),
            parameters=_parameters(fields.take("parameters", dict), what),
            clients=_clients(fields.take("clients", list), what),
            change=_shard(fields.take("change", dict), what),
            residual=fields.optional("residual", lambda key: _shard(fields.take(key, dict), what)),
            gap=fields.take("gap", bool),
            created=fields.integer("created", 0, m.MAX_SECONDS),
            metadata=fields.metadata(),
        )
    _check_whole(manifest, what)
    return manifest


def _parameters(table: dict[str, Any], what: str) -> dict[str, m.ParameterSpec]:
    if not 1 <= len(table) <= m.MAX_PARAMETERS:
        raise LedgerFormatError(what, expected=f"1 to {m.MAX_PARAMETERS} parameters", got=len(table))
    result = {}
    for name, value in table.items():
        names.check_parameter(name)
        with _Fields(value, what) as fields:
            shape = fields.take("shape", list)
            if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
                raise LedgerFormatError(what, expected=f"a shape for {name}", got=ascii(shape)[:80])
            if math.prod(shape) > m.MAX_ELEMENTS:
                raise LedgerFormatError(what, expected=f"at most {m.MAX_ELEMENTS} elements in {name}", got=shape)
            result[name] = m.ParameterSpec(
                tuple(shape),
                DTYPES[fields.choice("dtype", FLOATS)],
                fields.choice("form", ("dense", "lowrank")),
                fields.hash("base"),
                fields.hash("aggregate"),
                fields.number("change_norm"),
                fields.number("residual_norm"),
            )
    return result


def _clients(items: list[Any], what: str) -> tuple[m.ClientRecord, ...]:
    if not 1 <= len(items) <= m.MAX_CLIENTS:
        raise LedgerFormatError(what, expected=f"1 to {m.MAX_CLIENTS} clients", got=len(items))
    result = []
    for item in items:
        usual = _usual_client(item)
        if usual is not None:
            result.append(usual)
            continue
        with _Fields(item, what) as fields:
            record = m.ClientRecord(
                fields.named("client", names.check_client),
                fields.number("weight"),
                fields.optional("examples", lambda key: fields.integer(key, 0, 1 << 53)),
                fields.number("norm"),
                fields.optional("quarantined", lambda key: fields.text(key, 1024)),
                _shard(fields.take("shard", dict), what),
                fields.optional("key", fields.hash),
                fields.optional("signature", lambda key: fields.pattern(key, _SIGNATURE)),
            )
        result.append(record)
    return tuple(result)


def _usual_client(item: Any) -> m.ClientRecord | None:
    """A valid record without quarantine and signature, ten times faster than field by field; None for all others."""
    try:
        shard, client, weight, norm, examples = (item[k] for k in ("shard", "client", "weight", "norm", "examples"))
        good = (
            len(item) == 8
            and len(shard) == 3
            and item["quarantined"] is item["key"] is item["signature"] is None
            and type(weight) in (int, float)
            and 0 <= weight < math.inf
            and type(norm) in (int, float)
            and 0 <= norm < math.inf
            and (examples is None or (type(examples) is int and 0 <= examples <= 1 << 53))
            and type(shard["size"]) is int
            and 8 <= shard["size"] <= 1 << 50
            and names.CLIENT_PATTERN.fullmatch(client)
            and _SHARD_FILE.fullmatch(shard["file"])
            and _HASH.fullmatch(shard["sha256"])
        )
    except (KeyError, TypeError):
        return None
    if not good:
        return None
    reference = ShardRef(shard["file"], shard["size"], shard["sha256"])
    return m.ClientRecord(client, float(weight), examples, float(norm), None, reference)


def _shard(value: Any, what: str) -> ShardRef:
    with _Fields(value, what) as fields:
        return ShardRef(fields.pattern("file", _SHARD_FILE), fields.integer("size", 8, 1 << 50), fields.hash("sha256"))


def _check_whole(manifest: m.Manifest, what: str) -> None:
    duplicate = names.first_duplicate(record.client for record in manifest.clients)
    if duplicate:
        raise LedgerFormatError(what, expected="each client once", got=f"{duplicate[0]} and {duplicate[1]}")
    try:
        m.check_weights(manifest.rule, [record.weight for record in manifest.clients])
    except ArgumentError as error:
        raise LedgerFormatError(what, expected=error.expected, got=error.got) from error
    shards = [manifest.change.file, *(record.shard.file for record in manifest.clients)]
    expected = ["change.safetensors", *(m.client_file(i) for i in range(len(manifest.clients)))]
    if manifest.residual is not None:
        shards.append(manifest.residual.file)
        expected.append("residual.safetensors")
    if shards != expected:
        raise LedgerFormatError(what, expected="one shard per client, in order, and one for the change", got="others")


def _load(data: bytes, limit: int, what: str) -> dict[str, Any]:
    value = strictjson.load(data, limit=limit, what=what)
    if not isinstance(value, dict) or value.pop("format", None) != m.FORMAT:
        raise LedgerFormatError(what, expected=f'an object with "format": "{m.FORMAT}"', got="something else")
    version = value.pop("version", None)
    if type(version) is not int or version != m.VERSION:
        raise LedgerFormatError(
            what,
            expected=f"format version {m.VERSION}",
            got=ascii(version)[:40],
            remedy="Use a newer protoken.",
        )
    return value


class _Fields:
    """Typed fields of a JSON object; what is missing, mistyped or left over is a LedgerFormatError."""

    def __init__(self, value: Any, what: str) -> None:
        if not isinstance(value, dict):
            raise LedgerFormatError(what, expected="an object", got=ascii(value)[:80])
        self.value, self.what = value, what

    def __enter__(self) -> _Fields:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None and self.value:
            raise LedgerFormatError(self.what, expected="no other field", got=ascii(sorted(self.value))[:160])
        if isinstance(error, ArgumentError):
            raise LedgerFormatError(self.what, expected=error.expected, got=error.got) from error

    def take(self, key: str, kind: type[T]) -> T:
        if key not in self.value:
            raise LedgerFormatError(self.what, expected=f"a field {key}", got="none")
        value = self.value.pop(key)
        if type(value) is not kind:
            raise self._wrong(key, kind.__name__, value)
        return value

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        if key in self.value and self.value[key] is None:
            del self.value[key]
            return None
        return read(key)

    def text(self, key: str, limit: int) -> str:
        value = self.take(key, str)
        if len(value) > limit:
            raise self._wrong(key, f"at most {limit} characters", len(value))
        return value

    def pattern(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.take(key, str)
        if not pattern.fullmatch(value):
            raise self._wrong(key, f"a string matching {pattern.pattern}", value)
        return value

    def hash(self, key: str) -> str:
        return self.pattern(key, _HASH)

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.take(key, str)
        if value not in choices:
            raise self._wrong(key, f"one of {', '.join(choices)}", value)
        return value

    def named(self, key: str, check: Callable[[object], str]) -> str:
        return check(self.take(key, str))

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.take(key, int)
        if not low <= value <= high:
            raise self._wrong(key, f"an integer from {low} to {high}", value)
        return value

    def number(self, key: str) -> float:
        """A finite number >= 0; weights and norms are nothing else."""
        value = self.value.pop(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self._wrong(key, "a finite number >= 0", value)
        return float(value)

    def metadata(self) -> dict[str, Any]:
        value = self.take("metadata", dict)
        if strictjson.depth(value) > strictjson.MAX_DEPTH:
            raise self._wrong("metadata", f"at most {strictjson.MAX_DEPTH} levels", "more")
        return value

    def _wrong(self, key: str, expected: str, value: object) -> LedgerFormatError:
        return LedgerFormatError(f"{self.what}: {key}", expected=expected, got=ascii(value)[:80])
