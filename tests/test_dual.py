"""Tangents that ride along, against torch.func on the same functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import close
from torch import Tensor
from torch.nn import functional

from protoken.ways import dual_attention, dual_rules
from protoken.ways.dual import RULES, Dual, NoRule, by_autograd, tangent_of, value_of
from protoken.ways.dual_attention import attention_tangent, only_rows

DIRECTIONS = 3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def constant(*shape: int) -> Tensor:
    """Not random, so that it may be made inside vmap."""
    return torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64).sin().reshape(shape)


def moving(*shape: int, seed: int = 0) -> Dual:
    return Dual.of(normal(*shape, seed=seed), normal(DIRECTIONS, *shape, seed=seed + 100))


def expected(run: Callable[..., Any], *inputs: Dual) -> Any:
    """Values and tangents of every output by vmap over jvp."""
    primals = tuple(value_of(x) for x in inputs)

    def one(*directions: Tensor) -> Any:
        return torch.func.jvp(run, primals, directions)[1]

    return run(*primals), torch.func.vmap(one)(*(x.tangent for x in inputs))


WEIGHT, BIAS, SQUARE = normal(7, 6, seed=1), normal(7, seed=2), normal(6, 5, seed=3)
UNARY: dict[str, Callable[[Any], Any]] = {
    "view": lambda x: x.view(2, 5, 3, 2),
    "view-minus-one": lambda x: x.view(2, -1),
    "reshape": lambda x: x.transpose(1, 2).reshape(2, 30),
    "expand": lambda x: x[:, :1].expand(-1, 4, 6),
    "transpose": lambda x: x.transpose(1, 2),
    "transpose-negative": lambda x: x.transpose(-1, 0),
    "permute": lambda x: x.permute(2, 0, 1),
    "unsqueeze": lambda x: x.unsqueeze(1) + x.unsqueeze(-1).sum(-1).unsqueeze(1),
    "chunk": lambda x: torch.cat([-part for part in x.chunk(3, dim=-1)], dim=-1),
    "split": lambda x: x.split([2, 4], dim=2)[1],
    "split-first": lambda x: torch.split(x, 1)[1],
    "cat-with-constant": lambda x: torch.cat((x, constant(2, 5, 6)), dim=1),
    "index-slice": lambda x: x[..., 3:],
    "index-integer": lambda x: x[:, 2],
    "index-none": lambda x: x[:, None, :, 1:3],
    "index-tensor": lambda x: x[torch.tensor([1, 0, 1])],
    "index-two-tensors": lambda x: x[torch.tensor([1, 0]), :, torch.tensor([3, 4])],
    "index-mask": lambda x: x[constant(2, 5, 6) > 0],
    "rotate-half": lambda x: torch.cat((-x[..., 3:], x[..., :3]), dim=-1),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "mean-first": lambda x: torch.mean(x, dim=1),
    "mean-all": lambda x: x.mean(),
    "sum-two": lambda x: x.sum((0, 2)),
    "dropout": lambda x: functional.dropout(x, p=0.3, training=False),
    "detach": lambda x: x * x.detach(),
    "add-constant": lambda x: 2 + x + constant(6),
    "subtract": lambda x: 1 - x - constant(4, 1, 5, 6),
    "multiply-wider": lambda x: x[:, :1] * constant(2, 5, 6),
    "divide": lambda x: x / 3 / constant(5, 1).exp(),
    "divide-by": lambda x: 1 / (x * x + 1),
    "square": lambda x: x.pow(2) + x**3 + torch.square(x),
    "rms-norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * constant(6),
    "layer-norm": lambda x: functional.layer_norm(x, (6,), constant(6), constant(6) * 2, 1e-5),
    "layer-norm-bare": lambda x: functional.layer_norm(x, (5, 6)),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu-tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": lambda x: torch.tanh(x / 5) * 5 + x.sigmoid() + x.exp(),
    "relu": functional.relu,
    "clamp": lambda x: x.clamp(max=0.4),
    "softmax": lambda x: functional.softmax(x, dim=-1),
    "softmax-middle": lambda x: x.softmax(1),
    "linear": lambda x: functional.linear(x, WEIGHT, BIAS),
    "addmm": lambda x: torch.addmm(constant(5), x.view(-1, 6), SQUARE),
    "matmul-right": lambda x: x @ SQUARE,
    "matmul-left": lambda x: constant(3, 1, 4, 5) @ x,
    "matmul-vector": lambda x: x @ constant(6),
    "no-rule-of-its-own": lambda x: torch.stack((x, x.cumsum(1))).flatten(-2).logsumexp(-1),
    "several-outputs": lambda x: x.topk(2, dim=-1).values * x.max(dim=-1, keepdim=True).values,
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_function_of_one_value(name: str) -> None:
    x = moving(2, 5, 6)
    got = UNARY[name](x)
    value, tangent = expected(UNARY[name], x)
    close(value_of(got), value, torch.float64)
    close(got.tangent, tangent, torch.float64)


BINARY: dict[str, tuple[Callable[[Any, Any], Any], tuple[int, ...], tuple[int, ...]]] = {
    "add": (lambda x, y: x + y, (2, 5, 6), (2, 5, 6)),
    "add-broadcast": (lambda x, y: x + y, (5, 6), (2, 1, 6)),
    "subtract": (lambda x, y: x - y, (2, 5, 6), (6,)),
    "multiply": (lambda x, y: x * y, (2, 5, 6), (2, 5, 6)),
    "multiply-broadcast": (lambda x, y: y * x, (2, 5, 6), (5, 1)),
    "divide": (lambda x, y: x / (y * y + 1), (2, 5, 6), (6,)),
    "matmul": (torch.matmul, (2, 3, 5, 6), (2, 3, 6, 4)),
    "matmul-broadcast": (torch.matmul, (5, 6), (2, 3, 6, 4)),
    "cat": (lambda x, y: torch.cat((x, y), dim=1), (2, 5, 6), (2, 3, 6)),
    "baddbmm": (lambda x, y: torch.baddbmm(x, y, y.mT), (2, 5, 5), (2, 5, 6)),
}


@pytest.mark.parametrize("name", BINARY)
def test_function_of_two_values(name: str) -> None:
    run, left, right = BINARY[name]
    x, y = moving(*left), moving(*right, seed=7)
    got = run(x, y)
    value, tangent = expected(run, x, y)
    close(value_of(got), value, torch.float64)
    close(got.tangent, tangent, torch.float64)


def test_every_rule_is_exercised_by_a_listed_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that no test above reaches would be untested: dropping it must be noticed."""
    met = set()
    for function, rule in list(RULES.items()):

        def noting(func: Any, args: Any, kwargs: Any, own: Any = rule) -> Any:
            met.add(own)
            return own(func, args, kwargs)

        monkeypatch.setitem(RULES, function, noting)
    for run in UNARY.values():
        run(moving(2, 5, 6))
    for both, left, right in BINARY.values():
        both(moving(*left), moving(*right))
    q = moving(1, 2, 4, 6)
    functional.scaled_dot_product_attention(q, q, q)
    casts = q.float().to(torch.float64).type_as(value_of(q)).contiguous()
    assert casts.dtype == torch.float64
    monkeypatch.undo()
    assert {rule.__qualname__ for rule in RULES.values()} == {rule.__qualname__ for rule in met}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x.__setitem__(0, 0.0),
        lambda x: torch.add(x, x, out=torch.empty(2, 3, dtype=torch.float64)),
        lambda x: torch.zeros(2, 3, dtype=torch.float64).copy_(x),
    ],
    ids=["in-place", "assignment", "out", "copy-from"],
)
def test_changes_in_place_are_refused(change: Callable[[Dual], object]) -> None:
    with pytest.raises(NoRule):
        change(moving(2, 3))


