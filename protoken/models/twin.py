"""A second tree of modules over the same parameters: what a model computes at other weights, or before it was compiled.

torch.func.functional_call puts its tensors into the modules for the length of the call. In a model that answers other
requests meanwhile those would be answered with them. A twin shares parameters, buffers and submodules' code with its
model, and nothing that a call writes to. A compiled model runs without looking at hooks that came later; its twin is
not compiled.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from protoken.errors import ModelError
from protoken.models.architectures import Architecture, architecture_of
from protoken.models.patching import Substitute

M = TypeVar("M", bound=nn.Module)


def twin_of(model: M) -> M:
    """A structural copy of the model: own modules, the same parameters and buffers, the same hooks on them.

    Made in about a millisecond per hundred modules; nothing is copied on the device. Methods that were put onto modules
    and are bound to them (accelerate's hooks, kernels) are bound to the twin's. Of a model with others (closures, hooks
    that move parameters themselves) there is none: it is returned as it is, and must not generate in another thread
    meanwhile.
    """
    if bound_otherwise(model) is not None:
        return model
    copied: M = _Copies().of(model)  # type: ignore[assignment]
    return copied


def bound_otherwise(model: nn.Module) -> str | None:
    """The first module whose forward is bound to it in a way that no twin can have, or None."""
    return next((name or "the model" for name, module in model.named_modules() if not _can_be_bound(module)), None)


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
            expected="a compiled model whose modules keep the methods of their classes, or have accelerate's hooks",
            got=f"one where {bound_otherwise(model)} has a forward of its own",
            remedy="Trace it without compiling it, or compile it without that",
        )
    return twin, architecture_of(twin)


def _own_forward(module: nn.Module) -> Any:
    """What was put in the place of the class's forward, or None; compiled, it is the class's."""
    found = _put_there(module, "forward")
    return None if found is None or _is_compiled_forward(module) else found


def _put_there(module: nn.Module, name: str) -> Any:
    """An attribute of the instance itself, as it is without our replacement for the time being."""
    found = module.__dict__.get(name)
    if isinstance(found, Substitute):
        return found.own if found.had_own else None
    return found


def _is_compiled_forward(module: nn.Module) -> bool:
    """Whether its forward is its class's, compiled."""
    original = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
    return getattr(original, "__func__", None) is type(module).forward


def _can_be_bound(module: nn.Module) -> bool:
    forward = _own_forward(module)
    return forward is None or _is_method_of(forward, module) or _is_hooked(module, forward)


def _is_method_of(forward: object, module: nn.Module) -> bool:
    return isinstance(forward, MethodType) and forward.__self__ is module


def _is_hooked(module: nn.Module, forward: object) -> bool:
    """Whether accelerate has put it there: a function of the module, around the module's method, with hooks known."""
    around = isinstance(forward, functools.partial) and forward.args == (module,) and not forward.keywords
    inner = _is_method_of(_put_there(module, "_old_forward"), module)
    known = all(type(hook).__name__ in _HOOKS for hook in _hooks_of(module.__dict__.get("_hf_hook")))
    return around and inner and known


# Hooks of accelerate's that write to nothing but the module they are called with.
_HOOKS = ("ModelHook", "AlignDevicesHook")


def _hooks_of(hook: Any) -> tuple[Any, ...]:
    return tuple(one for inner in hook.hooks for one in _hooks_of(inner)) if hasattr(hook, "hooks") else (hook,)


@dataclass
class _Copies:
    """One tree of modules; each of the model's own, and each table of its hooks, is copied once."""

    modules: dict[int, nn.Module] = field(default_factory=dict)
    tables: dict[int, dict[Any, Any]] = field(default_factory=dict)

    def of(self, module: nn.Module) -> nn.Module:
        if id(module) in self.modules:
            return self.modules[id(module)]
        twin = self.modules[id(module)] = object.__new__(type(module))
        # Containers are what registering a parameter, a buffer, a hook or a child writes to.
        twin.__dict__.update(
            {k: v.copy() if isinstance(v, dict | OrderedDict | set) else v for k, v in vars(module).items()}
        )
        # Methods on the instance: somebody else's replacement for the time being, accelerate's warnings, compiled ones.
        for name in [name for name, value in vars(module).items() if _shadows(name, value)]:
            twin.__dict__.pop(name)
        twin.__dict__["_compiled_call_impl"] = None
        self._bind(twin, module, _own_forward(module))
        for name, child in module._modules.items():
            if child is not None:
                twin._modules[name] = self.of(child)
        return twin

    def _bind(self, twin: nn.Module, module: nn.Module, forward: Any) -> None:
        if isinstance(forward, MethodType):
            twin.__dict__["forward"] = MethodType(forward.__func__, twin)
        elif forward is not None:
            inner = MethodType(_put_there(module, "_old_forward").__func__, twin)
            own = {"_old_forward": inner, "_hf_hook": self._hook(module.__dict__["_hf_hook"])}
            twin.__dict__.update(own, forward=functools.update_wrapper(functools.partial(forward.func, twin), inner))

    def _hook(self, hook: Any) -> Any:
        """A hook notes what it has to put back after a pass; tied weights that are loaded stand in a common table."""
        own = copy.copy(hook)
        if hasattr(hook, "hooks"):
            own.hooks = tuple(map(self._hook, hook.hooks))
        table = getattr(hook, "tied_params_map", None)
        if table is not None:
            copied = {pointer: dict(loaded) for pointer, loaded in table.items()}
            own.tied_params_map = self.tables.setdefault(id(table), copied)
        return own


def _shadows(name: str, value: object) -> bool:
    """Whether an instance's attribute stands in the place of a method, which is bound to that instance."""
    method: Callable[..., Any] | None = getattr(nn.Module, name, None)
    return isinstance(value, Substitute) or (callable(value) and callable(method))
