"""The one tolerance table: relative RMS and maximum error, by the dtype the computation was done in.

rms = ||got - reference|| / ||reference||,   max = max|got - reference| / max|reference|, both against a reference in
higher precision. The bounds are what rounding of that dtype's inputs and fp32 accumulation allows, not what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    rms: float
    maximum: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-10, 1e-10),
    torch.float32: Tolerance(1e-5, 2e-5),
    torch.float16: Tolerance(2e-3, 5e-3),
    torch.bfloat16: Tolerance(1e-2, 2e-2),
}


# Kernels for GPUs multiply exactly and add in fp32, whatever the bank's format: relative RMS against fp64.
EMULATED_CUDA = 3e-6
TRITON = 1e-5


def close_in_rms(got: Tensor, reference: Tensor, rms: float) -> None:
    """Fail unless ||got - reference|| / ||reference|| is at most `rms`; NaN never passes."""
    assert got.shape == reference.shape, f"shape {tuple(got.shape)}, reference {tuple(reference.shape)}"
    error = float((got.double() - reference.double()).norm() / reference.double().norm())
    assert error <= rms, f"relative RMS error {error:.2e}, allowed {rms:.0e}"


def close(got: Tensor, reference: Tensor, dtype: torch.dtype, *, factor: float = 1.0) -> None:
    """Fail with the measured errors unless `got` equals `reference` within the table; NaN never passes.

    Args:
        got, reference: any dtype, equal shapes.
        dtype: which row of the table.
        factor: widens the row where a test compares differences of nearly equal numbers.
    """
    assert got.shape == reference.shape, f"shape {tuple(got.shape)}, reference {tuple(reference.shape)}"
    if not got.numel():
        return
    got, reference = got.detach().double().cpu(), reference.detach().double().cpu()
    error = got - reference
    rms = float(error.norm() / reference.norm().clamp(min=1e-300))
    maximum = float(error.abs().max() / reference.abs().max().clamp(min=1e-300))
    bound = TOLERANCES[dtype]
    allowed = f"allowed {factor * bound.rms:.1e} and {factor * bound.maximum:.1e}"
    assert rms <= factor * bound.rms and maximum <= factor * bound.maximum, (  # noqa: PT018
        f"relative RMS {rms:.3e}, maximum {maximum:.3e}; {allowed}"
    )
