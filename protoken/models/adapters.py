"""Low-rank adapters: which parameters of a ledger act at a layer, and what an adapter adds to its weight.

A federation of adapters leaves one of two records, by the name of the parameter:

    <layer>.weight                          the adapter as one value s B A (`LowRank`), or a dense (merged) weight
    <layer>.lora_A[.<adapter>].weight       both factors as parameters of their own, averaged apart by the server
    <layer>.lora_B[.<adapter>].weight                                        (embeddings: lora_embedding_A, _B)

The average of products is not the product of averages. With averages A, B and dX_k = X_k - X_{r-1}, the split

    c_k = s [ dB_k (A_r + A_{r-1}) / 2  +  (B_r + B_{r-1}) / 2 dA_k ]

adds up to the change exactly, sum_k rho_k c_k = s (B_r A_r - B_{r-1} A_{r-1}), and has rank 2 r.
LoRA: arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from protoken.errors import LayerError, LedgerMismatchError, ModelError
from protoken.ledger import Ledger, LowRank, Round
from protoken.ledger.rules import factor_contribution
from protoken.models.layers import Layer, is_tied
from protoken.models.quantised import dense_weight

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Pair:
    """The ledger's names of one adapter's two factors."""

    a: str
    b: str
    adapter: str


@dataclass(frozen=True)
class Recorded:
    """The ledger's parameters that make up one layer's weight: its own, factors kept apart, or both."""

    direct: str | None
    pairs: tuple[Pair, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*([self.direct] if self.direct else []), *(n for pair in self.pairs for n in (pair.a, pair.b)))


def recorded_as(model: nn.Module, layer: Layer, known: Collection[str], place: str) -> Recorded:
    """Find a layer among the recorded parameters; names with and without PEFT's prefixes are the same layer.

    Args:
        known: the recorded names.
        place: what they are the names of, for the message.

    Raises:
        LayerError: none of them is a parameter of this layer.
        ModelError: an adapter acts here whose effect is no sum (`require_additive`).
        LedgerMismatchError: factors are recorded of adapters that do not act in the model.
    """
    require_additive(layer)
    bare = layer.name.removeprefix(PEFT_PREFIX)
    own = [name if layer.kind == "experts" else f"{name}.weight" for name in (layer.name, bare)]
    candidates = [layer.parameter, *own, f"{bare}.base_layer.weight", *_aliases(model, layer)]
    direct = next((name for name in candidates if name in known), None)
    pairs = tuple(_pairs(layer, (layer.name, bare), known))
    if direct is None and not pairs:
        raise LayerError(
            "layers",
            expected=f"layers whose updates {place} holds: {_some(known)}",
            got=layer.name,
            remedy="Trace one of those, or record this layer when committing rounds",
        )
    return Recorded(direct, pairs)


def is_lora(module: nn.Module) -> bool:
    """Whether it is a PEFT LoRA layer (looked at, not imported: PEFT is optional)."""
    return hasattr(module, "base_layer") and isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def active_adapters(module: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that act in a LoRA layer, merged ones included; none while adapters are disabled."""
    lora: Any = module
    if not is_lora(module):
        return ()
    if lora.disable_adapters:  # Also merged ones: the next forward pass takes them out again.
        return ()
    merged = tuple(lora.merged_adapters)
    if merged:
        return merged
    return tuple(name for name in lora.active_adapters if name in lora.lora_A or name in lora.lora_embedding_A)


