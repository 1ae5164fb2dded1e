"""The Triton kernels against the fp64 references: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before triton is imported, so without a GPU this file runs itself in a process of its
own and reports what that said.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import op_cases
import pytest
import torch
from op_cases import FORMATS
from tolerances import TRITON, close_in_rms
from torch import Tensor

from protoken.dispatch import OPS, interpreter_fault

pytest.importorskip("triton", reason="triton is not installed")

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if CUDA and not INTERPRETED else "cpu")
here = pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")


if DEVICE.type == "cpu" and (fault := interpreter_fault()):
    pytest.skip(fault, allow_module_level=True)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests of this file run in this process")
def test_kernels_agree_with_the_references_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return op_cases.normal(*shape, seed=seed, dtype=dtype).to(DEVICE)


def bank_of(name: str, clients: int, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    bank, scale = op_cases.bank_of(name, clients, rows, columns)
    return bank.to(DEVICE), None if scale is None else scale.to(DEVICE)


def assert_close(got: Tensor, reference: Tensor, rms: float = TRITON) -> None:
    close_in_rms(got, reference, rms)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE)


@here
@pytest.mark.parametrize("tokens_dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(("clients", "tokens", "rows", "columns"), [(1, 1, 1, 1), (3, 5, 70, 37), (2, 33, 260, 64)])
def test_client_scores(name: str, tokens_dtype: str, clients: int, tokens: int, rows: int, columns: int) -> None:
    from protoken.kernels.client_scores import launch_client_scores

    from protoken.ops import DenseBank, client_scores_reference

    x = normal(tokens, columns, seed=1, dtype=FORMATS[tokens_dtype])
    grad = normal(tokens, rows, seed=2, dtype=FORMATS[tokens_dtype])
    bank, scale = bank_of(name, clients, rows, columns)
    out = poisoned(1, clients, tokens)
    launch_client_scores(out, [x], [grad], [DenseBank.of(bank, scale)])
    assert_close(out[0], client_scores_reference(x, grad, bank, scale=scale))


@here
def test_client_scores_of_layers_of_two_shapes_with_clients_apart() -> None:
    from protoken.kernels.client_scores import launch_client_scores

    from protoken.ops import DenseBank, client_scores_reference

    shapes = [(24, 40), (40, 24), (24, 40), (24, 40)]
    xs = [normal(6, columns, seed=10 + n) for n, (_, columns) in enumerate(shapes)]
    grads = [normal(6, rows, seed=20 + n).T.contiguous().T for n, (rows, _) in enumerate(shapes)]
    parts = [[normal(rows, columns, seed=100 * n + k) for k in range(3)] for n, (rows, columns) in enumerate(shapes)]
    out = poisoned(4, 3, 6)
    launch_client_scores(out, xs, grads, [DenseBank.of(part) for part in parts])
    for n in range(4):
        assert_close(out[n], client_scores_reference(xs[n], grads[n], torch.stack(parts[n])))


@here
def test_client_scores_of_a_transposed_bank_and_of_every_other_client() -> None:
    from protoken.kernels.client_scores import launch_client_scores

    from protoken.ops import DenseBank, client_scores_reference

    x, grad = normal(7, 33, seed=1), normal(7, 18, seed=2)
    bank = normal(6, 33, 18, seed=3).transpose(1, 2)[::2]
    out = poisoned(1, 3, 7)
    launch_client_scores(out, [x], [grad], [DenseBank.of(bank)])
    assert_close(out[0], client_scores_reference(x, grad, bank))


@here
def test_client_scores_do_not_depend_on_the_order_or_the_number_of_clients() -> None:
    from protoken.kernels.client_scores import launch_client_scores

    from protoken.ops import DenseBank

    x, grad, bank = normal(5, 50, seed=1), normal(5, 300, seed=2), normal(6, 300, 50, seed=3)
    order = torch.tensor([4, 1, 0, 5, 3, 2], device=DEVICE)
    outs = []
    for chosen in (bank, bank[order], bank[:2]):
        out = poisoned(1, chosen.shape[0], 5)
        launch_client_scores(out, [x], [grad], [DenseBank.of(chosen)])
        outs.append(out[0])
    assert torch.equal(outs[0][order], outs[1])
    assert torch.equal(outs[0][:2], outs[2])


@here
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("clients", "tokens", "rows", "columns", "rank"),
    [(1, 1, 1, 1, 1), (19, 5, 37, 70, 3), (9, 20, 64, 65, 8), (3, 3, 40, 66, 64)],
)
def test_client_scores_lowrank(name: str, clients: int, tokens: int, rows: int, columns: int, rank: int) -> None:
    from protoken.kernels.client_scores_lowrank import launch_client_scores_lowrank

    from protoken.ops import LowRankBank, client_scores_lowrank_reference

    x, grad = normal(tokens, columns, seed=1), normal(tokens, rows, seed=2)
    a, b = (
        normal(clients, rank, columns, seed=3, dtype=FORMATS[name]),
        normal(clients, rows, rank, seed=4, dtype=FORMATS[name]),
    )
    scale = normal(clients, seed=5).abs() + 0.5
    out = poisoned(1, clients, tokens)
    launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a, b, scale)])
    assert_close(out[0], client_scores_lowrank_reference(x, grad, a, b, scale))


@here
def test_scores_of_layers_wider_than_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    from protoken.kernels import common
    from protoken.kernels.client_scores import launch_client_scores
    from protoken.kernels.client_scores_lowrank import launch_client_scores_lowrank

    from protoken.ops import DenseBank, LowRankBank, client_scores_lowrank_reference, client_scores_reference

    monkeypatch.setattr(common, "DEPTH", 128)
    x, grad = normal(3, 300, seed=1), normal(3, 140, seed=2)
    bank, scale = bank_of("int8", 2, 140, 300)
    out = poisoned(1, 2, 3)
    launch_client_scores(out, [x], [grad], [DenseBank.of(bank, scale)])
    assert_close(out[0], client_scores_reference(x, grad, bank, scale=scale))
    a, b = normal(5, 4, 300, seed=3), normal(5, 140, 4, seed=4)
    out = poisoned(1, 5, 3)
    launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a, b)])
    assert_close(out[0], client_scores_lowrank_reference(x, grad, a, b))


@here
def test_client_scores_lowrank_of_mixed_ranks() -> None:
    from protoken.kernels.client_scores_lowrank import launch_client_scores_lowrank

    from protoken.ops import LowRankBank, client_scores_lowrank_reference

    x, grad = normal(4, 50, seed=1), normal(4, 30, seed=2)
    ranks = [4, 1, 0, 17, 4, 64]
    a = [normal(rank, 50, seed=10 + k) for k, rank in enumerate(ranks)]
    b = [normal(30, rank, seed=20 + k) for k, rank in enumerate(ranks)]
    out = poisoned(1, 6, 4)
    launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a, b)])
    assert_close(out[0], client_scores_lowrank_reference(x, grad, a, b))
    assert torch.equal(out[0, 2], torch.zeros(4, device=DEVICE))


@here
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(("clients", "rows", "columns"), [(1, 1, 1), (5, 37, 70), (3, 8, 515)])
def test_client_totals(name: str, clients: int, rows: int, columns: int) -> None:
    from protoken.kernels.client_totals import launch_client_totals

    from protoken.ops import DenseBank, client_totals_reference

    bank, scale = bank_of(name, clients, rows, columns)
    ms = [normal(rows, columns, seed=1), normal(columns, rows, seed=2).T]
    out = poisoned(2, clients)
    launch_client_totals(out, ms, [DenseBank.of(bank, scale)] * 2)
    for n in range(2):
        assert_close(out[n], client_totals_reference(ms[n], bank, scale=scale))


@here
@pytest.mark.parametrize("objective", ["log_prob", "logit"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcap"])
def test_relevance_head(norm: str, objective: str, softcap: float | None) -> None:
    from protoken.kernels.relevance_head import launch_relevance_head

    from protoken.ops.relevance_head import Head, relevance_head_reference

    width, vocabulary, tokens = 70, 301, 9
    head = Head(
        weight=normal(vocabulary, width, seed=1),
        bias=normal(vocabulary, seed=2),
        norm=norm,
        norm_weight=normal(width, seed=3),
        norm_bias=normal(width, seed=4),
        scale=0.5,
        softcap=softcap,
        objective=objective,
    )
    hidden = normal(tokens, width, seed=5)
    targets = torch.arange(tokens, device=DEVICE) * 31 % vocabulary
    grad, value = poisoned(tokens, width), poisoned(tokens)
    launch_relevance_head(grad, value, hidden, targets, head)
    wanted_grad, wanted_value = relevance_head_reference(hidden, targets, head)
    assert_close(grad, wanted_grad, 3e-5)
    assert_close(value, wanted_value, 3e-5)


@here
def test_relevance_head_over_several_chunks_of_a_bf16_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    from protoken.kernels import relevance_head as kernels

    from protoken.ops.relevance_head import Head, relevance_head_reference

    monkeypatch.setattr(kernels, "CHUNK", 128)
    head = Head(weight=normal(300, 64, seed=1, dtype=torch.bfloat16), norm_weight=normal(64, seed=3))
    hidden, targets = normal(3, 64, seed=5), torch.tensor([0, 299, 128], device=DEVICE)
    grad, value = poisoned(3, 64), poisoned(3)
    kernels.launch_relevance_head(grad, value, hidden, targets, head)
    wanted_grad, wanted_value = relevance_head_reference(hidden, targets, head)
    assert_close(grad, wanted_grad, 3e-5)
    assert_close(value, wanted_value, 3e-5)


@here
def test_relevance_head_with_a_first_chunk_of_masked_rows_and_a_target_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    from protoken.kernels import relevance_head as kernels

    from protoken.ops.relevance_head import Head, relevance_head_reference

    monkeypatch.setattr(kernels, "CHUNK", 128)
    bias = normal(300, seed=2)
    bias[:200] = -torch.inf
    for softcap in (None, 5.0):
        # A soft-cap turns -inf into a number like any other, so there only the target is out of the ordinary.
        head = Head(normal(300, 40, seed=1), bias=bias if softcap is None else None, softcap=softcap)
        hidden, targets = normal(3, 40, seed=5), torch.tensor([299, 250, 270], device=DEVICE)
        wanted_grad, wanted_value = relevance_head_reference(hidden, targets, head)
        targets[1] = 300
        grad, value = poisoned(3, 40), poisoned(3)
        kernels.launch_relevance_head(grad, value, hidden, targets, head)
        assert bool(grad[1].isnan().all() & value[1].isnan())
        assert_close(grad[::2], wanted_grad[::2], 3e-5)
        assert_close(value[::2], wanted_value[::2], 3e-5)


@pytest.mark.parametrize("op", OPS)
def test_launchers_make_the_device_of_their_operands_current(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    from protoken.kernels.common import on_its_device

    current: list[object] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    class There:
        device = torch.device("cuda", 1)

    seen: list[object] = []
    monkeypatch.setattr(torch.cuda, "device", device)
    for first in (There(), [There()]):
        on_its_device(lambda *operands: seen.append((list(current), len(operands))))(first, 1, 2)  # type: ignore[arg-type]
    on_its_device(lambda *operands: seen.append(list(current)))(torch.ones(1))
    assert seen == [([There.device], 3), ([There.device], 3), []]
    launch = getattr(importlib.import_module(f"protoken.kernels.{op}"), f"launch_{op}")
    assert launch.__wrapped__.__code__.co_filename.endswith(f"{op}.py")
    assert launch.__code__ is on_its_device(print).__code__


@here
@pytest.mark.parametrize("tokens", [1, 5, 8, 11])
@pytest.mark.parametrize(("of", "to"), [("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp32")])
def test_capture_append(tokens: int, of: str, to: str) -> None:
    from protoken.kernels.capture_append import launch_capture_append

    from protoken.ops.capture_append import capture_append_reference

    buffers = [torch.zeros(8, width, dtype=FORMATS[to], device=DEVICE) for width in (3, 1030)]
    steps = [normal(width, tokens, seed=width, dtype=FORMATS[of]).T for width in (3, 1030)]
    cursor = torch.tensor([6], device=DEVICE)
    wanted, end = [buffer.clone() for buffer in buffers], cursor.clone()
    launch_capture_append(buffers, steps, cursor)
    capture_append_reference(wanted, steps, end)
    assert torch.equal(cursor, end)
    for got, want in zip(buffers, wanted, strict=True):
        if INTERPRETED and (of, to) == ("fp32", "bf16"):  # the interpreter cuts bits off where a GPU rounds
            assert_close(got, want, 2**-7)
        else:
            assert torch.equal(got, want)
