"""What a round consists of, before it is written: shards out of updates, the residual out of what was stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from protoken.errors import LedgerMismatchError
from protoken.ledger import codecs, names
from protoken.ledger import manifest as m
from protoken.ledger.tensors import LowRank, norm
from protoken.ledger.updates import ClientUpdate, Value, subtract


def difference(after: Value, before: Value) -> Value:
    """G_r - G_{r-1}: dense fp32, or the exact low-rank difference of two LowRank values."""
    if isinstance(after, LowRank) and isinstance(before, LowRank):
        return after.minus(before)
    assert isinstance(after, Tensor)
    assert isinstance(before, Tensor)
    return subtract(after, before)


def shard_content(
    stored: Mapping[str, codecs.Encoded], binding: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and header of a shard: parts by "parameter::suffix", layouts, stated errors, binding."""
    tensors = {name + suffix: part for name, item in stored.items() for suffix, part in item.parts.items()}
    info: dict[str, object] = {
        "layout": {name: item.layout for name, item in stored.items()},
        "bound": {name: item.bound for name, item in stored.items() if item.bound},
        **binding,
    }
    return tensors, info


def stored_norm(item: codecs.Encoded) -> float:
    """Frobenius norm of one stored parameter; of factors sqrt(tr(B^T B A A^T)) * scale, never multiplied out."""
    if item.layout in ("lora", "lowrank"):
        found = codecs.factors(item.parts)
        a, b = found.a.double(), found.b.double()
        return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt()) * abs(found.scale)
    return norm(codecs.decode(item.layout, item.parts))


def check_continuity(base_digest: Mapping[str, str], last: m.Manifest | None) -> None:
    """LedgerMismatchError when the base is not what the last round ended with."""
    for name, digest in base_digest.items():
        spec = last.parameters.get(name) if last is not None else None
        if last is not None and spec is not None and digest != spec.aggregate:
            raise LedgerMismatchError(
                f"base[{name!r}]",
                expected=f"the aggregate of round {last.round} (digest {spec.aggregate[:16]}...)",
                got=f"digest {digest[:16]}...",
                remedy="Pass what the clients were sent; allow_gap=True records a change in between.",
            )


def raw(update: ClientUpdate) -> dict[str, codecs.Encoded]:
    """A bad update as it came, in fp32; factors apart. Names that cannot stand in a shard are left out."""
    given = update.delta if update.delta is not None else update.state
    assert given is not None
    parts: dict[str, Tensor] = {}
    for name, value in given.items():
        if isinstance(name, str) and names.PARAMETER_PATTERN.fullmatch(name):
            if isinstance(value, LowRank):
                parts |= {f"{name}.lora_A": value.a, f"{name}.lora_B": value.b}
            elif isinstance(value, Tensor) and value.ndim <= 8 and not value.is_complex():
                parts[name] = value
    parts = {name: part for name, part in parts.items() if not part.is_meta and part.layout is torch.strided}
    return {
        name: codecs.Encoded("raw", {"": part.detach().float()}, 0.0)
        for name, part in parts.items()
        if names.PARAMETER_PATTERN.fullmatch(name)
    }
