"""The CUDA kernels of relevance_head and capture_append, compiled as C++ with a fiber per thread, against fp64.

What this shows without a GPU: which element every lane loads, how fragments, descriptors and images are laid out,
how work is cut into units, and that barriers are met. csrc/cuda_emulation.h says what it does not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulated_cuda import assert_close, emulated_backend, poisoned
from op_cases import FORMATS, normal
from torch import Tensor

from protoken import dispatch
from protoken.dispatch import OPS


@pytest.fixture(scope="module")
def cuda() -> Iterator[ModuleType]:
    """A copy of protoken.ops.cuda over the emulated module."""
    yield from emulated_backend()


# Read once: teams of one warp and of many, one row per team and several tiles; read twice: stages and splits.
HEAD_SHAPES = [(1, 64, 300), (3, 136, 701), (4, 1040, 90), (2, 8, 5), (7, 264, 333), (40, 72, 200), (1, 33, 500)]


def head_case(
    tokens: int, width: int, vocabulary: int, name: str = "fp32", *, nested: bool = False, **options: object
) -> tuple[Tensor, Tensor, object]:
    from protoken.ops import Head

    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(5))
    weight = (normal(vocabulary, width, seed=1) / width**0.5).to(FORMATS[name])
    if nested:
        weight = torch.stack([weight, weight], -1)[..., 0]
    return normal(tokens, width, seed=2, dtype=FORMATS[name]) * 3, targets, Head(weight, **options)  # type: ignore[arg-type]


def head_of(cuda: ModuleType, hidden: Tensor, targets: Tensor, head: object, **options: int) -> tuple[Tensor, Tensor]:
    outs = poisoned(*hidden.shape), poisoned(hidden.shape[0])
    cuda.launch_relevance_head(*outs, hidden, targets, head, **options)
    return outs


def assert_head(cuda: ModuleType, hidden: Tensor, targets: Tensor, head: object, **options: int) -> None:
    from protoken.ops import relevance_head_reference

    got = head_of(cuda, hidden, targets, head, **options)
    for left, right in zip(got, relevance_head_reference(hidden, targets, head), strict=True):  # type: ignore[arg-type]
        assert_close(left, right)


@pytest.fixture
def poisoned_workspace(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory arrives as NaN, so that a part nobody wrote shows."""
    real = cuda._workspace
    monkeypatch.setattr(cuda, "_workspace", lambda size, device: real(size, device).fill_(255))


