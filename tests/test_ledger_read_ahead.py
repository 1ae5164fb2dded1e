"""Small shards that are asked for ahead while they come from the disk."""

from __future__ import annotations

import os
from concurrent.futures import Future

import pytest
import torch

from protoken.errors import LedgerFormatError
from protoken.ledger import ClientUpdate, Ledger, read_ahead, shard_check
from protoken.ledger.files import FileLayer
from protoken.ledger.verification import verify


@pytest.fixture
def crowd(tmp_path):
    """A round of 100 clients, one of whose shards is missing."""
    ledger = Ledger.create(tmp_path / "crowd", files=FileLayer(tmp_path / "crowd", sync=False))
    clients = [ClientUpdate(f"c{n}", 0.01, delta={"p": torch.full((2, 3), float(n))}) for n in range(100)]
    ledger.commit_round({"p": torch.zeros(2, 3)}, {"p": torch.full((2, 3), 49.5)}, clients)
    sorted((tmp_path / "crowd").rglob("clients/*.safetensors"))[70].unlink()
    return ledger


class AtOnce:
    """Runs what is handed in before it returns."""

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


def test_the_next_shards_are_asked_for_while_the_disk_is_read(crowd, monkeypatch):
    current = Ledger.open(crowd.path).round(1)
    refs = [record.shard for record in current.clients]
    blocks, asked, opened = iter([5, 5, 9, 9, 12]), [], []
    monkeypatch.setattr(read_ahead, "blocks_read", lambda: next(blocks))
    monkeypatch.setattr(read_ahead, "WINDOW", 40)
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *rest: asked.append(os.fstat(handle).st_ino))
    with shard_check.ShardChecker(current) as checker:

        def opening(ref):
            opened.append(refs.index(ref))
            return checker.open(ref)

        with read_ahead.ReadAhead(opening, refs, AtOnce()) as ahead:
            ahead.reached(0)
            assert opened == []  # nothing came from the disk yet
            ahead.reached(31)
            ahead.reached(32)
            assert opened == list(range(33, 72))
            ahead.reached(64)
            assert opened == list(range(33, 72))  # what was asked for has come: nothing was read since
            ahead.reached(96)
            assert opened == [*range(33, 72), 97, 98, 99]
    missing = sum(not (crowd.files.root / checker.name(refs[n])).exists() for n in opened)
    assert len(asked) == len(set(asked)) == len(opened) - missing


@pytest.mark.parametrize("cold", [True, False])
def test_shards_asked_for_ahead_are_reported_as_any_others(crowd, monkeypatch, cold):
    looks, asked = [], []
    monkeypatch.setattr(read_ahead, "blocks_read", lambda: looks.append(1) or len(looks) * cold)
    monkeypatch.setattr(os, "posix_fadvise", lambda *rest: asked.append(rest))
    report = verify(crowd.path)
    assert (report.shards, len(report.problems), len(looks)) == (101, 1, 5)
    assert isinstance(report.problems[0].error, LedgerFormatError)
    assert cold or not asked
