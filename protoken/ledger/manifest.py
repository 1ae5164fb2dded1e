"""The JSON of a ledger: ledger.json (written once), one manifest per round, and HEAD. Dataclasses and their
validation.

A manifest's hash is SHA-256 of its file's bytes. Round 1 names the hash of ledger.json as its previous one,
round r that of manifest r - 1, HEAD that of the last: one hash fixes the whole history.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from protoken.errors import ArgumentError, LedgerFormatError
from protoken.ledger import names, strictjson
from protoken.ledger.codecs import check_codec
from protoken.ledger.shards import MAX_DIMENSIONS, ShardRef
from protoken.ledger.tensors import DTYPE_NAMES, DTYPES, FLOATS

FORMAT, VERSION = "protoken-ledger", 1
HEAD_LIMIT, GENESIS_LIMIT, MANIFEST_LIMIT = 4 << 10, 2 << 20, 128 << 20
MAX_ELEMENTS = 1 << 36
MAX_CLIENTS, MAX_PARAMETERS, MAX_ROUND = 100_000, 20_000, 10**8 - 1
WEIGHT_TOLERANCE = 1e-6
_HASH = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_SHARD_FILE = re.compile(r"(change|residual|clients/[0-9]{6})\.safetensors")
T = TypeVar("T")


@dataclass(frozen=True)
class Genesis:
    """ledger.json: what holds for the whole run. ``server_key`` is the server's Ed25519 public key in hex, or
    None.
    """

    run: str
    model: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    server_key: str | None = None
    created: int = 0

    def dump(self) -> bytes:
        return strictjson.dump({"format": FORMAT, "version": VERSION, **asdict(self)})


@dataclass(frozen=True)
class Head:
    """HEAD: number and manifest hash of the last round (round 0: the hash of ledger.json)."""

    run: str
    round: int
    sha256: str

    def dump(self) -> bytes:
        return strictjson.dump({"format": FORMAT, "version": VERSION, **asdict(self)})

    def __str__(self) -> str:
        """The form to pin: "12:<hash>"."""
        return f"{self.round}:{self.sha256}"


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One recorded parameter. ``form`` is "dense", or "lowrank" when base and aggregate were given as
    factors.

    ``base`` and ``aggregate`` are digests of G_{r-1} and G_r; norms are Frobenius.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str
    base: str
    aggregate: str
    change_norm: float
    residual_norm: float


@dataclass(frozen=True, slots=True)
class ClientRecord:
    """One client's part in a round. ``weight`` is rho_k as applied; ``norm`` that of the stored update.

    ``quarantined`` is None, or why the update cannot be used although the server aggregated it; its effect is
    then part of the residual. ``key`` and ``signature`` are the client's Ed25519 public key and signature in
    hex, or None.
    """

    client: str
    weight: float
    examples: int | None
    norm: float
    quarantined: str | None
    shard: ShardRef
    key: str | None = None
    signature: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything of a round but its tensors."""

    run: str
    round: int
    previous: str
    rule: str
    codec: str
    parameters: dict[str, ParameterSpec]
    clients: tuple[ClientRecord, ...]
    change: ShardRef
    residual: ShardRef | None = None
    gap: bool = False
    created: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> bytes:
        # One level of vars() instead of asdict: that one copies deeply, which 10^5 clients feel.
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["parameters"] = {
            name: {**asdict(spec), "dtype": DTYPE_NAMES[spec.dtype]} for name, spec in self.parameters.items()
        }
        plain["clients"] = [
            {**{name: getattr(record, name) for name in record.__slots__}, "shard": _plain(record.shard)}
            for record in self.clients
        ]
        plain["change"] = _plain(self.change)
        plain["residual"] = _plain(self.residual) if self.residual else None
        return strictjson.dump({"format": FORMAT, "version": VERSION, **plain})


def _plain(ref: ShardRef) -> dict[str, object]:
    return {"file": ref.file, "size": ref.size, "sha256": ref.sha256}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def base_hash(parameters: Mapping[str, str]) -> str:
    """One hash for the model that the clients were sent: of the canonical JSON {parameter: base digest}."""
    return strictjson.digest(dict(parameters))


def parse_genesis(data: bytes, what: str = "ledger.json") -> Genesis:
    """Validate ledger.json."""
    with _Fields(_load(data, GENESIS_LIMIT, what), what) as fields:
        return Genesis(
            run=fields.named("run", names.check_run),
            model=fields.text("model", 4096),
            metadata=fields.metadata(),
            server_key=fields.optional("server_key", fields.hash),
            created=fields.integer("created", 0, 1 << 40),
        )


def parse_head(data: bytes, what: str = "HEAD") -> Head:
    """Validate HEAD; its bytes must be the canonical ones, so that no byte of it can change unseen."""
    with _Fields(_load(data, HEAD_LIMIT, what), what) as fields:
        head = Head(fields.named("run", names.check_run), fields.integer("round", 0, MAX_ROUND), fields.hash("sha256"))
    if head.dump() != data:
        raise LedgerFormatError(what, expected="canonical JSON", got="another spelling")
    return head


