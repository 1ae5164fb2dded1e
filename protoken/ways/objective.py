"""The objective f_t of a generated token, and how it is pulled back through a plain output head.

With z = W h + b what the head returns, of which f_t is a function, d f_t / d h = v W with v = d f_t / d z:

    gathered_head       the logit of one token per row needs one row of W, and the others are never computed
    pull_from_head      nothing follows the head, so v is known: onehot(t) for the logit, onehot(t) - softmax(z) for the
                        log-probability, the same without z_t in the softmax for the log-odds
    pull_through_head   soft-caps or scalings follow: v by autograd as far as z

Autograd would go densely through the head's matmul, and several times over the vocabulary. Only plain heads are taken
apart like this (`is_plain`); others run as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from protoken.models.quantised import is_quantised
from protoken.results.parts import Objective

__all__ = [
    "Objective",
    "gathered_head",
    "is_last_row",
    "is_plain",
    "objective_values",
    "pull_from_head",
    "pull_through_head",
]

# The softmax is at hand for the slope, and its logarithm is the objective, until it nears fp32's smallest numbers.
_LEAST = -80.0

# Autograd's names of what takes numbers out of a tensor and leaves them as they are.
_PICKING = frozenset(("SelectBackward0", "SliceBackward0", "CloneBackward0", "AliasBackward0"))


def objective_values(logits: Tensor, tokens: Tensor, objective: Objective) -> Tensor:
    """f_t for logits [T, V] and tokens [T], fp32 or fp64 [T].

    log_prob    log p_t = z_y - logsumexp_v z_v, in nats
    log_odds    log p_t / (1 - p_t) = z_y - logsumexp_{v != y} z_v, in nats; its gradient is that of log p_t over
                1 - p_t, which does not fade for tokens that are nearly certain. 1 - p_t itself is never formed
    logit       z_y
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    if objective == "logit":
        return chosen
    rivals = logits if objective == "log_prob" else logits.scatter(-1, tokens[:, None], -torch.inf)
    return chosen - rivals.logsumexp(-1)


def is_plain(head: nn.Module) -> bool:
    """Whether a head is one linear layer whose weight is at hand: neither packed nor kept on another device."""
    return type(head) is nn.Linear and not head.weight.is_meta and not is_quantised(head.weight)


def gathered_head(head: nn.Module, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """A head of one output per row, z_t = <w[token_t], h_t> + b[token_t], in place of a plain one's whole vocabulary.

    What families apply to the logits afterwards (soft-caps, scalings) is elementwise, so it still applies.
    """
    assert isinstance(head, nn.Linear)
    # [T, d] rows, widened: a half-precision dot product over d would round more than the whole head's matmul.
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    weight = head.weight.detach()[tokens].to(wide)
    bias = None if head.bias is None else head.bias.detach()[tokens].to(wide)

    def forward(hidden: Tensor) -> Tensor:
        logits = (hidden.to(wide) * weight).sum(-1, keepdim=True)
        return logits if bias is None else logits + bias[:, None]

    return forward


def pull_from_head(weight: Tensor, logits: Tensor, token: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """f [1] and d f / d h [d] where the logits [1, V] are what the head with weight [V, d] returned; token [1]."""
    weight, logits = weight.detach(), logits.detach()
    if objective == "logit":
        return objective_values(logits, token, "logit"), weight[token[0]]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if objective == "log_prob":
        masses = wide.softmax(-1)
        value = masses[:, token[0]].log()
        if float(value) < _LEAST:
            value = objective_values(wide, token, "log_prob")
    else:
        masses = wide.scatter(-1, token[:, None], -torch.inf).softmax(-1)
        value = objective_values(wide, token, "log_odds")
    slope = masses[0].neg_()
    slope[token] += 1
    return value, slope.to(weight.dtype) @ weight


def pull_through_head(
    weight: Tensor, logits: Tensor, z: Tensor, token: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """f [1] and d f / d h [d] = v W from v = d f / d z [V], with z the leaf that the logits [1, V] were made from."""
    weight = weight.detach()
    with torch.enable_grad():
        value = objective_values(logits, token, objective)
    slope = torch.autograd.grad(value, z)[0].reshape(-1).to(weight.dtype)
    if objective == "logit" and int(slope.count_nonzero()) <= 1:
        return value, slope[token] * weight[token[0]]
    return value, slope @ weight


def is_last_row(logits: Tensor, z: Tensor) -> bool:
    """Whether logits [1, V] are z [1, 1, V] as it is: between them the graph only copies and picks the position."""
    node = logits.grad_fn
    while node is not None and node.name() in _PICKING:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None) is z and logits.shape[-1] == z.numel()
