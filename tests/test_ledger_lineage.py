"""Lineage: a client's rounds summed first, equal to the rounds one by one; and taking rounds out of a ledger."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from ledger_cases import (
    NAMES,
    check_round,
    commit_next,
    contents,
    federation,
    parameters,
    reopen,
    small_ledger,
    updates,
)
from safetensors.torch import load_file

from protoken.errors import (
    ArgumentError,
    DtypeError,
    DurabilityError,
    LayerError,
    LedgerError,
    UnknownClientError,
    UnknownRoundError,
)
from protoken.ledger import ClientUpdate, Ledger, LowRank, chain
from protoken.ledger.estimate import estimate_bytes
from protoken.ledger.lineage import lineage_change, lineage_clients, lineage_delta, lineage_factors, lineage_residual
from protoken.ledger.transfer import copy_ledger, export_rounds, prune
from protoken.ledger.verification import verify


@pytest.fixture
def varied(tmp_path):
    """Three rounds: bob absent from the last, dave only in it, codecs mixed, server noise in the second."""
    ledger = small_ledger(tmp_path / "ledger", 0)
    model = parameters(0)
    for number, codec in ((1, "fp32"), (2, "int8"), (3, "lowrank-1")):
        states, mean = federation(model, number * 10)
        given = updates(states)
        if number == 2:
            mean = {n: mean[n] + parameters(70, 0.01)[n] for n in NAMES}
        if number == 3:
            given[1] = ClientUpdate("dave", 0.3, state=states["bob"])
        ledger.commit_round(model, mean, given, codec=codec)
        model = mean
    return ledger, parameters(0), model


def test_lineage_is_the_sum_over_rounds_and_conserves(varied):
    ledger, first, last = varied
    rounds = ledger.select("all")
    assert lineage_clients(rounds) == ("alice", "bob", "carol", "dave")
    for name in NAMES:
        total = lineage_residual(rounds, name)
        for client in lineage_clients(rounds):
            one_by_one = sum(
                r.client(client).weight * r.delta(client, name).float() for r in rounds if r.has_client(client)
            )
            found = lineage_delta(rounds, client, name)
            torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-6)
            total = total + found
        torch.testing.assert_close(total, last[name] - first[name], rtol=0, atol=2e-6)
        torch.testing.assert_close(lineage_change(rounds, name), last[name] - first[name], rtol=0, atol=2e-6)


def test_lineage_over_a_slice_leaves_the_other_rounds_out(varied):
    ledger, _, _ = varied
    rounds = ledger.select(slice(2, None))
    expected = 0.3 * ledger.round(3).delta("dave", NAMES[0])
    torch.testing.assert_close(lineage_delta(rounds, "dave", NAMES[0]), expected)
    with pytest.raises(UnknownClientError, match="expected one of 3 clients of 1 rounds, got 'bob'"):
        lineage_delta(rounds, "bob", NAMES[0])
    with pytest.raises(LayerError):
        lineage_delta(rounds, "dave", "nope")
    with pytest.raises(UnknownRoundError, match="at least one round"):
        lineage_delta([], "dave", NAMES[0])
    with pytest.raises(UnknownRoundError, match="each round once"):
        lineage_change([rounds[0], rounds[0]], NAMES[0])
    with pytest.raises(UnknownRoundError, match="at least one round, got none of 3"):
        ledger.select(slice(9, None))
    with pytest.raises(UnknownRoundError, match="rounds"):
        ledger.select("some")


def test_quarantined_update_counts_as_absent(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 0)
    base = parameters(0)
    bad = {n: torch.full_like(base[n], float("nan")) for n in NAMES}
    zero = {n: torch.zeros_like(base[n]) for n in NAMES}
    ledger.commit_round(
        base, base, [ClientUpdate("a", 0.5, delta=zero), ClientUpdate("b", 0.5, delta=bad)], on_bad="quarantine"
    )
    assert lineage_clients(ledger.select("all")) == ("a",)
    with pytest.raises(UnknownClientError):
        lineage_delta(ledger.select("all"), "b", NAMES[0])


def test_lineage_of_adapters_stays_factored(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 0)
    name, base = "w", {"w": torch.zeros(6, 5)}
    for number in range(3):
        torch.manual_seed(number)
        value = LowRank(torch.randn(2, 5), torch.randn(6, 2), 0.5)
        ledger.commit_round(base, {name: base[name] + value.dense()}, [ClientUpdate("a", 1.0, delta={name: value})])
        base = {name: base[name] + value.dense()}
    rounds = ledger.select("all")
    found = lineage_factors(rounds, "a", name)
    assert found.rank == 6
    torch.testing.assert_close(found.dense(), lineage_delta(rounds, "a", name), rtol=1e-5, atol=1e-6)
    dense = small_ledger(tmp_path / "dense", 1)
    with pytest.raises(DtypeError, match="factors in every round, got fp32"):
        lineage_factors(dense.select("all"), "alice", NAMES[0])


def test_manifests_kept_are_bounded_by_their_clients_and_ids_are_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "CLIENT_CACHE", 9)
    ledger = reopen(Path(small_ledger(tmp_path / "ledger", 5).path))
    assert [ledger.round(number).number for number in ledger.rounds] == [1, 2, 3, 4, 5]
    read, seen = ledger._chain._read, []
    monkeypatch.setattr(ledger._chain, "_read", lambda number: seen.append(number) or read(number))
    for number in (5, 4, 3, 2, 4, 3, 2, 5):
        ledger.round(number)
    assert seen == [2, 5]  # nine clients are three rounds; the one that was used longest ago makes room
    assert ledger._chain.clients_of(5) is ledger._chain.clients_of(4)
    assert ledger._chain.clients_of(1)[0] is ledger._chain.clients_of(5)[0]


# ---- copy, export, prune -----------------------------------------------------------------------------------------


def test_copy_is_the_same_bytes_and_a_prefix_is_a_ledger(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 3)
    copy = copy_ledger(ledger, tmp_path / "copy")
    assert contents(tmp_path / "copy") == {**contents(ledger.path), "lock": b""} or contents(tmp_path / "copy") == {
        k: v for k, v in contents(ledger.path).items() if k != "lock"
    }
    assert copy.head == ledger.head
    prefix = copy_ledger(ledger, tmp_path / "prefix", upto=2)
    assert prefix.rounds == (1, 2)
    assert verify(tmp_path / "prefix", pinned=f"2:{ledger.hash_of(2)}").ok
    commit_next(prefix)
    check_round(prefix.round(3))
    with pytest.raises(ArgumentError, match="a new or empty folder"):
        copy_ledger(ledger, tmp_path / "copy")
    with pytest.raises(UnknownRoundError, match="0 to 3"):
        copy_ledger(ledger, tmp_path / "other", upto=4)


def test_no_copy_ends_with_a_pruned_round(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 5)
    prune(ledger, [2, 3])
    with pytest.raises(UnknownRoundError, match=r"^upto: expected a round with its tensors, got round 2.* with is 4"):
        copy_ledger(ledger, tmp_path / "copy", upto=2)
    assert not (tmp_path / "copy").exists()
    copy = copy_ledger(ledger, tmp_path / "copy", upto=4)
    assert [copy.round(number).pruned for number in copy.rounds] == [False, True, True, False]
    assert verify(tmp_path / "copy").ok


def test_copy_of_a_damaged_ledger_fails(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 1)
    shard = Path(ledger.path) / "rounds/00000001/clients/000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(LedgerError, match="other bytes"):
        copy_ledger(reopen(Path(ledger.path)), tmp_path / "copy")


def test_exported_files_hold_the_updates(varied, tmp_path):
    ledger, _, _ = varied
    files = export_rounds(ledger, tmp_path / "out", rounds=[2, 3], clients=["alice", "dave"], parameters=NAMES[:1])
    assert sorted(str(f.relative_to(tmp_path / "out")) for f in files) == [
        "round-2/change.safetensors",
        "round-2/clients/alice.safetensors",
        "round-2/residual.safetensors",
        "round-2/round.json",
        "round-3/change.safetensors",
        "round-3/clients/alice.safetensors",
        "round-3/clients/dave.safetensors",
        "round-3/residual.safetensors",
        "round-3/round.json",
    ]
    loaded = load_file(tmp_path / "out/round-3/clients/dave.safetensors")
    assert list(loaded) == [NAMES[0]]
    assert torch.equal(loaded[NAMES[0]], ledger.round(3).delta("dave", NAMES[0]))


def test_export_onto_rounds_that_are_there_is_refused_and_writes_nothing(varied, tmp_path):
    ledger, _, _ = varied
    export_rounds(ledger, tmp_path / "out", rounds=2)
    before = contents(tmp_path / "out")
    for chosen in (2, [1, 2]):
        with pytest.raises(ArgumentError, match=r"^path: expected a folder without a round-2, got .*another folder"):
            export_rounds(ledger, tmp_path / "out", rounds=chosen)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out/round-1").mkdir()
    assert export_rounds(ledger, tmp_path / "out", rounds=1)


def test_export_of_what_the_rounds_do_not_hold_is_refused_and_writes_nothing(varied, tmp_path):
    ledger, _, _ = varied
    for error, wrong in (
        (LayerError, {"parameters": [NAMES[0], "nothing.weight"]}),
        (UnknownClientError, {"clients": ["alice", "mallory"]}),
    ):
        with pytest.raises(error, match=r"nothing\.weight|mallory"):
            export_rounds(ledger, tmp_path / "out", rounds="all", **wrong)
    prune(ledger, 1)
    with pytest.raises(LedgerError, match="round 1: expected its shards"):
        export_rounds(ledger, tmp_path / "out", rounds=[1, 3])
    assert not (tmp_path / "out").exists()


def test_nothing_is_exported_or_copied_into_the_ledger(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 1)
    before = contents(ledger.path)
    (tmp_path / "link").symlink_to("ledger/staging")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/round-1").symlink_to("../ledger/staging")
    root = Path(ledger.path)
    inside = (root, root / "rounds/00000001/clients", root / "new/deep", root / "rounds/..", tmp_path / "link/new")
    for target in (*inside, tmp_path / "out"):
        with pytest.raises(ArgumentError, match=r"^path: expected a folder outside the ledger"):
            export_rounds(ledger, target)
    for target in inside:
        with pytest.raises(ArgumentError, match=r"^path: expected a folder outside the ledger"):
            copy_ledger(ledger, target)
    assert contents(ledger.path) == before
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["rounds", "staging"]
    assert export_rounds(ledger, tmp_path / "ledger-beside")  # a name that begins as the ledger's does


def test_export_below_a_file_names_what_refused(varied, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DurabilityError, match=r"file/round-2/clients: expected mkdir to succeed, got Not a directory"):
        export_rounds(varied[0], tmp_path / "file", rounds=2)


def test_export_to_a_full_disk_is_refused_and_leaves_no_torn_file(varied, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself does: the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(DurabilityError, match=r"change\.safetensors: expected write to succeed") as raised:
            export_rounds(varied[0], tmp_path / "out", rounds=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(raised.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_pruned_rounds_keep_their_place_and_free_their_bytes(tmp_path):
    ledger = small_ledger(tmp_path / "ledger", 3)
    pin = str(ledger.head)
    old = sum(map(len, contents(ledger.path).values()))
    freed = prune(ledger, slice(0, 2))
    assert freed > 6000
    assert sum(map(len, contents(ledger.path).values())) == pytest.approx(old - freed, abs=40)
    again = Ledger.open(ledger.path, pinned=pin)
    assert [r.pruned for r in again.select("all")] == [True, True, False]
    assert again.clients == ("alice", "bob", "carol")
    with pytest.raises(LedgerError, match="a pruned round"):
        again.round(1).delta("alice", NAMES[0])
    with pytest.raises(LedgerError, match="a pruned round"):
        ledger.round(2).change(NAMES[0])
    check_round(again.round(3))
    report = verify(ledger.path, pinned=pin)
    assert (report.ok, report.pruned, report.rounds) == (True, [1, 2], 3)
    commit_next(reopen(Path(ledger.path)))
    assert copy_ledger(Ledger.open(ledger.path), tmp_path / "copy").round(1).pruned
    assert verify(tmp_path / "copy").ok
    with pytest.raises(UnknownRoundError, match="rounds before the last"):
        prune(Ledger.open(ledger.path), "last")


@pytest.mark.parametrize("text", [b"", b"[]", b'{"rounds":["1"]}\n', b'{"rounds":[1] }\n', b'{"rounds":[0]}\n', b"{"])
def test_a_bad_list_of_pruned_rounds_is_a_typed_error(tmp_path, text):
    ledger = small_ledger(tmp_path / "ledger", 1)
    (Path(ledger.path) / "PRUNED").write_bytes(text)
    with pytest.raises(LedgerError):
        Ledger.open(ledger.path)


# ---- the size estimator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "lowrank-4"])
def test_estimate_is_within_a_tenth_of_the_ledger(tmp_path, codec):
    shapes = {f"model.layers.{i}.self_attn.o_proj.weight": (96, 64) for i in range(3)}
    ledger = small_ledger(tmp_path / "ledger", 0)
    torch.manual_seed(0)
    base = {n: torch.randn(s) for n, s in shapes.items()}
    states = [{n: t + torch.randn_like(t) * 0.01 for n, t in base.items()} for _ in range(4)]
    mean = {n: sum(s[n] for s in states) / 4 for n in base}
    for _ in range(2):
        given = [ClientUpdate(f"client-{i}", 0.25, state=s) for i, s in enumerate(states)]
        ledger.commit_round(base, mean, given, codec=codec, allow_gap=True)
    size = sum(map(len, contents(ledger.path).values()))
    estimate = estimate_bytes(shapes, clients=4, rounds=2, codec=codec)
    assert estimate.total == pytest.approx(size, rel=0.1)
    assert estimate.total == 2 * estimate.round


def test_estimate_of_adapters(tmp_path):
    shapes = {f"model.layers.{i}.self_attn.o_proj.weight": (96, 64) for i in range(3)}
    ledger = small_ledger(tmp_path / "ledger", 0)
    torch.manual_seed(0)

    def adapters() -> dict[str, LowRank]:
        return {n: LowRank(torch.randn(8, i), torch.randn(o, 8), 2.0) for n, (o, i) in shapes.items()}

    given = [ClientUpdate(f"client-{i}", 0.1, delta=adapters()) for i in range(10)]
    ledger.commit_round(adapters(), adapters(), given, keep_residual="never")
    size = sum(map(len, contents(ledger.path).values()))
    assert estimate_bytes(shapes, clients=10, lora_rank=8).total == pytest.approx(size, rel=0.1)
    with pytest.raises(ArgumentError):
        estimate_bytes(shapes, clients=0)