def test_augmented_assignment_is_refused() -> None:
    x = moving(2, 3)
    with pytest.raises(NoRule, match="add_"):
        x += 1


def test_questions_about_a_value_are_answered_plainly() -> None:
    x = moving(2, 3)
    assert (x.shape, x.dtype, x.size(1), x.dim(), len(x)) == ((2, 3), torch.float64, 3, 2, 2)
    assert type(x > 0) is Tensor
    assert tangent_of(x > 0) is None
    assert tangent_of(3) is None


def test_half_precision_keeps_the_dtype_of_the_value() -> None:
    x = Dual.of(normal(4, 6).to(torch.bfloat16), normal(2, 4, 6).to(torch.bfloat16))
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)) * normal(6, dtype=torch.float32)
    narrow = wide.to(x.dtype)
    assert (wide.tangent.dtype, narrow.tangent.dtype) == (torch.float32, torch.bfloat16)


# ---- attention -----------------------------------------------------------------------------------------


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """The formula, head by head; differentiable in every mode."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype).triu(1)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


def window(length: int) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return ((distance >= 0) & (distance < 3))[None, None]


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool-mask": {"attn_mask": window(9)},
    "added-mask": {"attn_mask": normal(1, 1, 9, 9)},
    "mask-per-head": {"attn_mask": normal(2, 4, 9, 9), "scale": 0.7},
}


@pytest.mark.parametrize("settings", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("shared", [4, 2, 1], ids="heads-{}".format)
@pytest.mark.parametrize("scratch", [1 << 21, 1], ids=["one-run", "row-by-row"])
def test_attention(settings: dict[str, Any], shared: int, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_attention, "_SCRATCH", scratch)
    q, k, v = moving(2, 4, 9, 6), moving(2, shared, 9, 6, seed=1), moving(2, shared, 9, 5, seed=2)
    got = functional.scaled_dot_product_attention(q, k, v, enable_gqa=shared < 4, **settings)

    def plain(*inputs: Tensor) -> Tensor:
        own = settings.get("attn_mask"), settings.get("is_causal", False), settings.get("scale")
        return plain_attention(*inputs, *own)

    value, tangent = expected(plain, q, k, v)
    close(value_of(got), value, torch.float64)
    close(got.tangent, tangent, torch.float64)


@pytest.mark.parametrize("which", range(3), ids=["queries", "keys", "values"])
def test_attention_with_one_moving_input(which: int) -> None:
    inputs: list[Any] = [normal(1, 2, 5, 6, seed=n) for n in range(3)]
    inputs[which] = moving(1, 2, 5, 6, seed=which)
    tangent = attention_tangent(*inputs, mask=None, causal=True, scale=0.5)

    def plain(moved: Tensor) -> Tensor:
        own = [value_of(x) for x in inputs]
        own[which] = moved
        return plain_attention(*own, None, True, 0.5)

    close(tangent, expected(plain, inputs[which])[1], torch.float64)


def test_attention_of_wanted_rows_only() -> None:
    q, k, v = moving(1, 4, 9, 6), moving(1, 2, 9, 6, seed=1), moving(1, 2, 9, 6, seed=2)
    whole = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with only_rows(slice(6, 9)):
        some = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(value_of(some), value_of(whole))
    assert not some.tangent[..., :6, :].any()
    close(some.tangent[..., 6:, :], whole.tangent[..., 6:, :], torch.float64)


def test_attention_that_has_no_rule_is_refused() -> None:
    q = moving(1, 2, 5, 6)
    for settings in ({"dropout_p": 0.1}, {"attn_mask": moving(1, 2, 5, 5)}):
        with pytest.raises(NoRule, match="attention"):
            functional.scaled_dot_product_attention(q, q, q, **settings)
    with pytest.raises(NoRule, match="attention"):
        functional.scaled_dot_product_attention(q[:, :, :2], q, q, is_causal=True)


def test_a_function_without_a_rule_equals_one_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways of the same function: by its rule, and by torch.func alone."""
    x = moving(2, 5, 6)
    by_rule = functional.linear(x, WEIGHT, BIAS)
    monkeypatch.delitem(RULES, functional.linear)
    close(functional.linear(x, WEIGHT, BIAS).tangent, by_rule.tangent, torch.float64)
    assert by_autograd(functional.linear, (x, WEIGHT), {}).shape == (2, 5, 7)
    assert dual_rules.RULES is RULES
