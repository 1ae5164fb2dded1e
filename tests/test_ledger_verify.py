"""verify() on its own, and the corners of writing and summing up that no other file of tests walks through."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ledger_cases import (
    NAMES,
    WEIGHTS,
    check_round,
    commit_next,
    federation,
    forge_header,
    forge_manifest,
    forge_shard,
    parameters,
    reopen,
    round_data,
    small_ledger,
    updates,
)

from protoken.errors import (
    ArgumentError,
    DtypeError,
    LayerError,
    LedgerFormatError,
    NonFiniteError,
)
from protoken.ledger import ClientUpdate, Ledger, LowRank, shard_check, verification
from protoken.ledger import manifest as m
from protoken.ledger.files import FileLayer
from protoken.ledger.shard_check import bytes_finite
from protoken.ledger.summary import list_ledger, show_round
from protoken.ledger.tensors import DTYPES, ITEM_SIZES, byte_view, is_finite
from protoken.ledger.transfer import copy_ledger
from protoken.ledger.verification import verify


@pytest.fixture
def path(tmp_path):
    return Path(small_ledger(tmp_path / "ledger", 3).path)


def test_report_counts_what_it_read_and_tells_progress(path):
    seen = []
    report = verify(path, progress=lambda done, total: seen.append((done, total)), workers=2, conservation=True)
    assert (report.ok, report.rounds, report.shards, report.signed) == (True, 3, 12, 0)
    assert report.bytes == sum(f.stat().st_size for f in path.rglob("*.safetensors"))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert report.head == Ledger.open(path).head


@pytest.mark.parametrize("name", DTYPES)
def test_finite_bytes_are_those_of_finite_tensors(name):
    size = ITEM_SIZES[name]
    if size <= 2:  # every bit pattern there is
        patterns = torch.arange(256**size, dtype=torch.int32).to(torch.uint16 if size == 2 else torch.uint8)
        numbers = patterns.view(DTYPES[name])
    else:
        special = [0.0, -0.0, 1.0, torch.finfo(DTYPES[name]).max, torch.finfo(DTYPES[name]).tiny, 5e-324]
        numbers = torch.tensor([*special, math.inf, -math.inf, math.nan], dtype=DTYPES[name])
    finite = torch.isfinite(numbers if size == 8 else numbers.float())
    assert bytes_finite(byte_view(numbers[finite]), name)
    for number in numbers[~finite]:
        assert not bytes_finite(byte_view(number), name)
        assert not is_finite(number)
    assert bytes_finite(memoryview(b""), name)


def test_shards_too_large_for_one_piece_are_checked_tensor_by_tensor(path, monkeypatch):
    whole = verify(path)
    monkeypatch.setattr(shard_check, "ONE_PIECE", 0)
    pieces = verify(path)
    assert (pieces.ok, pieces.bytes, pieces.shards) == (True, whole.bytes, whole.shards)
    shard = path / "rounds/00000002/clients/000001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [p.where for p in verify(path).problems] == ["round 2, client bob"]


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_numbers_that_are_not_finite_are_found_on_either_way(path, monkeypatch, limit):
    monkeypatch.setattr(shard_check, "ONE_PIECE", limit)

    def spoil(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
        begin, end = header[NAMES[1]]["data_offsets"]
        body[begin : begin + 4] = b"\x00\x00\xc0\x7f"
        info = json.loads(header["__metadata__"]["protoken"])
        info["sha256"][NAMES[1]] = hashlib.sha256(body[begin:end]).hexdigest()
        header["__metadata__"]["protoken"] = json.dumps(info)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    forge_shard(path, spoil)
    assert "finite numbers" in " ".join(map(str, verify(path).problems))


def test_a_missing_folder_of_clients_is_a_problem_of_every_client(path):
    shutil.rmtree(path / "rounds/00000002/clients")
    problems = verify(path).problems
    assert [p.where for p in problems] == [f"round 2, client {c}" for c in WEIGHTS]


def test_large_shards_are_checked_by_threads_and_small_ones_here(path, monkeypatch):
    shard = path / "rounds/00000002/clients/000001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for small in (1 << 20, 0):
        seen = set()
        checked = shard_check.ShardChecker.check
        with monkeypatch.context() as patch:
            patch.setattr(verification, "SMALL", small)
            patch.setattr(
                shard_check.ShardChecker,
                "check",
                lambda *arguments: seen.add(threading.get_ident()) or checked(*arguments),  # noqa: B023
            )
            report = verify(path, workers=2)
        assert [p.where for p in report.problems] == ["round 2, client bob"]
        assert report.shards == 12
        assert (threading.get_ident() in seen) == (small > 0)


def test_rounds_that_are_named_as_pruned_are_told_and_the_last_one_is_a_problem(path):
    for numbers, problems in (("1,2", []), ("1,2,3", ["round 3"])):
        (path / "PRUNED").write_text(f'{{"rounds":[{numbers}]}}\n')
        report = verify(path, conservation=True)
        assert report.pruned == [int(number) for number in numbers.split(",")]
        assert [problem.where for problem in report.problems] == problems
    assert "before the last, got the last, 3" in str(report.problems[0])
    (path / "PRUNED").write_text('{"rounds":[1]}\n')
    assert [problem.where for problem in verify(path, complete=True).problems] == ["round 1"]
    (path / "PRUNED").unlink()
    assert verify(path, complete=True).ok


@pytest.mark.parametrize("place", ["", "clients/"])
def test_a_foreign_file_in_a_pruned_round_is_a_problem(path, place):
    (path / "PRUNED").write_text('{"rounds":[1]}\n')
    assert verify(path).ok  # the shards of a prune() that was interrupted
    (path / "rounds" / "00000001" / f"{place}evil.pkl").write_bytes(b"x")
    assert [problem.where for problem in verify(path).problems] == ["round 1"]


def test_a_broken_manifest_ends_the_chain_and_says_so(path):
    place = path / "rounds/00000002/manifest.json"
    place.write_bytes(place.read_bytes().replace(b"fedavg", b"fedsgd"))
    report = verify(path)
    assert [str(p).split(":")[0] for p in report.problems] == ["round 3", "round 2 and all before"]
    assert report.rounds == 1
    check_round(Ledger.open(path).round(3))


def test_recorded_residual_that_is_not_the_true_one_is_found_by_adding_up(path):
    forge_manifest(path, lambda v: v["parameters"][NAMES[0]].update(residual_norm=0.5))
    assert verify(path).ok
    problems = verify(path, conservation=True).problems
    assert [p.where for p in problems] == ["round 3"]
    assert "norm 0.5 as recorded" in str(problems[0])


def test_a_base_that_is_not_the_last_aggregate_is_a_problem_unless_a_gap_is_recorded(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 1)
    base = parameters(5)
    states, mean = federation(base)
    ledger.commit_round(base, mean, updates(states), allow_gap=True)
    assert verify(ledger.path).ok
    forge_manifest(Path(ledger.path), lambda v: v.update(gap=False))
    assert "the last aggregate" in str(verify(ledger.path).problems[0])


def test_a_tensor_that_belongs_to_no_parameter_is_a_problem(path):
    def smuggle(header, info):
        header["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        info["sha256"]["extra"] = hashlib.sha256(b"").hexdigest()

    forge_header(path, smuggle)
    assert "tensors of the parameters only" in str(verify(path).problems[0])


def test_factors_of_two_ranks_are_a_format_error(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 0)
    value = LowRank(torch.ones(2, 6), torch.ones(4, 2))
    ledger.commit_round({"w": torch.zeros(4, 6)}, {"w": value.dense()}, [ClientUpdate("a", 1.0, delta={"w": value})])

    def reshape(header, info):
        # F64 scale first, then a [2, 6]; the 32 bytes of b [4, 2] become a b [4, 4] of half the width.
        header["w::b"].update(shape=[4, 4], dtype="F16")

    forge_header(Path(ledger.path), reshape)
    with pytest.raises(LedgerFormatError, match=r"one rank for w, got \[2, 4\]"):
        Ledger.open(ledger.path).round(1).delta("a", "w")
    assert not verify(ledger.path).ok


def test_updates_whose_sum_overflows_are_refused(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 0)
    huge = torch.full((2, 2), 3e38)
    with pytest.raises(NonFiniteError, match="weighted updates whose sum fits fp32"):
        ledger.commit_round(
            {"w": torch.zeros(2, 2)},
            {"w": -huge},
            [ClientUpdate("a", 1.0, delta={"w": huge})],
            codec="int8",
        )
    assert Ledger.open(ledger.path).rounds == ()


def test_difference_that_overflows_is_refused(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 0)
    low, high = {"w": torch.full((2,), -3e38)}, {"w": torch.full((2,), 3e38)}
    with pytest.raises(NonFiniteError, match="a difference that fits fp32"):
        ledger.commit_round(low, low, [ClientUpdate("a", 1.0, state=high)])


def test_arguments_of_other_types_are_named(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 0)
    with pytest.raises(DtypeError, match=r"expected a torch\.Tensor or LowRank, got list"):
        ledger.commit_round({"w": [1.0]}, {}, [])
    nothing = {"w": torch.zeros(1)}
    with pytest.raises(DtypeError, match=r"state of a: w: expected a torch\.Tensor or LowRank, got list"):
        ledger.commit_round(nothing, nothing, [ClientUpdate("a", 1.0, state={"w": [0.0]})])
    with pytest.raises(DtypeError, match=r"aggregate\['w'\]: expected a torch\.Tensor or LowRank, got ndarray"):
        ledger.commit_round(nothing, {"w": nothing["w"].numpy()}, [ClientUpdate("a", 1.0, state=nothing)])
    with pytest.raises(ArgumentError, match="examples of a: expected a whole number >= 0, got -1"):
        ClientUpdate("a", 1.0, delta={}, examples=-1)
    with pytest.raises(ArgumentError, match="at most 4096 characters"):
        Ledger.create(tmp_path / "other", model="x" * 5000)
    with pytest.raises(ArgumentError, match=r'"<round>:<hash>", as str\(ledger\.head\) gives it'):
        ledger.require_pinned("12")
    with pytest.raises(ArgumentError, match="run"):
        Ledger.create(tmp_path / "other", run="a/b")
    with pytest.raises(ArgumentError, match="rule"):
        ledger.begin_round({"w": torch.zeros(1)}, rule="Fed Avg")
    ledger.begin_round({"w": torch.zeros(1)}).close()  # the refused ones have let go of the lock


def test_too_many_clients_and_too_large_a_manifest_are_refused(tmp_path, monkeypatch):
    ledger = small_ledger(tmp_path / "ledger", 0)
    base, mean, given = round_data(1)
    monkeypatch.setattr(m, "MAX_CLIENTS", 2)
    with pytest.raises(ArgumentError, match="at most 2 clients in a round"):
        ledger.commit_round(base, mean, given)
    monkeypatch.undo()
    monkeypatch.setattr(m, "MANIFEST_LIMIT", 100)
    with pytest.raises(ArgumentError, match="a manifest of at most 100 bytes"):
        ledger.commit_round(base, mean, given)
    monkeypatch.undo()
    commit_next(ledger)


def test_change_factors_and_quarantined_tensor_say_what_they_are_for(path):
    read = Ledger.open(path).round(1)
    with pytest.raises(DtypeError, match="a parameter recorded as factors, got fp32"):
        read.change_factors(NAMES[0])
    with pytest.raises(LayerError, match="one kept from a quarantined update"):
        read.quarantined_tensor("alice", NAMES[0])


def test_signed_ledger_with_residual_is_copied_whole(tmp_path):
    pytest.importorskip("cryptography")
    key = bytes(32)
    files = FileLayer(tmp_path / "ledger", sync=False)
    ledger = Ledger.create(tmp_path / "ledger", signing_key=key, files=files)
    base = parameters(0)
    states, mean = federation(base)
    given = [ClientUpdate(c, w, state=states[c]) for c, w in WEIGHTS.items()]
    ledger.commit_round(base, {n: t + 1 for n, t in mean.items()}, given)
    copy = copy_ledger(ledger, tmp_path / "copy")
    report = verify(copy.path, server_key=ledger.genesis.server_key)
    assert (report.ok, report.signed, report.shards) == (True, 1, 5)


def test_documented_check_of_a_shard_by_hand_gives_the_manifests_hash(path):
    """The program printed in docs/ledger-format.md, run as it stands there."""
    document = (Path(__file__).parents[1] / "docs/ledger-format.md").read_text("utf-8")
    program = document.partition("```python\n")[2].partition("```")[0]
    for record in Ledger.open(path).round(2).clients:
        shard = path / "rounds/00000002" / record.shard.file
        done = subprocess.run([sys.executable, "-c", program, shard], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == record.shard.sha256
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert subprocess.run([sys.executable, "-c", program, shard], capture_output=True).returncode != 0


def test_summaries_are_plain_json(path):
    ledger = reopen(path)
    base, _, given = round_data(4)
    ledger.commit_round(base, base, given)  # a change of 0 with updates that are not: an infinite relative residual
    listed = json.loads(json.dumps(list_ledger(ledger), allow_nan=False))
    assert [row["round"] for row in listed["rounds"]] == [1, 2, 3, 4]
    assert listed["head"] == str(ledger.head)
    assert listed["rounds"][0]["bytes"] == sum(
        f.stat().st_size for f in (path / "rounds/00000001").rglob("*.safetensors")
    )
    assert listed["rounds"][0]["largest_relative_residual"] < 1e-5
    assert listed["rounds"][3]["largest_relative_residual"] is None
    shown = json.loads(json.dumps(show_round(ledger.round(1)), allow_nan=False))
    assert [c["client"] for c in shown["clients"]] == list(WEIGHTS)
    assert shown["parameters"][NAMES[0]]["base"] == ledger.round(1).base_digest[NAMES[0]]
    assert list_ledger(small_ledger(path.parent / "empty", 0))["rounds"] == []


def test_clients_of_a_snapshot_are_read_once(path):
    ledger = Ledger.open(path)
    assert ledger.clients == tuple(WEIGHTS)
    shutil.rmtree(path / "rounds")
    assert ledger.clients == tuple(WEIGHTS)


def test_bytes_of_one_update_are_those_of_its_parts(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 0)
    base, mean, given = round_data(1)
    read = ledger.commit_round(base, mean, given, codec="int8")
    assert read.stored_bytes("alice", NAMES[0]) == 6 * 5 + 6 * 4  # values, and an fp32 scale per row
    with pytest.raises(LayerError):
        read.stored_bytes("alice", "nothing")


def test_parameters_without_elements_are_kept_as_they_are(tmp_path):
    ledger, nothing = small_ledger(tmp_path / "ledger", 0), {"w": torch.zeros(0, 3), "v": torch.ones(2)}
    read = ledger.commit_round(nothing, nothing, [ClientUpdate("a", 1.0, state=nothing)])
    assert tuple(read.delta("a", "w").shape) == (0, 3)
    assert read.relative_residual == {"v": 0.0, "w": 0.0}
    assert verify(ledger.path, conservation=True).ok
