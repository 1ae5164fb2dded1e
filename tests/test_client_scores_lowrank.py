"""client_scores_lowrank against its fp64 reference on every CPU way, and what must hold bit by bit."""

from __future__ import annotations

import pytest
import torch
from op_cases import FACTOR_FORMATS, FORMATS, INPUTS, SHAPES, cpu_ways, factors_of, layouts_of, normal, tokens_of, use
from tolerances import close
from torch import Tensor

from protoken.errors import ArgumentError, DtypeError, ShapeError
from protoken.ops import (
    LowRankBank,
    client_scores,
    client_scores_lowrank,
    client_scores_lowrank_grouped,
    client_scores_lowrank_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty", "instruction_sets")
RANKS = (1, 2, 3, 4, 8, 17, 64, 70)


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("name", FACTOR_FORMATS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_scores_equal_the_reference(way: str, name: str, inputs: str) -> None:
    backend = use(way)
    for clients, tokens, rows, columns in SHAPES[1:]:
        x, grad = tokens_of(tokens, rows, columns, INPUTS[inputs])
        for rank in RANKS:
            a, b, scale = factors_of(name, clients, rows, columns, rank)
            got = client_scores_lowrank(x, grad, a, b, scale, backend=backend)
            close(got, client_scores_lowrank_reference(x, grad, a, b, scale), torch.float32, factor=3)


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("inputs", INPUTS)
def test_strides_do_not_matter(way: str, tokens: int, inputs: str) -> None:
    backend = use(way)
    x, grad = tokens_of(tokens, 50, 45, INPUTS[inputs])
    a, b, scale = factors_of("bf16", 3, 50, 45, 5)
    expected = client_scores_lowrank_reference(x, grad, a, b, scale)
    for left, right in zip(layouts_of(a).values(), layouts_of(b).values(), strict=True):
        close(client_scores_lowrank(x, grad, left, right, scale, backend=backend), expected, torch.float32)


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("inputs", INPUTS)
def test_ranks_may_differ(way: str, tokens: int, inputs: str) -> None:
    backend = use(way)
    x, grad = tokens_of(tokens, 33, 47, INPUTS[inputs])
    ranks = [4, 0, 1, 64, 7, 65, 16]
    a = [normal(rank, 47, seed=rank) for rank in ranks]
    b = [normal(33, rank, seed=rank + 1) for rank in ranks]
    got = client_scores_lowrank(x, grad, a, b, backend=backend)
    close(got, client_scores_lowrank_reference(x, grad, a, b), torch.float32)
    assert torch.equal(got[1], torch.zeros(tokens))


@pytest.mark.parametrize("way", cpu_ways())
def test_the_product_is_scored_never_its_factors(way: str) -> None:
    backend = use(way)
    x, grad = tokens_of(11, 30, 40)
    a, b, scale = factors_of("fp32", 2, 30, 40, 4)
    expected = client_scores_lowrank(x, grad, a, b, scale, backend=backend)
    assert torch.equal(client_scores_lowrank(x, grad, 4 * a, b / 4, scale, backend=backend), expected)
    close(client_scores(x, grad, scale[:, None, None] * (b @ a)), expected, torch.float32)


@pytest.mark.parametrize("way", cpu_ways()[1:])
@pytest.mark.parametrize("tokens", [1, 12, 50])
@pytest.mark.parametrize("inputs", INPUTS)
def test_bits_do_not_depend_on_runs_order_company_or_threads(way: str, tokens: int, inputs: str) -> None:
    backend = use(way)
    x, grad = tokens_of(tokens, 130, 257, INPUTS[inputs])
    a, b, scale = factors_of("fp32", 40, 130, 257, 8)
    first = client_scores_lowrank(x, grad, a, b, scale, backend=backend)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    moved = client_scores_lowrank(x, grad, a[order], b[order], scale[order], backend=backend)
    assert torch.equal(moved, first[order])
    assert torch.equal(client_scores_lowrank(x, grad, a[7:8], b[7:8], scale[7:8], backend=backend), first[7:8])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(34):
                assert torch.equal(client_scores_lowrank(x, grad, a, b, scale, backend=backend), first)
    finally:
        torch.set_num_threads(threads)


def rows_of(memory: Tensor, starts: list[int], ranks: list[int], step: int = 47) -> list[Tensor]:
    """Matrices [rank, 47] that lie in one memory, their rows `step` elements apart."""
    return [memory.as_strided((rank, 47), (step, 1), start) for start, rank in zip(starts, ranks, strict=True)]


@pytest.mark.parametrize("way", cpu_ways()[1:])
@pytest.mark.parametrize("name", FACTOR_FORMATS)
@pytest.mark.parametrize("tokens", [1, 9, 50])
@pytest.mark.parametrize("inputs", INPUTS)
def test_neighbours_in_memory_change_no_bit(way: str, name: str, tokens: int, inputs: str) -> None:
    """Rows of several clients that follow one another may be read as one matrix, but only those."""
    backend = use(way)
    memory = normal(7000, seed=1, dtype=FORMATS[name])
    lying = {
        "one after the other": ([0, 47, 47 * 4, 47 * 9], [1, 3, 5, 60], 47),
        "a gap of a row": ([0, 47 * 4, 47 * 8], [3, 3, 3], 47),
        "rank 1, far apart evenly": ([0, 470, 940, 1410], [1, 1, 1, 1], 47),
        "rank 1, apart unevenly": ([0, 470, 941, 1411, 1412], [1, 1, 1, 1, 1], 47),
        "one memory for all": ([0, 0, 0], [1, 1, 1], 47),
        "backwards": ([47 * 6, 47 * 3, 0], [3, 3, 3], 47),
        "overlapping": ([0, 20, 40, 60, 107], [1, 2, 1, 2, 1], 47),
        "rank 1, then wider": ([0, 47, 47 + 94 * 2], [1, 2, 3], 94),
    }
    x, grad = tokens_of(tokens, 47, 47, INPUTS[inputs])
    for starts, ranks, step in lying.values():
        a = rows_of(memory, starts, ranks, step)
        b = [part.T for part in rows_of(memory.flip(0), starts, ranks, step)]
        got = client_scores_lowrank(x, grad, a, b, backend=backend)
        close(got, client_scores_lowrank_reference(x, grad, a, b), torch.float32)
        for n in range(len(a)):
            alone = client_scores_lowrank(x, grad, [a[n].clone()], [b[n].T.clone().T], backend=backend)
            assert torch.equal(alone[0], got[n])


@pytest.mark.parametrize("way", cpu_ways()[1:])
@pytest.mark.parametrize("name", FACTOR_FORMATS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_clients_of_few_ranks_and_their_neighbours(way: str, name: str, inputs: str) -> None:
    """With many tokens factors of few ranks share one tile of registers; nobody's bits depend on with whom."""
    backend = use(way)
    x, grad = tokens_of(140, 290, 519, INPUTS[inputs])
    ranks = [2, 3, 1, 0, 2, 8, 3, 3, 70, 1, 2]
    a = [normal(rank, 519, seed=rank + n, dtype=FORMATS[name]) for n, rank in enumerate(ranks)]
    b = [normal(290, rank, seed=rank - n, dtype=FORMATS[name]) for n, rank in enumerate(ranks)]
    expected = client_scores_lowrank_reference(x, grad, a, b)
    for left in ([part.T.contiguous().T for part in a], a):
        for right in ([part.T.contiguous().T for part in b], b):
            got = client_scores_lowrank(x, grad, left, right, backend=backend)
            close(got, expected, torch.float32, factor=3)
            for n in range(len(ranks)):
                alone = client_scores_lowrank(x, grad, left[n : n + 1], right[n : n + 1], backend=backend)
                assert torch.equal(alone[0], got[n])


@pytest.mark.parametrize("way", cpu_ways())
def test_layers_in_one_call_equal_layers_one_by_one(way: str) -> None:
    backend = use(way)
    shapes = [(24, 40, 3), (120, 16, 9)]
    xs = [normal(6, columns, seed=10 + n) for n, (_, columns, _) in enumerate(shapes)]
    grads = [normal(6, rows, seed=20 + n) for n, (rows, _, _) in enumerate(shapes)]
    banks = [factors_of("fp16", 3, rows, columns, rank) for rows, columns, rank in shapes]
    together = client_scores_lowrank_grouped(xs, grads, banks, backend=backend)
    for n in range(2):
        assert torch.equal(together[n], client_scores_lowrank(xs[n], grads[n], *banks[n], backend=backend))


def test_nothing_gives_zeros_or_an_empty_tensor() -> None:
    x, grad = tokens_of(4, 5, 6)
    a, b, scale = factors_of("fp32", 3, 5, 6, 2)
    assert client_scores_lowrank(x[:0], grad[:0], a, b, scale).shape == (3, 0)
    assert client_scores_lowrank(x, grad, a[:0], b[:0], scale[:0]).shape == (0, 4)
    assert client_scores_lowrank(x, grad, [], []).shape == (0, 4)
    assert torch.equal(client_scores_lowrank(x, grad, a[:, :0], b[:, :, :0]), torch.zeros(3, 4))
    assert client_scores_lowrank_grouped([], [], []).shape == (0, 0, 0)


def test_bad_input_is_named() -> None:
    x, grad = tokens_of(4, 5, 6)
    a, b, scale = factors_of("fp32", 3, 5, 6, 2)
    with pytest.raises(ShapeError, match=r"b: expected \[3, O, 2\]"):
        client_scores_lowrank(x, grad, a, b[:, :, :1], scale)
    with pytest.raises(DtypeError, match="b"):
        client_scores_lowrank(x, grad, a, b.half(), scale)
    with pytest.raises(DtypeError, match="a"):
        client_scores_lowrank(x, grad, a.to(torch.int8), b.to(torch.int8), scale)
    with pytest.raises(ShapeError, match="scale"):
        client_scores_lowrank(x, grad, a, b, scale[:2])
    with pytest.raises(ShapeError, match=r"b\[1\]"):
        client_scores_lowrank(x, grad, [a[0], a[1]], [b[0], b[1][:, :1]])
    with pytest.raises(ShapeError, match="x"):
        client_scores_lowrank(x[:, :5], grad, a, b, scale)
    with pytest.raises(ArgumentError, match="a and b"):
        client_scores_lowrank(x, grad, a)
    with pytest.raises(ArgumentError, match="LowRankBank"):
        client_scores_lowrank(x, grad, LowRankBank.of(a, b), b)
    with pytest.raises(ShapeError, match="grads: expected 2 entries, one per layer as in xs, got 1"):
        client_scores_lowrank_grouped([x, x], [grad], [(a, b, scale), (a, b, scale)])
    with pytest.raises(ShapeError, match=r"bank\[1\]: expected 3 clients as bank\[0\], got 2.*absent client"):
        client_scores_lowrank_grouped([x, x], [grad, grad], [(a, b, scale), (a[:2], b[:2], scale[:2])])
