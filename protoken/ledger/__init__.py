"""The ledger: a tamper-evident, crash-safe record of rounds and client updates. Start at `Ledger` in ledger.py.

reading       ledger.py, a snapshot of the folder; rounds.py, one round; lineage.py, many rounds as one; summary.py
writing       writer.py, one round; updates.py, what a caller hands in; composing.py, what is made of it; rules.py,
              what the server did beyond FedAvg; estimate.py, bytes beforehand
checking      verification.py, every byte; shard_check.py, one shard; chain.py, the manifests below a head;
              signatures.py
in and out    importers.py and checkpoints.py, from files; transfer.py, to others, and pruning
the format    manifest.py (written) and parsing.py (read back, trusting nothing), strictjson.py, names.py, shards.py,
              codecs.py, tensors.py, pruned.py; docs/ledger-format.md has it byte by byte
the disk      files.py, every file operation
many clients  round_files.py, read_ahead.py, templates.py, small_factors.py: small shards, read and checked quickly
"""

from protoken.ledger.estimate import estimate_bytes
from protoken.ledger.importers import import_folder, import_round, round_folders
from protoken.ledger.ledger import Ledger
from protoken.ledger.lineage import (
    lineage_change,
    lineage_clients,
    lineage_delta,
    lineage_factors,
    lineage_gaps,
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
    "lineage_gaps",
    "lineage_residual",
    "list_ledger",
    "parameter_digest",
    "prune",
    "round_folders",
    "show_round",
    "tensor_digest",
    "verify",
]
