"""Opening a ledger: creators that meet, heads pinned and replaced, the walk along the chain, what cannot be read."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ledger_cases import (
    check_round,
    commit_next,
    forge_manifest,
    reopen,
    small_ledger,
)

from protoken.errors import (
    ArgumentError,
    CommitConflict,
    DurabilityError,
    LedgerError,
    LedgerFormatError,
)
from protoken.ledger import ClientUpdate, Ledger, LowRank, parsing
from protoken.ledger.files import FileLayer
from protoken.ledger.tensors import byte_view
from protoken.ledger.verification import verify


@pytest.fixture
def path(tmp_path):
    return Path(small_ledger(tmp_path / "ledger", 3).path)


def test_a_copy_of_an_open_ledger_stays_at_its_rounds(path):
    ledger = Ledger.open(path)
    taken = copy.deepcopy(ledger)
    commit_next(ledger)
    assert (taken.head.round, ledger.head.round) == (3, 4)
    assert [taken.hash_of(number) for number in range(4)] == [ledger.hash_of(number) for number in range(4)]
    assert taken.round(2).clients == ledger.round(2).clients


def test_threads_may_read_one_ledger(tmp_path):
    """More rounds than are kept in memory, and a switch between threads at almost every step."""
    path = Path(small_ledger(tmp_path / "ledger", 80).path)
    hashes = {number: Ledger.open(path).hash_of(number) for number in range(81)}
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(3):
            shared = Ledger.open(path)

            def read(first: int, shared: Ledger = shared) -> None:
                for step in range(80):
                    number = 1 + (first + 7 * step) % 80
                    assert shared.round(number).number == number
                    assert shared.hash_of(number) == hashes[number]

            with ThreadPoolExecutor(6) as pool:
                for found in [pool.submit(read, 13 * n) for n in range(6)]:
                    found.result()
    finally:
        sys.setswitchinterval(before)


def test_pinning_before_the_first_round_and_hash_of_genesis(path):
    ledger = Ledger.open(path)
    empty = small_ledger(path.parent / "empty", 0)
    assert f"0:{empty.hash_of(0)}" == str(empty.head)
    assert ledger.hash_of(0) == hashlib.sha256((path / "ledger.json").read_bytes()).hexdigest()
    ledger.require_pinned(f"0:{ledger.hash_of(0)}")
    assert "Ledger(" in repr(ledger)
    assert repr(ledger.round(1)) == "Round(1, rule='fedavg', clients=3, parameters=2)"
    assert ledger.round(1).codec == "fp32"


def test_opening_with_another_runs_head_is_a_format_error(path, tmp_path):
    other = small_ledger(tmp_path / "other", 1)
    (path / "HEAD").write_bytes((Path(other.path) / "HEAD").read_bytes().replace(b"run-1", b"run-2"))
    with pytest.raises(LedgerFormatError, match="the head of run run-1"):
        Ledger.open(path)
    head = json.loads((path / "HEAD").read_bytes())
    (path / "HEAD").write_text(json.dumps(head))
    with pytest.raises(LedgerFormatError, match="canonical JSON"):
        Ledger.open(path)


def test_two_creators_make_one_ledger(tmp_path):
    """Both pass the check for an empty folder; the lock decides."""
    results: list[object] = []
    barrier = threading.Barrier(4)

    def create() -> None:
        barrier.wait()
        try:
            results.append(Ledger.create(tmp_path / "ledger"))
        except (CommitConflict, ArgumentError) as error:
            results.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [r for r in results if isinstance(r, Ledger)]
    assert len(made) == 1
    assert Ledger.open(tmp_path / "ledger").run == made[0].run


def test_a_creator_that_comes_second_to_the_lock_leaves_the_ledger_alone(tmp_path):
    class Late(FileLayer):
        def lock(self, name: str) -> int:
            small_ledger(tmp_path / "ledger", 1)  # somebody else, after this one has found the folder empty
            return super().lock(name)

    with pytest.raises(CommitConflict, match="nobody else to create it"):
        Ledger.create(tmp_path / "ledger", files=Late(tmp_path / "ledger"))
    ledger = reopen(tmp_path / "ledger")
    check_round(ledger.round(1))
    commit_next(ledger)  # and the lock is free


@pytest.mark.parametrize("moment", ["before create looks", "while create waits"])
def test_a_ledger_that_somebody_else_makes_meanwhile_is_opened(tmp_path, monkeypatch, moment):
    place, create = tmp_path / "ledger", Ledger.create
    assert Ledger.open_or_create(tmp_path / "new", model="m").model == "m"
    assert Ledger.open_or_create(tmp_path / "new", model="other").model == "m"

    class Late(FileLayer):
        def lock(self, name: str) -> int:
            small_ledger(place, 1)
            return super().lock(name)

    def second(path, **arguments):
        monkeypatch.undo()
        if moment == "before create looks":
            small_ledger(place, 1)
            return create(path, **arguments)
        return create(path, files=Late(place), **arguments)

    monkeypatch.setattr(Ledger, "create", second)
    check_round(Ledger.open_or_create(place).round(1))


def test_a_folder_of_something_else_is_not_taken_for_a_ledger(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"a new or empty folder, got one with 'notes.txt' in it"):
        Ledger.open_or_create(tmp_path)


def test_head_replaced_between_open_and_fstat_is_still_read(path):
    """A reader may hold the HEAD of a moment ago; it has no name any more and is whole."""

    class Slow(FileLayer):
        def size(self, handle: int) -> int:
            return super().size(handle)

        def open_read(self, name: str) -> int:
            handle = super().open_read(name)
            if name == "HEAD" and not self.done:
                self.done = True
                commit_next(reopen(path))
                assert os.fstat(handle).st_nlink == 0
            return handle

        done = False

    assert Ledger.open(path, files=Slow(path)).rounds == (1, 2, 3)
    assert Ledger.open(path).rounds == (1, 2, 3, 4)


def test_an_unreadable_file_is_a_ledger_error(path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(LedgerError, match="a readable file, got Input/output error"):
        Ledger.open(path)


def test_read_only_folder_reads_and_does_not_write(path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    ledger = Ledger.open(path)
    monkeypatch.setattr(os, "mkdir", refuse)
    check_round(ledger.round(2))
    with pytest.raises(DurabilityError, match=r"mkdir to succeed, got Permission denied. Get the right to write there"):
        commit_next(ledger)
    monkeypatch.undo()
    assert commit_next(ledger).number == 4


def test_opening_reads_two_small_files_whatever_the_number_of_clients(tmp_path):
    """1,000 clients: opening does not touch the manifest; the first round asked for reads one."""
    path = tmp_path / "ledger"
    ledger = Ledger.create(path, files=FileLayer(path, sync=False))
    value = LowRank(torch.ones(8, 16), torch.ones(16, 8))
    with ledger.begin_round({"w": value}, keep_residual="never") as writer:
        for i in range(1000):
            writer.add(ClientUpdate(f"client-{i:04d}", 1e-3, delta={"w": value}))
        writer.commit({"w": value})

    class Counting(FileLayer):
        opened: list[str] = []  # noqa: RUF012

        def open_read(self, name: str) -> int:
            self.opened.append(name)
            return super().open_read(name)

    again = Ledger.open(path, files=Counting(path))
    assert Counting.opened == ["ledger.json", "HEAD"]
    assert len(again.clients) == 1000
    assert Counting.opened == ["ledger.json", "HEAD", "rounds/00000001/manifest.json"]
    assert again.round(1).factors("client-0999", "w")[2] == 1.0
    assert Counting.opened[3:] == 4 * ["rounds/00000001/clients/000999.safetensors"]
    assert verify(path).ok


def test_a_previous_hash_hidden_where_the_walk_would_find_it_is_refused(path):
    """The walk down the chain looks for the last "previous" in the bytes; here that is another field's."""
    forge_manifest(path, lambda v: json.dumps({**v, "zzz": {"previous": "0" * 64}}, separators=(",", ":")).encode())
    with pytest.raises(LedgerFormatError):
        Ledger.open(path).round(2)
    with pytest.raises(LedgerFormatError):
        Ledger.open(path).round(3)
    place = path / "rounds/00000003/manifest.json"
    tail = place.read_bytes().replace(b',"zzz":{"previous":"' + b"0" * 64 + b'"}', b"")
    forge_manifest(path, lambda v: tail.replace(b'"rule":', b'"previous":"' + b"0" * 64 + b'","rule":'))
    with pytest.raises(LedgerFormatError):
        Ledger.open(path).round(1)
    with pytest.raises(LedgerFormatError):
        Ledger.open(path).round(3)


