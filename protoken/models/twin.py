"""A second tree of modules over the same parameters: what a model computes at other weights, or before it was compiled.

torch.func.functional_call puts its tensors into the modules for the length of the call. In a model that answers other
requests meanwhile those would be answered with them. A twin shares parameters, buffers and submodules' code with its
model, and nothing that a call writes to. A compiled model runs without looking at hooks that came later; its twin is
not compiled.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from torch import nn

from ..errors import ModelError
from .architectures import Architecture, architecture_of
from .patching import Substitute

M = TypeVar("M", bound=nn.Module)


def twin_of(model: M) -> M:
    """A structural copy of the model: own modules, the same parameters and buffers, the same hooks on them.

    Made in about a millisecond per hundred modules; nothing is copied on the device. A model with methods put onto its
    instances (accelerate's hooks, kernels) is bound to itself by them: it is returned as it is, and must not generate
    in another thread meanwhile.
    """
    if any(_has_own_forward(module) for module in model.modules()):
        return model
    known: dict[int, nn.Module] = {}
    copied: M = _copied(model, known)  # type: ignore[assignment]
    return copied


def is_compiled(model: nn.Module) -> bool:
    """Whether any of its modules was compiled in place, by `module.compile()` or as `module.forward`."""
    return any(module._compiled_call_impl is not None or _is_compiled_forward(module) for module in model.modules())


def uncompiled(model: M, architecture: Architecture) -> tuple[M, Architecture]:
    """The model, or its twin if it is compiled.

    Raises:
        ModelError: it is compiled, and has methods on its instances that bind it to itself.
    """
    if not is_compiled(model):
        return model, architecture
    twin = twin_of(model)
    if twin is model:
        raise ModelError(
            "model",
            expected="a compiled model whose modules keep the methods of their classes",
            got="one with other methods put onto its modules, as accelerate's hooks are",
            remedy="Trace it without compiling it, or compile it without the hooks",
        )
    return twin, architecture_of(twin)


def _has_own_forward(module: nn.Module) -> bool:
    found = module.__dict__.get("forward")
    own = found is not None and not _is_compiled_forward(module)
    return found.had_own if isinstance(found, Substitute) else own


def _is_compiled_forward(module: nn.Module) -> bool:
    """Whether its forward is its class's, compiled."""
    original = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
    return getattr(original, "__func__", None) is type(module).forward


def _copied(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = object.__new__(type(module))
    # Containers are what registering a parameter, a buffer, a hook or a child writes to.
    twin.__dict__.update(
        {k: v.copy() if isinstance(v, dict | OrderedDict | set) else v for k, v in vars(module).items()}
    )
    # Somebody else's replacement, for the time being; or compiled, and bound to the model itself.
    for name in [name for name, value in vars(module).items() if isinstance(value, Substitute)]:
        twin.__dict__.pop(name, None)
    twin.__dict__.pop("forward", None)
    twin.__dict__["_compiled_call_impl"] = None
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = _copied(child, known)
    return twin