@pytest.mark.usefixtures("poisoned_workspace")
@pytest.mark.parametrize("path", [0, 2], ids=["auto", "twice"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("tokens", "width", "vocabulary"), HEAD_SHAPES)
def test_relevance_head(cuda: ModuleType, name: str, tokens: int, width: int, vocabulary: int, path: int) -> None:
    norm, softcap = ("rms", None) if width % 16 else ("layer", 2.0)
    hidden, targets, head = head_case(
        tokens,
        width,
        vocabulary,
        name,
        norm=norm,
        softcap=softcap,
        bias=normal(vocabulary, seed=3, dtype=FORMATS[name]),
        norm_weight=normal(width, seed=4, dtype=FORMATS[name]),
        norm_bias=normal(width, seed=6) if norm == "layer" else None,
        scale=0.7,
    )
    assert_head(cuda, hidden, targets, head, path=path)


@pytest.mark.usefixtures("poisoned_workspace")
@pytest.mark.parametrize("path", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("objective", ["log_prob", "logit"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "capped"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "bare"])
def test_relevance_head_of_every_norm_and_objective(
    cuda: ModuleType, path: int, norm: str, objective: str, softcap: float | None, whole: bool
) -> None:
    about = {"norm": norm, "objective": objective, "softcap": softcap}
    if whole:
        about |= {"bias": normal(150, seed=3), "norm_weight": normal(48, seed=4), "norm_bias": normal(48, seed=6)}
    assert_head(cuda, *head_case(6, 48, 150, **about), path=path)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_relevance_head_of_strided_operands(cuda: ModuleType, name: str) -> None:
    from protoken.ops import Head

    hidden, targets, head = head_case(20, 61, 130, name, nested=True, bias=normal(260, seed=3)[::2])
    assert head.weight.stride(1) == 2
    hidden = hidden.T.contiguous().T
    targets = torch.stack([targets, targets], 1)[:, 0]
    assert_head(cuda, hidden, targets, head)
    tied = normal(150, 64, seed=8, dtype=FORMATS[name])[::2, 8:40]  # rows apart, aligned for fp32 alone or not at all
    assert_head(cuda, normal(3, 32, seed=9, dtype=FORMATS[name]), torch.tensor([0, 74, 5]), Head(tied))


@pytest.mark.parametrize("path", [1, 2], ids=["once", "twice"])
def test_relevance_head_of_one_row_and_of_a_width_that_takes_two_loads_per_thread(cuda: ModuleType, path: int) -> None:
    assert_head(cuda, *head_case(1, 16, 1, norm="none", objective="logit"), path=path)
    hidden, targets, head = head_case(2, 16, 1)
    grad, value = head_of(cuda, hidden, targets, head, path=path)
    assert float(grad.abs().max()) < 1e-6
    assert float(value.abs().max()) < 1e-6  # the only token there is has probability 1
    assert_head(cuda, *head_case(1, 4104, 40, "bf16"), path=path)


@pytest.mark.parametrize("path", [1, 2], ids=["once", "twice"])
def test_relevance_head_with_large_logits_and_masked_rows(cuda: ModuleType, path: int) -> None:
    bias = normal(400, seed=3)
    bias[:390] = -torch.inf  # whole parts of the vocabulary have no mass
    bias[395] = 500.0
    hidden, targets, head = head_case(3, 64, 400, norm="none", bias=bias)
    targets[:] = torch.tensor([395, 392, 399])
    assert_head(cuda, hidden * 50, targets, head, path=path)


def test_a_target_outside_the_vocabulary_spoils_its_own_token_alone(cuda: ModuleType) -> None:
    hidden, targets, head = head_case(3, 64, 100)
    right = head_of(cuda, hidden, targets, head)
    for wrong in (100, -1):
        targets[1] = wrong
        grad, value = head_of(cuda, hidden, targets, head)
        assert bool(grad[1].isnan().all() & value[1].isnan())
        for t in (0, 2):
            assert torch.equal(grad[t], right[0][t])
            assert torch.equal(value[t], right[1][t])


@pytest.mark.parametrize(("count", "path"), [(4, 1), (9, 1), (16, 2), (40, 2), (130, 2)])
def test_relevance_head_does_not_depend_on_other_tokens_or_on_the_run(cuda: ModuleType, count: int, path: int) -> None:
    hidden, targets, head = head_case(count, 64, 90)
    first = head_of(cuda, hidden, targets, head, path=path)
    again = head_of(cuda, hidden, targets, head, path=path)
    assert all(map(torch.equal, first, again))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    moved = head_of(cuda, hidden[order], targets[order], head, path=path)
    assert all(torch.equal(left[order], right) for left, right in zip(first, moved, strict=True))
    few = {4: 2, 9: 3, 16: 1, 40: 17, 130: 20}[count]
    part = head_of(cuda, hidden[:few], targets[:few], head, path=path)
    assert all(torch.equal(left[:few], right) for left, right in zip(first, part, strict=True))


def test_a_head_that_cannot_be_read_once_is_refused_by_name(cuda: ModuleType) -> None:
    from protoken.errors import ArgumentError

    hidden, targets, head = head_case(2, 33, 20)
    with pytest.raises(ArgumentError, match="cannot be read once"):
        head_of(cuda, hidden, targets, head, path=1)
    _, _, double = head_case(2, 16, 20)
    assert "float64" in cuda.why_not_relevance_head(hidden, targets, type(double)(double.weight.double()))
    assert "at least one" in cuda.why_not_relevance_head(hidden, targets, type(double)(double.weight[:0]))
    assert cuda.why_not_relevance_head(hidden, targets, head) is None


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_cuda_on_a_gpu_for_every_op(cuda: ModuleType, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_modules", {(op, "cuda"): cuda, (op, "triton"): "not asked"})
    assert dispatch.choose(op, "auto", torch.device("cuda")).name == "cuda"


def test_a_float64_head_goes_to_the_next_backend_and_by_name_says_why(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from protoken.errors import BackendError
    from protoken.ops import Head

    monkeypatch.setattr(dispatch, "_modules", {("relevance_head", "cuda"): cuda, ("relevance_head", "triton"): "gone"})
    operands = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64), Head(torch.ones(5, 4, dtype=torch.float64))
    assert dispatch.choose("relevance_head", "auto", torch.device("cuda"), *operands).name == "torch"
    with pytest.raises(BackendError, match="float64"):
        dispatch.choose("relevance_head", "cuda", torch.device("cuda"), *operands)


FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("of", FLOATS, ids=str)
@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_capture_append(cuda: ModuleType, to: torch.dtype, of: torch.dtype, capacity: int) -> None:
    from protoken.ops import capture_append_reference

    got = [torch.zeros(capacity, n, dtype=to) for n in (5, 64, 0)]
    got += [torch.zeros(capacity, 90)[:, 3:36], torch.zeros(capacity, 4100, dtype=to)]
    expected = [buffer.clone() for buffer in got]
    cursor, place = torch.full((1,), 3), torch.full((1,), 3)
    for seed, tokens in enumerate((1, 3, 20)):
        widths = [buffer.shape[1] for buffer in got]
        steps = [normal(tokens, n, seed=seed + n, dtype=of) for n in widths]
        steps[3] = normal(33, tokens, seed=seed + 50, dtype=of).T
        cuda.launch_capture_append(got, steps, cursor)
        capture_append_reference(expected, steps, place)
        assert torch.equal(cursor, place)
        for left, right in zip(got, expected, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_capture_append_rounds_to_even_and_keeps_special_values(cuda: ModuleType, dtype: torch.dtype) -> None:
    special = [1.00390625, 1.01171875, float("nan"), float("inf"), -0.0, 3.4e38, 65504.0, 65519.9, 65520.0, 6e-8, 3e-8]
    step = torch.cat([torch.tensor(special), normal(500, seed=1) * 1e-5, normal(500, seed=2) * 3e4])[None]
    buffer = torch.zeros(2, step.shape[1], dtype=dtype)
    cuda.launch_capture_append([buffer], [step], torch.zeros(1, dtype=torch.int64))
    assert torch.equal(buffer[0].nan_to_num(7.0), step[0].to(dtype).nan_to_num(7.0))
    assert torch.equal(buffer[0].isnan(), step[0].to(dtype).isnan())


def test_capture_append_of_more_buffers_than_a_launch_takes(cuda: ModuleType) -> None:
    buffers, steps = [torch.zeros(4, 6) for _ in range(70)], [normal(3, 6, seed=n) for n in range(70)]
    cursor = torch.full((1,), 2)
    cuda.launch_capture_append(buffers, steps, cursor)
    assert int(cursor) == 5
    for buffer, step in zip(buffers, steps, strict=True):
        assert torch.equal(buffer[[2, 3, 0]], step)
