"""Structure-aware fuzzing of all that is parsed: manifests, shard headers, HEAD, ledger.json, JSON, whole ledgers.

    python tests/fuzz_ledger_structures.py CASES [SEED]     random cases; prints counts as JSON

fuzz_ledger_guided.py runs the same cases guided by coverage.

A case is well-formed JSON with a few fields replaced, removed, doubled, swapped or made absurd, or bytes with a few of
them changed; hashes are mended, so that it reaches the validators. The answer must be a typed error or a value that
holds what it promises, in less than a second.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ledger_cases import NAMES, federation, forge_manifest, forge_shard, forge_tensor, parameters, updates

from protoken.errors import LedgerError, LedgerFormatError
from protoken.ledger import ClientUpdate, Ledger, LowRank, parsing, strictjson
from protoken.ledger.files import FileLayer
from protoken.ledger.round_files import RoundReader, dense
from protoken.ledger.shards import ShardRef, parse_header
from protoken.ledger.templates import HeaderTemplate
from protoken.ledger.verification import verify

SECOND = 1.0
# One case in so many goes through the file system.
ON_DISK = 200
THINGS: list[Any] = [
    None, True, False, 0, -1, 1, 7, 8, 1 << 31, 1 << 53, 1 << 62, 1 << 63, 1 << 64, -(1 << 63), 0.5, -0.0, 1e308,
    5e-324, "", "F32", "I8", "BF16", "lora", "int8", "raw", "fp32", "alice", "ALICE", "..", "/etc/passwd", "\0",
    "\x1b[2J", "\ud800", "change.safetensors", "clients/000000.safetensors", "0" * 64, "f" * 64, "0" * 128, [], {},
    [0], [[]], [1 << 40, 1 << 40], [-1], [6, 5], {"a": 1}, {"": {}},
]  # fmt: skip


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every node below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*here, key)
        yield from places(child, (*here, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate(value: Any, chance: random.Random) -> Any:
    """One to four edits of a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 4)):
        paths = list(places(value))
        if not paths:
            return value
        *parents, last = chance.choice(paths)
        parent, thing = at(value, tuple(parents)), copy.deepcopy(chance.choice(THINGS))
        kind = chance.randrange(7)
        if kind == 0:
            parent[last] = thing
        elif kind == 1:
            del parent[last]
        elif kind == 2 and isinstance(parent, dict):
            parent[str(thing)[:20]] = thing
        elif kind == 2:
            parent.insert(last, thing)
        elif kind == 3:
            parent[last] = copy.deepcopy(at(value, chance.choice(paths)))
        elif kind == 6 and parents and isinstance(parents[-1], int):  # one field of all clients, or of a whole list
            for other in at(value, tuple(parents[:-1])):
                if isinstance(other, dict) and last in other:
                    other[last] = copy.deepcopy(thing)
        elif kind == 4 and isinstance(parent[last], int | float | str | list) and len(str(parent[last])) < 1000:
            parent[last] = parent[last] * 2
        elif isinstance(parent[last], int) and not isinstance(parent[last], bool):
            parent[last] += chance.choice([-8, -4, -1, 1, 4, 8])
    return value


def scramble(data: bytes, chance: random.Random) -> bytes:
    """One to six edits of bytes."""
    changed = bytearray(data or b"x")
    for _ in range(chance.randint(1, 6)):
        where, kind = chance.randrange(len(changed)), chance.randrange(4)
        if kind == 0:
            changed[where] = chance.randrange(256)
        elif kind == 1:
            del changed[where : where + chance.randrange(1, 9)]
        elif kind == 2:
            changed[where:where] = chance.randbytes(chance.randrange(1, 9))
        else:
            changed[where] ^= 1 << chance.randrange(8)
        changed = changed or bytearray(b"x")
    return bytes(changed)


def strange_numbers(data: bytes, chance: random.Random) -> bytes:
    """Doubles, floats or bytes at the edge of what fits, somewhere among a tensor's numbers."""
    number = chance.choice([math.nan, math.inf, -math.inf, 3.4e38, -1e300, 1e39, 5e-324, -0.0, 448.0])
    strange = struct.pack("<d", number) if abs(number) > 3.4e38 or len(data) == 8 else struct.pack("<f", number)
    where = chance.randrange(0, max(1, len(data) - len(strange) + 1), 4)
    return (data[:where] + strange + data[where + len(strange) :])[: len(data)]


