"""Reversible changes to somebody else's model: every one undone in `finally`, none leaving an attribute behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .errors import ModelError


@contextmanager
def replaced_method(module: nn.Module, name: str, method: Callable[..., Any] | None) -> Iterator[None]:
    """Give one module instance another method (or plain attribute); hooks on it still run. Restores what was there."""
    had_own = name in module.__dict__
    own = module.__dict__.get(name)
    module.__dict__[name] = method
    try:
        yield
    finally:
        if had_own:
            module.__dict__[name] = own
        else:
            del module.__dict__[name]


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


@contextmanager
def hooks(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Remove the handles whatever happens."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def refuse_inference_mode(model: nn.Module) -> None:
    """Relevance is a gradient: inference mode, and parameters created in it, cannot take part in one.

    Raises:
        ModelError: inference mode is on, or a parameter was created in it.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "model",
            expected="a call outside torch.inference_mode()",
            got="inference mode, which forbids gradients",
            remedy="Use torch.no_grad() around your own code; gradients are turned on only where they are needed",
        )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ModelError(
                "model",
                expected="parameters created outside torch.inference_mode()",
                got=f"inference tensor {name}",
                remedy="Load the model outside torch.inference_mode()",
            )
