"""Weights that are not plain numbers: packed to 4 bits, scaled integers, or kept on another device between calls.

Relevance needs activations and gradients. Where a quantised layer gives no gradient, because it rounds its input to
integers or because its kernel has no derivative, it is that of its dequantised weight W (straight through):

    backward    y(x) + W (x - stop(x))                      forward    y(x0) + W (x - x0),   x0 and y(x0) recorded

so values are always the layer's own. Forward mode takes the second form everywhere: kernels that lack a tangent drop it
without a word.

bitsandbytes' 4-bit layers lay their weight out anew at their first call without gradients, where the processor has
AVX512-BF16: rows interleaved, scales in bf16 (`_interleaved`). From then on they have neither a derivative nor, through
`functional.dequantize_4bit`, the right numbers; with a bias they fail where an input asks for a gradient. Here they
are called with inputs that do not ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from protoken.models.layers import Layer
from protoken.models.patching import after, current_method, hooks, replaced_method


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
    if getattr(state, "packing_format_for_cpu", False):
        plain = _interleaved(packed.data, state)
    elif state is not None:
        plain = functional.dequantize_4bit(packed.data, state).float()
    else:
        # int8 rows, each scaled to its largest element.
        scales = packed.SCB if packed.SCB is not None else layer.state.SCB
        plain = packed.data.float() * (scales.float() / 127)[:, None]
    return plain


def _interleaved(packed: Tensor, state: Any) -> Tensor:
    """bitsandbytes' layout for AVX512-BF16, [O, I] in fp32.

    32 rows lie side by side, two columns of each in turn: of the 64 codes of every 32 bytes the first half are the low
    nibbles. `absmax` is [I / blocksize, O].
    """
    outputs, inputs = state.shape
    pieces = packed.reshape(-1, 32)
    codes = torch.cat([pieces & 15, pieces >> 4], 1).reshape(outputs // 32, inputs // 2, 32, 2)
    codes = codes.transpose(1, 2).reshape(outputs, inputs)
    plain: Tensor = state.code.float()[codes.long()] * state.absmax.float().T.repeat_interleave(state.blocksize, 1)
    return plain


def _only_infers(module: nn.Module) -> bool:
    """Whether the module lays its weight out anew for inference (see above)."""
    on_cpu = getattr(module, "weight", torch.empty(0)).device.type == "cpu"
    return on_cpu and not module.training and bool(getattr(module, "support_avx512bf16_for_cpu", False))


def quantised_linears(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """All linear layers below these modules whose weight is no plain matrix."""
    found = {id(m): m for top in modules for m in top.modules() if isinstance(m, nn.Linear)}
    return [module for module in found.values() if not module.weight.is_meta and is_quantised(module.weight)]


@contextmanager
def straight_through(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give quantised layers a gradient where they would give none; their values stay their own."""

    def hook(module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x = args[0]
        if output.requires_grad or not x.requires_grad:
            return None
        weight = dequantised(module, module.weight.detach())
        return output + functional.linear(x - x.detach(), weight.to(x)).to(output.dtype)

    found = quantised_linears(modules)
    with ExitStack() as stack:
        for module in filter(_only_infers, found):
            stack.enter_context(replaced_method(module, "forward", _without_gradient(module)))
        stack.enter_context(hooks(*(after(module, hook) for module in found)))
        yield


def _without_gradient(module: nn.Module) -> Callable[[Tensor], Tensor]:
    own = current_method(module, "forward")

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = own(x.detach())
        return y

    return forward


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Linear, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of the quantised layers that run inside the `with`."""
    kept: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def hook(module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        kept[module] = (args[0].detach(), output.detach())

    with hooks(*(after(module, hook) for module in quantised_linears(modules))):
        yield kept


@contextmanager
def linearised(records: dict[nn.Linear, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let recorded layers compute y0 + W (x - x0), which forward mode can go through; their W are held meanwhile."""
    with ExitStack() as stack:
        for module, (x0, y0) in records.items():
            stack.enter_context(replaced_method(module, "forward", _around(module, x0, y0)))
        yield


def _around(module: nn.Linear, x0: Tensor, y0: Tensor) -> Callable[[Tensor], Tensor]:
    weight = dequantised(module, module.weight.detach()).to(x0)

    def forward(x: Tensor) -> Tensor:
        return y0 + functional.linear(x - x0, weight).to(y0.dtype)

    return forward
