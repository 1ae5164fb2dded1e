"""Tensors as bytes: names of dtypes, memory views, and the digest that names a parameter's value."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protoken.arguments import finite
from protoken.errors import ArgumentError, DtypeError, LedgerError, NonFiniteError, ShapeError

# The names of the safetensors format.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ITEM_SIZES = {name: torch.empty((), dtype=dtype).element_size() for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
LARGEST = float(torch.finfo(torch.float32).max)
# Far below LARGEST: sums of squares and scales up to this need no second look.
USUAL = 1e12


@dataclass(frozen=True)
class LowRank:
    """A matrix kept as two factors: scale * b @ a, with a [r, I] and b [O, r].

    LoRA as PEFT stores it: a = lora_A.weight, b = lora_B.weight, scale = alpha / r. Stands wherever the
    ledger takes a tensor: in an update (the client's delta), and in ``base`` and ``aggregate`` (the adapter's
    own value; the frozen weight below it cancels in every difference).
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, factor in (("a", self.a), ("b", self.b)):
            require_tensor(f"LowRank: {name}", factor)
        if type(self.scale) is not float:
            object.__setattr__(self, "scale", finite("LowRank: scale", self.scale))
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ShapeError(
                "LowRank",
                expected="a [r, I] and b [O, r]",
                got=f"{tuple(self.a.shape)} and {tuple(self.b.shape)}",
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def dense(self) -> Tensor:
        """scale * b @ a, fp32 [O, I]."""
        require_memory(self.shape)
        return (self.b.float() @ self.a.float()).mul_(self.scale)

    def minus(self, other: LowRank) -> LowRank:
        """The exact difference, of rank r + r': [s b, -s' b'] @ [a; a']."""
        return concatenate([(1.0, self), (-1.0, other)])

    def finite(self) -> bool:
        """Whether factors, scale and every element of the product are finite in fp32.

        The product is bounded by |(B A)_oi| <= ||b_o|| ||a_i|| (Cauchy-Schwarz), which its partial sums keep to as
        well: nothing is multiplied out.
        """
        if abs(self.scale) <= USUAL and _squares(self.a) * _squares(self.b) <= USUAL:
            return True
        if not (is_finite(self.a) and is_finite(self.b) and abs(self.scale) <= LARGEST):
            return False
        rows, columns = _largest_norm(self.b, 1), _largest_norm(self.a, 0)
        return rows * columns * max(1.0, abs(self.scale)) <= LARGEST


def require_tensor(argument: str, value: object) -> None:
    """ArgumentError for what is no tensor."""
    if not isinstance(value, Tensor):
        raise ArgumentError(argument, expected="a torch.Tensor", got=f"a {type(value).__name__}")


def require_memory(shape: tuple[int, ...], item: int = 4) -> None:
    """LedgerError when a tensor of this shape and bytes per item cannot fit: two thin factors may claim a huge matrix,
    and so may a file of zeros that takes no room on the disk.
    """
    need = item * math.prod(shape)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise LedgerError(
            "parameter",
            expected=f"a matrix that fits in {have} bytes of memory",
            got=f"{shape}, {need} bytes",
        )


def concatenate(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """sum_i w_i L_i as one LowRank whose rank is the sum of the ranks; exact, nothing is multiplied out."""
    a = torch.cat([term.a.float() for _, term in terms])
    b = torch.cat([term.b.float() * (weight * term.scale) for weight, term in terms], dim=1)
    return LowRank(a, b, 1.0)


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; fp8 and integers through their fp32 values."""
    if tensor.dtype == torch.int8:
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        tensor = tensor.to(torch.float32)
    return bool(torch.isfinite(tensor).all())


def _squares(tensor: Tensor) -> float:
    """Sum of squares in fp32: a quick look at usual factors. NaN for other dtypes; NaN or infinite where a number is.

    ||b|| ||a|| bounds every element of b @ a. Where squares vanish in fp32 a term is below 1e-3, and rounding is far
    below the distance between USUAL and the largest fp32 number.
    """
    if tensor.dtype != torch.float32:
        return math.nan
    flat = tensor.detach().reshape(-1)
    return float(torch.dot(flat, flat))


def _largest_norm(tensor: Tensor, dim: int) -> float:
    """The largest norm of a row (dim 1) or a column (dim 0), in fp64; 0 of nothing."""
    if not tensor.numel():
        return 0.0
    return float(torch.linalg.vector_norm(tensor.detach(), dim=dim, dtype=torch.float64).max())


def norm(tensor: Tensor) -> float:
    """Frobenius norm, accumulated in fp64."""
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


def dtype_name(tensor: Tensor, argument: str = "tensor") -> str:
    """The safetensors name of a tensor's dtype; DtypeError when the ledger does not keep it."""
    name = DTYPE_NAMES.get(tensor.dtype)
    if name is None:
        raise DtypeError(argument, expected=f"one of {', '.join(map(str, DTYPE_NAMES))}", got=tensor.dtype)
    return name


def byte_view(tensor: Tensor) -> memoryview:
    """The tensor's little-endian, row-major bytes, without a copy when it is already so on the CPU."""
    if sys.byteorder != "little":
        raise LedgerError("platform", expected="a little-endian machine", got=sys.byteorder)
    flat = tensor.detach().resolve_neg().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy().data)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and values: sha256("BF16 [4,3]\\n" + little-endian bytes), in hex.

    The dtype is the parameter's own, by its safetensors name. Equal tensors have equal digests on every
    machine. DtypeError for dtypes that the ledger does not keep.
    """
    require_tensor("tensor", tensor)
    head = f"{dtype_name(tensor)} [{','.join(map(str, tensor.shape))}]\n"
    state = hashlib.sha256(head.encode("ascii"))
    state.update(byte_view(tensor))
    return state.hexdigest()


def parameter_digest(value: Tensor | LowRank) -> str:
    """tensor_digest of a tensor; of a LowRank, sha256("lowrank <digest of a> <of b> <scale in hex>\\n")."""
    if not isinstance(value, LowRank):
        return tensor_digest(value)
    text = f"lowrank {tensor_digest(value.a)} {tensor_digest(value.b)} {float(value.scale).hex()}\n"
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def require_finite(argument: str, value: Tensor | LowRank, remedy: str | None = None) -> None:
    """NonFiniteError when the value holds NaN or infinity, or the product of factors does not fit fp32."""
    if isinstance(value, LowRank) and not value.finite():
        wanted = "finite factors whose product fits fp32"
        raise NonFiniteError(argument, expected=wanted, got="NaN, infinity or an overflow", remedy=remedy)
    if isinstance(value, Tensor) and not is_finite(value):
        raise NonFiniteError(argument, expected="finite numbers", got="NaN or infinity", remedy=remedy)
