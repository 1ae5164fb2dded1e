"""The ledger: a tamper-evident, crash-safe record of rounds and client updates. Start at Ledger."""

from protoken.ledger.ledger import Ledger
from protoken.ledger.manifest import ClientRecord, Head, ParameterSpec
from protoken.ledger.rounds import Round
from protoken.ledger.tensors import LowRank, parameter_digest, tensor_digest
from protoken.ledger.updates import ClientUpdate
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
    "parameter_digest",
    "tensor_digest",
]