def parse_manifest(data: bytes, what: str) -> Manifest:
    """Validate a manifest by itself; its place in the chain is the reader's matter."""
    with _Fields(_load(data, MANIFEST_LIMIT, what), what) as fields:
        manifest = Manifest(
            run=fields.named("run", names.check_run),
            round=fields.integer("round", 1, MAX_ROUND),
            previous=fields.hash("previous"),
            rule=fields.named("rule", names.check_rule),
            codec=fields.named("codec", check_codec),
            parameters=_parameters(fields.take("parameters", dict), what),
            clients=_clients(fields.take("clients", list), what),
            change=_shard(fields.take("change", dict), what),
            residual=fields.optional("residual", lambda key: _shard(fields.take(key, dict), what)),
            gap=fields.take("gap", bool),
            created=fields.integer("created", 0, 1 << 40),
            metadata=fields.metadata(),
        )
    _check_whole(manifest, what)
    return manifest


def check_model(model: object) -> str:
    """What the user calls the model: free text of at most 4096 characters."""
    if not isinstance(model, str) or len(model) > 4096:
        raise ArgumentError("model", expected="a string of at most 4096 characters", got=ascii(model)[:80])
    return model


def check_weights(rule: str, weights: list[float], argument: str = "weight") -> None:
    """ArgumentError unless finite and not negative, and of sum 1 (within 1e-6) under fedavg and fedprox."""
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ArgumentError(argument, expected="a finite number >= 0", got=weight)
    total = math.fsum(weights)
    if rule in ("fedavg", "fedprox") and abs(total - 1.0) > WEIGHT_TOLERANCE:
        raise ArgumentError(
            argument,
            expected=f"weights of a {rule} round that sum to 1",
            got=total,
            remedy="Give the weights as the server applied them, e.g. examples_k / sum of examples.",
        )


def _parameters(table: dict[str, Any], what: str) -> dict[str, ParameterSpec]:
    if not 1 <= len(table) <= MAX_PARAMETERS:
        raise LedgerFormatError(what, expected=f"1 to {MAX_PARAMETERS} parameters", got=len(table))
    result = {}
    for name, value in table.items():
        names.check_parameter(name)
        with _Fields(value, what) as fields:
            shape = fields.take("shape", list)
            if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
                raise LedgerFormatError(what, expected=f"a shape for {name}", got=ascii(shape)[:80])
            if math.prod(shape) > MAX_ELEMENTS:
                raise LedgerFormatError(what, expected=f"at most {MAX_ELEMENTS} elements in {name}", got=shape)
            result[name] = ParameterSpec(
                tuple(shape),
                DTYPES[fields.choice("dtype", FLOATS)],
                fields.choice("form", ("dense", "lowrank")),
                fields.hash("base"),
                fields.hash("aggregate"),
                fields.number("change_norm"),
                fields.number("residual_norm"),
            )
    return result


def _clients(items: list[Any], what: str) -> tuple[ClientRecord, ...]:
    if not 1 <= len(items) <= MAX_CLIENTS:
        raise LedgerFormatError(what, expected=f"1 to {MAX_CLIENTS} clients", got=len(items))
    result = []
    for item in items:
        usual = _usual_client(item)
        if usual is not None:
            result.append(usual)
            continue
        with _Fields(item, what) as fields:
            record = ClientRecord(
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


def _usual_client(item: Any) -> ClientRecord | None:
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
    return ClientRecord(client, float(weight), examples, float(norm), None, reference)


def _shard(value: Any, what: str) -> ShardRef:
    with _Fields(value, what) as fields:
        return ShardRef(fields.pattern("file", _SHARD_FILE), fields.integer("size", 8, 1 << 50), fields.hash("sha256"))


def _check_whole(manifest: Manifest, what: str) -> None:
    duplicate = names.first_duplicate(record.client for record in manifest.clients)
    if duplicate:
        raise LedgerFormatError(what, expected="each client once", got=f"{duplicate[0]} and {duplicate[1]}")
    try:
        check_weights(manifest.rule, [record.weight for record in manifest.clients])
    except ArgumentError as error:
        raise LedgerFormatError(what, expected=error.expected, got=error.got) from error
    shards = [manifest.change.file, *(record.shard.file for record in manifest.clients)]
    expected = ["change.safetensors", *(client_file(i) for i in range(len(manifest.clients)))]
    if manifest.residual is not None:
        shards.append(manifest.residual.file)
        expected.append("residual.safetensors")
    if shards != expected:
        raise LedgerFormatError(what, expected="one shard per client, in order, and one for the change", got="others")


def client_file(index: int) -> str:
    """Shard of the index-th client of a round, from 0."""
    return f"clients/{index:06d}.safetensors"


def _load(data: bytes, limit: int, what: str) -> dict[str, Any]:
    value = strictjson.load(data, limit=limit, what=what)
    if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
        raise LedgerFormatError(what, expected=f'an object with "format": "{FORMAT}"', got="something else")
    version = value.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise LedgerFormatError(
            what,
            expected=f"format version {VERSION}",
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
