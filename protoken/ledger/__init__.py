"""The ledger: a tamper-evident, crash-safe record of rounds and client updates. Start at Ledger."""

from protoken.ledger.estimate import estimate_bytes
from protoken.ledger.importers import import_folder, import_round
from protoken.ledger.ledger import Ledger
from protoken.ledger.lineage import (
    lineage_change,
    lineage_clients,
    lineage_delta,
    lineage_factors,
    lineage_residual,
)
from protoken.ledger.manifest import ClientRecord, Head, ParameterSpec
from protoken.ledger.rounds import Round
from protoken.ledger.summary import list_ledger, show_round
from protoken.ledger.tensors import LowRank, parameter_digest, tensor_digest
from protoken.ledger.transfer import copy_ledger, export_rounds, prune
from protoken.ledger.updates import ClientUpdate
from protoken.ledger.verification import VerifyReport, verify
from protoken.ledger.writer import RoundWriter

__all__ = [
    "ClientRecord",
    "ClientUpdate",
    "Head",
    "Ledger",
    "LowRank",
    "ParameterSpec",
    "Round",
    "RoundWriter",
    "VerifyReport",
    "copy_ledger",
    "estimate_bytes",
    "export_rounds",
    "import_folder",
    "import_round",
    "lineage_change",
    "lineage_clients",
    "lineage_delta",
    "lineage_factors",
    "lineage_residual",
    "list_ledger",
    "parameter_digest",
    "prune",
    "show_round",
    "tensor_digest",
    "verify",
]
