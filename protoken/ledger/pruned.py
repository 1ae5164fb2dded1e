"""Which rounds have lost their tensors: the file PRUNED."""

from __future__ import annotations

from protoken.errors import LedgerFormatError
from protoken.ledger import manifest as m
from protoken.ledger import strictjson
from protoken.ledger.files import FileLayer


def read_pruned(files: FileLayer) -> frozenset[int]:
    """Numbers of the rounds whose shards were removed by prune()."""
    if not files.exists("PRUNED"):
        return frozenset()
    data = files.read("PRUNED", m.GENESIS_LIMIT)
    value = strictjson.load(data, limit=m.GENESIS_LIMIT, what="PRUNED")
    good = isinstance(value, dict) and set(value) == {"rounds"} and isinstance(value["rounds"], list)
    if not good or not all(type(n) is int and 1 <= n <= m.MAX_ROUND for n in value["rounds"]):
        raise LedgerFormatError("PRUNED", expected='{"rounds": [numbers]}', got="something else")
    numbers = frozenset(value["rounds"])
    if strictjson.dump({"rounds": sorted(numbers)}) != data:
        raise LedgerFormatError("PRUNED", expected="canonical JSON", got="another spelling")
    return numbers


def pruned_bytes(numbers: set[int]) -> bytes:
    """What PRUNED says of these rounds."""
    return strictjson.dump({"rounds": sorted(numbers)})
