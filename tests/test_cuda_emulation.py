"""The CUDA kernels of scores and totals, compiled as C++ with one fiber per thread, against the fp64 references.

What this shows without a GPU: which element every lane loads, how fragments, descriptors and images are laid out,
how work is cut into units, and that barriers are met. csrc/cuda_emulation.h says what it does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from emulated_cuda import assert_close, emulated_backend, poisoned
from op_cases import FORMATS, bank_of, normal


@pytest.fixture(scope="module")
def cuda() -> Iterator[ModuleType]:
    """A copy of protoken.ops.cuda over the emulated module."""
    yield from emulated_backend()


@pytest.mark.parametrize("tokens_dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(
    ("clients", "tokens", "rows", "columns"), [(3, 1, 70, 64), (5, 20, 65, 272), (1, 70, 64, 48), (2, 7, 63, 61)]
)
@pytest.mark.parametrize("path", [0, 1], ids=["auto", "mma"])
def test_client_scores(
    cuda: ModuleType, name: str, tokens_dtype: str, clients: int, tokens: int, rows: int, columns: int, path: int
) -> None:
    from protoken.ops import DenseBank, client_scores_reference

    x = normal(tokens, columns, seed=1, dtype=FORMATS[tokens_dtype])
    grad = normal(tokens, rows, seed=2, dtype=FORMATS[tokens_dtype])
    bank, scale = bank_of(name, clients, rows, columns)
    out = poisoned(1, clients, tokens)
    cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(bank, scale)], path=path)
    assert_close(out[0], client_scores_reference(x, grad, bank, scale=scale))


@pytest.mark.parametrize("tokens", [3, 100], ids=["narrow", "wide"])
def test_client_scores_over_several_chunks_units_and_blocks(cuda: ModuleType, tokens: int) -> None:
    from protoken.ops import DenseBank, client_scores_reference

    x, grad = (normal(tokens, n, seed=n, dtype=torch.bfloat16) for n in (1160, 130))
    bank = normal(2, 130, 1160, seed=3, dtype=torch.bfloat16)
    out = poisoned(1, 2, tokens)
    cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(bank)])
    assert_close(out[0], client_scores_reference(x, grad, bank))


def test_client_scores_of_layers_of_two_shapes_with_clients_apart(cuda: ModuleType) -> None:
    from protoken.ops import DenseBank, client_scores_reference

    shapes = [(24, 40), (72, 24), (24, 40)]
    xs = [normal(6, columns, seed=10 + n) for n, (_, columns) in enumerate(shapes)]
    grads = [normal(6, rows, seed=20 + n).T.contiguous().T for n, (rows, _) in enumerate(shapes)]
    parts = [[normal(*shape, seed=100 * n + k) for k in range(3)] for n, shape in enumerate(shapes)]
    out = poisoned(3, 3, 6)
    cuda.launch_client_scores(out, xs, grads, [DenseBank.of(part) for part in parts])
    for n in range(3):
        assert_close(out[n], client_scores_reference(xs[n], grads[n], torch.stack(parts[n])))


def test_client_scores_of_more_layers_than_go_into_a_launch(cuda: ModuleType) -> None:
    from protoken.ops import DenseBank, client_scores_reference

    count = 2 * cuda.AT_ONCE + 5
    xs = [normal(2, 16, seed=n) for n in range(count)]
    grads = [normal(2, 8, seed=50 + n) for n in range(count)]
    formats = [torch.float32 if n % 3 else torch.bfloat16 for n in range(count)]
    banks = [normal(2, 8, 16, seed=100 + n, dtype=dtype) for n, dtype in enumerate(formats)]
    out = poisoned(count, 2, 2)
    cuda.launch_client_scores(out, xs, grads, [DenseBank.of(bank) for bank in banks])
    for n in range(count):
        assert_close(out[n], client_scores_reference(xs[n], grads[n], banks[n]))


@pytest.mark.parametrize("columns", [40, 33], ids=["aligned", "odd"])
def test_client_scores_of_a_transposed_bank_and_of_every_other_client(cuda: ModuleType, columns: int) -> None:
    from protoken.ops import DenseBank, client_scores_reference

    x, grad = normal(7, columns, seed=1), normal(7, 24, seed=2)
    bank = normal(6, columns, 24, seed=3).transpose(1, 2)[::2]
    out = poisoned(1, 3, 7)
    cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(bank)])
    assert_close(out[0], client_scores_reference(x, grad, bank))


@pytest.mark.parametrize("tokens", [5, 40])
def test_client_scores_do_not_depend_on_the_order_or_the_number_of_clients(cuda: ModuleType, tokens: int) -> None:
    from protoken.ops import DenseBank

    x, grad, bank = normal(tokens, 80, seed=1), normal(tokens, 200, seed=2), normal(5, 200, 80, seed=3)
    order = torch.tensor([4, 1, 0, 3, 2])
    outs = []
    for chosen in (bank, bank[order], bank[:2]):
        out = poisoned(1, chosen.shape[0], tokens)
        cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(chosen)])
        outs.append(out[0])
    assert torch.equal(outs[0][order], outs[1])
    assert torch.equal(outs[0][:2], outs[2])


class _On:
    """The native module, called for another of the emulated devices; ``device`` is the last but one of a launch's
    arguments and the last when only the size of the workspace is asked for."""

    def __init__(self, native: ModuleType, device: int) -> None:
        self._native, self._device = native, device

    def __getattr__(self, name: str) -> Callable[..., object]:
        function, place = getattr(self._native, name), -1 if name.endswith("workspace") else -2

        def call(*arguments: object) -> object:
            changed = list(arguments)
            changed[place] = self._device
            return function(*changed)

        return call


@pytest.mark.parametrize("device", [1, 2], ids=["sm_80", "sm_86"])
@pytest.mark.parametrize(
    ("name", "tokens_dtype"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("int8", "fp32"), ("fp8", "bf16")]
)
def test_calls_fit_into_the_shared_memory_of_older_devices(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, device: int, name: str, tokens_dtype: str
) -> None:
    from protoken.ops import DenseBank, LowRankBank, client_scores_lowrank_reference, client_scores_reference

    monkeypatch.setattr(cuda, "native", _On(cuda.native, device))
    for tokens, rows, columns in ((5, 16, 1040), (130, 16, 528)):
        x = normal(tokens, columns, seed=1, dtype=FORMATS[tokens_dtype])
        grad = normal(tokens, rows, seed=2, dtype=FORMATS[tokens_dtype])
        bank, scale = bank_of(name, 1, rows, columns)
        out = poisoned(1, 1, tokens)
        cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(bank, scale)])
        assert_close(out[0], client_scores_reference(x, grad, bank, scale=scale))
        if scale is None:
            a, b = (normal(*shape, seed=4, dtype=FORMATS[name]) for shape in ((3, 8, columns), (3, rows, 8)))
            out = poisoned(1, 3, tokens)
            cuda.launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a, b)], path=1)
            assert_close(out[0], client_scores_lowrank_reference(x, grad, a, b))


def test_a_small_call_leaves_a_kernel_the_shared_memory_that_larger_ones_need(cuda: ModuleType) -> None:
    """The limit belongs to the kernel: lowered between another thread's two steps, it would fail that launch."""
    from protoken.ops import DenseBank, client_scores_reference

    for columns in (768, 520, 64, 768):  # 77, 53 and 8 KB
        x, grad, bank = normal(2, columns, seed=1), normal(2, 8, seed=2), normal(1, 8, columns, seed=3)
        out = poisoned(1, 1, 2)
        cuda.launch_client_scores(out, [x], [grad], [DenseBank.of(bank)])
        assert_close(out[0], client_scores_reference(x, grad, bank))


