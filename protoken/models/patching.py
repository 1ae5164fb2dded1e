"""Reversible changes to somebody else's model: every one undone in `finally`, none leaving an attribute behind.

Other threads may be using the model meanwhile. Hooks and methods put in place here act in the thread that put them
there, so that nobody else's generation is recorded, cut short or computed another way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from protoken.errors import ModelError


@dataclass(frozen=True, eq=False)
class _Replacement:
    method: Callable[..., Any]
    meant: Callable[[], bool]
    shared: bool


class Substitute:
    """Stands in `module.__dict__` for a method while anybody has another one in its place.

    Each caller gets the newest replacement that is meant for it, everybody else the method that was there: a model
    that serves other threads goes on computing for them as it did.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.had_own, self.own = name in module.__dict__, getattr(module, name)
        self.replacements: tuple[_Replacement, ...] = ()
        update_wrapper(self, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.replacements
        method = found[0].method if len(found) == 1 and found[0].shared else self.meant()
        return method(*args, **kwargs)

    def meant(self) -> Callable[..., Any]:
        """The newest replacement that is meant for the caller, or what was there."""
        return next((one.method for one in reversed(self.replacements) if one.meant()), self.own)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        """A copy of the model, or one written to a file, gets the method that was there, as its own."""
        return _itself, (self.own,)


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


_substitutes_lock = threading.Lock()


def current_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """The method as this caller has it, or as it was: what a replacement that wraps it has to call."""
    found = getattr(module, name)
    current: Callable[..., Any] = found.meant() if isinstance(found, Substitute) else found
    return current


@contextmanager
def replaced_method(
    module: nn.Module,
    name: str,
    method: Callable[..., Any],
    *,
    meant: Callable[[], bool] | None = None,
    shared: bool = False,
) -> Iterator[None]:
    """Give one module instance another method; hooks on it still run. Restores what was there.

    Args:
        meant: asked at each call whether the caller gets this method; None: callers in this thread do.
        shared: everybody gets it while it is the only replacement.
    """
    entry = _Replacement(method, meant or this_thread(), shared)
    with _substitutes_lock:
        found = module.__dict__.get(name)
        substitute = found if isinstance(found, Substitute) else Substitute(module, name)
        module.__dict__[name] = substitute
        substitute.replacements += (entry,)
    try:
        yield
    finally:
        with _substitutes_lock:
            substitute.replacements = tuple(other for other in substitute.replacements if other is not entry)
            # Whoever has put something else there meanwhile will put back what he found: it hands on to the method.
            if not substitute.replacements and module.__dict__.get(name) is substitute:
                if substitute.had_own:
                    module.__dict__[name] = substitute.own
                else:
                    del module.__dict__[name]


@contextmanager
def replaced_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give one module instance another value of a plain attribute, for every thread; one user at a time."""
    own = module.__dict__[name]
    module.__dict__[name] = value
    try:
        yield
    finally:
        module.__dict__[name] = own


def this_thread() -> Callable[[], bool]:
    """Whether a call comes from the thread that is running now."""
    own = threading.get_ident()
    return lambda: threading.get_ident() == own


def before(module: nn.Module, hook: Callable[..., Any]) -> torch.utils.hooks.RemovableHandle:
    """Call `hook(module, args, kwargs)` before the module runs in this thread; passes of other threads go by unseen."""
    own = this_thread()
    return module.register_forward_pre_hook(lambda *call: hook(*call) if own() else None, with_kwargs=True)


def after(module: nn.Module, hook: Callable[..., Any]) -> torch.utils.hooks.RemovableHandle:
    """Call `hook(module, args, output)` after the module has run in this thread.

    Those put on here run in their order and before everybody else's: a user's hook may make something else of the
    output, and what is to be seen is what the module itself computed from its weight.
    """
    handle = module.register_forward_hook(_After(hook, this_thread()))
    found: Any = module._forward_hooks
    for key in [key for key, one in reversed(found.items()) if isinstance(one, _After)]:
        found.move_to_end(key, last=False)
    return handle


@dataclass(frozen=True, eq=False)
class _After:
    hook: Callable[..., Any]
    meant: Callable[[], bool]

    def __call__(self, *call: Any) -> Any:
        return self.hook(*call) if self.meant() else None


@dataclass
class _Evaluation:
    """Who evaluates one model at the moment, and the modules that were training before the first of them."""

    users: int = 0
    training: list[nn.Module] = field(default_factory=list)


_evaluations: WeakKeyDictionary[nn.Module, _Evaluation] = WeakKeyDictionary()
_evaluations_lock = threading.Lock()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off for the duration; each module's own training flag is put back, also where they were mixed.

    Of several at once (streams that overlap) the last one to leave puts the flags back.
    """
    with _evaluations_lock:
        state = _evaluations.setdefault(model, _Evaluation())
        state.users += 1
        if state.users == 1:
            state.training = [module for module in model.modules() if module.training]
            for module in state.training:
                module.training = False
    try:
        yield
    finally:
        with _evaluations_lock:
            state.users -= 1
            if not state.users:
                for module in state.training:
                    module.training = True
                del _evaluations[model]


class Stopped(Exception):
    """Raised in a hook to leave a model's forward once it has computed all it is for: ``with suppress(Stopped)``."""


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states that a block is called with."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


@contextmanager
def hooks(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove the handles whatever happens."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def refuse_no_model(model: object) -> None:
    """ModelError for what is no module at all."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            "model",
            expected="a transformers causal language model",
            got=f"a {type(model).__name__}",
            remedy="Load it with AutoModelForCausalLM.from_pretrained",
        )


def refuse_parallel(model: nn.Module) -> None:
    """Refuse what splits a batch over devices and has no `generate` of its own.

    Raises:
        ModelError: it is such a wrapper.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ModelError(
            "model",
            expected="a transformers causal language model",
            got=f"torch's {type(model).__name__} around one",
            remedy="Give what it wraps: model.module",
        )


def refuse_inference_mode(model: nn.Module) -> None:
    """Relevance is a gradient: inference mode, parameters created in it, and mere shapes cannot take part in one.

    Raises:
        ModelError: inference mode is on, a parameter was created in it or has no numbers, or this is no model at all.
    """
    refuse_no_model(model)
    refuse_parallel(model)
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "model",
            expected="a call outside torch.inference_mode()",
            got="inference mode, which forbids gradients",
            remedy="Use torch.no_grad() around your own code; gradients are turned on only where they are needed",
        )
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not offloaded:
            raise ModelError(
                "model",
                expected="weights in memory, or offloaded by accelerate",
                got=f"{name} on the meta device, which holds shapes only",
                remedy="Load it with AutoModelForCausalLM.from_pretrained",
            )
        if parameter.is_inference():
            raise ModelError(
                "model",
                expected="parameters created outside torch.inference_mode()",
                got=f"inference tensor {name}",
                remedy="Load the model outside torch.inference_mode()",
            )
