"""relevance_head against autograd in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from op_cases import normal
from tolerances import close

from protoken.dispatch import backends_for
from protoken.errors import ArgumentError, DtypeError, ShapeError
from protoken.ops import Head, relevance_head, relevance_head_reference

pytestmark = pytest.mark.usefixtures("poisoned_empty")
BACKENDS = [backend.name for backend in backends_for("relevance_head", "cpu") if backend.available]


def case(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32, **options: object
) -> tuple[torch.Tensor, torch.Tensor, Head]:
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(5))
    weight = (normal(vocabulary, width, seed=1) / width**0.5).to(dtype)
    return normal(tokens, width, seed=2, dtype=dtype) * 3, targets, Head(weight, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", ["log_prob", "logit"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_relevance_equals_autograd(backend: str, objective: str, norm: str, softcap: float | None) -> None:
    for tokens, width, vocabulary in ((1, 33, 5003), (7, 64, 300), (16, 17, 2048)):
        hidden, targets, head = case(
            tokens,
            width,
            vocabulary,
            norm=norm,
            objective=objective,
            softcap=softcap,
            bias=normal(vocabulary, seed=3),
            norm_weight=normal(width, seed=4),
            norm_bias=normal(width, seed=5) if norm == "layer" else None,
            scale=0.7,
        )
        grad, value = relevance_head(hidden, targets, head, backend=backend)
        expected_grad, expected_value = relevance_head_reference(hidden, targets, head)
        close(grad, expected_grad, torch.float32)
        close(value, expected_value, torch.float32)


@pytest.mark.parametrize("objective", ["log_prob", "logit"])
def test_many_tokens(objective: str) -> None:
    hidden, targets, head = case(40, 30, 5000, objective=objective)
    for got, expected in zip(
        relevance_head(hidden, targets, head), relevance_head_reference(hidden, targets, head), strict=True
    ):
        close(got, expected, torch.float32)


def test_bits_do_not_depend_on_runs_or_threads() -> None:
    hidden, targets, head = case(3, 40, 30000)
    first, threads = relevance_head(hidden, targets, head), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(10):
                assert all(map(torch.equal, relevance_head(hidden, targets, head), first))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly_and_summed_in_fp32(backend: str, dtype: torch.dtype) -> None:
    hidden, targets, head = case(5, 48, 3000, dtype)
    got = relevance_head(hidden, targets, head, backend=backend)
    for left, right in zip(got, relevance_head_reference(hidden, targets, head), strict=True):
        assert left.dtype == torch.float32
        close(left, right, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend: str) -> None:
    hidden, targets, head = case(3, 20, 5000, norm="none")
    grad, value = relevance_head(hidden * 1e4, targets, head, backend=backend)
    expected_grad, expected_value = relevance_head_reference(hidden * 1e4, targets, head)
    assert grad.isfinite().all()
    close(value, expected_value, torch.float32)
    close(grad, expected_grad, torch.float32, factor=100)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_does_not_depend_on_its_neighbours(backend: str) -> None:
    hidden, targets, head = case(9, 40, 4000)
    grad, value = relevance_head(hidden, targets, head, backend=backend)
    alone, own = relevance_head(hidden[4:5], targets[4:5], head, backend=backend)
    close(grad[4:5], alone, torch.float32)
    close(value[4:5], own, torch.float32)


def test_no_tokens_give_empty_tensors() -> None:
    hidden, targets, head = case(0, 8, 10)
    grad, value = relevance_head(hidden, targets, head)
    assert grad.shape == (0, 8)
    assert value.shape == (0,)


def test_bad_input_is_named() -> None:
    hidden, targets, head = case(3, 8, 10)
    with pytest.raises(ShapeError, match="hidden"):
        relevance_head(hidden[:, :7], targets, head)
    with pytest.raises(ShapeError, match="targets"):
        relevance_head(hidden, targets[:2], head)
    with pytest.raises(DtypeError, match="targets"):
        relevance_head(hidden, targets.int(), head)
    with pytest.raises(ArgumentError, match="token ids from 0 to 9, got 10"):
        relevance_head(hidden, torch.tensor([0, 10, 1]), head)
    with pytest.raises(ArgumentError, match=r"head\.norm: expected one of rms, layer, none"):
        relevance_head(hidden, targets, Head(head.weight, norm="batch"))
    with pytest.raises(ArgumentError, match=r"head\.objective: expected one of log_prob, logit"):
        relevance_head(hidden, targets, Head(head.weight, objective="loss"))
    with pytest.raises(ShapeError, match="norm_weight"):
        relevance_head(hidden, targets, Head(head.weight, norm_weight=torch.ones(3)))


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("softcap", 0.0, "a finite number above 0, or None"),
        ("softcap", -30.0, "a finite number above 0, or None"),
        ("softcap", math.nan, "a finite number above 0, or None"),
        ("eps", -1e-6, "a finite number, not negative"),
        ("scale", math.inf, "a finite number"),
    ],
)
def test_a_number_that_makes_no_head_is_named(name: str, number: float, expected: str) -> None:
    hidden, targets, head = case(3, 8, 10)
    with pytest.raises(ArgumentError, match=rf"head\.{name}: expected {expected}, got {number}"):
        relevance_head(hidden, targets, replace(head, **{name: number}))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_rows_that_a_bias_masks_weigh_nothing_even_when_they_come_first(backend: str) -> None:
    bias = normal(5000, seed=3)
    bias[:4500] = -torch.inf
    hidden, targets, head = case(3, 24, 5000, bias=bias)
    targets = targets % 500 + 4500
    expected_grad, expected_value = relevance_head_reference(hidden, targets, head)
    grad, value = relevance_head(hidden, targets, head, backend=backend)
    close(grad, expected_grad, torch.float32)
    close(value, expected_value, torch.float32)


@pytest.mark.parametrize("objective", ["log_prob", "logit"])
def test_the_torch_launcher_answers_a_target_outside_the_vocabulary_with_nan(objective: str) -> None:
    """On a GPU nobody looks at the targets beforehand, and a row that is not there would end the process."""
    from protoken.ops.relevance_head import launch_relevance_head

    hidden, targets, head = case(4, 24, 90, objective=objective, softcap=2.0)
    right = torch.empty(4, 24), torch.empty(4)
    launch_relevance_head(*right, hidden, targets, head)
    targets[1], targets[3] = 90, -1
    grad, value = torch.empty(4, 24), torch.empty(4)
    launch_relevance_head(grad, value, hidden, targets, head)
    assert bool(grad[1::2].isnan().all() & value[1::2].isnan().all())
    assert torch.equal(grad[::2], right[0][::2])
    assert torch.equal(value[::2], right[1][::2])
