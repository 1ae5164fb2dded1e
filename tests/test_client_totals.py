"""client_totals against its fp64 reference on every CPU way, and what must hold bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import FORMATS, SHAPES, bank_of, cpu_ways, layouts_of, normal, tokens_of, use
from tolerances import close

from protoken.errors import DtypeError, ShapeError
from protoken.ops import client_scores, client_totals, client_totals_grouped, client_totals_reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "instruction_sets")


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("name", FORMATS)
def test_totals_equal_the_reference(way: str, name: str) -> None:
    backend = use(way)
    for clients, _, rows, columns in [*SHAPES, (2, 0, 3, 40000), (1, 0, 300, 131)]:
        m = normal(rows, columns, seed=8)
        bank, scale = bank_of(name, clients, rows, columns)
        expected = client_totals_reference(m, bank, scale=scale)
        # A sum of products of both signs: what counts is the error beside the size of its terms.
        size = client_totals_reference(m.abs(), bank.float().abs(), scale=scale)
        got = client_totals(m, bank, scale=scale, backend=backend)
        assert ((got.double() - expected).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("name", ["fp32", "fp8"])
def test_strides_do_not_matter(way: str, name: str) -> None:
    backend = use(way)
    m = normal(50, 45, seed=8)
    bank, scale = bank_of(name, 3, 50, 45)
    expected = client_totals_reference(m, bank, scale=scale)
    for view in layouts_of(bank).values():
        close(client_totals(m.T.contiguous().T, view, scale=scale, backend=backend), expected, torch.float32)
    close(client_totals(m, list(bank), scale=scale, backend=backend), expected, torch.float32)


@pytest.mark.parametrize("way", cpu_ways())
def test_totals_are_the_sum_of_scores_over_tokens(way: str) -> None:
    backend = use(way)
    x, grad = tokens_of(17, 60, 80)
    bank, _ = bank_of("fp32", 4, 60, 80)
    scores = client_scores(x, grad, bank, backend=backend)
    close(client_totals(grad.T @ x, bank, backend=backend), scores.double().sum(1), torch.float32, factor=3)


@pytest.mark.parametrize("way", cpu_ways()[1:])
def test_bits_do_not_depend_on_runs_order_company_or_threads(way: str) -> None:
    backend = use(way)
    m = normal(250, 333, seed=8)
    bank, _ = bank_of("bf16", 7, 250, 333)
    first = client_totals(m, bank, backend=backend)
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    assert torch.equal(client_totals(m, bank[order], backend=backend), first[order])
    assert torch.equal(client_totals(m, bank[2:3], backend=backend), first[2:3])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(34):
                assert torch.equal(client_totals(m, bank, backend=backend), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("way", cpu_ways())
def test_null_client_and_nan(way: str) -> None:
    backend = use(way)
    m = normal(30, 70, seed=8)
    bank, scale = bank_of("fp8", 3, 30, 70)
    bank[1], bank[2, 29, 69] = 0, math.nan
    got = client_totals(m, bank, scale=scale, backend=backend)
    assert got[1] == 0
    assert got[2].isnan()
    assert got[0].isfinite()


@pytest.mark.parametrize("way", cpu_ways())
def test_layers_in_one_call_equal_layers_one_by_one(way: str) -> None:
    backend = use(way)
    shapes = [(24, 40), (120, 16), (0, 4)]
    ms = [normal(rows, columns, seed=n) for n, (rows, columns) in enumerate(shapes)]
    banks = [normal(3, rows, columns, seed=30 + n) for n, (rows, columns) in enumerate(shapes)]
    together = client_totals_grouped(ms, banks, backend=backend)
    for n in range(3):
        assert torch.equal(together[n], client_totals(ms[n], banks[n], backend=backend))


def test_nothing_gives_zeros_or_an_empty_tensor() -> None:
    m = normal(5, 6, seed=8)
    bank, _ = bank_of("fp32", 3, 5, 6)
    assert client_totals(m, bank[:0]).shape == (0,)
    assert client_totals(m, []).shape == (0,)
    assert torch.equal(client_totals(m[:0], bank[:, :0]), torch.zeros(3))
    assert client_totals_grouped([], []).shape == (0, 0)


def test_bad_input_is_named() -> None:
    m = normal(5, 6, seed=8)
    bank, _ = bank_of("fp32", 3, 5, 6)
    with pytest.raises(ShapeError, match=r"m\[0\]: expected \[5, 6\] to match the bank, got \(6, 5\)"):
        client_totals(m.T, bank)
    with pytest.raises(DtypeError, match="m"):
        client_totals(m.int(), bank)
    with pytest.raises(ShapeError, match="banks"):
        client_totals_grouped([m, m], [bank])
    with pytest.raises(ShapeError, match=r"bank\[1\]: expected 3 clients as bank\[0\], got 2.*absent client"):
        client_totals_grouped([m, m], [bank, bank[:2]])
