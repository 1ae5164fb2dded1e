"""Manifests and shards that lie, hashes and all: each is a typed error, and nothing in them is ever run."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from ledger_cases import (
    NAMES,
    SHARD,
    assert_first_round_is_untouched,
    check_round,
    contents,
    forge_header,
    forge_manifest,
    forge_shard,
    read_all,
    small_ledger,
)

from protoken.errors import ArgumentError, LedgerError, LedgerFormatError
from protoken.ledger import ClientUpdate, Ledger, LowRank
from protoken.ledger.files import FileLayer
from protoken.ledger.verification import verify


@pytest.fixture
def path(tmp_path):
    return Path(small_ledger(tmp_path / "ledger", 2).path)


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def edit(manifest):
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return edit


def duplicate_key(manifest):
    return json.dumps(manifest).replace('"gap": false', '"gap": false, "gap": false').encode()


def raw(text):
    """A manifest with the first weight replaced by text that json would not write."""
    return lambda manifest: json.dumps(manifest).replace('"weight": 0.5', f'"weight": {text}').encode()


def drop(key):
    return lambda manifest: manifest.pop(key) and None


BAD_MANIFESTS = {
    "not json": lambda manifest: b"\x80\x04pickle",
    "empty": lambda manifest: b"",
    "a list": lambda manifest: b"[]",
    "deep": lambda manifest: b"[" * 100_000,
    "deep metadata": put("metadata", json.loads('{"a":' * 100 + "1" + "}" * 100)),
    "wide": lambda manifest: b"[" + b"[]," * 1_000_001 + b"[]]",
    "bad utf-8": lambda manifest: b'{"format": "\xff"}',
    "duplicate key": duplicate_key,
    "NaN": raw("NaN"),
    "Infinity": raw("Infinity"),
    "overflow": raw("1e999"),
    "huge integer": raw("1" + "0" * 5000),
    "negative weight": put("clients", 0, "weight", -0.5),
    "boolean weight": put("clients", 0, "weight", True),
    "text weight": put("clients", 0, "weight", "0.5"),
    "weights of sum 1.1": put("clients", 0, "weight", 0.6),
    "zero weights": lambda manifest: [client.update(weight=0) for client in manifest["clients"]] and None,
    "no clients": put("clients", []),
    "client twice": put("clients", 1, "client", "alice"),
    "client by case": put("clients", 1, "client", "ALICE"),
    "client in Unicode": put("clients", 1, "client", "al\u00efce"),
    "client with escape": put("clients", 1, "client", "bob\x1b[2J"),
    "client with markup": put("clients", 1, "client", "<script>"),
    "client as path": put("clients", 1, "client", "../bob"),
    "client with newline": put("clients", 1, "client", "bob\n"),
    "path traversal": put("clients", 0, "shard", "file", "../../../etc/passwd"),
    "absolute path": put("change", "file", "/etc/passwd"),
    "another's shard": put("clients", 0, "shard", "file", "clients/000001.safetensors"),
    "change as client": put("clients", 0, "shard", "file", "change.safetensors"),
    "bad hash": put("change", "sha256", "A" * 64),
    "negative size": put("change", "size", -1),
    "huge size": put("change", "size", 1 << 60),
    "fractional size": put("change", "size", 10.5),
    "version 2": put("version", 2),
    "version true": put("version", True),
    "other format": put("format", "else"),
    "other run": put("run", "run-2"),
    "other round": put("round", 1),
    "unknown field": put("extra", 1),
    "missing field": drop("rule"),
    "bad rule": put("rule", "<b>"),
    "bad codec": put("codec", "raw"),
    "no parameters": put("parameters", {}),
    "bad parameter": put("parameters", {"../x": {}}),
    "negative shape": put("parameters", NAMES[0], "shape", [-1, 5]),
    "huge shape": put("parameters", NAMES[0], "shape", [1 << 39, 1 << 39]),
    "nine dimensions": put("parameters", NAMES[0], "shape", [1] * 9),
    "bad dtype": put("parameters", NAMES[0], "dtype", "I8"),
    "bad form": put("parameters", NAMES[0], "form", "sparse"),
    "bad norm": put("parameters", NAMES[0], "change_norm", -1),
    "null parameter": put("parameters", NAMES[0], None),
    "half a signature": put("clients", 0, "signature", "0" * 127),
    "gap as text": put("gap", "false"),
    "committed in the year 10000": put("created", 253_402_300_800),
    "examples below 0": put("clients", 0, "examples", -1),
    "long model": put("clients", 0, "quarantined", "x" * 2000),
}


@pytest.mark.parametrize("edit", BAD_MANIFESTS)
def test_forged_manifest_is_a_format_error(path, edit):
    forge_manifest(path, BAD_MANIFESTS[edit])
    with pytest.raises(LedgerFormatError) as caught:
        read_all(path)
    assert str(caught.value).isascii()
    assert "\x1b" not in str(caught.value)
    assert not verify(path).ok
    assert_first_round_is_untouched(path)


def test_a_shape_that_is_not_the_shards_is_a_format_error(path):
    forge_manifest(path, put("parameters", NAMES[0], "shape", [5, 6]))
    with pytest.raises(LedgerFormatError, match=r"expected F32 \(5, 6\)"):
        Ledger.open(path).round(2).delta("alice", NAMES[0])


def header(**fields):
    def edit(header, info):
        header[NAMES[0]].update(fields)

    return edit


def overlap(header, info):
    header[NAMES[0]]["data_offsets"] = [8, 128]


BAD_HEADERS = {
    "overlap": overlap,
    "hole": header(data_offsets=[20, 140]),
    "backwards": header(data_offsets=[120, 0]),
    "negative": header(data_offsets=[-120, 0]),
    "beyond the end": header(data_offsets=[0, 1 << 61]),
    "three offsets": header(data_offsets=[0, 1, 2]),
    "text offsets": header(data_offsets=["0", "120"]),
    "shape too large": header(shape=[60, 5]),
    "shape overflow": header(shape=[1 << 32, 1 << 32]),
    "shape negative": header(shape=[-6, -5]),
    "shape true": header(shape=[True, 30]),
    "nine dimensions": header(shape=[6, 5, 1, 1, 1, 1, 1, 1, 1]),
    "unknown dtype": header(dtype="I64"),
    "null dtype": header(dtype=None),
    "list dtype": header(dtype=["F32"]),
    "extra field": header(extra=1),
    "reinterpreted": header(dtype="F16", shape=[12, 5]),
    "no metadata": lambda h, i: h.pop("__metadata__") and None,
    "text metadata": lambda h, i: h.update({"__metadata__": "x"}),
    "no hash": lambda h, i: i["sha256"].pop(NAMES[0]) and None,
    "hash of nothing": lambda h, i: i["sha256"].update(other="0" * 64),
    "number as hash": lambda h, i: i["sha256"].update({NAMES[0]: 5}),
    "no layout": lambda h, i: i["layout"].pop(NAMES[0]) and None,
    "unknown layout": lambda h, i: i["layout"].update({NAMES[0]: "raw"}),
    "list layout": lambda h, i: i["layout"].update({NAMES[0]: ["fp32"]}),
    "layout without parts": lambda h, i: i["layout"].update({NAMES[0]: "int8"}),
    "low-rank vector": lambda h, i: i["layout"].update({NAMES[1]: "lora"}),
    "text bound": lambda h, i: i["bound"].update({NAMES[0]: "0"}),
    "other run": lambda h, i: i.update(run="run-2"),
    "other round": lambda h, i: i.update(round=1),
    "other base": lambda h, i: i.update(base="0" * 64),
    "other client": lambda h, i: i.update(client="bob"),
    "not json": lambda h, i: b"{",
    "a list": lambda h, i: b"[]",
    "nested": lambda h, i: b'{"a":' * 50_000,
    "tensor twice": lambda h, i: json.dumps(h).replace("{", '{"x":1,"x":1,', 1).encode(),
    "tensor is null": lambda h, i: h.update({NAMES[0]: None}),
}


@pytest.mark.parametrize("edit", BAD_HEADERS)
def test_forged_shard_header_is_a_format_error_and_other_clients_stay_readable(path, edit):
    forge_header(path, BAD_HEADERS[edit])
    read = Ledger.open(path).round(2)
    with pytest.raises(LedgerFormatError):
        dict(read.deltas("alice"))
    for name in NAMES:
        assert read.delta("bob", name).shape == read.change(name).shape
    report = verify(path)
    assert [problem.where for problem in report.problems] == ["round 2, client alice"]
    check_round(Ledger.open(path).round(1))
    assert_first_round_is_untouched(path)


def with_tensor_bytes(data: bytes, values: bytes) -> bytes:
    """A shard whose last bytes are replaced, hashes included."""
    import hashlib

    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    info = json.loads(head["__metadata__"]["protoken"])
    whole = data[8 + length : len(data) - len(values)] + values
    for name, entry in head.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            info["sha256"][name] = hashlib.sha256(whole[begin:end]).hexdigest()
    head["__metadata__"]["protoken"] = json.dumps(info)
    body = json.dumps(head).encode()
    return len(body).to_bytes(8, "little") + body + whole


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stored_nan_with_right_hashes_is_found_when_read(path, value):
    forge_shard(path, lambda data: with_tensor_bytes(data, struct.pack("<f", value)))
    with pytest.raises(LedgerFormatError, match="NaN or infinity"):
        read_all(path)
    assert not verify(path).ok


@pytest.mark.parametrize("length", [0, 1, 7, 8, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_header_length_outside_the_file(path, length):
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(struct.pack("<Q", length) + data[8:])
    with pytest.raises(LedgerFormatError):
        read_all(path)


def test_pickle_with_a_consistent_manifest_is_never_unpickled(path, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "boom"),))

    forge_shard(path, lambda data: pickle.dumps(Bomb()) + bytes(100))
    with pytest.raises(LedgerFormatError):
        read_all(path)
    torch.save({"x": torch.zeros(3)}, path / SHARD)
    with pytest.raises(LedgerFormatError):
        read_all(path)
    assert not (tmp_path / "boom").exists()


def test_two_thin_factors_cannot_claim_a_matrix_larger_than_memory(tmp_path):
    side = 300_000  # 360 GB dense
    a, b = torch.zeros(1, side), torch.zeros(side, 1)
    tall = LowRank(a, b)
    ledger = Ledger.create(tmp_path / "ledger", files=FileLayer(tmp_path / "ledger", sync=False))
    before = contents(ledger.path)
    with pytest.raises((LedgerError, ArgumentError), match=r"fits in|at most"):
        ledger.commit_round({"w": tall}, {"w": tall}, [ClientUpdate("a", 1.0, delta={"w": tall})])
    assert contents(ledger.path) == before
