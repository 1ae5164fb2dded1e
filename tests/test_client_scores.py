"""client_scores against its fp64 reference on every CPU way, and what must hold bit by bit."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import FORMATS, INPUTS, SHAPES, bank_of, cpu_ways, layouts_of, normal, tokens_of, use
from tolerances import close

from protoken import _C
from protoken.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from protoken.ops import DenseBank, client_scores, client_scores_grouped, client_scores_reference

pytestmark = pytest.mark.usefixtures("poisoned_empty", "instruction_sets")


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_scores_equal_the_reference(way: str, name: str, inputs: str) -> None:
    backend = use(way)
    for clients, tokens, rows, columns in SHAPES:
        x, grad = tokens_of(tokens, rows, columns, INPUTS[inputs])
        bank, scale = bank_of(name, clients, rows, columns)
        got = client_scores(x, grad, bank, scale=scale, backend=backend)
        assert got.dtype == torch.float32
        close(got, client_scores_reference(x, grad, bank, scale=scale), torch.float32)


@pytest.mark.parametrize("way", [way for way in cpu_ways() if way != "torch"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_few_tokens_are_split_evenly_and_none_is_lost(way: str, name: str, inputs: str) -> None:
    """Up to 16 tokens (in pairs: 32) pass in even parts, beyond them in panels: every number around these borders."""
    backend = use(way)
    bank, scale = bank_of(name, 2, 101, 530)
    for tokens in [*range(1, 19), 23, 25, 31, 32, 33]:
        x, grad = tokens_of(tokens, 101, 530, INPUTS[inputs])
        got = client_scores(x, grad, bank, scale=scale, backend=backend)
        close(got, client_scores_reference(x, grad, bank, scale=scale), torch.float32)


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 7, 20, 40])
@pytest.mark.parametrize("inputs", INPUTS)
def test_strides_do_not_matter(way: str, name: str, tokens: int, inputs: str) -> None:
    backend = use(way)
    x, grad = tokens_of(tokens, 50, 45, INPUTS[inputs])
    bank, scale = bank_of(name, 3, 50, 45)
    expected = client_scores_reference(x, grad, bank, scale=scale)
    for layout, view in layouts_of(bank).items():
        got = client_scores(x.T.contiguous().T, grad[:, :], view, scale=scale, backend=backend)
        assert layout
        close(got, expected, torch.float32)
    apart = client_scores(x, grad, [part.clone() for part in bank], scale=scale, backend=backend)
    close(apart, expected, torch.float32)


@pytest.mark.parametrize("way", [way for way in cpu_ways() if way != "torch"])
@pytest.mark.parametrize("tokens", [1, 10, 11, 16, 17, 24, 33, 60])
def test_rows_whole_pages_apart(way: str, tokens: int) -> None:
    """One token reads such rows as fewer streams; many tokens may want a copy of them, which changes no bit."""
    backend = use(way)
    x, grad = tokens_of(tokens, 101, 530)
    bank, _ = bank_of("fp32", 2, 101, 530)
    memory = torch.full((2, 101, 1024), float("nan"))
    memory[..., :530] = bank
    together = client_scores(x, grad, bank, backend=backend)
    apart = client_scores(x, grad, memory[..., :530], backend=backend)
    close(apart, client_scores_reference(x, grad, bank), torch.float32)
    assert tokens == 1 or torch.equal(apart, together)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_dtypes(dtype: torch.dtype) -> None:
    x, grad = tokens_of(9, 30, 40, dtype)
    bank, _ = bank_of("fp32", 2, 30, 40)
    close(client_scores(x, grad, bank), client_scores_reference(x, grad, bank), torch.float32)


@pytest.mark.parametrize("way", cpu_ways()[1:])
@pytest.mark.parametrize("tokens", [8, 20, 50])
@pytest.mark.parametrize("name", ["bf16", "int8", "fp8"])
def test_a_vector_that_is_not_bf16_is_not_rounded(way: str, name: str, tokens: int) -> None:
    """One number of one token is enough; infinity and NaN are bf16, and reach their token alone."""
    backend = use(way)
    x, grad = (part.float() for part in tokens_of(tokens, 100, 71, torch.bfloat16))
    bank, scale = bank_of(name, 2, 100, 71)
    bank[:, :, 70] = 1
    x[tokens - 1, 70] = 1 + 2**-9
    x[tokens - 1, :70] = 0
    got = client_scores(x, grad, bank, scale=scale, backend=backend)
    close(got, client_scores_reference(x, grad, bank, scale=scale), torch.float32)
    for special in (math.inf, math.nan):
        x[tokens - 1, 70] = special
        found = client_scores(x, grad, bank, scale=scale, backend=backend)
        assert not found[:, -1].isfinite().any()
        close(found[:, :-1], client_scores_reference(x, grad, bank, scale=scale)[:, :-1], torch.float32)


@pytest.mark.parametrize("way", cpu_ways())
def test_layers_in_one_call_equal_layers_one_by_one(way: str) -> None:
    backend = use(way)
    shapes = [(24, 40), (120, 16), (24, 40)]
    xs = [normal(6, columns, seed=10 + n) for n, (_, columns) in enumerate(shapes)]
    grads = [normal(6, rows, seed=20 + n) for n, (rows, _) in enumerate(shapes)]
    banks = [normal(3, rows, columns, seed=30 + n) for n, (rows, columns) in enumerate(shapes)]
    together = client_scores_grouped(xs, grads, banks, backend=backend)
    for n in range(3):
        assert torch.equal(together[n], client_scores(xs[n], grads[n], banks[n], backend=backend))


@pytest.mark.parametrize("way", cpu_ways()[1:])
@pytest.mark.parametrize("tokens", [1, 12, 50])
@pytest.mark.parametrize("inputs", INPUTS)
def test_bits_do_not_depend_on_runs_order_company_or_threads(way: str, tokens: int, inputs: str) -> None:
    backend = use(way)
    x, grad = tokens_of(tokens, 250, 333, INPUTS[inputs])
    bank, _ = bank_of("bf16", 7, 250, 333)
    first = client_scores(x, grad, bank, backend=backend)
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    assert torch.equal(client_scores(x, grad, bank[order], backend=backend), first[order])
    assert torch.equal(client_scores(x, grad, bank[2:3], backend=backend), first[2:3])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(34):
                assert torch.equal(client_scores(x, grad, bank, backend=backend), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("tokens", [1, 20])
def test_null_client_scores_exactly_zero(way: str, tokens: int) -> None:
    x, grad = tokens_of(tokens, 100, 64)
    bank, _ = bank_of("fp32", 3, 100, 64)
    bank[1] = 0
    assert torch.equal(client_scores(x, grad, bank, backend=use(way))[1], torch.zeros(tokens))


@pytest.mark.parametrize("way", cpu_ways())
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("tokens", [1, 7, 20, 40])
@pytest.mark.parametrize("inputs", INPUTS)
def test_nan_of_one_client_stays_with_that_client(way: str, name: str, tokens: int, inputs: str) -> None:
    x, grad = tokens_of(tokens, 100, 70, INPUTS[inputs])
    bank, scale = bank_of(name, 3, 100, 70)
    bank[1, 97, 69] = math.nan
    got = client_scores(x, grad, bank, scale=scale, backend=use(way))
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("way", cpu_ways()[1:])
def test_every_float8_and_every_half_is_decoded(way: str) -> None:
    backend = use(way)
    for dtype, count, bits in ((torch.float8_e4m3fn, 256, torch.uint8), (torch.float16, 1 << 16, torch.int16)):
        values = torch.arange(count, dtype=torch.int32).to(bits).view(dtype)
        values = torch.where(values.float().isfinite(), values.float(), 0.0).to(dtype)
        scale = torch.ones(count, 1) if dtype == torch.float8_e4m3fn else None
        for tokens in (1, 7, 20, 40):
            x = torch.ones(tokens, 1)
            got = client_scores(x, x, values[:, None, None], scale=scale, backend=backend)
            assert torch.equal(got, values.float()[:, None].expand(-1, tokens))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_nothing_gives_zeros_or_an_empty_tensor(backend: str) -> None:
    x, grad = tokens_of(4, 5, 6)
    bank, _ = bank_of("fp32", 3, 5, 6)
    assert client_scores(x[:0], grad[:0], bank, backend=backend).shape == (3, 0)
    assert client_scores(x, grad, bank[:0], backend=backend).shape == (0, 4)
    assert client_scores(x, grad, [], backend=backend).shape == (0, 4)
    assert torch.equal(client_scores(x[:, :0], grad, bank[:, :, :0], backend=backend), torch.zeros(3, 4))
    assert torch.equal(client_scores(x, grad[:, :0], bank[:, :0], backend=backend), torch.zeros(3, 4))
    assert client_scores_grouped([], [], [], backend=backend).shape == (0, 0, 0)


def test_thousands_of_clients_lying_apart() -> None:
    x, grad = tokens_of(3, 4, 5)
    bank, _ = bank_of("fp32", 5000, 4, 5)
    wrapped = DenseBank.of(list(bank))
    close(client_scores(x, grad, wrapped), client_scores_reference(x, grad, bank), torch.float32)


def test_bad_input_is_named() -> None:
    x, grad = tokens_of(4, 5, 6)
    bank, _ = bank_of("fp32", 3, 5, 6)
    with pytest.raises(ShapeError, match=r"x: expected \[T, 6\] to match the bank, got \(4, 5\)"):
        client_scores(grad, grad, bank)
    with pytest.raises(ShapeError, match="grad"):
        client_scores(x, grad[:3], bank)
    with pytest.raises(ShapeError, match=r"bank: expected \[K, O, I\]"):
        client_scores(x, grad, bank[0])
    with pytest.raises(DtypeError, match="bank"):
        client_scores(x, grad, bank.double())
    with pytest.raises(DtypeError, match="x"):
        client_scores(x.long(), grad, bank)
    with pytest.raises(ArgumentError, match="scale"):
        client_scores(x, grad, bank.to(torch.int8))
    with pytest.raises(ArgumentError, match="scale"):
        client_scores(x, grad, bank, scale=torch.ones(3, 5))
    with pytest.raises(ShapeError, match="scale"):
        client_scores(x, grad, bank.to(torch.int8), scale=torch.ones(3, 4))
    with pytest.raises(DeviceError, match="meta"):
        client_scores(x, grad, bank.to("meta"))
    with pytest.raises(ArgumentError, match="strided"):
        client_scores(x.to_sparse(), grad, bank)
    with pytest.raises(ShapeError, match=r"bank\[1\]"):
        client_scores(x, grad, [bank[0], bank[1, :4]])
    with pytest.raises(ArgumentError, match="str"):
        client_scores(x, grad, "bank")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"bank\[1\]: expected 2 clients as bank\[0\], got 3.*absent client"):
        client_scores_grouped([x, x], [grad, grad], [bank[:2], bank])


def test_bad_input_is_named_beside_a_bank_that_was_checked_before() -> None:
    x, grad = tokens_of(4, 5, 6)
    bank = DenseBank.of(bank_of("fp32", 3, 5, 6)[0])
    with pytest.raises(ShapeError, match=r"x: expected \[T, 6\] to match the bank, got \(\)"):
        client_scores(x[0, 0], grad, bank)
    with pytest.raises(ShapeError, match=r"grad: expected \[4, 5\] to match x and the bank, got \(3, 5\)"):
        client_scores(x, grad[:3], bank)
    with pytest.raises(ArgumentError, match=r"x: expected a torch\.Tensor, got list"):
        client_scores([[1.0]], grad, bank)  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match=r"grad.*meta"):
        client_scores(x, grad.to("meta"), bank)
    with pytest.raises(ArgumentError, match="strided"):
        client_scores(x, grad.to_sparse(), bank)
    with pytest.raises(ArgumentError, match="holds its own"):
        client_scores(x, grad, bank, scale=torch.ones(3, 5))
    with pytest.raises(DtypeError, match="x"):
        client_scores(x.long(), grad, bank)


def test_misaligned_data_is_refused() -> None:
    x, grad = tokens_of(2, 3, 4)
    raw = bytearray(4 * 12 + 1)
    bank = torch.frombuffer(memoryview(raw)[1:], dtype=torch.float32).view(1, 3, 4)
    with pytest.raises(ArgumentError, match="aligned"):
        client_scores(x, grad, bank)


def test_the_native_module_checks_what_it_is_given() -> None:
    row = torch.zeros(9, dtype=torch.int64)
    row[2], row[3], row[4] = 3, 4, 9
    with pytest.raises(ValueError, match="dtype code"):
        _C.client_scores(row.data_ptr(), 1, 1, 1, row.data_ptr(), 1)
    row[4], pointers = 0, torch.tensor([2], dtype=torch.int64)
    row[5] = pointers.data_ptr()
    with pytest.raises(ValueError, match="misaligned"):
        _C.client_scores(row.data_ptr(), 1, 1, 1, row.data_ptr(), 1)
    pointers[0], row[6], row[7] = row.data_ptr(), 2**62, 1
    with pytest.raises(ValueError, match="overflow"):
        _C.client_scores(row.data_ptr(), 1, 1, 1, row.data_ptr(), 1)