def test_metadata_cannot_stand_in_for_the_previous_hash(path):
    """Fields in an order of their own, so that the walk finds the one inside the metadata, which fits a pinned head."""
    rolled = f"2:{'0' * 64}"

    def hide(manifest):
        manifest["metadata"] = {"previous": "0" * 64}
        last = {"metadata": manifest.pop("metadata")}
        return json.dumps({**manifest, **last}, separators=(",", ":")).encode()

    forge_manifest(path, hide)
    ledger = Ledger.open(path, pinned=rolled)
    for number in ledger.rounds:
        with pytest.raises(LedgerFormatError):
            ledger.round(number)
    with pytest.raises(LedgerFormatError, match="its own previous hash, got another one read before"):
        ledger.round(3)
    assert not verify(path, pinned=rolled).ok


def test_a_big_endian_machine_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(LedgerError, match="a little-endian machine, got big"):
        byte_view(torch.ones(2))


def test_walking_the_chain_reads_each_manifest_once_and_parses_none_of_them(path, monkeypatch):
    parsed = []
    original = parsing.parse_manifest
    monkeypatch.setattr(parsing, "parse_manifest", lambda data, what: parsed.append(what) or original(data, what))
    assert Ledger.open(path).round(1).number == 1
    assert parsed == ["rounds/00000001/manifest.json"]


@pytest.mark.parametrize(
    "known",
    [{"pinned": "1:abc"}, {"pinned": 5}, {"server_key": "zz" * 32}, {"server_key": 5}, {"client_keys": {"a": "00"}}],
    ids=str,
)
def test_what_is_no_head_and_no_key_says_nothing_about_the_ledger(tmp_path, known):
    ledger = small_ledger(tmp_path / "ledger")
    with pytest.raises(ArgumentError, match=next(iter(known))):
        verify(ledger.path, **known)
    assert verify(ledger.path, pinned=ledger.head).ok
