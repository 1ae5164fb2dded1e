"""g[t] = d f_t / d h[t]: the objective of token t pulled back through the head and the final norm.

f_t is the log-probability of the token that was generated, log softmax(z_t)[y_t], or its raw logit z_t[y_t],
with z = softcap(scale * (W norm(h) + b)). For the log-probability d f / d z = onehot(y) - softmax(z), so

    d f / d norm(h) = c[y] W[y] - sum_v softmax(z)[v] c[v] W[v],   c = d z / d (W norm(h) + b)

and the sum over the vocabulary is taken chunk by chunk with a running maximum: neither z nor its gradient is
ever held as [T, V]. The chain rule of RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from protoken.dispatch import launcher
from protoken.errors import ArgumentError, ShapeError
from protoken.ops.checks import FLOATS, check_device, check_dtype, check_matrix, check_tensor, narrow

NORMS = ("rms", "layer", "none")
OBJECTIVES = ("log_prob", "logit")
CHUNK = 2048  # vocabulary rows that the torch way holds at once


@dataclass(frozen=True, eq=False)
class Head:
    """Everything between the last block's output and the objective.

    weight [V, d] and bias [V] of the head; norm "rms", "layer" or "none" with norm_weight [d], norm_bias [d]
    and eps (families that multiply by 1 + w pass 1 + w); logits are multiplied by ``scale`` and then, where
    ``softcap`` is given, become softcap * tanh(logits / softcap).
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: str = "rms"
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-6
    scale: float = 1.0
    softcap: float | None = None
    objective: str = "log_prob"


