"""The ledger as a caller meets it: create, commit, open, read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ledger_cases import NAMES, SHAPES, WEIGHTS, commit_next, contents, federation, parameters, reopen, updates
from safetensors.torch import load_file

from protoken.errors import (
    ArgumentError,
    CommitConflict,
    ConservationError,
    DtypeError,
    LayerError,
    LedgerFormatError,
    LedgerMismatchError,
    NonFiniteError,
    ProtokenError,
    ShapeError,
    UnknownClientError,
    UnknownRoundError,
)
from protoken.ledger import ClientUpdate, Ledger, tensor_digest


@pytest.fixture
def ledger(tmp_path):
    return Ledger.create(tmp_path / "ledger", model="tiny", run="run-1", metadata={"purpose": "test"})


def test_deltas_change_and_records_read_back_as_written(ledger):
    base = parameters(0)
    states, mean = federation(base)
    ledger.commit_round(base, mean, updates(states), metadata={"lr": 0.1})
    again = Ledger.open(ledger.path)
    assert (again.run, again.model, again.metadata) == ("run-1", "tiny", {"purpose": "test"})
    assert again.rounds == (1,)
    assert again.clients == ("alice", "bob", "carol")
    read = again.round("last")
    assert (read.number, read.rule, read.metadata) == (1, "fedavg", {"lr": 0.1})
    assert [(c.client, c.weight, c.examples) for c in read.clients] == [(c, w, 7) for c, w in WEIGHTS.items()]
    assert {n: (s.shape, s.dtype) for n, s in read.parameters.items()} == {
        n: (s, torch.float32) for n, s in zip(NAMES, SHAPES, strict=True)
    }
    for name in NAMES:
        assert torch.equal(read.change(name), mean[name] - base[name])
        for client in WEIGHTS:
            assert torch.equal(read.delta(client, name), states[client][name] - base[name])
    assert read.base_digest == {n: tensor_digest(base[n]) for n in NAMES}
    assert read.aggregate_digest == {n: tensor_digest(mean[n]) for n in NAMES}


def test_fedavg_conserves_to_rounding_and_residual_is_what_is_left(ledger):
    base = parameters(0)
    states, mean = federation(base)
    committed = ledger.commit_round(base, mean, updates(states), max_relative_residual=1e-5)
    for name in NAMES:
        assert 0 <= committed.relative_residual[name] < 2e-6
        explicit = committed.change(name) - sum(w * committed.delta(c, name) for c, w in WEIGHTS.items())
        torch.testing.assert_close(committed.residual(name), explicit, rtol=0, atol=1e-7)
        assert committed.residual_norm[name] == pytest.approx(float(explicit.norm()), abs=1e-6)


@pytest.mark.parametrize("keep", ["auto", "always", "never"])
def test_what_the_server_added_is_the_residual_stored_or_not(ledger, keep):
    base = parameters(0)
    states, mean = federation(base)
    noise = parameters(99, 0.05)
    noisy = {n: mean[n] + noise[n] for n in NAMES}
    committed = ledger.commit_round(base, noisy, updates(states), keep_residual=keep)
    assert (committed.manifest.residual is None) == (keep == "never")
    for name in NAMES:
        torch.testing.assert_close(committed.residual(name), noise[name], rtol=0, atol=1e-6)
        assert committed.residual_norm[name] == pytest.approx(float(noise[name].norm()), rel=1e-4)


def test_residual_above_the_limit_refuses_the_round_and_leaves_nothing(ledger):
    base = parameters(0)
    states, mean = federation(base)
    before = contents(ledger.path)
    wrong = {n: mean[n] * 1.5 for n in NAMES}
    with pytest.raises(ConservationError, match=r"round 1: model\.layers\.0.*expected a residual of at most"):
        ledger.commit_round(base, wrong, updates(states), max_relative_residual=1e-3)
    assert contents(ledger.path) == before
    ledger.commit_round(base, mean, updates(states), max_relative_residual=1e-3)
    assert ledger.rounds == (1,)


def test_delta_and_state_give_the_same_record(tmp_path):
    base = parameters(0)
    states, mean = federation(base)
    deltas = [ClientUpdate(c, w, delta={n: states[c][n] - base[n] for n in NAMES}) for c, w in WEIGHTS.items()]
    one = Ledger.create(tmp_path / "one", run="r").commit_round(base, mean, updates(states))
    two = Ledger.create(tmp_path / "two", run="r").commit_round(base, mean, deltas)
    assert [c.shard for c in one.clients] == [c.shard for c in two.clients]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_other_dtypes_have_fp32_deltas_and_own_dtype_digests(ledger, dtype):
    base = parameters(0, dtype=dtype)
    states, mean = federation(base)
    committed = ledger.commit_round(base, mean, updates(states))
    for name in NAMES:
        assert committed.parameters[name].dtype == dtype
        assert committed.base_digest[name] == tensor_digest(base[name])
        expected = (states["bob"][name].double() - base[name].double()).float()
        assert torch.equal(committed.delta("bob", name), expected)


def test_rounds_follow_each_other_and_a_gap_must_be_allowed(ledger):
    base = parameters(0)
    states, mean = federation(base)
    ledger.commit_round(base, mean, updates(states))
    later, newer = federation(mean, seed=50)
    with pytest.raises(LedgerMismatchError, match="expected the aggregate of round 1"):
        ledger.commit_round(base, newer, updates(later))
    ledger.commit_round(mean, newer, updates(later))
    states3, mean3 = federation(base)
    third = ledger.commit_round(base, mean3, updates(states3), allow_gap=True)
    assert third.manifest.gap
    assert ledger.rounds == (1, 2, 3)
    assert [r.number for r in ledger.select("all")] == [1, 2, 3]
    assert [r.number for r in ledger.select(slice(1, None))] == [2, 3]
    assert [r.number for r in ledger.select([3, 1, 3])] == [1, 3]
    assert [r.number for r in ledger.select("last")] == [3]


def test_streamed_round_is_invisible_until_commit_and_gone_without(ledger):
    base = parameters(0)
    states, mean = federation(base)
    before = contents(ledger.path)
    with ledger.begin_round(base, rule="fedavg", metadata={}) as writer:
        writer.add(ClientUpdate("alice", 1.0, state=states["alice"]))
        assert Ledger.open(ledger.path).rounds == ()
    assert contents(ledger.path) == before
    with pytest.raises(CommitConflict, match="committed or given up"):
        writer.commit(mean)

    def fails():
        with ledger.begin_round(base) as writer:
            writer.add(ClientUpdate("alice", 1.0, state=states["alice"]))
            raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        fails()
    assert contents(ledger.path) == before


def test_a_refused_client_leaves_the_others_in_place(ledger):
    base = parameters(0)
    states, _ = federation(base)
    with ledger.begin_round(base) as writer:
        writer.add(ClientUpdate("alice", 1.0, state=states["alice"]))
        with pytest.raises(ArgumentError, match="each client once"):
            writer.add(ClientUpdate("alice", 0.0, state=states["bob"]))
        committed = writer.commit(states["alice"])
    assert [c.client for c in committed.clients] == ["alice"]


def bad_inputs():
    base = parameters(0)
    states, mean = federation(base)
    good = updates(states)
    nan = {**states["bob"], NAMES[0]: torch.full((6, 5), math.nan)}
    infinite = {**states["bob"], NAMES[0]: torch.full((6, 5), math.inf)}
    narrow = {**states["bob"], NAMES[0]: torch.zeros(6, 4)}
    half = {n: t.half() for n, t in states["bob"].items()}
    whole = {**states["bob"], NAMES[1]: torch.zeros(4, dtype=torch.int64)}

    def bob(**arguments):
        return [good[0], ClientUpdate("bob", 0.3, **arguments), good[2]]

    yield "nan", (base, mean, bob(state=nan)), NonFiniteError, r"state of bob: model.*finite numbers"
    yield "inf", (base, mean, bob(state=infinite)), NonFiniteError, "Leave the client out"
    yield "shape", (base, mean, bob(state=narrow)), ShapeError, r"expected \(6, 5\) as in base, got \(6, 4\)"
    yield "dtype", (base, mean, bob(state=half)), DtypeError, r"expected torch.float32 as in base"
    yield "integer", (base, mean, bob(state=whole)), DtypeError, "fp64, fp32, fp16 or bf16"
    yield "missing", (base, mean, bob(state={NAMES[0]: base[NAMES[0]]})), LayerError, "1 missing, 0 unknown"
    unknown = {**states["bob"], "lm_head.weight": torch.zeros(1)}
    yield (
        "unknown",
        (base, mean, bob(delta=unknown)),
        LayerError,
        "0 missing, 1 unknown, e.g. 'lm_head.weight'",
    )
    yield "sum", (base, mean, good[:2]), ArgumentError, r"sum to 1, got 0.8"
    zero = [ClientUpdate(c, 0.0, state=states[c]) for c in WEIGHTS]
    yield "zero weights", (base, mean, zero), ArgumentError, r"sum to 1, got 0.0"
    yield "nobody", (base, mean, []), ArgumentError, "at least one client"
    yield "twice", (base, mean, [*good, good[0]]), ArgumentError, "each client once per round"
    yield "empty base", ({}, mean, good), ArgumentError, "1 to 20000 parameters"
    yield "base nan", ({**base, NAMES[1]: torch.full((4,), math.nan)}, mean, good), NonFiniteError, "base"
    yield "bad name", ({"../x": torch.zeros(2)}, mean, good), ArgumentError, "named_parameters"
    short = {NAMES[0]: mean[NAMES[0]]}
    yield "aggregate missing", (base, short, good), LayerError, "every parameter of base"
    yield "aggregate shape", (base, {**mean, NAMES[1]: torch.zeros(5)}, good), ShapeError, "as in base"
    yield "aggregate dtype", (base, {n: t.half() for n, t in mean.items()}, good), DtypeError, "expected F32"
    yield (
        "aggregate nan",
        (base, {**mean, NAMES[1]: torch.full((4,), math.nan)}, good),
        NonFiniteError,
        "aggregate",
    )


@pytest.mark.parametrize(("arguments", "error", "message"), [pytest.param(*c[1:], id=c[0]) for c in bad_inputs()])
def test_bad_round_is_a_typed_error_and_leaves_nothing(ledger, arguments, error, message):
    base = parameters(7)
    states, mean = federation(base)
    ledger.commit_round(base, mean, updates(states))
    before = contents(ledger.path)
    with pytest.raises(error, match=message) as caught:
        ledger.commit_round(*arguments, allow_gap=True)
    assert isinstance(caught.value, ProtokenError)
    assert contents(ledger.path) == before
    assert Ledger.open(ledger.path).rounds == (1,)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, "0.5", None])
def test_weight_that_is_no_finite_number_is_refused(weight):
    with pytest.raises(ArgumentError, match="weight of alice: expected a finite number >= 0"):
        ClientUpdate("alice", weight, delta={})


@pytest.mark.parametrize("arguments", [{}, {"delta": {}, "state": {}}], ids=["neither", "both"])
def test_update_needs_exactly_one_of_delta_and_state(arguments):
    with pytest.raises(ArgumentError, match="exactly one of delta and state"):
        ClientUpdate("alice", 1.0, **arguments)


def test_unknown_client_round_and_parameter_are_named(ledger):
    base = parameters(0)
    states, mean = federation(base)
    with pytest.raises(UnknownRoundError, match="a number from 1 to 0"):
        ledger.round("last")
    read = ledger.commit_round(base, mean, updates(states))
    with pytest.raises(UnknownClientError, match=r"expected one of the 3 clients of round 1, got 'dave'"):
        read.delta("dave", NAMES[0])
    with pytest.raises(LayerError, match=r"expected one of the 2 parameters of round 1, got 'nope'"):
        read.delta("alice", "nope")
    for number in (0, 2, -1, "first", 1.0, True):
        with pytest.raises(UnknownRoundError, match="round"):
            ledger.round(number)


def test_create_refuses_a_folder_with_something_in_it(ledger, tmp_path):
    with pytest.raises(ArgumentError, match="a new or empty folder"):
        Ledger.create(ledger.path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ArgumentError, match="one with 'file' in it"):
        Ledger.create(tmp_path / "other")
    with pytest.raises(LedgerFormatError, match="nothing there"):
        Ledger.open(tmp_path / "nowhere")


def test_shards_are_plain_safetensors(ledger):
    base = parameters(0)
    states, mean = federation(base)
    ledger.commit_round(base, mean, updates(states))
    loaded = load_file(ledger.path / "rounds/00000001/clients/000001.safetensors")
    assert {n: t.tolist() for n, t in loaded.items()} == {n: (states["bob"][n] - base[n]).tolist() for n in NAMES}
    assert set(load_file(ledger.path / "rounds/00000001/change.safetensors")) == set(NAMES)


def test_digest_covers_dtype_shape_and_bytes_and_ignores_layout():
    tensor = torch.arange(12.0).reshape(3, 4)
    assert tensor_digest(tensor) == tensor_digest(tensor.T.contiguous().T)
    others = [tensor.reshape(4, 3), tensor.double(), tensor.bfloat16(), tensor + 1e-6, -tensor]
    assert len({tensor_digest(t) for t in [tensor, *others]}) == 6
    # sha256(b"F32 [2]\n" + bytes of 1.0 and 2.0), so that anybody can compute it without torch
    import hashlib
    import struct

    assert (
        tensor_digest(torch.tensor([1.0, 2.0])) == hashlib.sha256(b"F32 [2]\n" + struct.pack("<2f", 1, 2)).hexdigest()
    )
    with pytest.raises(DtypeError, match=r"torch\.int64"):
        tensor_digest(torch.zeros(2, dtype=torch.int64))


# ---- what is handed in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, 5, [1]])
def test_ledger_that_is_no_path_and_parameters_that_are_no_mapping_are_named(ledger, wrong):
    with pytest.raises(ArgumentError, match="ledger"):
        Ledger.open(wrong)
    base = parameters(0)
    states, mean = federation(base)
    with pytest.raises(ArgumentError, match="base"):
        ledger.commit_round(wrong, mean, updates(states))
    with pytest.raises(ArgumentError, match="aggregate"):
        ledger.commit_round(base, wrong, updates(states))
    with pytest.raises(ArgumentError, match="updates"):
        ledger.commit_round(base, mean, wrong)
    with pytest.raises(ArgumentError, match="update of alice"):
        ClientUpdate("alice", 1.0, delta=wrong)
    assert ledger.commit_round(base, mean, updates(states)).number == 1


def test_updates_by_name_are_no_list_of_updates(ledger):
    base = parameters(0)
    states, mean = federation(base)
    with pytest.raises(ArgumentError, match="a list of ClientUpdate, got a dict"):
        ledger.commit_round(base, mean, states)


@pytest.mark.parametrize("words", [{"on_bad": "skip"}, {"keep_residual": "sometimes"}], ids=str)
def test_words_that_nobody_knows_are_named(ledger, words):
    base = parameters(0)
    states, mean = federation(base)
    with pytest.raises(ArgumentError, match=next(iter(words))):
        ledger.commit_round(base, mean, updates(states), **words)


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_tensors_without_dense_data_are_refused_or_kept_in_quarantine(ledger, kind):
    base = parameters(0)
    states, mean = federation(base)

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta") if kind == "meta" else tensor.to_sparse()

    with pytest.raises(DtypeError, match="dense"):
        ledger.commit_round({name: empty(value) for name, value in base.items()}, mean, updates(states))
    states["bob"] = {name: empty(value) for name, value in states["bob"].items()}
    with pytest.raises(DtypeError, match="state of bob"):
        ledger.commit_round(base, mean, updates(states))
    committed = ledger.commit_round(base, mean, updates(states), on_bad="quarantine")
    assert {record.client for record in committed.usable} == {"alice", "carol"}
    assert reopen(ledger.path).round(1).clients[1].quarantined.startswith("state of bob")


def test_rounds_may_be_counted_by_numpy(ledger):
    commit_next(ledger)
    assert reopen(ledger.path).round(np.int64(1)).number == 1
    for wrong in (np.float64(1), np.True_, np.int64(2)):
        with pytest.raises(UnknownRoundError):
            reopen(ledger.path).round(wrong)
