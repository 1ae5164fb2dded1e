"""One traced layer: y = W x at some place of a model, whatever form the weight has.

linear      nn.Linear and its (quantised) subclasses, GPT-2's Conv1D, a LoRA layer over one of them
router      a module that keeps a matrix and applies it inside its own forward (a mixture's gate)
experts     one 3-D parameter of E matrices; a row of x meets the one its token was routed to
embedding   a table; x is a token id
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from protoken.errors import LayerError

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

Kind = Literal["linear", "router", "experts", "embedding"]
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Layer:
    """Where a layer is and how its weight lies.

    Attributes:
        name: its module's name in memory; for experts the name of the parameter.
        module: the module to watch; for experts the one that owns the parameter.
        owner: the module whose `weight` (or `attribute`) it is: below a LoRA layer the base layer.
        parameter: name in memory of its weight.
        rows, columns: O and I.
        transposed: the weight lies as (in, out).
        experts: E, or None.
    """

    name: str
    kind: Kind
    module: nn.Module
    owner: nn.Module
    attribute: str
    parameter: str
    rows: int
    columns: int
    transposed: bool = False
    experts: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as a federation would record it: that of the plain, unquantised parameter."""
        matrix = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def weight(self) -> Tensor:
        """The parameter; on the meta device between calls where weights are offloaded."""
        weight: Tensor = getattr(self.owner, self.attribute)
        return weight


def layer_of(model: nn.Module, name: str) -> Layer:
    """What lies under that name.

    Raises:
        LayerError: nothing, or nothing linear.
    """
    path, _, last = name.rpartition(".")
    parent = _submodule(model, path)
    if is_experts(parent) and last in EXPERT_PARAMETERS:
        return _experts(parent, name, last)
    module = _submodule(model, name)
    if module is None:
        raise LayerError("layers", expected="layers of the model", got=name, remedy="See model.named_modules()")
    owner = base_of(module)
    inside = next(path for path, below in module.named_modules() if below is owner)
    where = f"{name}.{inside}.weight" if inside else f"{name}.weight"
    if isinstance(owner, nn.Embedding):
        return Layer(name, "embedding", module, owner, "weight", where, owner.embedding_dim, owner.num_embeddings, True)
    if is_conv1d(owner):
        return Layer(name, "linear", module, owner, "weight", where, int(owner.nf), int(owner.nx), True)
    if is_router(owner):
        weight: Any = owner.weight
        rows, columns = map(int, weight.shape)
        return Layer(name, "router", module, owner, "weight", where, rows, columns)
    if isinstance(owner, nn.Linear):
        # Packed weights (4 bits) have shapes of their own: the features are the truth.
        return Layer(name, "linear", module, owner, "weight", where, owner.out_features, owner.in_features)
    raise LayerError("layers", expected="a linear layer", got=f"{name}, a {type(owner).__name__}")


def linear_names(block: nn.Module) -> list[str]:
    """Names of all linear layers below a module, in its own order; what makes up a LoRA layer is not listed apart."""
    names: list[str] = []
    inside: list[str] = []
    for name, module in block.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if is_experts(module):
            names += [f"{name}.{p}" for p in EXPERT_PARAMETERS if getattr(module, p, None) is not None]
            inside.append(f"{name}.")
        elif is_linear(module) or is_router(module):
            names.append(name)
            inside.append(f"{name}.")
    return names


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x W^T (+ b): nn.Linear and its subclasses, GPT-2's Conv1D, a LoRA layer on one."""
    owner = base_of(module)
    return isinstance(owner, nn.Linear) or is_conv1d(owner)


def is_conv1d(module: object) -> TypeGuard[Conv1D]:
    """Whether it is GPT-2's linear layer, which keeps its weight as (in, out)."""
    # Not at the top: whoever has such a layer has loaded transformers, and all others need not wait for it.
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_experts(module: nn.Module | None) -> bool:
    """Experts in one parameter each, under the contract of transformers' `use_experts_implementation`."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, Tensor) and down.dim() == 3 and hasattr(module, "is_transposed")


def is_router(module: nn.Module) -> bool:
    """A gate in front of experts: a matrix [E, d] that the module applies itself, on its way to more than a product."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and "Router" in type(module).__name__


def base_of(module: nn.Module) -> nn.Module:
    """The layer below an adapter, or PEFT's trained copy of a whole layer; the module itself if there is neither."""
    while True:
        wrapper: Any = module
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            active = [name for name in wrapper.active_adapters if name in copies]
            module = copies[active[0]] if active and not wrapper.disable_adapters else wrapper.original_module
        elif isinstance(getattr(module, "base_layer", None), nn.Module):
            module = wrapper.base_layer
        else:
            return module


def device_of(layer: Layer) -> torch.device:
    """Where the layer computes: with offloaded weights the hook knows, otherwise its weight stands there."""
    hook: Any = getattr(layer.owner, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return layer.weight.device if place is None else torch.device(place)


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the embeddings'; of offloaded weights only the configuration tells."""
    ends: Any = model
    head = getattr(base_of(ends.get_output_embeddings()), "weight", None)
    table = getattr(base_of(ends.get_input_embeddings()), "weight", None)
    if isinstance(head, Tensor) and head.is_meta:
        return bool(getattr(ends.config.get_text_config(), "tie_word_embeddings", False))
    return head is not None and head is table


def input_device(model: nn.Module) -> torch.device:
    """Where token ids belong: with the embeddings, or where they are brought for each call."""
    embeddings: Any = base_of(model.get_input_embeddings())  # type: ignore[operator]
    place = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if place is None else torch.device(place)


def _experts(module: nn.Module | None, name: str, attribute: str) -> Layer:
    assert module is not None
    weight: Tensor = getattr(module, attribute)
    experts, first, second = map(int, weight.shape)
    transposed = bool(module.is_transposed)
    rows, columns = (second, first) if transposed else (first, second)
    return Layer(name, "experts", module, module, attribute, name, rows, columns, transposed, experts)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
