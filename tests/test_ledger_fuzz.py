"""Structure-aware fuzzing: any JSON, any header, any bytes are a typed error or a right answer, and quickly.

PROTOKEN_FUZZ_CASES multiplies the number of cases (1: a few hundred per test).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from fuzz_ledger_structures import make_ledger, places, read_everything
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_cases import NAMES, forge_manifest, forge_shard, reopen

from protoken.errors import LedgerError, LedgerFormatError, ProtokenError
from protoken.ledger import Ledger, parsing, strictjson
from protoken.ledger.shards import ShardRef, parse_header
from protoken.ledger.verification import verify

CASES = float(os.environ.get("PROTOKEN_FUZZ_CASES", "1"))
FUZZ = settings(
    max_examples=int(250 * CASES),
    deadline=None,
    derandomize=CASES <= 1,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
SLOW = settings(FUZZ, max_examples=int(80 * CASES))
SECOND = 1.0
T = TypeVar("T")

nasty = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 7, 8, 1 << 31, 1 << 53, 1 << 62, 1 << 63, 1 << 64, -(1 << 63)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "F32", "I8", "lora", "int8", "fp32", "alice", "ALICE", "..", "/etc/passwd", "\0", "\x1b[2J"]),
    st.sampled_from(["change.safetensors", "clients/000000.safetensors", "0" * 64, "f" * 64, "0" * 128]),
    st.text(max_size=12),
    st.lists(st.integers(-2, 1 << 40), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(-(1 << 60), 1 << 60), max_size=3),
)


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple[str, float, Any]]:
    """One to four edits: kind, where (a share of all places), and a value."""
    edit = st.tuples(st.sampled_from(["replace", "delete", "add", "copy", "double"]), st.floats(0, 0.999999), nasty)
    return draw(st.lists(edit, min_size=1, max_size=4))


def mutate(value: Any, edits: list[tuple[str, float, Any]]) -> Any:
    value = copy.deepcopy(value)
    for kind, where, thing in edits:
        paths = list(places(value))
        if not paths:
            return value
        *parents, last = paths[int(where * len(paths))]
        parent = value
        for key in parents:
            parent = parent[key]
        if kind == "replace":
            parent[last] = thing
        elif kind == "delete":
            del parent[last]
        elif kind == "add" and isinstance(parent, dict):
            parent[str(thing)[:20]] = thing
        elif kind == "add":
            parent.insert(last, thing)
        elif kind == "copy":
            *others, other = paths[int(where * 7919 * len(paths)) % len(paths)]
            source = value
            for key in [*others, other]:
                source = source[key] if isinstance(source, (dict, list)) else source
            parent[last] = copy.deepcopy(source)
        elif isinstance(parent[last], (int, float, str, list)):
            parent[last] = parent[last] * 2
    return value


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Two rounds; the second has every layout: fp32, int8 and LoRA, a residual, a quarantined client."""
    path = tmp_path_factory.mktemp("fuzz") / "ledger"
    make_ledger(path)
    return path


def attempt(action: Callable[[], T]) -> tuple[T | None, ProtokenError | None]:
    """(result, None) or (None, the typed error); anything else is a crash and fails the test."""
    try:
        return action(), None
    except ProtokenError as error:
        return None, error


@FUZZ
@given(edits=mutations())
def test_any_manifest_is_parsed_or_a_format_error(original, edits):
    data = json.loads((original / "rounds/00000002/manifest.json").read_bytes())
    text = json.dumps(mutate(data, edits)).encode()
    start = time.process_time()
    parsed, error = attempt(lambda: parsing.parse_manifest(text, "manifest"))
    if parsed is None:
        assert isinstance(error, LedgerFormatError)
        assert str(error).isprintable()
        assert str(error).isascii()
    else:
        assert parsing.parse_manifest(parsed.dump(), "again") == parsed
        assert abs(math.fsum(c.weight for c in parsed.clients) - 1) < 1e-5 or parsed.rule not in ("fedavg", "fedprox")
    assert time.process_time() - start < SECOND


