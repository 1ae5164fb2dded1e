"""What `protoken ledger ls` and `show` print: plain JSON values, nothing but manifests read.

Names follow the ledger's charset; free text (model, metadata, reasons of quarantine) does not: draw it with
protoken.report.visible before it reaches a terminal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from protoken.errors import ArgumentError
from protoken.ledger.ledger import Ledger, check_ledger
from protoken.ledger.rounds import Round
from protoken.ledger.tensors import DTYPE_NAMES


def list_ledger(ledger: Ledger) -> dict[str, object]:
    """Run, model, head and one row per round: number, rule, codec, clients, parameters, residual, bytes."""
    check_ledger(ledger)
    return {
        "path": os.fspath(ledger.path),
        "run": ledger.run,
        "model": ledger.model,
        "metadata": dict(ledger.metadata),
        "head": str(ledger.head),
        "server_key": ledger.genesis.server_key,
        "rounds": [_row(current) for current in map(ledger.round, ledger.rounds)],
    }


def show_round(current: Round) -> dict[str, object]:
    """One round in full: its row, every client's record, every parameter's norms and digests."""
    if not isinstance(current, Round):
        raise ArgumentError("current", expected="a round, as Ledger.round gives it", got=f"a {type(current).__name__}")
    return {
        **_row(current),
        "previous": current.manifest.previous,
        "base_hash": current.base_hash,
        "metadata": dict(current.metadata),
        "clients": [
            {
                "client": record.client,
                "weight": record.weight,
                "examples": record.examples,
                "norm": record.norm,
                "bytes": record.shard.size,
                "quarantined": record.quarantined,
                "signed_by": record.key,
            }
            for record in current.clients
        ],
        "parameters": {
            name: {
                "shape": list(spec.shape),
                "dtype": DTYPE_NAMES[spec.dtype],
                "form": spec.form,
                "base": spec.base,
                "aggregate": spec.aggregate,
                "change_norm": spec.change_norm,
                "relative_residual": _plain(current.relative_residual)[name],
            }
            for name, spec in current.parameters.items()
        },
    }


def _row(current: Round) -> dict[str, object]:
    manifest = current.manifest
    shards = [manifest.change, *([manifest.residual] if manifest.residual else []), *(c.shard for c in current.clients)]
    return {
        "round": current.number,
        "created": manifest.created,
        "rule": current.rule,
        "codec": current.codec,
        "clients": len(current.clients),
        "quarantined": sum(record.quarantined is not None for record in current.clients),
        "parameters": len(current.parameters),
        "largest_relative_residual": _largest(current),
        "bytes": 0 if current.pruned else sum(shard.size for shard in shards),
        "pruned": current.pruned,
        "gap": manifest.gap,
    }


def _largest(current: Round) -> float | None:
    """None where the change is 0 and the residual is not: JSON has no infinity."""
    values = _plain(current.relative_residual).values()
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(current.parameters) else None


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if value < float("inf") else None for name, value in values.items()}
