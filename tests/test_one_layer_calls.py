"""Calls of one layer with a bank that was read before: answered at once, with the same bits and the same errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import bank_of, cpu_ways, factors_of, normal, tokens_of, use
from tolerances import close
from torch import Tensor

from protoken import dispatch, ops
from protoken.errors import ProtokenError
from protoken.ops import DenseBank, LowRankBank, cpp

pytestmark = pytest.mark.usefixtures("poisoned_empty", "instruction_sets")
OPS = ("client_scores", "client_scores_lowrank", "client_totals")
NATIVE = [way for way in cpu_ways() if way.startswith("cpp")]


def case(op: str, name: str, tokens: int = 3) -> tuple[list[Tensor], DenseBank | LowRankBank]:
    """The inputs and the bank of 2 clients with 21 outputs and 34 inputs."""
    if op == "client_totals":
        return [normal(21, 34, seed=8)], DenseBank.of(*bank_of(name, 2, 21, 34))
    inputs = list(tokens_of(tokens, 21, 34))
    if op == "client_scores":
        return inputs, DenseBank.of(*bank_of(name, 2, 21, 34))
    return inputs, LowRankBank.of(*factors_of(name, 2, 21, 34, 4))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops whose launcher of the cpp backend ran."""
    seen: list[str] = []

    def watched(op: str, real: Callable[..., None]) -> Callable[..., None]:
        def launch(*operands: Any) -> None:
            seen.append(op)
            real(*operands)

        return launch

    for op in OPS:
        monkeypatch.setattr(cpp, f"launch_{op}", watched(op, getattr(cpp, f"launch_{op}")))
    return seen


@pytest.mark.parametrize("way", NATIVE)
@pytest.mark.parametrize(("op", "name"), [(op, "fp32") for op in OPS] + [(OPS[0], "int8"), (OPS[1], "bf16")])
def test_the_second_call_is_answered_at_once_and_with_the_same_bits(
    way: str, op: str, name: str, counted: list[str]
) -> None:
    use(way)
    inputs, bank = case(op, name)
    first = getattr(ops, op)(*inputs, bank)
    assert counted == [op]
    second = getattr(ops, op)(*inputs, bank)
    assert counted == [op]
    assert second.shape == first.shape
    assert torch.equal(first, second)
    assert torch.equal(first, getattr(ops, op)(*inputs, bank, backend="cpp"))
    assert counted == [op, op]
    close(first, getattr(ops, op)(*inputs, bank, backend="torch"), torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_operands_that_do_not_lie_as_they_are_read_take_the_long_way(op: str, counted: list[str]) -> None:
    inputs, bank = case(op, "fp32")
    call = getattr(ops, op)
    expected = call(*inputs, bank)
    call(*inputs, bank)
    for other in (
        [x.double() for x in inputs],
        [x.t().contiguous().t() for x in inputs],
        [torch.nn.Parameter(x) for x in inputs],
    ):
        counted.clear()
        assert torch.equal(call(*other, bank), expected)
        assert counted == [op]
    assert not call(*[x.clone().requires_grad_() for x in inputs], bank).requires_grad
    if op != "client_totals":
        assert call(*(x[:0] for x in inputs), bank).shape == (2, 0)


def test_a_transposed_bank_gets_its_totals_the_long_way(counted: list[str]) -> None:
    values = normal(2, 34, 21, seed=3)
    bank, m = DenseBank.of(values.transpose(1, 2)), normal(21, 34, seed=8)
    assert torch.equal(ops.client_totals(m, bank), ops.client_totals(m, bank))
    assert counted == ["client_totals", "client_totals"]
    close(ops.client_totals(m, bank), ops.client_totals_reference(m, values.transpose(1, 2)), torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_errors_are_those_of_the_first_call(op: str) -> None:
    inputs, fresh = case(op, "fp32")
    _, served = case(op, "fp32")
    call = getattr(ops, op)
    for _ in range(2):
        call(*inputs, served)
    last = inputs[-1]
    bad: list[object] = [last[:1], last[:, :5], last[0], last.long(), last.to("meta"), last.to_sparse(), [[1.0]], None]
    for value in bad[1:] if op == "client_totals" else bad:
        with pytest.raises(ProtokenError) as expected:
            call(*inputs[:-1], value, fresh)
        with pytest.raises(type(expected.value)) as got:
            call(*inputs[:-1], value, served)
        assert str(got.value) == str(expected.value)
    for backend in ("cuda", "fast"):
        with pytest.raises(ProtokenError) as expected:
            call(*inputs, fresh, backend=backend)
        with pytest.raises(type(expected.value)) as got:
            call(*inputs, served, backend=backend)
        assert str(got.value) == str(expected.value)


def test_there_is_no_shortcut_before_auto_has_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_served", {})
    monkeypatch.setattr(dispatch, "_shortcuts", {})
    inputs, bank = case("client_scores", "fp32")
    ops.client_scores(*inputs, bank, backend="cpp")
    assert dispatch.shortcut("client_scores") is None
    ops.client_scores(*inputs, bank)
    assert dispatch.shortcut("client_scores") is cpp.serve_client_scores


def minus(value: Tensor) -> Tensor:
    """``value`` as torch keeps the imaginary part of a conjugate: stored with the other sign."""
    return torch.complex(torch.zeros_like(value), -value).conj().imag


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("op", OPS)
def test_a_sign_that_torch_only_remembers_counts(way: str, op: str) -> None:
    backend = use(way)
    call = getattr(ops, op)
    inputs, bank = case(op, "fp32", tokens=1)
    expected = call(*inputs, bank, backend=backend)
    assert all(minus(x).is_neg() for x in inputs)
    close(call(*(minus(x) for x in inputs), bank, backend=backend), expected, torch.float32)
    if isinstance(bank, LowRankBank):
        assert bank.a is not None
        assert bank.b is not None
        turned = LowRankBank.of(minus(bank.a), minus(bank.b), minus(bank.scale))
        close(call(*inputs, turned, backend=backend), expected, torch.float32)
        apart = LowRankBank.of(list(minus(bank.a)), list(minus(bank.b)), minus(bank.scale))
        close(call(*inputs, apart, backend=backend), expected, torch.float32)
    else:
        assert bank.tensor is not None
        close(call(*inputs, DenseBank.of(minus(bank.tensor)), backend=backend), expected, torch.float32)
        close(call(*inputs, DenseBank.of(list(minus(bank.tensor))), backend=backend), expected, torch.float32)


def test_a_remembered_sign_of_a_single_number_counts() -> None:
    """One number is contiguous however it lies, so nothing but its sign tells it from a plain one."""
    one, bank = torch.ones(1, 1), DenseBank.of(torch.ones(1, 1, 1))
    for _ in range(2):
        assert ops.client_scores(minus(-one), one, bank).item() == -1
        assert ops.client_scores(one, minus(-one), bank).item() == -1
        assert ops.client_totals(minus(-one), bank).item() == -1