@FUZZ
@given(edits=mutations(), inner=st.booleans())
def test_any_shard_header_is_parsed_or_a_format_error(original, edits, inner):
    data = (original / "rounds/00000002/clients/000000.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if inner:
        info = mutate(json.loads(header["__metadata__"]["protoken"]), edits)
        header["__metadata__"]["protoken"] = json.dumps(info)
    else:
        header = mutate(header, edits)
    body = json.dumps(header).encode()
    size = 8 + len(body) + len(data) - 8 - length
    index, error = attempt(lambda: parse_header(body, ShardRef("x", size, "0" * 64)))
    if index is None:
        assert isinstance(error, LedgerFormatError)
        assert str(error).isascii()
    else:
        covered = sorted((e.begin, e.end) for e in index.entries.values())
        assert [b for b, _ in covered[1:]] == [e for _, e in covered[:-1]]


@FUZZ
@given(data=st.binary(max_size=300), limit=st.integers(0, 400))
def test_any_bytes_are_json_or_a_format_error(data, limit):
    try:
        value = strictjson.load(data, limit=limit, what="bytes")
    except LedgerFormatError:
        return
    assert len(data) <= limit
    again = strictjson.load(strictjson.dump(value), limit=10_000, what="again")
    assert again == value


@FUZZ
@given(
    value=st.recursive(
        nasty, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=20
    )
)
def test_canonical_json_is_one_spelling(value):
    data = strictjson.dump(value)
    assert strictjson.dump(strictjson.load(data, limit=1 << 20, what="value")) == data
    assert data.isascii()


def restored(original: Path, tmp_path: Path) -> Path:
    """A fresh hard copy of the small ledger; fast enough for thousands."""
    path = tmp_path / hashlib.sha256(os.urandom(8)).hexdigest()[:12]
    for file in original.rglob("*"):
        target = path / file.relative_to(original)
        if file.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return path


@SLOW
@given(edits=mutations())
def test_any_consistent_manifest_reads_whole_or_is_a_ledger_error(original, tmp_path, edits):
    path = restored(original, tmp_path)
    forge_manifest(path, lambda value: json.dumps(mutate(value, edits)).encode())
    start = time.process_time()
    _, error = attempt(lambda: read_everything(path))
    assert error is None or isinstance(error, LedgerError)
    verify(path, workers=1)  # finds problems, never raises
    assert time.process_time() - start < SECOND


@SLOW
@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 6), index=st.integers(0, 2))
def test_any_consistent_shard_reads_whole_or_is_a_ledger_error(original, tmp_path, seed, count, index):
    path, chance = restored(original, tmp_path), random.Random(seed)

    def scramble(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(count):
            at = chance.randrange(len(changed))
            kind = chance.randrange(4)
            if kind == 0:
                changed[at] = chance.randrange(256)
            elif kind == 1:
                del changed[at : at + chance.randrange(1, 9)]
            elif kind == 2:
                changed[at:at] = chance.randbytes(chance.randrange(1, 9))
            else:
                changed[at] ^= 1 << chance.randrange(8)
            changed = changed or bytearray(b"x")
        return bytes(changed)

    forge_shard(path, scramble, index)
    start = time.process_time()
    _, error = attempt(lambda: read_everything(path))
    assert error is None or isinstance(error, LedgerError)
    verify(path, workers=1)
    assert time.process_time() - start < SECOND
    check_first = reopen(path)
    try:
        first = check_first.round(1)
    except LedgerError:
        return
    assert first.delta("alice", NAMES[0]).shape == (6, 5)


@SLOW
@given(seed=st.integers(0, 1 << 32))
def test_any_damage_without_new_hashes_is_never_read_as_right(original, tmp_path, seed):
    """Nothing consistent about it: whatever still reads must be the original."""
    path, chance = restored(original, tmp_path), random.Random(seed)
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size)
    victim = chance.choice(files)
    data = bytearray(victim.read_bytes())
    at = chance.randrange(len(data))
    if chance.random() < 0.5:
        data[at] ^= 1 << chance.randrange(8)
    else:
        data = data[:at]
    victim.write_bytes(data)
    assert not verify(path, workers=1).ok
    intact = Ledger.open(original)

    def compare() -> None:
        damaged = Ledger.open(path)
        for number in damaged.rounds:
            for name in NAMES:
                assert torch.equal(damaged.round(number).change(name), intact.round(number).change(name))
                assert torch.equal(damaged.round(number).delta("bob", name), intact.round(number).delta("bob", name))

    _, error = attempt(compare)
    assert error is None or isinstance(error, LedgerError)


def test_the_unharmed_ledger_reads_whole(original):
    read_everything(original)


@pytest.mark.slow
def test_a_hundred_thousand_cases_end_in_a_typed_error_or_the_right_answer_within_a_second():
    """The same script runs 10^6 cases, or is guided by coverage: see its head."""
    cases = max(1, int(100_000 * CASES))
    script = Path(__file__).with_name("fuzz_ledger_structures.py")
    done = subprocess.run([sys.executable, str(script), str(cases)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["crashes"] == []
    assert result["slowest"] < SECOND
    assert 0.02 < result["accepted"] / cases < 0.9  # cases reach the validators, and do not all pass them