def test_null_client_scores_exactly_zero(cuda: ModuleType) -> None:
    from protoken.ops import DenseBank

    bank = normal(3, 64, 64, seed=3)
    bank[1] = 0
    out = poisoned(1, 3, 4)
    cuda.launch_client_scores(out, [normal(4, 64, seed=1)], [normal(4, 64, seed=2)], [DenseBank.of(bank)])
    assert torch.equal(out[0, 1], torch.zeros(4))


@pytest.mark.parametrize("path", [1, 2], ids=["whole", "split"])
@pytest.mark.parametrize("stored", ["rank-last", "rank-first"])
@pytest.mark.parametrize(
    ("name", "tokens_dtype"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "bf16")]
)
@pytest.mark.parametrize(
    ("clients", "tokens", "rows", "columns", "rank"),
    [(20, 5, 72, 136, 8), (5, 20, 65, 61, 3), (3, 1, 64, 64, 64), (7, 9, 40, 56, 2), (9, 2, 24, 17, 1)],
)
def test_client_scores_lowrank(
    cuda: ModuleType,
    name: str,
    tokens_dtype: str,
    stored: str,
    path: int,
    clients: int,
    tokens: int,
    rows: int,
    columns: int,
    rank: int,
) -> None:
    from protoken.ops import LowRankBank, client_scores_lowrank_reference

    x = normal(tokens, columns, seed=1, dtype=FORMATS[tokens_dtype])
    grad = normal(tokens, rows, seed=2, dtype=FORMATS[tokens_dtype])
    a = normal(clients, rank, columns, seed=3, dtype=FORMATS[name])
    b = normal(clients, rows, rank, seed=4, dtype=FORMATS[name])
    if stored == "rank-first":
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    scale = normal(clients, seed=5).abs() + 0.5
    out = poisoned(1, clients, tokens)
    cuda.launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a, b, scale)], path=path)
    assert_close(out[0], client_scores_lowrank_reference(x, grad, a, b, scale))


