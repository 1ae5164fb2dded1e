"""capture_append against its row-by-row reference."""

from __future__ import annotations

import pytest
import torch
from op_cases import normal

from protoken.dispatch import backends_for
from protoken.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from protoken.ops import capture_append, capture_append_reference


def skip_cut_off_bits(backend: str, of: torch.dtype, to: torch.dtype) -> None:
    """Triton's interpreter cuts bits off where the hardware rounds: narrowing to bf16 is checked on a GPU only."""
    if backend == "triton" and to == torch.bfloat16 and of != torch.bfloat16:
        pytest.skip("the interpreter does not round to bf16")


BACKENDS = [backend.name for backend in backends_for("capture_append", "cpu") if backend.available]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_steps_land_where_the_reference_puts_them(
    backend: str, to: torch.dtype, of: torch.dtype, capacity: int
) -> None:
    skip_cut_off_bits(backend, of, to)
    got = [torch.zeros(capacity, 5, dtype=to), torch.zeros(capacity, 33, dtype=torch.float32)]
    expected = [buffer.clone() for buffer in got]
    cursor, place = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for seed, tokens in enumerate((1, 3, 1, 0, 20, 5, 1)):
        steps = [normal(tokens, 5, seed=seed, dtype=of), normal(33, tokens, seed=seed + 50).T]
        capture_append(got, steps, cursor, backend=backend)
        capture_append_reference(expected, steps, place)
        assert torch.equal(cursor, place)
        for left, right in zip(got, expected, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_and_special_values(backend: str, dtype: torch.dtype) -> None:
    skip_cut_off_bits(backend, torch.float32, dtype)
    step = torch.tensor([[1.00390625, 1.01171875, float("nan"), float("inf"), -0.0, 3.4e38, 65520.0, 6e-8]])
    buffer = torch.zeros(2, 8, dtype=dtype)
    capture_append([buffer], [step], torch.zeros(1, dtype=torch.int64), backend=backend)
    assert torch.equal(buffer[0].isnan(), step[0].to(dtype).isnan())
    assert torch.equal(buffer[0].nan_to_num(7.0), step[0].to(dtype).nan_to_num(7.0))


def test_bad_input_is_named() -> None:
    buffer, step, cursor = torch.zeros(4, 5), torch.zeros(2, 5), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ShapeError, match="cursor"):
        capture_append([buffer], [step], torch.zeros((), dtype=torch.int64))
    with pytest.raises(DtypeError, match="cursor"):
        capture_append([buffer], [step], torch.zeros(1))
    with pytest.raises(ShapeError, match=r"steps\[0\]"):
        capture_append([buffer], [step[:, :4]], cursor)
    with pytest.raises(ShapeError, match="steps"):
        capture_append([buffer], [], cursor)
    with pytest.raises(ArgumentError, match="stride 1"):
        capture_append([torch.zeros(5, 4).T], [step], cursor)
    with pytest.raises(ShapeError, match="capacity"):
        capture_append([buffer[:0]], [step], cursor)
    with pytest.raises(DeviceError):
        capture_append([buffer.to("meta")], [step], cursor)
    assert cursor == 0
