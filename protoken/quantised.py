"""Weights that are not plain numbers: packed to 4 bits, scaled integers, or kept on another device between calls.

Relevance needs only activations and gradients, which such layers give like any other. What needs the weight itself
(forward mode, the published method) gets it dequantised.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from .layers import Layer


def at_hand(module: nn.Module) -> AbstractContextManager[Any]:
    """The module's weights in memory for the length of a `with`, also where accelerate keeps them elsewhere."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    aligned: AbstractContextManager[Any] = align_module_device(module)
    return aligned


def is_quantised(weight: Tensor) -> bool:
    """Packed or scaled weights: bitsandbytes' integers, torchao's tensor subclasses."""
    plain = type(weight) in (Tensor, nn.Parameter)
    return not weight.is_floating_point() or not plain or weight.element_size() < 2


def dense_weight(layer: Layer) -> Tensor:
    """A layer's own weight as plain numbers, [O, I] or [E, O, I], adapters left out; fp32 where it was quantised."""
    with at_hand(layer.owner):
        weight = layer.weight.detach()
        plain = dequantised(layer.owner, weight) if is_quantised(layer.weight) else weight
        # With offloaded weights the tensor must outlive the context.
        plain = plain.clone() if hasattr(layer.owner, "_hf_hook") else plain
    return plain.mT if layer.transposed else plain


def dequantised(module: nn.Module, weight: Tensor) -> Tensor:
    """The numbers that a quantised weight stands for, fp32."""
    plain: Tensor
    if not type(module).__module__.startswith("bitsandbytes"):
        plain = weight.dequantize().float()
        return plain
    from bitsandbytes import functional

    layer: Any = module
    packed = layer.weight
    state = getattr(packed, "quant_state", None)
    if state is not None:
        plain = functional.dequantize_4bit(packed.data, state).float()
    else:
        # int8 rows, each scaled to its largest element.
        scales = packed.SCB if packed.SCB is not None else layer.state.SCB
        plain = packed.data.float() * (scales.float() / 127)[:, None]
    return plain