def test_client_scores_lowrank_is_the_same_bits_whole_or_split_and_for_any_clients(cuda: ModuleType) -> None:
    from protoken.ops import LowRankBank

    x, grad = normal(5, 1100, seed=1), normal(5, 200, seed=2)
    a, b = normal(20, 8, 1100, seed=3), normal(20, 200, 8, seed=4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    outs = []
    for path, chosen in ((1, slice(None)), (2, slice(None)), (1, order), (2, slice(0, 3))):
        out = poisoned(1, a[chosen].shape[0], 5)
        cuda.launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a[chosen], b[chosen])], path=path)
        outs.append(out[0])
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0][order], outs[2])
    assert torch.equal(outs[0][:3], outs[3])


def test_client_scores_lowrank_of_mixed_ranks_and_layouts(cuda: ModuleType) -> None:
    from protoken.ops import LowRankBank, client_scores_lowrank_reference

    x, grad = normal(4, 56, seed=1), normal(4, 40, seed=2)
    ranks = [4, 1, 0, 17, 4, 64]
    a = [normal(rank, 56, seed=10 + k) for k, rank in enumerate(ranks)]
    b = [normal(40, rank, seed=20 + k) for k, rank in enumerate(ranks)]
    b[4] = b[4].T.contiguous().T
    out = poisoned(1, 6, 4)
    cuda.launch_client_scores_lowrank(out, [x], [grad], [LowRankBank.of(a, b)])
    assert_close(out[0], client_scores_lowrank_reference(x, grad, a, b))
    assert torch.equal(out[0, 2], torch.zeros(4))


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(("clients", "rows", "columns"), [(1, 1, 1), (70, 5, 7), (3, 70, 64), (2, 130, 352)])
def test_client_totals(cuda: ModuleType, name: str, clients: int, rows: int, columns: int) -> None:
    from protoken.ops import DenseBank, client_totals_reference

    bank, scale = bank_of(name, clients, rows, columns)
    ms = [normal(rows, columns, seed=1), normal(columns, rows, seed=2).T]
    turned = bank.transpose(1, 2).contiguous().transpose(1, 2)
    out = poisoned(2, clients)
    cuda.launch_client_totals(out, ms, [DenseBank.of(bank, scale), DenseBank.of(turned, scale)])
    for n in range(2):
        assert_close(out[n], client_totals_reference(ms[n], bank, scale=scale))


def test_calls_beyond_the_limits_of_a_launch_are_refused_before_anything_is_allocated(cuda: ModuleType) -> None:
    from protoken.errors import ArgumentError
    from protoken.ops import DenseBank

    bank = DenseBank.of(torch.ones(1, 1, 8))
    many = (1 << 20) + 1  # one tile of 16 tokens more than the grid's second dimension takes, at any stride
    xs, grads = [torch.ones(1, 8).expand(many, 8)], [torch.ones(1, 1).expand(many, 1)]
    odd = DenseBank.of(torch.ones(1, 1, 16)[:, :, ::2])
    with pytest.raises(ArgumentError, match="65535 tiles of 16 tokens"):
        cuda.launch_client_scores(torch.empty(1, 1, many), xs, grads, [odd])
    crowd = DenseBank.of(torch.ones(1, 1, 4).expand(65535 * 64 + 1, 1, 4))
    with pytest.raises(ArgumentError, match="4194240 clients"):
        cuda.launch_client_totals(torch.empty(1, crowd.clients), [torch.ones(1, 4)], [crowd])
    out = poisoned(1, 1, 2)
    cuda.launch_client_scores(out, [torch.ones(2, 8)], [torch.ones(2, 1)], [bank])
    assert torch.equal(out, torch.full((1, 1, 2), 8.0))
