"""The JSON of a ledger as dataclasses: ledger.json (written once), one manifest per round, and HEAD.

They write themselves; parsing.py reads them back. A manifest's hash is SHA-256 of its file's bytes. Round 1 names the
hash of ledger.json as its previous one, round r that of manifest r - 1, HEAD that of the last: one hash fixes the whole
history.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from protoken.errors import ArgumentError
from protoken.ledger import strictjson
from protoken.ledger.shards import ShardRef
from protoken.ledger.tensors import DTYPE_NAMES, LARGEST

FORMAT, VERSION = "protoken-ledger", 1
HEAD_LIMIT, GENESIS_LIMIT, MANIFEST_LIMIT = 4 << 10, 2 << 20, 128 << 20
MAX_ELEMENTS = 1 << 36
MAX_CLIENTS, MAX_PARAMETERS, MAX_ROUND = 100_000, 20_000, 10**8 - 1
# The last second that calendars with four digits for the year can show.
MAX_SECONDS = 253_402_300_799
WEIGHT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Genesis:
    """ledger.json: what holds for the whole run. ``server_key`` is the server's Ed25519 public key in hex, or None."""

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
    """One recorded parameter. ``form`` is "dense", or "lowrank" when base and aggregate were given as factors.

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

    ``quarantined`` is None, or why the update cannot be used although the server aggregated it; its effect is then part
    of the residual. ``key`` and ``signature`` are the client's Ed25519 public key and signature in hex, or None.
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


def check_model(model: object) -> str:
    """What the user calls the model: free text of at most 4096 characters."""
    if not isinstance(model, str) or len(model) > 4096:
        raise ArgumentError("model", expected="a string of at most 4096 characters", got=ascii(model)[:80])
    return model


def check_weights(rule: str, weights: list[float], argument: str = "weight") -> None:
    """ArgumentError unless from 0 to the largest fp32 number, and of sum 1 (within 1e-6) under fedavg and fedprox."""
    for weight in weights:
        if not 0 <= weight <= LARGEST:  # weights multiply fp32 tensors
            raise ArgumentError(argument, expected=f"a number from 0 to {LARGEST:.3g}", got=weight)
    total = math.fsum(weights)
    if rule in ("fedavg", "fedprox") and abs(total - 1.0) > WEIGHT_TOLERANCE:
        raise ArgumentError(
            argument,
            expected=f"weights of a {rule} round that sum to 1",
            got=total,
            remedy="Give the weights as the server applied them, e.g. examples_k / sum of examples.",
        )


def client_file(index: int) -> str:
    """Shard of the index-th client of a round, from 0."""
    return f"clients/{index:06d}.safetensors"
