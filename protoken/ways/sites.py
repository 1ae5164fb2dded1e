"""Stand at a layer while the model runs: see x and y, and say which y the model goes on with.

Linear layers and embeddings have modules of their own, a hook will do. A router applies its matrix inside its forward:
there the one call of `linear` with its weight is intercepted. Experts are computed here, by the formula that
transformers' own implementations share, with one row per (token, slot) in the order of the tokens: so a row's x and y
can be told, and reverse and forward mode go through it.

    slot (t, j):   y = W_down[e] act(W_gate_up[e] h_t),   e = top_k_index[t, j]        out_t = sum_j w_tj y_tj
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from protoken.errors import GenerationError
from protoken.models.layers import Layer, is_experts
from protoken.models.patching import after, current_method, hooks, replaced_method

# visit(layer, x, y, route) -> y; route is the expert of every slot [rows, n], or None.
Visit = Callable[[Layer, Tensor, Tensor, Tensor | None], Tensor]

# A gate in half precision is widened before it is applied; even a conversion to the dtype it has may be another tensor.
_CONVERSIONS = frozenset((Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double))


@contextmanager
def visited(layers: Sequence[Layer], visit: Visit, blocks: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Call `visit` at each layer whenever it runs in this thread.

    All experts of `blocks` compute by our formula there, visited or not.
    """
    experts = {id(m): m for block in blocks for m in block.modules() if is_experts(m)}
    experts |= {id(layer.module): layer.module for layer in layers if layer.kind == "experts"}
    with ExitStack() as stack:
        for module in experts.values():
            own = {layer.attribute: layer for layer in layers if layer.module is module}
            forward = partial(experts_forward, module, own, visit)
            stack.enter_context(replaced_method(module, forward_name(module), forward))
        for layer in layers:
            if layer.kind == "router":
                stack.enter_context(_router_visited(layer, visit))
            elif layer.kind != "experts":
                stack.enter_context(hooks(after(layer.module, _hook(layer, visit))))
        yield


def check_visited(wanted: Iterable[str], seen: Container[str]) -> None:
    """What did not run was not scored: an error, and never a zero.

    Raises:
        GenerationError: a traced layer was not visited.
    """
    missing = [name for name in wanted if name not in seen]
    if missing:
        raise GenerationError(
            "layers",
            expected="layers that run in the model's forward pass",
            got=f"{missing}, which did not",
            remedy="Trace other layers",
        )


def check_first_visit(name: str, seen: Container[str]) -> None:
    """One x and one y stand for a layer: of one that runs again in the same pass the first would be lost.

    Raises:
        GenerationError: the layer was visited before.
    """
    if name in seen:
        raise GenerationError(
            "layers",
            expected="layers that run once in a forward pass",
            got=f"{name}, which runs several times",
            remedy="Leave it out: its weight is shared between places",
        )


def experts_forward(
    module: Any,
    layers: dict[str, Layer],
    visit: Visit,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The experts' output [n, d] for hidden states [n, d], routed to top_k_index [n, slots] with weights [n, slots].

    Raises:
        GenerationError: the experts are spread over processes.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise GenerationError(
            "model", expected="experts within one process", got="expert parallelism", remedy="Load without ep_plan"
        )
    rows, slots = top_k_index.shape
    route = top_k_index.reshape(-1)
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"

    def apply(name: str, x: Tensor) -> Tensor:
        bias = getattr(module, f"{name}_bias", None) if module.has_bias else None
        y = _by_expert(x, getattr(module, name), bias, route, transposed=module.is_transposed)
        return visit(layers[name], x, y, top_k_index) if name in layers else y

    x = hidden_states[:, None].expand(-1, slots, -1).reshape(rows * slots, -1)
    inner = apply(up, x)
    inner = module._apply_gate(inner) if up == "gate_up_proj" else module.act_fn(inner)
    y = apply("down_proj", inner)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    weighted = (y * top_k_weights.reshape(-1, 1)).reshape(rows, slots, -1)
    return weighted.sum(1).to(hidden_states.dtype)


def forward_name(module: nn.Module) -> str:
    """Which attribute to replace: accelerate keeps the real forward aside and brings the weights before calling it."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def _by_expert(x: Tensor, weight: Tensor, bias: Tensor | None, route: Tensor, *, transposed: bool) -> Tensor:
    """y[r] = W[route[r]] x[r] + b[route[r]]: one matmul per expert that was hit, nothing written in place."""
    order = route.argsort(stable=True)
    parts, start = [], 0
    # int() of each, not tolist(): torch 2.6 makes no list of a tensor under functorch's transforms.
    for expert, count in enumerate(map(int, torch.bincount(route, minlength=weight.shape[0]).cpu())):
        if count:
            matrix = weight[expert].T if transposed else weight[expert]
            own = None if bias is None else bias[expert]
            parts.append(functional.linear(x[order[start : start + count]], matrix, own))
            start += count
    return torch.cat(parts)[order.argsort()]


def _hook(layer: Layer, visit: Visit) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    # Gemma multiplies the row it looked up: the table's own output is before that.
    scale = getattr(layer.owner, "embed_scale", None) if layer.kind == "embedding" else None

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if scale is None:
            return visit(layer, args[0], output, None)
        factor = torch.as_tensor(scale).to(output)
        return visit(layer, args[0], output / factor, None) * factor

    return hook


@contextmanager
def _router_visited(layer: Layer, visit: Visit) -> Iterator[None]:
    name = forward_name(layer.module)
    own = current_method(layer.module, name)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _LinearOf(layer, visit):
            return own(*args, **kwargs)

    with replaced_method(layer.module, name, forward):
        yield


class _LinearOf(TorchFunctionMode):
    """Intercepts `linear(x, weight)` with one layer's weight, or with what it was converted to for the call."""

    def __init__(self, layer: Layer, visit: Visit) -> None:
        super().__init__()
        self.layer, self.visit = layer, visit
        self.forms = [layer.weight]

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CONVERSIONS and any(args[0] is form for form in self.forms):
            self.forms.append(result)
        if func is functional.linear and len(args) > 1 and any(args[1] is form for form in self.forms):
            return self.visit(self.layer, args[0], result, None)
        return result
