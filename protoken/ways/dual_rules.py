"""Tangent rules of what decoder blocks are made of: see dual.py.

Tangents keep their K directions in the first dimension, so a rule is the function itself with dimensions moved by
one (reshaping, cutting, joining), a matmul with K times the rows (linear layers), or a factor f'(x) that is computed
once for all directions (activations). Attention is in dual_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from protoken.ways.dual import RULES, Dual, Rule, by_autograd, tangent_of, value_of


def _for(*functions: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for function in functions:
            RULES[function] = rule
        return rule

    return register


def _plain(args: tuple[Any, ...]) -> list[Any]:
    return [value_of(arg) for arg in args]


def _spread(tangent: Tensor, value: Tensor) -> Tensor:
    """Tangents of an operand, [K, *shape], as [K, *value.shape], by the rules of broadcasting."""
    missing = value.dim() - (tangent.dim() - 1)
    if missing:
        tangent = tangent.reshape(tangent.shape[0], *(1,) * missing, *tangent.shape[1:])
    return tangent.expand(tangent.shape[0], *value.shape)


def _aligned(tangent: Tensor, rank: int) -> Tensor:
    """Tangents with ones put in behind K until there are `rank` dimensions more than K's."""
    missing = rank - (tangent.dim() - 1)
    return tangent.reshape(tangent.shape[0], *(1,) * missing, *tangent.shape[1:]) if missing else tangent


def _later(dim: int) -> int:
    """The same dimension behind K."""
    return dim + 1 if dim >= 0 else dim


# ---- the function itself, one dimension further --------------------------------------------------------


