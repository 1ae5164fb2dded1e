"""What a caller hands in: a client's update, checked against the model that the client was sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protoken.arguments import is_whole
from protoken.errors import ArgumentError, DtypeError, LayerError, NonFiniteError, ShapeError
from protoken.ledger import names
from protoken.ledger.manifest import MAX_PARAMETERS
from protoken.ledger.tensors import DTYPES, FLOATS, LowRank, dtype_name, require_finite

Value = Tensor | LowRank


@dataclass(frozen=True)
class ClientUpdate:
    """One client's part in a round.

    ``weight`` is rho_k as the server applied it. Exactly one of ``delta`` (client minus base) and ``state``
    (the client's parameters, from which the base is subtracted in fp32) is given, by parameter name. A matrix
    may come as LowRank. A ``state`` may hold more parameters than are recorded, a ``delta`` may not. ``key``
    and ``signature`` are the client's Ed25519 public key (32 bytes) and signature (64 bytes), see
    protoken.ledger.signatures.

    Raises:
        ArgumentError: a client id that the format does not allow, both or none of delta and state, a weight that is
            negative or not finite, or examples that are no count.
    """

    client: str
    weight: float
    delta: Mapping[str, Value] | None = None
    state: Mapping[str, Value] | None = None
    examples: int | None = None
    key: bytes | None = None
    signature: bytes | None = None

    def __post_init__(self) -> None:
        names.check_client(self.client)
        if (self.delta is None) == (self.state is None):
            raise ArgumentError(
                f"update of {self.client}", expected="exactly one of delta and state", got="both or none"
            )
        if not isinstance(self.delta if self.state is None else self.state, Mapping):
            raise ArgumentError(f"update of {self.client}", expected="tensors by parameter name", got="no mapping")
        number = isinstance(self.weight, float | int | np.number) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight < float("inf"):
            raise ArgumentError(f"weight of {self.client}", expected="a finite number >= 0", got=self.weight)
        if self.examples is not None:
            if not is_whole(self.examples) or not 0 <= self.examples < 1 << 53:
                raise ArgumentError(f"examples of {self.client}", expected="a whole number >= 0", got=self.examples)
            object.__setattr__(self, "examples", int(self.examples))


def check_update(argument: str, update: object) -> None:
    """ArgumentError for what is no ClientUpdate."""
    if not isinstance(update, ClientUpdate):
        raise ArgumentError(argument, expected="a protoken.ClientUpdate", got=f"a {type(update).__name__}")


def check_base(base: Mapping[str, Value]) -> dict[str, Value]:
    """The chosen parameters, sorted by name: named, floating, finite."""
    if not isinstance(base, Mapping):
        raise ArgumentError("base", expected="tensors by parameter name", got=f"a {type(base).__name__}")
    if not 1 <= len(base) <= MAX_PARAMETERS:
        raise ArgumentError("base", expected=f"1 to {MAX_PARAMETERS} parameters", got=len(base))
    for name, value in base.items():
        names.check_parameter(name)
        check_dtype(f"base[{name!r}]", value)
        require_finite(f"base[{name!r}]", value)
    return {name: base[name] for name in sorted(base)}


def check_aggregate(base: Mapping[str, Value], aggregate: Mapping[str, Value]) -> dict[str, Value]:
    """The same parameters after the round: same shape, dtype and form. LayerError, ShapeError, DtypeError,
    NonFiniteError.
    """
    if not isinstance(aggregate, Mapping):
        raise ArgumentError("aggregate", expected="tensors by parameter name", got=f"a {type(aggregate).__name__}")
    result: dict[str, Value] = {}
    for name, before in base.items():
        if name not in aggregate:
            raise LayerError(f"aggregate[{name!r}]", expected="every parameter of base", got="none of this name")
        after, argument = aggregate[name], f"aggregate[{name!r}]"
        check_dtype(argument, after)
        if tuple(after.shape) != tuple(before.shape):
            raise ShapeError(argument, expected=f"{tuple(before.shape)} as in base", got=tuple(after.shape))
        if isinstance(after, LowRank) != isinstance(before, LowRank) or form_dtype(after) != form_dtype(before):
            raise DtypeError(argument, expected=f"{form_dtype(before)} as in base", got=form_dtype(after))
        require_finite(argument, after)
        result[name] = after
    return result


def deltas_of(update: ClientUpdate, base: Mapping[str, Value]) -> dict[str, Value]:
    """The update's delta for every parameter of base. LayerError, ShapeError, DtypeError, NonFiniteError."""
    given = update.delta if update.delta is not None else update.state
    assert given is not None
    kind = "delta" if update.delta is not None else "state"
    missing = [name for name in base if name not in given]
    unknown = [name for name in given if name not in base] if kind == "delta" else []
    if missing or unknown:
        raise LayerError(
            f"{kind} of {update.client}",
            expected=f"the {len(base)} parameters of base",
            got=f"{len(missing)} missing, {len(unknown)} unknown, e.g. {ascii((missing + unknown)[0])[:100]}",
        )
    return {
        name: delta_of(f"{kind} of {update.client}: {name}", given[name], before, kind == "state")
        for name, before in base.items()
    }


def delta_of(argument: str, value: Value, before: Value, is_state: bool) -> Value:
    """One parameter's delta: as given, or state - base. Subtracted in fp32 (fp64 for fp64 models), LowRank exactly."""
    check_dtype(argument, value)
    if tuple(value.shape) != tuple(before.shape):
        raise ShapeError(argument, expected=f"{tuple(before.shape)} as in base", got=tuple(value.shape))
    require_finite(
        argument,
        value,
        "Leave the client out, or add it with on_bad='quarantine' if the server aggregated it.",
    )
    if not is_state:
        return value
    if isinstance(value, LowRank) and isinstance(before, LowRank):
        apart = value.minus(before)
        require_finite(argument, apart)
        return apart
    if isinstance(value, LowRank) or isinstance(before, LowRank):
        raise DtypeError(argument, expected="factors in state and base, or in neither", got="a mix")
    if value.dtype != before.dtype:
        raise DtypeError(
            argument,
            expected=f"{before.dtype} as in base",
            got=value.dtype,
            remedy="Convert, or give the delta itself.",
        )
    delta = subtract(value, before)
    if not bool(torch.isfinite(delta).all()):
        raise NonFiniteError(argument, expected="a difference that fits fp32", got="an overflow")
    return delta


def subtract(after: Tensor, before: Tensor) -> Tensor:
    """after - before on the CPU: in fp32, or in fp64 rounded once to fp32 when the model is fp64."""
    wide = torch.float64 if after.dtype == torch.float64 else torch.float32
    return (after.detach().cpu().to(wide) - before.detach().cpu().to(wide)).float()


def check_dtype(argument: str, value: Value) -> None:
    """Floating dtypes that the ledger keeps: fp64, fp32, fp16, bf16."""
    for tensor in (value.a, value.b) if isinstance(value, LowRank) else (value,):
        if not isinstance(tensor, Tensor):
            raise DtypeError(argument, expected="a torch.Tensor or LowRank", got=type(tensor).__name__)
        if tensor.dtype not in [DTYPES[name] for name in FLOATS]:
            raise DtypeError(argument, expected="fp64, fp32, fp16 or bf16", got=tensor.dtype)
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise DtypeError(
                argument,
                expected="a dense tensor that is in memory",
                got="one without data" if tensor.is_meta else tensor.layout,
                remedy="Load what was offloaded, and call to_dense() on what is sparse.",
            )


def form_dtype(value: Value) -> str:
    """Name of the dtype; of LowRank, that of a."""
    return dtype_name(value.a if isinstance(value, LowRank) else value)