def relevance_head_reference(
    hidden: Tensor, targets: Tensor, head: Head, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(g [T, d], f [T]) in ``dtype``, by autograd through the definition."""

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to(dtype)

    with torch.enable_grad():
        leaf = hidden.detach().to(dtype).requires_grad_()
        normed = leaf
        if head.norm == "layer":
            normed = normed - normed.mean(-1, keepdim=True)
        if head.norm != "none":
            normed = normed * (normed.square().mean(-1, keepdim=True) + head.eps).rsqrt()
        weight, bias = cast(head.norm_weight), cast(head.norm_bias)
        normed = normed if weight is None else normed * weight
        normed = normed if bias is None else normed + bias
        logits = head.scale * torch.nn.functional.linear(normed, head.weight.detach().to(dtype), cast(head.bias))
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        if head.objective == "log_prob":
            logits = logits.log_softmax(-1)
        value = logits.gather(1, targets[:, None]).squeeze(1)
        grad = torch.autograd.grad(value.sum(), leaf)[0] if value.numel() else torch.zeros_like(leaf)
    return grad, value.detach()


def relevance_head(hidden: Tensor, targets: Tensor, head: Head, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Relevance at the last block's output, and the objective itself.

    hidden [T, d]: output of the last block, before the final norm; fp32, bf16, fp16 or fp64. targets int64
    [T]: the generated tokens' ids. Returns fp32 (grad [T, d], value [T]); value in nats for "log_prob".

    Errors: `ShapeError`, `DtypeError`, `DeviceError`, `ArgumentError` (unknown norm or objective, a target outside the
    vocabulary, checked on the CPU only since a look at a GPU's memory would wait for it), `BackendError`.
    """
    if torch.compiler.is_compiling():
        tensors = head.weight, head.bias, head.norm_weight, head.norm_bias
        numbers = head.norm, head.eps, head.scale, head.softcap, head.objective
        return torch.ops.protoken.relevance_head(hidden, targets, *tensors, *numbers, backend)  # type: ignore[no-any-return]
    _check(hidden, targets, head)
    tokens, width = hidden.shape
    if not tokens:
        return hidden.new_zeros(0, width, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    hidden, targets = narrow(hidden), targets.detach()
    launch = launcher("relevance_head", backend, hidden.device, hidden, targets, head)
    grad = torch.empty(tokens, width, dtype=torch.float32, device=hidden.device)
    value = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    launch(grad, value, hidden, targets, head)
    return grad, value


def _check(hidden: Tensor, targets: Tensor, head: Head) -> None:
    check_matrix("head.weight", head.weight, "[V, d]")
    vocabulary, width = head.weight.shape
    check_matrix("hidden", hidden, f"[T, {width}] to match head.weight", None, width)
    check_dtype("hidden", hidden.dtype, FLOATS)
    _check_tensors(head, hidden.device)
    _check_choices(head)
    _check_targets(targets, hidden, vocabulary)


def _check_tensors(head: Head, device: torch.device) -> None:
    vocabulary, width = head.weight.shape
    lengths = {"weight": None, "bias": vocabulary, "norm_weight": width, "norm_bias": width}
    for name, length in lengths.items():
        value = getattr(head, name)
        if value is None:
            continue
        if length is not None and tuple(value.shape) != (length,):
            raise ShapeError(f"head.{name}", expected=f"({length},)", got=tuple(value.shape))
        check_dtype(f"head.{name}", value.dtype, FLOATS)
        check_device(f"head.{name}", value.device, device, "hidden")


def _check_choices(head: Head) -> None:
    if head.norm not in NORMS:
        raise ArgumentError("head.norm", expected=f"one of {', '.join(NORMS)}", got=repr(head.norm))
    if head.objective not in OBJECTIVES:
        raise ArgumentError("head.objective", expected=f"one of {', '.join(OBJECTIVES)}", got=repr(head.objective))
    if not math.isfinite(head.scale):
        raise ArgumentError("head.scale", expected="a finite number", got=head.scale)
    if not (math.isfinite(head.eps) and head.eps >= 0):
        raise ArgumentError("head.eps", expected="a finite number, not negative", got=head.eps)
    if head.softcap is not None and not (math.isfinite(head.softcap) and head.softcap > 0):
        raise ArgumentError("head.softcap", expected="a finite number above 0, or None", got=head.softcap)


def _check_targets(targets: Tensor, hidden: Tensor, vocabulary: int) -> None:
    check_tensor("targets", targets)
    if tuple(targets.shape) != (hidden.shape[0],):
        raise ShapeError("targets", expected=f"[T] = ({hidden.shape[0]},)", got=tuple(targets.shape))
    check_dtype("targets", targets.dtype, (torch.int64,))
    check_device("targets", targets.device, hidden.device, "hidden")
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ArgumentError("targets", expected=f"token ids from 0 to {vocabulary - 1}", got=wrong)


def normalise(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 (norm(h) [T, d], its unit direction before the weight [T, d], reciprocal root mean square [T, 1])."""
    direction = hidden.float()
    if head.norm == "layer":
        direction = direction - direction.mean(-1, keepdim=True)
    inverse = torch.ones_like(direction[:, :1])
    if head.norm != "none":
        inverse = (direction.square().mean(-1, keepdim=True) + head.eps).rsqrt()
        direction = direction * inverse
    normed = direction if head.norm_weight is None else direction * head.norm_weight.detach().float()
    if head.norm_bias is not None:
        normed = normed + head.norm_bias.detach().float()
    return normed, direction, inverse


def pull_through_norm(grad: Tensor, upstream: Tensor, direction: Tensor, inverse: Tensor, head: Head) -> None:
    """grad <- d f / d h from upstream = d f / d norm(h)."""
    if head.norm_weight is not None:
        upstream = upstream * head.norm_weight.detach().float()
    if head.norm == "none":
        grad.copy_(upstream)
        return
    along = (upstream * direction).mean(-1, keepdim=True)
    if head.norm == "layer":
        upstream = upstream - upstream.mean(-1, keepdim=True)
    torch.mul(upstream - direction * along, inverse, out=grad)


def softcapped(logits: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """(softcap * tanh(z / softcap), scale times its slope). The slope is 1 / cosh^2, since 1 - tanh^2 cancels."""
    assert head.softcap is not None
    inner = logits / head.softcap
    return torch.tanh(inner) * head.softcap, torch.cosh(inner).square_().reciprocal_().mul_(head.scale)


def _logits(normed: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> tuple[Tensor, Tensor | None]:
    """Logits of some vocabulary rows and d logits / d (W n + b) when that is not the constant ``scale``."""
    logits = torch.nn.functional.linear(normed, weight, bias)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is None:
        return logits, None
    return softcapped(logits, head)


def launch_relevance_head(grad: Tensor, value: Tensor, hidden: Tensor, targets: Tensor, head: Head) -> None:
    """The torch backend: vocabulary chunks with a running maximum, two matmuls per chunk while it is in cache."""
    normed, direction, inverse = normalise(hidden, head)
    own = own_rows(value, normed, targets, head)
    if head.objective == "logit":
        pull_through_norm(grad, own, direction, inverse, head)
        return
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach().float()
    top = torch.full_like(normed[:, :1], -math.inf)
    mass, mean = torch.zeros_like(top), torch.zeros_like(normed)
    for start in range(0, weight.shape[0], CHUNK):
        rows = weight[start : start + CHUNK].float()
        logits, slope = _logits(normed, rows, None if bias is None else bias[start : start + CHUNK], head)
        higher = torch.maximum(top, logits.amax(-1, keepdim=True))
        base = higher.masked_fill(higher == -math.inf, 0.0)  # nothing but masked rows so far
        shrink = (top - base).exp_()
        logits.sub_(base).exp_()
        mass.mul_(shrink).add_(logits.sum(-1, keepdim=True))
        mean.mul_(shrink).addmm_(logits if slope is None else logits.mul_(slope), rows)
        top = higher
    mean.div_(mass)
    if head.softcap is None and head.scale != 1.0:
        mean.mul_(head.scale)
    value.sub_((top + mass.log()).squeeze(1))
    pull_through_norm(grad, own - mean, direction, inverse, head)


def own_rows(value: Tensor, normed: Tensor, targets: Tensor, head: Head) -> Tensor:
    """value <- the tokens' own logits; returns their gradient with respect to norm(h) [T, d]."""
    targets, known = known_targets(targets, head.weight.shape[0])
    rows = head.weight.detach()[targets].float()
    logits = (rows * normed).sum(-1)
    if head.bias is not None:
        logits += head.bias.detach()[targets].float()
    logits *= head.scale
    slope = torch.full_like(logits, head.scale)
    if head.softcap is not None:
        logits, slope = softcapped(logits, head)
    torch.mul(logits, known, out=value)
    return rows * (slope * known)[:, None]


def known_targets(targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(targets moved into the vocabulary, 1 or, for one outside it, NaN [T] fp32).

    A GPU that is asked for a row that is not there serves its process no more; nobody waits to look beforehand.
    """
    inside = targets.clamp(0, vocabulary - 1)
    return inside, torch.where(inside == targets, 1.0, math.nan)
