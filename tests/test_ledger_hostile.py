"""Files and names that somebody meant to be read: typed errors, quickly, and nothing outside is touched."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from ledger_cases import (
    MANIFEST,
    NAMES,
    SHARD,
    assert_first_round_is_untouched,
    check_round,
    commit_next,
    contents,
    federation,
    forge_manifest,
    parameters,
    read_all,
    reopen,
    small_ledger,
    updates,
)
from typer.testing import CliRunner

from protoken.cli import app
from protoken.errors import ArgumentError, LedgerError, LedgerFormatError, NonFiniteError
from protoken.ledger import ClientUpdate, Ledger, parsing
from protoken.ledger import manifest as m
from protoken.ledger.files import FileLayer
from protoken.ledger.verification import verify


@pytest.fixture
def path(tmp_path):
    return Path(small_ledger(tmp_path / "ledger", 2).path)


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
