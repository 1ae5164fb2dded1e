"""Fuzzing of the ledger's parsers guided by coverage: libFuzzer (package atheris) chooses bytes, they choose the edits.

    PYTHONPATH=tests python tests/fuzz_ledger_guided.py CORPUS [libFuzzer's options, e.g. -max_total_time=600]

The first byte decides whether the rest is handed to the parsers as it is, or spells out the random choices of a case of
fuzz_ledger_structures.py. A crash, or a case of more than a second, is written to ./crash-...; give that file as an
argument to see it again.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["protoken.ledger"]):
    import protoken.ledger  # noqa: F401 (instrumented only when nobody has imported it before)

from fuzz_ledger_structures import SECOND, Fuzzer, refused

from protoken.ledger import parsing, strictjson
from protoken.ledger.shards import ShardRef, parse_header

RAW = 64


class Spelled(random.Random):
    """Random choices read off bytes, zeros after their end: a changed byte changes one choice, not all."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._at = data, 0

    def getrandbits(self, k: int, /) -> int:
        count = (k + 7) // 8
        piece = self._data[self._at : self._at + count]
        self._at += count
        return int.from_bytes(piece.ljust(count, b"\0"), "little") >> (8 * count - k)

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


def parse_all(data: bytes) -> None:
    """The same bytes as every kind of file."""
    refused(lambda: parsing.parse_manifest(data, "manifest"))
    refused(lambda: parsing.parse_genesis(data))
    refused(lambda: parsing.parse_head(data))
    refused(lambda: parse_header(data, ShardRef("shard", 8 + len(data), "0" * 64)))
    refused(lambda: strictjson.load(data, limit=4096, what="bytes"))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # libFuzzer ends the process without another word
        fuzzer = Fuzzer(Path(folder))
    corpus = Path(sys.argv[1])
    if not corpus.is_file():
        corpus.mkdir(parents=True, exist_ok=True)
        files = {name.name: data for name, data in fuzzer.files.items() if name.suffix != ".safetensors"}
        headers = {f"header-{i}": json.dumps(header).encode() for i, header in enumerate(fuzzer.headers)}
        for name, data in {**files, **headers}.items():
            (corpus / name).write_bytes(b"\0" + data)
        (corpus / "case").write_bytes(bytes([RAW, *range(64)]))

    def one(data: bytes) -> None:
        start = time.process_time()
        if data and data[0] >= RAW:
            fuzzer.in_memory(Spelled(data[1:]))
        else:
            parse_all(data[1:])
        assert time.process_time() - start < SECOND, "a case took more than a second"

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
