"""Files that somebody meant to be read: each is a typed error, quickly, and touches nothing outside its round."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from ledger_cases import (
    NAMES,
    check_round,
    commit_next,
    contents,
    federation,
    forge_header,
    forge_manifest,
    forge_shard,
    parameters,
    reopen,
    small_ledger,
    updates,
)
from typer.testing import CliRunner

from protoken.cli import app
from protoken.errors import ArgumentError, LedgerError, LedgerFormatError, NonFiniteError
from protoken.ledger import ClientUpdate, Ledger, LowRank, parsing
from protoken.ledger import manifest as m
from protoken.ledger.files import FileLayer
from protoken.ledger.names import escape_terminal
from protoken.ledger.verification import verify

SHARD = "rounds/00000002/clients/000000.safetensors"
MANIFEST = "rounds/00000002/manifest.json"


@pytest.fixture
def path(tmp_path):
    return Path(small_ledger(tmp_path / "ledger", 2).path)


def read_all(path: Path) -> None:
    ledger = Ledger.open(path)
    for number in ledger.rounds:
        check_round(ledger.round(number))


def assert_first_round_is_untouched(path: Path) -> None:
    """Under the head of a moment before, the ledger is sound: what came after harmed nothing that was there."""
    data = (path / "rounds/00000001/manifest.json").read_bytes()
    (path / "HEAD").write_bytes(m.Head("run-1", 1, m.sha256(data)).dump())
    report = verify(path)
    assert report.problems == []
    assert report.leftovers == ["rounds/00000002"]
    check_round(Ledger.open(path).round(1))


def replace_by_symlink(file: Path) -> None:
    copy = next(p for p in file.parents if (p / "ledger.json").exists()).parent / "copy"
    shutil.move(file, copy)
    file.symlink_to(copy)


def replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_socket(file: Path) -> None:
    import socket

    file.unlink()
    here = os.getcwd()
    os.chdir(file.parent)  # the path of a socket is at most 107 bytes long
    try:
        socket.socket(socket.AF_UNIX).bind(file.name)
    finally:
        os.chdir(here)


DAMAGE = {
    "symlink": replace_by_symlink,
    "hard link": lambda file: os.link(file, file.with_suffix(".second")),
    "fifo": replace_by_fifo,
    "folder": replace_by_folder,
    "socket": replace_by_socket,
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "sparse": lambda file: os.truncate(file, 1 << 40),
    "other bytes": lambda file: file.write_bytes(os.urandom(file.stat().st_size)),
    "pickle": lambda file: file.write_bytes(pickle.dumps({"weight": [1.0] * 100})),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [SHARD, MANIFEST, "HEAD", "ledger.json"])
def test_damaged_file_is_a_typed_error(path, name, damage):
    DAMAGE[damage](path / name)
    with pytest.raises(LedgerError):
        read_all(path)
    report = verify(path)
    assert not report.ok
    if name == SHARD:
        assert {problem.where.split(",")[0] for problem in report.problems} == {"round 2"}
        check_round(Ledger.open(path).round(1))
    if name in (SHARD, MANIFEST):
        assert_first_round_is_untouched(path)


@pytest.mark.parametrize("name", ["rounds", "rounds/00000002"])
def test_a_folder_that_is_a_link_is_not_followed(path, name, tmp_path):
    shutil.move(path / name, tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(LedgerFormatError, match="without links"):
        read_all(path)
    with pytest.raises(LedgerError):
        commit_next(reopen(path))
    assert contents(tmp_path / "elsewhere") == before


def test_shrinking_shard_is_an_error_not_a_dead_process(path):
    """With a mapping the second read would be a SIGBUS."""
    read = Ledger.open(path).round(2)
    read.delta("alice", NAMES[0])
    os.truncate(path / SHARD, 200)
    with pytest.raises(LedgerFormatError, match=r"expected \d+ bytes, got 200"):
        read.delta("alice", NAMES[0])

    class Blind(FileLayer):
        """The file shrinks between fstat and pread."""

        def size(self, handle: int) -> int:
            return full

    full = (path / "rounds/00000001/clients/000000.safetensors").stat().st_size
    os.truncate(path / "rounds/00000001/clients/000000.safetensors", full - 3)
    with pytest.raises(LedgerFormatError, match="the file was cut short"):
        Ledger.open(path, files=Blind(path)).round(1).delta("alice", NAMES[0])


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "rounds//x", ".", "a/.", "", "a\0b"])
def test_the_file_layer_refuses_names_that_lead_out(path, name):
    with pytest.raises((LedgerFormatError, ValueError)):
        FileLayer(path).read(name, 10)
    assert not FileLayer(path).exists("../x")


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


def test_swapped_rounds_and_shards_are_found(path):
    one, two = path / "rounds/00000001", path / "rounds/00000002"
    shutil.copytree(one, path / "saved")
    for client in ("000000", "000001"):
        shutil.copyfile(one / f"clients/{client}.safetensors", two / f"clients/{client}.safetensors")
    assert len(verify(path).problems) == 2
    shutil.rmtree(two)
    shutil.copytree(path / "saved", two)
    with pytest.raises(LedgerFormatError, match="expected a manifest with hash"):
        Ledger.open(path).round(1)


def test_client_ids_that_differ_by_case_or_unicode_form_are_one_client(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 1)
    base = parameters(1001)
    states, mean = federation(base)
    for bad in ("Alice", "ALICE"):
        given = [
            ClientUpdate(bad if u.client == "alice" else u.client, u.weight, state=u.state) for u in updates(states)
        ]
        with pytest.raises(ArgumentError, match="expected alice, as in earlier rounds"):
            ledger.commit_round(base, mean, given)
    with pytest.raises(ArgumentError, match="each client once per round, got alice, Alice"):
        ledger.commit_round(base, mean, [*updates(states), ClientUpdate("Alice", 0.0, state=base)])
    for bad in ("\u0430lice", "alice\u0301", "", " alice", "alice ", "a" * 129, "a/b", "..", "-a", "a\n", None, 5):
        with pytest.raises(ArgumentError, match="client: expected a string matching"):
            ClientUpdate(bad, 1.0, state={})
    assert verify(ledger.path).ok


@pytest.mark.parametrize(
    "metadata", [{"x": float("nan")}, {"x": 10**30}, {"x": object()}, {"x": "y" * (1 << 20)}, {1: {2, 3}}]
)
def test_metadata_that_is_no_finite_json_is_refused(tmp_path, metadata):
    with pytest.raises(ArgumentError, match="metadata"):
        Ledger.create(tmp_path / "ledger", metadata=metadata)


def test_metadata_too_deep_or_recursive_is_refused(tmp_path):
    recursive: dict[str, object] = {}
    recursive["x"] = recursive
    nested: object = 1
    for _ in range(30):
        nested = [nested]
    for metadata in (recursive, {"x": nested}):
        with pytest.raises(ArgumentError, match="metadata"):
            Ledger.create(tmp_path / "ledger", metadata=metadata)


def test_a_hundred_thousand_clients_are_parsed_and_one_more_is_refused(path):
    whole = Ledger.open(path).round(2).manifest
    record = whole.clients[0]

    def client(i: int) -> m.ClientRecord:
        shard = dataclasses.replace(record.shard, file=m.client_file(i))
        return dataclasses.replace(record, client=f"client-{i}", weight=1e-5, shard=shard)

    data = dataclasses.replace(whole, clients=tuple(client(i) for i in range(m.MAX_CLIENTS))).dump()
    assert len(data) < m.MANIFEST_LIMIT
    parsed = parsing.parse_manifest(data, "many")
    assert len(parsed.clients) == 100_000
    assert parsed.clients[99_999] == client(99_999)
    more = data.replace(b'"clients":[', b'"clients":[{},', 1)
    with pytest.raises(LedgerFormatError, match="1 to 100000 clients, got 100001"):
        parsing.parse_manifest(more, "more")


@pytest.mark.parametrize("text", ["\x1b]0;pwned\x07", "a\u202eb", "tab\t", "back\\slash", "\x9b31m"])
def test_escaped_text_is_printable_ascii(text):
    escaped = escape_terminal(text)
    assert escaped.isascii()
    assert escaped.isprintable()
    assert escape_terminal("plain text <>") == "plain text <>"


def test_free_text_of_a_ledger_never_reaches_a_terminal_as_it_is(tmp_path):
    """Model, metadata, the reason of a quarantine and names of stray files are anything; every command shows them."""
    evil = "\x1b]0;pwned\x07\u202e[red]<b>\x9b31m"
    path = tmp_path / "ledger"
    ledger = Ledger.create(path, run="run-1", model=evil, metadata={evil: evil}, files=FileLayer(path, sync=False))
    base = parameters(0)
    states, mean = federation(base)
    given = [*updates(states)[:2], ClientUpdate("carol", 0.2, state={evil: torch.zeros(1)})]
    ledger.commit_round(base, mean, given, metadata={evil: evil}, on_bad="quarantine")
    forge_manifest(path, lambda manifest: manifest["clients"][2].update(quarantined=evil))
    (path / "rounds/00000001" / evil.replace("/", "")).touch()
    (path / "staging" / evil.replace("/", "")).touch()
    for command in ("ls", "show", "verify"):
        for options in ([], ["--json"]):
            done = CliRunner().invoke(app, ["ledger", command, str(path), *options])
            assert done.exit_code == (command == "verify"), done.output
            assert not {c for c in done.output if c in "\x1b\x07\x9b\u202e"}
    with pytest.raises(NonFiniteError) as caught:
        Ledger.open(path).round(1).delta("carol", NAMES[0])
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


# ---- quarantine --------------------------------------------------------------------------------------------------


def test_bad_update_that_was_aggregated_is_kept_flagged_and_out_of_the_way(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 0)
    base = parameters(0)
    states, mean = federation(base)
    bad = {**states["bob"], NAMES[0]: states["bob"][NAMES[0]].clone()}
    bad[NAMES[0]][2, 3] = float("nan")
    given = [ClientUpdate(u.client, u.weight, state=bad if u.client == "bob" else u.state) for u in updates(states)]
    with pytest.raises(NonFiniteError, match="on_bad='quarantine'"):
        ledger.commit_round(base, mean, given)
    committed = ledger.commit_round(base, mean, given, on_bad="quarantine")
    record = committed.client("bob")
    assert record.quarantined is not None
    assert "finite numbers" in record.quarantined
    assert record.weight == 0.3
    assert [c.client for c in committed.usable] == ["alice", "carol"]
    with pytest.raises(NonFiniteError, match="quarantined in round 1"):
        committed.delta("bob", NAMES[0])
    kept = committed.quarantined_tensor("bob", NAMES[0])
    assert torch.isnan(kept[2, 3])
    assert torch.equal(committed.delta("alice", NAMES[0]), states["alice"][NAMES[0]] - base[NAMES[0]])
    # its effect is owed to nobody: 0.3 of what bob did is the residual
    lost = 0.3 * (states["bob"][NAMES[1]] - base[NAMES[1]])
    torch.testing.assert_close(committed.residual(NAMES[1]), lost, rtol=0, atol=1e-6)
    assert verify(ledger.path, conservation=True).ok
    assert Ledger.open(ledger.path).round(1).client("bob").quarantined == record.quarantined


@pytest.mark.parametrize(
    "sent",
    [
        {NAMES[0]: torch.zeros(3, 3), NAMES[1]: torch.zeros(4)},
        {NAMES[0]: torch.zeros(6, 5)},
        {NAMES[0]: torch.zeros(6, 5), NAMES[1]: torch.zeros(4), "../../x": torch.zeros(1)},
        {},
        {NAMES[0]: LowRank(torch.zeros(2, 5), torch.full((6, 2), float("nan"))), NAMES[1]: torch.zeros(4)},
        {NAMES[0]: torch.zeros(6, 5, dtype=torch.complex64), NAMES[1]: [0.0] * 4},
    ],
    ids=["shape", "missing", "unknown name", "nothing", "NaN factors", "no tensors of numbers"],
)
def test_updates_bad_in_other_ways_are_quarantined_too(tmp_path, sent):
    ledger = small_ledger(tmp_path / "ledger", 0)
    base = parameters(0)
    with ledger.begin_round(base) as writer:
        writer.add(ClientUpdate("good", 0.5, delta={n: torch.zeros_like(base[n]) for n in NAMES}))
        record = writer.add(ClientUpdate("bad", 0.5, delta=sent), on_bad="quarantine")
        writer.commit(base)
    assert record.quarantined
    assert verify(ledger.path).ok
