"""Codecs: what comes back, how far off it may be, and that the stated error is the true one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_cases import NAMES, WEIGHTS, federation, parameters, reopen, small_ledger, updates

from protoken.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from protoken.ledger import ClientUpdate, Ledger, LowRank, tensor_digest
from protoken.ledger.codecs import check_codec, decode, encode
from protoken.ledger.tensors import concatenate, parameter_digest
from protoken.ledger.verification import verify

# Largest error of an element as a share of the element itself, and of its row's largest.
OF_ELEMENT = {"fp32": 0.0, "bf16": 2.0**-8, "fp16": 2.0**-11, "int8": 0.0, "fp8": 2.0**-4}
OF_ROW = {"fp32": 0.0, "bf16": 0.0, "fp16": 0.0, "int8": 0.5 / 127, "fp8": 2.0**-10 / 448}


@pytest.fixture
def ledger(tmp_path):
    return small_ledger(tmp_path / "ledger", 0)


@pytest.mark.parametrize("shape", [(6, 5), (1, 1), (3, 4, 5), (7,), (), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("codec", list(OF_ELEMENT))
def test_every_element_is_within_the_published_error(codec, shape):
    torch.manual_seed(3)
    value = torch.randn(shape) * 0.01
    if value.ndim == 2 and value.numel():
        value[0] = 0  # an all-zero row must stay exactly zero
    stored = encode(codec, value)
    found = decode(stored.layout, stored.parts).float()
    assert found.shape == value.shape
    row = value.abs().amax(-1, keepdim=True) if value.ndim and value.numel() else value.abs()
    allowed = OF_ELEMENT[codec] * value.abs() + OF_ROW[codec] * row * (1 + 1e-5)
    assert bool(((found - value).abs() <= allowed).all())
    assert stored.bound == pytest.approx(float((found.double() - value.double()).norm()), rel=1e-5, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["int8", "fp8", "bf16", "fp16"]),
    st.lists(st.floats(-6e4, 6e4, width=32, allow_nan=False), min_size=1, max_size=12),
)
def test_any_finite_row_survives_within_its_scale(codec, row):
    value = torch.tensor([row], dtype=torch.float32)
    stored = encode(codec, value)
    found = decode(stored.layout, stored.parts).float()
    largest = float(value.abs().max())
    tiny = 127 * 1.2e-38 if codec in ("int8", "fp8") else 6e-5  # below: subnormal numbers
    assert bool(torch.isfinite(found).all())
    assert float((found - value).abs().max()) <= max(largest / 16, tiny)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncated_svd_error_is_the_dropped_singular_values(rank):
    torch.manual_seed(0)
    value = torch.randn(24, 16)
    stored = encode(f"lowrank-{rank}", value)
    assert stored.layout == "lowrank"
    assert stored.parts["::a"].shape == (rank, 16)
    assert stored.parts["::b"].shape == (24, rank)
    dropped = torch.linalg.svdvals(value.double())[rank:].square().sum().sqrt()
    assert stored.bound == pytest.approx(float(dropped), rel=1e-4)
    error = decode(stored.layout, stored.parts) - value
    assert float(error.norm()) == pytest.approx(stored.bound, rel=1e-5)


@pytest.mark.parametrize("shape", [(16,), (4, 4), (3, 4, 5), ()], ids=str)
def test_low_rank_keeps_what_it_cannot_make_smaller_exactly(shape):
    value = torch.randn(shape)
    stored = encode("lowrank-3", value)
    assert stored.layout == "fp32"
    assert torch.equal(stored.parts[""], value)


def test_fp16_overflow_is_refused_and_bf16_takes_it(ledger):
    base = {"w": torch.zeros(2, 2)}
    huge = [ClientUpdate("a", 1.0, delta={"w": torch.full((2, 2), 1e6)})]
    with pytest.raises(NonFiniteError, match=r"at most 65504 under fp16, got more\. Use bf16"):
        ledger.commit_round(base, {"w": torch.full((2, 2), 1e6)}, huge, codec="fp16")
    read = ledger.commit_round(base, {"w": torch.full((2, 2), 1e6)}, huge, codec="bf16")
    assert read.delta("a", "w").dtype == torch.bfloat16


@pytest.mark.parametrize("codec", ["fp64", "lowrank", "lowrank-0", "lowrank--1", "lora", "raw", None, 8])
def test_unknown_codec_is_named(codec):
    with pytest.raises(ArgumentError, match="codec: expected one of fp32, bf16, fp16, int8, fp8, lowrank-r"):
        check_codec(codec)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8", "fp8", "lowrank-1"])
def test_what_the_codec_loses_is_in_the_residual_so_conservation_holds(ledger, codec):
    base = parameters(0)
    states, mean = federation(base)
    ledger.commit_round(base, mean, updates(states), codec=codec)
    read = Ledger.open(ledger.path).round(1)
    for name in NAMES:
        total = sum(w * read.delta(c, name).float() for c, w in WEIGHTS.items()) + read.residual(name)
        torch.testing.assert_close(total, read.change(name), rtol=0, atol=1e-6)
        lost = (read.delta("bob", name).float() - (states["bob"][name] - base[name])).norm()
        assert read.error_bound("bob", name) == pytest.approx(float(lost), rel=1e-3, abs=1e-9)
    assert (read.manifest.residual is None) == (codec == "fp32")
    assert verify(ledger.path, conservation=True).ok


def test_quantised_and_factored_forms_are_offered_as_stored(ledger):
    base = parameters(0)
    states, mean = federation(base)
    name = NAMES[0]
    quantised = ledger.commit_round(base, mean, updates(states), codec="int8")
    values, scale = quantised.quantised("bob", name)
    assert (values.dtype, values.shape, scale.shape) == (torch.int8, (6, 5), (6,))
    assert torch.equal(values.float() * scale[:, None], quantised.delta("bob", name))
    with pytest.raises(DtypeError, match=r"expected lora or lowrank, got int8\. Use delta\(\)"):
        quantised.factors("bob", name)
    states2, mean2 = federation(mean, 9)
    factored = ledger.commit_round(mean, mean2, updates(states2), codec="lowrank-2")
    a, b, scale_ = factored.factors("bob", name)
    assert (a.shape, b.shape, scale_) == ((2, 5), (6, 2), 1.0)
    assert factored.layout("bob", name) == "lowrank"
    torch.testing.assert_close(b @ a, factored.delta("bob", name))
    with pytest.raises(DtypeError, match="expected int8 or fp8, got lowrank"):
        factored.quantised("bob", name)


# ---- LoRA --------------------------------------------------------------------------------------------------------


def adapter(seed: int, rank: int = 2, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 5, generator=generator), torch.randn(6, rank, generator=generator)
    return LowRank(a.to(dtype), b.to(dtype), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lora_update_is_kept_as_it_came(ledger, dtype):
    name = NAMES[0]
    sent = {"a": adapter(1, 2, 2.0, dtype), "b": adapter(2, 3, 0.5, dtype)}
    base = {name: torch.zeros(6, 5)}
    mean = {name: 0.25 * sent["a"].dense() + 0.75 * sent["b"].dense()}
    given = [ClientUpdate("a", 0.25, delta={name: sent["a"]}), ClientUpdate("b", 0.75, delta={name: sent["b"]})]
    ledger.commit_round(base, mean, given, codec="int8")  # a codec is for dense updates
    read = reopen(ledger.path).round(1)
    for client, update in sent.items():
        a, b, scale = read.factors(client, name)
        assert torch.equal(a, update.a)
        assert torch.equal(b, update.b)
        assert scale == update.scale
        assert read.layout(client, name) == "lora"
        torch.testing.assert_close(read.delta(client, name), update.dense())
        assert read.client(client).norm == pytest.approx(float(update.dense().norm()), rel=1e-5)
    assert read.relative_residual[name] < 1e-6


def test_a_round_of_adapters_never_needs_the_frozen_weight(ledger):
    name = NAMES[0]
    start, clients = adapter(0), {"a": adapter(1), "b": adapter(2)}
    # a server that averages the products keeps them as factors of higher rank
    mean = concatenate([(0.5, clients["a"]), (0.5, clients["b"])])
    read = ledger.commit_round(
        {name: start},
        {name: mean},
        [ClientUpdate(c, 0.5, state={name: value}) for c, value in clients.items()],
        max_relative_residual=1e-5,
    )
    assert read.parameters[name].form == "lowrank"
    assert read.base_digest[name] == parameter_digest(start)
    torch.testing.assert_close(read.change(name), mean.dense() - start.dense(), rtol=1e-5, atol=1e-5)
    assert read.change_factors(name).rank == mean.rank + start.rank
    torch.testing.assert_close(read.delta("a", name), clients["a"].dense() - start.dense(), rtol=1e-5, atol=1e-5)
    assert verify(ledger.path, conservation=True).ok


def test_the_gauge_of_an_adapter_does_not_matter(ledger):
    name, value = NAMES[0], adapter(1)
    other = LowRank(value.a * 3, value.b / 3, value.scale)
    base = {name: torch.zeros(6, 5)}
    given = [ClientUpdate("a", 0.5, delta={name: value}), ClientUpdate("b", 0.5, delta={name: other})]
    read = ledger.commit_round(base, {name: value.dense()}, given)
    torch.testing.assert_close(read.delta("a", name), read.delta("b", name))
    assert read.client("a").norm == pytest.approx(read.client("b").norm, rel=1e-6)
    assert read.relative_residual[name] < 1e-6


def test_factors_that_do_not_fit_are_refused(ledger):
    with pytest.raises(ShapeError, match=r"a \[r, I\] and b \[O, r\]"):
        LowRank(torch.zeros(2, 5), torch.zeros(6, 3))
    base = {NAMES[0]: torch.zeros(6, 5)}
    wrong = LowRank(torch.zeros(2, 6), torch.zeros(6, 2))
    with pytest.raises(ShapeError, match=r"expected \(6, 5\) as in base, got \(6, 6\)"):
        ledger.commit_round(base, base, [ClientUpdate("a", 1.0, delta={NAMES[0]: wrong})])
    with pytest.raises(DtypeError, match="factors in state and base, or in neither"):
        ledger.commit_round(base, base, [ClientUpdate("a", 1.0, state={NAMES[0]: adapter(0)})])
    bad = LowRank(torch.full((2, 5), float("nan")), torch.zeros(6, 2))
    with pytest.raises(NonFiniteError):
        ledger.commit_round(base, base, [ClientUpdate("a", 1.0, delta={NAMES[0]: bad})])
    with pytest.raises(DtypeError, match="as in base"):
        ledger.commit_round({NAMES[0]: adapter(0)}, {NAMES[0]: torch.zeros(6, 5)}, [ClientUpdate("a", 1.0, delta=base)])


def test_strided_transposed_and_shared_tensors_are_stored_by_value(ledger):
    wide = torch.arange(30.0).reshape(5, 6)
    base = {"w": torch.zeros(6, 5)}
    given = [
        ClientUpdate("a", 1.0, delta={"w": wide.T}),
        ClientUpdate("b", 0.0, delta={"w": torch.ones(1, 5).expand(6, 5)}),
        ClientUpdate("c", 0.0, delta={"w": torch._neg_view(wide.T.contiguous())}),
    ]
    read = ledger.commit_round(base, {"w": wide.T.contiguous()}, given)
    assert torch.equal(read.delta("a", "w"), wide.T)
    assert torch.equal(read.delta("b", "w"), torch.ones(6, 5))
    assert torch.equal(read.delta("c", "w"), -wide.T)
    assert read.aggregate_digest["w"] == tensor_digest(wide.T)


def test_gradients_and_parameters_are_accepted(ledger):
    layer = torch.nn.Linear(5, 6)
    base = dict(layer.named_parameters())
    read = ledger.commit_round(base, layer.state_dict(), [ClientUpdate("a", 1.0, state=base)])
    assert not read.delta("a", "weight").requires_grad
    assert float(read.delta("a", "weight").abs().sum()) == 0
