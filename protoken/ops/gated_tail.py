"""gated_tail: gradients behind the last attention of a block with a gated MLP and RMS norms, for one token.

With a what enters the block's second norm, z and u what gate and up projection make of it, and b what enters the final
norm, whose output h has the gradient v:

    b = a + W_down (silu(z) * u)      z = W_gate norm(a)      u = W_up norm(a)      h = final_norm(b)
    d f / d b = v^T d final_norm / d b =: p                            also the gradient at W_down's output
    q = W_down^T p
    d f / d a = p + (W_gate^T (q * u * silu'(z)) + W_up^T (q * silu(z)))^T d norm / d a
                                                                       also that at the out-projection's output

The three matrices are read once and nothing else costs anything, where autograd walks some thirty nodes for it.
Not an op that users call: the leaf tap uses it where it has seen that the user's model is made like this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GatedBlock:
    """The weights: gate and up [I, d], down [d, I], both norms [d] with their epsilons."""

    gate: Tensor
    up: Tensor
    down: Tensor
    norm: Tensor
    epsilon: float
    final_norm: Tensor
    final_epsilon: float


@dataclass(frozen=True)
class GatedValues:
    """What one token left there: a and b [d], z and u [I]."""

    entering: Tensor
    gate: Tensor
    up: Tensor
    leaving: Tensor


def gated_tail_reference(block: GatedBlock, values: GatedValues, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """d f / d b and d f / d a, fp64 [d] each, for v = upstream [d]."""
    a, z, u, b = (x.double() for x in (values.entering, values.gate, values.up, values.leaving))
    at_leaving = _through_rms_norm(b, block.final_norm.double(), block.final_epsilon, upstream.double())
    q, sigmoid = at_leaving @ block.down.double(), z.sigmoid()
    to_gate, to_up = q * u * sigmoid * (1 + z * (1 - sigmoid)), q * z * sigmoid
    inner = to_gate @ block.gate.double() + to_up @ block.up.double()
    return at_leaving, at_leaving + _through_rms_norm(a, block.norm.double(), block.epsilon, inner)


def _through_rms_norm(a: Tensor, weight: Tensor, epsilon: float, v: Tensor) -> Tensor:
    """y = w a r with r = (mean a^2 + eps)^(-1/2):   v^T dy/da = r (u - a r^2 <u, a> / d),   u = v w."""
    inverse, u = torch.rsqrt(a.square().mean() + epsilon), v * weight
    return inverse * (u - a * (inverse.square() * (u @ a) / a.numel()))
