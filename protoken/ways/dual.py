"""K tangents ride along one value, through whatever code computes with it.

A `Dual` is a tensor [*shape] with tangents [K, *shape]. It goes into a model's own forward in place of a hidden state;
every torch function that meets it computes its value once, as ever, and its K tangents in one batched call:

    y = f(x)      dy_k = f'(x) dx_k,   k = 1..K

The rules for what decoder blocks are made of are in dual_rules.py; a function without a rule is differentiated by
torch.func on its own, which is slower and just as exact. What changes a tensor in place has no rule: `NoRule` is
raised, and nothing is guessed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

# rule(function, args, kwargs) -> what the function returns, with tangents.
Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[Any, Rule] = {}
# Functions that say something about a tensor and return no differentiable value.
_QUERIES = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "requires_grad", "is_quantized")
} | {
    getattr(Tensor, name)
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "__len__")
}


_forward_mode = threading.RLock()


@contextmanager
def forward_mode_of_torch() -> Iterator[None]:
    """One thread at a time in torch's own forward mode, with attention in its math form.

    torch counts the levels of forward mode per process, not per thread, and the switches of its attention, whose fused
    form has no forward mode, are the process's, too: put back out of order, they would stay as they are in here.
    """
    with _forward_mode, sdpa_kernel([SDPBackend.MATH]):
        yield


class NoRule(Exception):
    """A function that tangents cannot follow; the caller differentiates the pass as a whole instead."""


class Dual(Tensor):
    """A value [*shape] and its tangents [K, *shape] in the same dtype."""

    tangent: Tensor

    @staticmethod
    def of(value: Tensor, tangent: Tensor) -> Dual:
        dual = value.detach().as_subclass(Dual)
        dual.tangent = tangent
        return dual

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _QUERIES:
            return func(value_of(args[0]), *args[1:], **kwargs)
        rule = RULES.get(func)
        return by_autograd(func, args, kwargs) if rule is None else rule(func, args, kwargs)


def value_of(x: Any) -> Any:
    """The plain tensor under a `Dual`; anything else as it is."""
    return x.as_subclass(Tensor) if isinstance(x, Dual) else x


def tangent_of(x: Any) -> Tensor | None:
    """The tangents [K, *shape]; None of what has none."""
    return x.tangent if isinstance(x, Dual) else None


def by_autograd(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any function that has a forward-mode formula: its K tangents by vmap over jvp.

    Raises:
        NoRule: it changes a tensor in place.
    """
    name = getattr(func, "__name__", str(func))
    if _in_place(name) or kwargs.get("out") is not None:
        raise NoRule(name)
    leaves, spec = tree_flatten((args, kwargs))
    moving = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
    plain = [value_of(leaf) for leaf in leaves]

    def call(some: list[Any]) -> Any:
        own_args, own_kwargs = tree_unflatten(some, spec)
        return func(*own_args, **own_kwargs)

    outputs, shape = tree_flatten(call(plain))
    floating = [index for index, out in enumerate(outputs) if isinstance(out, Tensor) and out.is_floating_point()]
    if not floating:
        return tree_unflatten(outputs, shape)

    def moved(*values: Tensor) -> tuple[Tensor, ...]:
        changed = list(plain)
        for index, value in zip(moving, values, strict=True):
            changed[index] = value
        found = tree_flatten(call(changed))[0]
        return tuple(found[index] for index in floating)

    def one(*directions: Tensor) -> tuple[Tensor, ...]:
        result: Any = torch.func.jvp(moved, tuple(plain[index] for index in moving), directions)
        return result[1]  # type: ignore[no-any-return]

    with forward_mode_of_torch():
        tangents = torch.func.vmap(one)(*(leaves[index].tangent for index in moving))
    for index, tangent in zip(floating, tangents, strict=True):
        outputs[index] = Dual.of(outputs[index], tangent)
    return tree_unflatten(outputs, shape)


def _in_place(name: str) -> bool:
    # `x += y` arrives as add_.
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