@_for(Tensor.contiguous, Tensor.clone, torch.clone, Tensor.neg, torch.neg, Tensor.__neg__, Tensor.float, Tensor.double)
@_for(Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type)
def _as_it_is(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rest = _plain(args[1:])
    out = func(value_of(args[0]), *rest, **kwargs)
    if not isinstance(args[0], Dual) or not isinstance(out, Tensor) or not out.is_floating_point():
        return out
    return Dual.of(out, func(args[0].tangent, *rest, **kwargs))


@_for(Tensor.type_as)
def _type_as(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].to(value_of(args[1]).dtype) if isinstance(args[0], Dual) else func(*_plain(args), **kwargs)


@_for(Tensor.detach)
def _detach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(value_of(args[0]))


def _sizes(args: Sequence[Any]) -> list[int]:
    return list(args[0]) if len(args) == 1 and not isinstance(args[0], int) else list(args)


@_for(Tensor.view, Tensor.reshape, torch.reshape)
def _reshape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, rest = args[0], args[1:] or tuple(kwargs.values())
    if isinstance(rest[0], torch.dtype):
        return by_autograd(func, args, kwargs)
    out = value_of(x).reshape(*rest)
    return Dual.of(out, x.tangent.reshape(x.tangent.shape[0], *out.shape))


@_for(Tensor.expand)
def _expand(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out = func(value_of(args[0]), *args[1:], **kwargs)
    return Dual.of(out, _spread(args[0].tangent, out))


@_for(Tensor.transpose, torch.transpose, Tensor.swapaxes)
def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        return by_autograd(func, args, kwargs)
    x, first, second = args
    return Dual.of(value_of(x).transpose(first, second), x.tangent.transpose(_later(first), _later(second)))


@_for(Tensor.permute, torch.permute)
def _permute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        return by_autograd(func, args, kwargs)
    dims = _sizes(args[1:])
    return Dual.of(value_of(args[0]).permute(dims), args[0].tangent.permute(0, *map(_later, dims)))


@_for(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        return by_autograd(func, args, kwargs)
    x, dim = args
    return Dual.of(value_of(x).unsqueeze(dim), x.tangent.unsqueeze(_later(dim)))


@_for(Tensor.split, torch.split, Tensor.chunk, torch.chunk)
def _split(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) < 2:
        return by_autograd(func, args, kwargs)
    x, dim = args[0], kwargs.get("dim", args[2] if len(args) > 2 else 0)
    parts = func(value_of(x), args[1], dim=dim)
    return tuple(
        Dual.of(part, tangent)
        for part, tangent in zip(parts, func(x.tangent, args[1], dim=_later(dim)), strict=True)
    )  # fmt: skip


@_for(torch.cat)
def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    directions = next(part.tangent.shape[0] for part in parts if isinstance(part, Dual))
    out = torch.cat([value_of(part) for part in parts], dim=dim)
    tangents = [
        part.tangent if isinstance(part, Dual) else part.new_zeros(1).expand(directions, *part.shape) for part in parts
    ]
    return Dual.of(out, torch.cat(tangents, dim=_later(dim)))


@_for(Tensor.__getitem__)
def _getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = args
    own = index if isinstance(index, tuple) else (index,)
    # A list, or several tensors with slices between them, would move the dimension of K.
    simple = all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in own)
    lone = len(own) == 1 and isinstance(own[0], Tensor) and own[0].dtype == torch.long
    if not isinstance(x, Dual) or not (simple or lone):
        return by_autograd(func, args, kwargs)
    return Dual.of(value_of(x)[own], x.tangent[(slice(None), *own)])


@_for(Tensor.mean, torch.mean, Tensor.sum, torch.sum)
def _reduce(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None or len(args) > 2 or isinstance(dims, torch.dtype):
        return by_autograd(func, args, kwargs)
    rest = {name: value for name, value in kwargs.items() if name != "dim"}
    moved = _later(dims) if isinstance(dims, int) else [_later(dim) for dim in dims]
    return Dual.of(func(value_of(args[0]), dims, **rest), func(args[0].tangent, moved, **rest))


@_for(functional.dropout)
def _dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return by_autograd(func, args, kwargs) if training and p else args[0]


# ---- sums and products ---------------------------------------------------------------------------------


def _sum_rule(sign: int, swapped: bool = False) -> Rule:
    """x + y, x - y or y - x."""

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != 2:
            return by_autograd(func, args, kwargs)
        x, y = reversed(args) if swapped else args
        out = value_of(x) + value_of(y) if sign > 0 else value_of(x) - value_of(y)
        dx, dy = tangent_of(x), tangent_of(y)
        if dx is None:
            assert dy is not None
            return Dual.of(out, _spread(dy if sign > 0 else -dy, out).to(out.dtype))
        if dy is None:
            return Dual.of(out, _spread(dx, out).to(out.dtype))
        return Dual.of(out, torch.add(_spread(dx, out), _spread(dy, out), alpha=sign))

    return rule


_for(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)(_sum_rule(1))
_for(torch.sub, Tensor.sub, Tensor.__sub__)(_sum_rule(-1))
_for(Tensor.__rsub__)(_sum_rule(-1, swapped=True))


@_for(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        return by_autograd(func, args, kwargs)
    x, y = args
    out = torch.mul(value_of(x), value_of(y))
    dx, dy = tangent_of(x), tangent_of(y)
    if dx is None or dy is None:
        moving, factor = (dx, value_of(y)) if dx is not None else (dy, value_of(x))
        assert moving is not None
        return Dual.of(out, _spread(_aligned(moving, out.dim()) * factor, out).to(out.dtype))
    left = _aligned(dx, out.dim()) * value_of(y)
    if left.shape[1:] == out.shape and left.dtype == dy.dtype == value_of(x).dtype:
        return Dual.of(out, left.addcmul_(_aligned(dy, out.dim()), value_of(x)))
    return Dual.of(out, _spread(left + _aligned(dy, out.dim()) * value_of(x), out).to(out.dtype))


@_for(torch.div, Tensor.div, Tensor.__truediv__)
def _div(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or isinstance(args[1], Dual):
        return by_autograd(func, args, kwargs)
    out = value_of(args[0]) / args[1]
    return Dual.of(out, _spread(_aligned(args[0].tangent, out.dim()) / args[1], out).to(out.dtype))


@_for(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
def _matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, y = args
    if kwargs or min(x.dim(), y.dim()) < 2:
        return by_autograd(func, args, kwargs)
    out = torch.matmul(value_of(x), value_of(y))
    parts = []
    if isinstance(x, Dual):
        parts.append(_rows_times(_aligned(x.tangent, out.dim()), value_of(y)))
    if isinstance(y, Dual):
        parts.append(torch.matmul(value_of(x), _aligned(y.tangent, out.dim())))
    return Dual.of(out, _spread(parts[0] if len(parts) == 1 else parts[0] + parts[1], out))


def _rows_times(tangent: Tensor, matrix: Tensor) -> Tensor:
    if matrix.dim() == 2:
        return (tangent.reshape(-1, tangent.shape[-1]) @ matrix).reshape(*tangent.shape[:-1], -1)
    return torch.matmul(tangent, matrix)


@_for(functional.linear)
def _linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if not isinstance(x, Dual) or isinstance(weight, Dual) or isinstance(bias, Dual):
        return by_autograd(func, args, kwargs)
    rows = x.tangent.reshape(-1, x.tangent.shape[-1])
    out = functional.linear(value_of(x), weight, bias)
    return Dual.of(out, functional.linear(rows, weight).reshape(x.tangent.shape[0], *out.shape))


@_for(torch.addmm)
def _addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or [isinstance(arg, Dual) for arg in args] != [False, True, False]:
        return by_autograd(func, args, kwargs)
    out = func(*_plain(args))
    return Dual.of(out, _rows_times(args[1].tangent, args[2]))


# ---- activations and norms -----------------------------------------------------------------------------


@_for(functional.silu, functional.gelu, functional.relu, functional.softplus, functional.sigmoid, functional.tanh)
@_for(torch.sigmoid, torch.tanh, torch.relu, torch.exp, torch.rsqrt, torch.sqrt, torch.pow, torch.square, torch.clamp)
@_for(Tensor.sigmoid, Tensor.tanh, Tensor.relu, Tensor.exp, Tensor.rsqrt, Tensor.sqrt, Tensor.pow, Tensor.square)
@_for(Tensor.clamp, Tensor.__pow__)
def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """f'(x) once, for all directions."""
    x = args[0]
    if not isinstance(x, Dual) or any(isinstance(part, Tensor) for part in [*args[1:], *kwargs.values()]):
        return by_autograd(func, args, kwargs)
    rest = {name: value for name, value in kwargs.items() if name != "inplace"}
    with torch.enable_grad():
        leaf = value_of(x).detach().requires_grad_()
        out = func(leaf, *args[1:], **rest)
        (slope,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    return Dual.of(out.detach(), x.tangent * slope)


@_for(functional.softmax, torch.softmax, Tensor.softmax)
def _softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    out = func(value_of(x), *args[1:], **kwargs)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(dim, int):
        return by_autograd(func, args, kwargs)
    weighted = x.tangent * out
    return Dual.of(out, weighted - out * weighted.sum(_later(dim), keepdim=True))


@_for(functional.layer_norm, torch.layer_norm)
def _layer_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, dims = given["input"], list(range(-len(given["normalized_shape"]), 0))
    if not isinstance(x, Dual) or any(isinstance(given.get(name), Dual) for name in ("weight", "bias")):
        return by_autograd(func, args, kwargs)
    value, weight = value_of(x), given.get("weight")
    wide = torch.promote_types(value.dtype, torch.float32)
    centred = value.to(wide) - value.to(wide).mean(dims, keepdim=True)
    scale = (centred.square().mean(dims, keepdim=True) + given.get("eps", 1e-5)).rsqrt()
    normal, moved = centred * scale, x.tangent.to(wide)
    moved = moved - moved.mean(dims, keepdim=True) - normal * (moved * normal).mean(dims, keepdim=True)
    moved = moved * (scale if weight is None else scale * weight.to(wide))
    return Dual.of(func(value, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}), moved.to(value.dtype))
