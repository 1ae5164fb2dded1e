"""The tangent of scaled dot-product attention, for K directions at once.

    S = scale q k^T + mask        dS_k = scale (dq_k k^T + q dk_k^T)
    P = softmax(S)                dP_k = P * (dS_k - rowsum(P * dS_k))
    o = P v                       do_k = dP_k v + P dv_k

P is computed once for all directions, a run of query rows at a time, so that memory does not grow with the square of
the length; under a causal mask later keys are never touched. Heads that share a key head stay together as rows of one
matmul. Half precision is computed in fp32. The fused attention that the value itself comes from has no forward mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from protoken.ways.dual import RULES, Dual, NoRule, tangent_of, value_of

# Elements of dS that are held at once; four such buffers are alive.
_SCRATCH = 1 << 21
_wanted: ContextVar[slice] = ContextVar("wanted_rows", default=slice(None))


@contextmanager
def only_rows(rows: slice) -> Iterator[None]:
    """Inside, attention computes tangents of these query rows only; those of others are zeros."""
    token = _wanted.set(rows)
    try:
        yield
    finally:
        _wanted.reset(token)


def attention_tangent(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    rows: slice = slice(None),
) -> Tensor:
    """Tangents [K, B, H, s, e] of softmax(scale q k^T + mask) v; zeros outside `rows`.

    Args:
        q, k, v: [B, H, s, e], [B, H', S, e], [B, H', S, e'] with H a multiple of H'; `Dual`, or plain where constant.
        mask: bool (True: may look) or added to the scores; broadcasts to [B, H, s, S].
        causal: query i looks at keys up to i; s = S.
    """
    given = [tangent for tangent in map(tangent_of, (q, k, v)) if tangent is not None]
    directions = given[0].shape[0]
    batch, heads, length, _ = q.shape
    shared, keys = k.shape[1], k.shape[2]
    group = heads // shared
    wide = torch.promote_types(value_of(q).dtype, torch.float32)

    def grouped(x: Any) -> Tensor:
        """[..., B, H, s, e] as [..., B, H', group, s, e]."""
        return x.reshape(*x.shape[:-3], shared, group, *x.shape[-2:]).to(wide)  # type: ignore[no-any-return]

    qs, ks, vs = grouped(value_of(q)), value_of(k).to(wide), value_of(v).to(wide)
    dq = None if tangent_of(q) is None else grouped(tangent_of(q))
    dk = None if tangent_of(k) is None else tangent_of(k).to(wide)  # type: ignore[union-attr]
    dv = None if tangent_of(v) is None else tangent_of(v).to(wide)  # type: ignore[union-attr]
    if mask is not None:
        mask = mask.expand(batch, heads, length, keys).reshape(batch, shared, group, length, keys)
    out = torch.zeros(directions, batch, shared, group, length, vs.shape[-1], dtype=wide, device=vs.device)
    first, last, _ = rows.indices(length)
    step = max(1, _SCRATCH // (directions * batch * heads * keys))
    for start in range(first, last, step):
        stop = min(start + step, last)
        seen = stop if causal else keys
        bias = None if mask is None else mask[..., start:stop, :seen].flatten(2, 3)
        if causal:
            bias = torch.ones(stop - start, seen, dtype=torch.bool, device=vs.device).tril_(start)
            bias = bias.repeat(group, 1)
        total = _of_rows(
            qs[..., start:stop, :].flatten(2, 3),
            ks[:, :, :seen],
            vs[:, :, :seen],
            None if dq is None else dq[..., start:stop, :].flatten(3, 4),
            None if dk is None else dk[..., :seen, :],
            None if dv is None else dv[..., :seen, :],
            bias,
            scale,
        )
        out[..., start:stop, :] = total.reshape(*total.shape[:3], group, stop - start, -1)
    return out.flatten(2, 3).to(value_of(q).dtype)


def _of_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """do_k of a run of n query rows, [K, B, H', n, e'].

    Args:
        q, k, v: [B, H', n, e], [B, H', S, e], [B, H', S, e']; their tangents likewise behind K, or None: at least one.
        bias: as `_softmax` takes it, broadcasting to [B, H', n, S].
    """
    weights = _softmax((q @ k.mT) * scale, bias)
    moved = None if dq is None else dq @ k.mT
    if dk is not None:
        other = q @ dk.mT
        moved = other if moved is None else moved.add_(other)
    direct = None if dv is None else weights @ dv
    if moved is None:
        assert direct is not None
        return direct
    moved.mul_(weights)
    moved.addcmul_(weights, moved.sum(-1, keepdim=True), value=-1).mul_(scale)
    through_scores = moved @ v
    return through_scores if direct is None else through_scores.add_(direct)


def _softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    """P for scores [.., S] that nobody else needs; bias is bool (True: may look), or added."""
    if bias is None:
        return scores.softmax(-1)
    if bias.dtype == torch.bool:
        return scores.masked_fill_(~bias, float("-inf")).softmax(-1)
    return scores.add_(bias).softmax(-1)


def _rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask, causal = given.get("attn_mask"), bool(given.get("is_causal", False))
    q, k, v = given["query"], given["key"], given["value"]
    if isinstance(mask, Dual) or given.get("dropout_p", 0.0) or q.dim() != 4 or (causal and q.shape[2] != k.shape[2]):
        raise NoRule("scaled_dot_product_attention")
    scale = given.get("scale")
    tangent = attention_tangent(
        q, k, v,
        mask=mask,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        rows=_wanted.get(),
    )  # fmt: skip
    plain = {name: value_of(value) for name, value in given.items()}
    return Dual.of(functional.scaled_dot_product_attention(**plain), tangent)


RULES[functional.scaled_dot_product_attention] = _rule
