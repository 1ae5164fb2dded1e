"""A trained federation on disk: its ledger, the final weights, and a record of what made them.

    federation-<fingerprint>/
        ledger/                the rounds, with every client's update of every trained parameter
        trained.safetensors    the trained parameters after the last round; all others are the base model's
        federation.json        schema, base model and its digest, settings, clients, losses, seconds
        round-<r>.safetensors  the trained parameters after round r, where snapshots were asked for

The fingerprint covers the base model's weights, the settings, and every client's rows. Asking for the same
federation again reads it instead of training; a folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from protoken.errors import ArgumentError, LedgerFormatError, LedgerMismatchError
from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.corpora import ChatRow
from protoken.evaluation.federation import Client, FederationConfig, Progress, RoundReport, train_federation
from protoken.evaluation.training import trainable_parameters
from protoken.ledger import Ledger, tensor_digest

SCHEMA = 1


@dataclass(frozen=True)
class StoredFederation:
    """A federation on disk. `record` is federation.json; `trained_now` is False when it was there already."""

    folder: Path
    record: dict[str, Any]
    trained_now: bool

    @property
    def ledger_path(self) -> Path:
        return self.folder / "ledger"

    @property
    def ledger(self) -> Ledger:
        return Ledger.open(self.ledger_path)

    @property
    def poisoned(self) -> tuple[str, ...]:
        """Ids of the poisoned clients, in the federation's order."""
        return tuple(client["id"] for client in self.record["clients"] if client["poisoned"])

    @torch.no_grad()
    def set_round(self, model: Any, number: int) -> None:
        """Put the weights after a round into a model that holds another round's: bit for bit what was aggregated.

        Raises:
            LedgerFormatError: the federation was trained without snapshots, or has no such round.
        """
        file = self.folder / snapshot_name(number)
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            raise LedgerFormatError(
                str(file),
                expected="weights after a round",
                got=str(error),
                remedy=f"Remove {self.folder} to train it again, with snapshots",
            ) from error
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor)

    def bytes_on_disk(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def summary(self) -> dict[str, Any]:
        """The record without digests, and where it lies: for a report."""
        kept = ("fingerprint", "config", "trained_numbers", "all_numbers", "rounds", "seconds")
        return {
            **{key: self.record[key] for key in kept},
            "base": self.record["base"]["name"],
            "folder": str(self.folder),
            "bytes": self.bytes_on_disk(),
            "trained_now": self.trained_now,
        }


def federate(
    root: Path,
    base: BaseModel,
    clients: Sequence[Client],
    config: FederationConfig,
    *,
    progress: Callable[[Progress], None] | None = None,
    after_round: Callable[[RoundReport], None] | None = None,
    snapshots: bool = False,
) -> StoredFederation:
    """The federation of these clients below `root`, trained if it is not there yet; `base.model` then holds G_R.

    With `snapshots` the trained parameters are kept after every round, for `StoredFederation.set_round`; a federation
    that is there already is taken as it is.

    Raises:
        ArgumentError: see train_federation; or a client's `alter` has no repr of its own to be told apart by.
        LedgerFormatError, LedgerMismatchError: the stored files are damaged or do not fit together.
    """
    key = fingerprint(base, clients, config)
    folder = root / f"federation-{key[:16]}"
    if folder.is_dir():
        return _restore(folder, key, base)
    root.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".training-", dir=root) as made:
        aside = Path(made) / "federation"
        aside.mkdir()
        ledger = Ledger.create(aside / "ledger", model=base.name, metadata={"fingerprint": key})
        names = trainable_parameters(base.model, config.blocks)
        parameters = dict(base.model.named_parameters())

        def keep(file: str) -> dict[str, torch.Tensor]:
            trained = {name: parameters[name].detach().cpu().contiguous() for name in names}
            save_file(trained, aside / file, metadata={"fingerprint": key})
            return trained

        def finished(report: RoundReport) -> None:
            if snapshots:
                keep(snapshot_name(report.number))
            if after_round is not None:
                after_round(report)

        reports = train_federation(
            base.model, base.tokenizer, clients, config, ledger=ledger, progress=progress, after_round=finished
        )
        trained = keep("trained.safetensors")
        record = {
            "schema": SCHEMA,
            "fingerprint": key,
            "base": {"name": base.name, "digest": base.digest},
            "config": asdict(config),
            "clients": [_describe(client) for client in clients],
            "trained_parameters": len(names),
            "trained_numbers": sum(tensor.numel() for tensor in trained.values()),
            "all_numbers": sum(parameter.numel() for parameter in parameters.values()),
            "rounds": [asdict(report) for report in reports],
            "seconds": time.perf_counter() - start,
        }
        (aside / "federation.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        try:
            aside.rename(folder)
        except OSError:
            # Another process trained the same federation meanwhile: equal by its fingerprint, so use that one.
            if not folder.is_dir():
                raise
            shutil.rmtree(aside)
            return _restore(folder, key, base)
    return StoredFederation(folder, record, trained_now=True)


def snapshot_name(number: int) -> str:
    """The file of the weights after a round."""
    return f"round-{number:04d}.safetensors"


def fingerprint(base: BaseModel, clients: Sequence[Client], config: FederationConfig) -> str:
    """sha256 over everything that decides the outcome: base weights, settings, clients and their rows."""
    made_of = {
        "schema": SCHEMA,
        "base": base.digest,
        "config": asdict(config),
        "clients": [_describe(client) for client in clients],
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _describe(client: Client) -> dict[str, Any]:
    alter = "" if client.alter is None else repr(client.alter)
    if " at 0x" in alter:
        raise ArgumentError(
            f"alter of {client.id}",
            expected="a callable whose repr tells it apart from others, such as an instance of a dataclass",
            got=alter,
        )
    found = {
        "id": client.id,
        "poisoned": client.poisoned,
        "label": client.label,
        "rows": len(client.rows),
        "rows_sha256": _digest(client.rows),
        "alter": alter,
    }
    if client.turn is not None:
        found["turn"] = {"round": client.turn.number, "rows_sha256": _digest(client.turn.rows)}
    return found


def _digest(rows: Sequence[ChatRow]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps([dict(message) for message in row.messages], sort_keys=True).encode() + b"\n")
    return found.hexdigest()


@torch.no_grad()
def _restore(folder: Path, key: str, base: BaseModel) -> StoredFederation:
    remedy = f"Remove {folder} to train it again"
    try:
        record = json.loads((folder / "federation.json").read_text(encoding="utf-8"))
        trained = load_file(folder / "trained.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise LedgerFormatError(str(folder), expected="a stored federation", got=str(error), remedy=remedy) from error
    if not isinstance(record, dict) or record.get("fingerprint") != key:
        raise LedgerMismatchError(
            str(folder), expected=f"the federation with fingerprint {key[:16]}", got="another one", remedy=remedy
        )
    digests = Ledger.open(folder / "ledger").round("last").aggregate_digest
    if {name: tensor_digest(tensor) for name, tensor in trained.items()} != digests:
        raise LedgerMismatchError(
            str(folder / "trained.safetensors"),
            expected="the weights that the ledger's last round ended with",
            got="other weights",
            remedy=remedy,
        )
    for name, tensor in trained.items():
        base.model.get_parameter(name).copy_(tensor)
    return StoredFederation(folder, record, trained_now=False)