class Fuzzer:
    """Holds the sound ledger that cases are made from."""

    def __init__(self, folder: Path) -> None:
        self.path, self.copy = folder / "sound", folder / "harmed"
        make_ledger(self.path)
        place = self.path / "rounds/00000002"
        self.manifest = json.loads((place / "manifest.json").read_bytes())
        self.manifest_bytes = (place / "manifest.json").read_bytes()
        self.genesis, self.head = (json.loads((self.path / n).read_bytes()) for n in ("ledger.json", "HEAD"))
        self.shards = [(place / f"clients/{i:06d}.safetensors").read_bytes() for i in range(3)]
        self.headers = [json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) for data in self.shards]
        self.bodies = [data[8 : 8 + int.from_bytes(data[:8], "little")] for data in self.shards[:2]]
        indices = [
            parse_header(body, ShardRef("x", len(data), "0" * 64))
            for body, data in zip(self.bodies, self.shards[:2], strict=True)
        ]
        made = [HeaderTemplate.of(index, body) for index, body in zip(indices, self.bodies, strict=True)]
        self.kinds = [kind for kind in made if kind is not None]
        assert len(self.kinds) == 2
        self.files = {file.relative_to(self.path): file.read_bytes() for file in self.path.rglob("*") if file.is_file()}

    def case(self, chance: random.Random) -> bool:
        """One case; whether it was accepted. AssertionError or any untyped error is a finding."""
        return self.any_ledger(chance) if chance.randrange(ON_DISK) == 0 else self.in_memory(chance)

    def in_memory(self, chance: random.Random) -> bool:
        """One case without the file system."""
        kinds: list[Callable[[random.Random], bool]] = [
            self.any_manifest,
            self.any_header,
            self.any_kind,
            self.any_small,
            self.any_json,
        ]
        return chance.choice(kinds)(chance)

    def any_manifest(self, chance: random.Random) -> bool:
        if chance.randrange(4) == 0:
            text = scramble(self.manifest_bytes, chance)
        else:
            text = json.dumps(mutate(self.any_rule(self.manifest, chance), chance)).encode()
        parsed = refused(lambda: parsing.parse_manifest(text, "manifest"))
        if parsed is None:
            return False
        assert parsing.parse_manifest(parsed.dump(), "again") == parsed
        weights = math.fsum(record.weight for record in parsed.clients)
        assert abs(weights - 1) < 1e-5 or parsed.rule not in ("fedavg", "fedprox")
        assert len({record.client.lower() for record in parsed.clients}) == len(parsed.clients)
        return True

    @staticmethod
    def any_rule(manifest: dict[str, Any], chance: random.Random) -> dict[str, Any]:
        """The same under a rule that leaves the weights free, every other time."""
        return {**manifest, "rule": chance.choice(["fedavg", "fedadam"])}

    def any_header(self, chance: random.Random) -> bool:
        which = chance.randrange(3)
        header, data = self.headers[which], self.shards[which]
        start = 8 + int.from_bytes(data[:8], "little")
        if chance.randrange(2):
            inner = mutate(json.loads(header["__metadata__"]["protoken"]), chance)
            header = {**header, "__metadata__": {"protoken": json.dumps(inner)}}
        else:
            header = mutate(header, chance)
        body = json.dumps(header).encode()
        if chance.randrange(8) == 0:
            body = scramble(body, chance)
        size = 8 + len(body) + len(data) - start
        index = refused(lambda: parse_header(body, ShardRef("x", size, "0" * 64)))
        if index is None:
            return False
        covered = sorted((entry.begin, entry.end) for entry in index.entries.values())
        ends = [8 + len(body), *(end for _, end in covered)]
        assert [begin for begin, _ in covered] == ends[:-1]
        assert ends[-1] == size
        return True

    def any_kind(self, chance: random.Random) -> bool:
        """A header taken for one of a kind met before is one that the parser takes, and finds the same in."""
        kind = self.kinds[chance.randrange(len(self.kinds))]
        header = json.loads(self.bodies[chance.randrange(len(self.bodies))])
        inner = json.loads(header["__metadata__"]["protoken"])
        inner["client"] = client = chance.choice(["alice", "bob", "x" * chance.randint(1, 128)])
        inner["bound"] = {name: chance.random() * 10 ** chance.randint(-30, 30) for name in inner["bound"]}
        if chance.randrange(2):
            inner, client = mutate(inner, chance), chance.choice(["alice", client])
        header["__metadata__"]["protoken"] = json.dumps(inner, sort_keys=True, separators=(",", ":"))
        if chance.randrange(4) == 0:
            header = mutate(header, chance)
        body = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        body += b" " * (-len(body) % 8)
        if chance.randrange(4) == 0:
            body = scramble(body, chance)
        hashes = kind.match(body, client)
        if hashes is None:
            return False
        start = 8 + len(body)
        index = parse_header(body, ShardRef("x", start + kind.size, "0" * 64))
        own = {name: kind.entry(name, start, hashes) for name in kind.parts}
        assert index.entries == own
        assert index.info == {
            **kind.index.info,
            "client": client,
            "bound": index.info["bound"],
            "sha256": index.info["sha256"],
        }
        assert set(index.info) == set(kind.index.info)
        return True

    def any_small(self, chance: random.Random) -> bool:
        if chance.randrange(2):
            text = json.dumps(mutate(self.head, chance), sort_keys=True, separators=(",", ":")).encode() + b"\n"
            return refused(lambda: parsing.parse_head(text)) is not None
        text = json.dumps(mutate(self.genesis, chance)).encode()
        return refused(lambda: parsing.parse_genesis(text)) is not None

    def any_json(self, chance: random.Random) -> bool:
        if chance.randrange(2):
            text = chance.randbytes(chance.randrange(40))
        else:
            text = scramble(json.dumps(mutate({"a": [1, {"b": None}], "c": "d"}, chance)).encode(), chance)
        found = refused(lambda: (strictjson.load(text, limit=4096, what="bytes"),))
        if found is None:
            return False
        again = refused(lambda: (strictjson.load(strictjson.dump(found[0]), limit=65536, what="again"),))
        assert again == found
        return True

    def any_ledger(self, chance: random.Random) -> bool:
        """A whole ledger with one harmed file, hashes mended or not; everything in it is read."""
        for name, data in self.files.items():
            (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
            (self.copy / name).write_bytes(data)
        kind = chance.randrange(4)
        if kind == 0:
            forge_manifest(self.copy, lambda value: json.dumps(mutate(self.any_rule(value, chance), chance)).encode())
        elif kind == 1:
            forge_shard(self.copy, lambda data: scramble(data, chance), chance.randrange(3))
        elif kind == 2:
            which = chance.randrange(3)
            name = chance.choice([name for name in self.headers[which] if name != "__metadata__"])
            forge_tensor(self.copy, name, lambda data: strange_numbers(data, chance), which)
        else:
            name, data = chance.choice([item for item in self.files.items() if item[1]])
            (self.copy / name).write_bytes(scramble(data, chance))
        report = verify(self.copy, workers=1)  # finds problems, never raises
        try:
            read_everything(self.copy)
        except LedgerError:
            return False
        return report.ok


def refused(action: Callable[[], Any]) -> Any:
    """The result, or None for a format error with a message that can be printed."""
    try:
        return action()
    except LedgerFormatError as error:
        text = str(error)
        assert text.isascii()
        assert text.isprintable()
        return None


def make_ledger(path: Path) -> None:
    """Two rounds; the second has every layout: fp32, int8 and LoRA, a residual, a quarantined client."""
    ledger = Ledger.create(path, run="run-1", files=FileLayer(path, sync=False))
    base = parameters(0)
    states, mean = federation(base)
    ledger.commit_round(base, mean, updates(states))
    with ledger.begin_round(mean, codec="int8", metadata={"a": [1, {"b": None}]}) as writer:
        lora = LowRank(torch.ones(2, 5), torch.ones(6, 2), 0.5)
        writer.add(ClientUpdate("alice", 0.5, delta={NAMES[0]: lora, NAMES[1]: torch.ones(4)}, examples=3))
        writer.add(ClientUpdate("bob", 0.25, delta={n: t * 0.1 for n, t in base.items()}))
        bad = {n: torch.full_like(t, math.nan) for n, t in base.items()}
        writer.add(ClientUpdate("carol", 0.25, delta=bad), on_bad="quarantine")
        writer.commit({n: t + 0.5 for n, t in mean.items()})
    assert verify(path).ok


def read_everything(path: Path) -> None:
    """Every public reading function on every round; stops at the first typed error."""
    ledger = Ledger.open(path)
    for current in ledger.select("all"):
        with RoundReader(current) as reader:
            for record in current.usable:
                for stored in reader.stored(record.client, list(current.parameters)):
                    assert bool(torch.isfinite(dense(stored)).all())
        for name, spec in current.parameters.items():
            assert bool(torch.isfinite(current.change(name)).all())
            assert bool(torch.isfinite(current.residual(name)).all())
            for record in current.usable:
                delta = current.delta(record.client, name)
                assert tuple(delta.shape) == spec.shape
                assert bool(torch.isfinite(delta).all())
                if current.layout(record.client, name) == "lora":
                    current.factors(record.client, name)


def run(cases: int, seed: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    fuzzer, result = Fuzzer(folder), {"cases": cases, "accepted": 0, "slowest": 0.0, "crashes": []}
    for number in range(cases):
        start = time.process_time()
        try:
            result["accepted"] += fuzzer.case(random.Random(f"{seed}:{number}"))
        except Exception as error:
            result["crashes"].append(f"{seed}:{number} {type(error).__name__}: {str(error)[:200]!a}")
        result["slowest"] = max(result["slowest"], time.process_time() - start)
        if number % 50_000 == 49_999:
            print(f"{number + 1}: {result}", file=sys.stderr, flush=True)
    for file in sorted(folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    folder.rmdir()
    return result


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))


if __name__ == "__main__":
    main()