def active_in(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that a model calls active, whatever acts at each layer; none for a model without any."""
    adapters: Any = getattr(model, "active_adapters", ())
    try:
        return tuple(adapters() if callable(adapters) else adapters)
    except (ImportError, ValueError):  # transformers' own method, without PEFT or before an adapter was loaded
        return ()


def acting(layer: Layer) -> tuple[Any, ...]:
    """Where a layer's weight is, and the adapters that act at it: (name, scale, merged) each.

    Adapters are switched, scaled, merged and disabled without a write to their factors.
    """
    lora: Any = layer.module
    adapters = ((n, float(lora.scaling[n]), n in lora.merged_adapters) for n in active_adapters(layer.module))
    return (layer.parameter, *adapters)


def require_acting(model: nn.Module, parameter: str) -> None:
    """Refuse a parameter of an adapter that a forward pass does not use: at any value the response is the same.

    Args:
        parameter: the model's own name of one, of an adapter or not.

    Raises:
        ModelError: its adapter is disabled, merged into the base weight, or not among the active ones.
    """
    wrapper, adapter = _wrapped_by(model, parameter)
    if wrapper is None:
        return
    if wrapper.disable_adapters:
        got, remedy = "one that is disabled", "Leave disable_adapter(), or call model.enable_adapters() first"
    elif getattr(wrapper, "merged_adapters", None):
        got, remedy = "one that is merged", "Call model.unmerge_adapter() first"
    elif adapter not in wrapper.active_adapters:
        got = f"{adapter!r}, while {', '.join(map(repr, wrapper.active_adapters)) or 'none'} is active"
        remedy = f"Call model.set_adapter({adapter!r}) first"
    else:
        return
    raise ModelError(
        "model",
        expected=f"an adapter that acts, to replay the response at other values of {parameter}",
        got=got,
        remedy=remedy,
    )


def _wrapped_by(model: nn.Module, parameter: str) -> tuple[Any, str]:
    """PEFT's wrapper that a parameter belongs to, and its adapter; (None, "") of one that is no adapter's.

    Every kind of wrapper keeps an adapter's own as <wrapper>.<one of adapter_layer_names>.<adapter>.
    """
    module: Any = model
    for kind, adapter in pairwise(parameter.split(".")):
        if kind in getattr(module, "adapter_layer_names", ()):
            return module, adapter
        module = getattr(module, kind)
    return None, ""


def require_additive(layer: Layer) -> None:
    """Refuse adapters whose effect is not W x + s B A x: below them an update of W is not what reaches the output.

    Raises:
        ModelError: another kind of adapter, or a variant of LoRA such as DoRA, acts at this layer.
    """
    for adapter in active_adapters(layer.module):
        factors_of(layer.module, adapter)
    if isinstance(getattr(layer.module, "base_layer", None), nn.Module) and not is_lora(layer.module):
        raise ModelError(
            "layers",
            expected="layers with plain LoRA or rsLoRA, or without an adapter",
            got=f"{layer.name}, a {type(layer.module).__module__}.{type(layer.module).__name__}",
            remedy="Trace layers that this adapter leaves alone, or merge it and record the merged weights",
        )


def factors_of(module: nn.Module, adapter: str) -> LowRank:
    """What an adapter adds to its layer, [O, I], as factors.

    Raises:
        ModelError: the adapter's effect is no fixed s B A (DoRA and other variants).
    """
    lora: Any = module
    variant = lora.lora_variant.get(adapter) if hasattr(lora, "lora_variant") else None
    if variant is not None or getattr(lora, "use_dora", {}).get(adapter):
        kind = "DoRA" if getattr(lora, "use_dora", {}).get(adapter) else type(variant).__name__
        raise ModelError(
            f"adapter {adapter}",
            expected="plain LoRA or rsLoRA, which add s B A to the weight",
            got=f"{kind}, whose effect is no sum of updates",
            remedy="Merge the adapter, and record the merged weights in the ledger",
        )
    if adapter in lora.lora_embedding_A:
        a, b = lora.lora_embedding_A[adapter].detach(), lora.lora_embedding_B[adapter].detach()
    else:
        a, b = lora.lora_A[adapter].weight.detach(), lora.lora_B[adapter].weight.detach()
    return LowRank(a, b, float(lora.scaling[adapter]))


def effective_weight(layer: Layer) -> Tensor:
    """What a layer multiplies by, [O, I] in fp32 or fp64: its weight, dequantised, and its active adapters."""
    weight = dense_weight(layer)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    merged = getattr(layer.module, "merged_adapters", [])
    for adapter in active_adapters(layer.module):
        if adapter not in merged:
            weight = weight + factors_of(layer.module, adapter).dense().to(weight)
    return weight


@dataclass(frozen=True)
class Split:
    """One round of factors that were averaged apart: their means over the round, the scale, and what the server did."""

    mean_a: Tensor
    mean_b: Tensor
    scale: float
    change_a: Tensor
    change_b: Tensor

    def contribution(self, da: Tensor, db: Tensor) -> LowRank:
        """c_k of a client, of rank 2 r."""
        return factor_contribution(self.mean_a, self.mean_b, da, db, self.scale)

    @property
    def change(self) -> LowRank:
        """What the round added to the layer's weight."""
        return self.contribution(self.change_a, self.change_b)


class AveragedApart:
    """Splits of factors that were averaged apart, for rounds asked for from the last to the first.

    Args:
        at_round: the round whose aggregate the model holds; the factors of earlier ones are found backwards from it.
    """

    def __init__(self, ledger: Ledger, layer: Layer, pair: Pair, at_round: int) -> None:
        self._ledger, self._pair, self._next = ledger, pair, at_round
        current = factors_of(layer.module, pair.adapter)
        self._a, self._b, self._scale = current.a.float().cpu(), current.b.float().cpu(), current.scale

    def at(self, record: Round) -> Split:
        """The split of one round; LedgerFormatError and others of reading it. ``record`` is no later than the last."""
        while self._next > record.number:
            self._before(self._ledger.round(self._next))
        change_a, change_b = record.change(self._pair.a), record.change(self._pair.b)
        # (X_r + X_{r-1}) / 2
        return Split(self._a - change_a / 2, self._b - change_b / 2, self._scale, change_a, change_b)

    def _before(self, record: Round) -> None:
        """From the factors after a round to those before it."""
        self._a = self._a - record.change(self._pair.a)
        self._b = self._b - record.change(self._pair.b)
        self._next = record.number - 1


def _pairs(layer: Layer, names: tuple[str, ...], known: Collection[str]) -> Iterator[Pair]:
    active = active_adapters(layer.module)
    found: set[str] = set()
    for name in dict.fromkeys(names):
        for adapter in active:
            for infix in (f".{adapter}", ""):
                a, b = (_factor_name(layer, name, factor, infix) for factor in "AB")
                if a in known and b in known and adapter not in found:
                    if not infix and len(active) > 1:
                        raise LedgerMismatchError(
                            "ledger",
                            expected=f"factors named after one of the active adapters {active}",
                            got=a,
                            remedy="Activate the federation's adapter alone: model.set_adapter(...)",
                        )
                    found.add(adapter)
                    yield Pair(a, b, adapter)
    start = tuple(f"{name}.lora_{kind}" for name in names for kind in ("A.", "embedding_A"))
    recorded = [n for n in known if n.startswith(start)]
    if recorded and not found:
        raise LedgerMismatchError(
            "ledger",
            expected=f"factors of an adapter that acts at {layer.name}: {', '.join(active) or 'none does'}",
            got=f"{recorded[0]}",
            remedy="Load the federation's adapter and activate it (set_adapter, enable_adapters)",
        )


def _factor_name(layer: Layer, name: str, factor: str, infix: str) -> str:
    """Embedding tables keep their factors as parameters, other layers in modules."""
    if layer.kind == "embedding":
        return f"{name}.lora_embedding_{factor}{infix}"
    return f"{name}.lora_{factor}{infix}.weight"


def _aliases(model: nn.Module, layer: Layer) -> list[str]:
    """Other names of the same tensor: a tied head's weight is recorded as the embeddings'."""
    ends: Any = model
    pair = (
        [ends.get_input_embeddings(), ends.get_output_embeddings()] if hasattr(model, "get_output_embeddings") else []
    )
    if layer.module in pair and is_tied(model):
        return [f"{n}.weight" for n, module in model.named_modules() if module in pair]
    if layer.kind == "experts" or layer.weight.is_meta:
        return []
    return [n for n, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]


def _some(known: Collection[str]) -> str:
    names = sorted(name.removesuffix(".weight") for name in known)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
