"""Relevance: the gradient of each generated token's objective at the traced layers' outputs.

Two of the three exact ways that do not repeat the generation (the third is forward.py):

local    one traced block. After the last attention no position talks to another, so d f_t / d y is zero at every
         position but the deciding one: all tokens' relevances come from one backward pass over T rows.
reverse  any number of blocks, totals over the sequence. One backward pass gives per layer M = sum_t g_t x_t^T [O, I],
         and a client's total is <M, delta_k>.

Source: arXiv 2601.19672 section 3 (gradient relevance); the exactness of both ways is tested against methods/paper.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from protoken.errors import GenerationError
from protoken.models.architectures import Architecture
from protoken.models.layers import layer_of
from protoken.ways.capture import Capture
from protoken.ways.objective import Objective, gathered_head, is_plain, objective_values
from protoken.ways.replay import Replayed, Tap, replay

# A replay that differs by more than this from what generation computed is another computation, not rounding. Most
# families compute rotary angles and norms in fp32 whatever their weights are.
REPLAY_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass
class Response:
    """One finished sequence: ids [1, P + T], prompt length P, number of generated tokens T."""

    ids: Tensor
    prompt_length: int

    @property
    def new_tokens(self) -> int:
        return int(self.ids.shape[1]) - self.prompt_length

    @property
    def tokens(self) -> Tensor:
        """The generated token ids [T]."""
        return self.ids[0, self.prompt_length :]

    @property
    def seen(self) -> Tensor:
        """The ids that entered the model, [1, P - 1 + T]: all but the last generated one."""
        return self.ids[:, :-1]


@dataclass
class LocalRelevance:
    """Per layer x [T, I] and g = d f_t / d y [T, O]; objective values f_t [T].

    `hidden_grad` [T, d] and `projection_grad` [T, O] are the gradients at the last block's input, past its attention,
    and at its out-projection's output: all that a tangent arriving there can act through. Experts with n slots per
    token have x [T, n I], g [T, n O] and a route [T, n]: the expert of each slot.
    """

    x: dict[str, Tensor]
    grad: dict[str, Tensor]
    hidden_grad: Tensor
    projection_grad: Tensor
    objective: Tensor
    replay_error: float
    routes: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class ReverseRelevance:
    """Per layer M = sum over positions of g x^T, fp32 [O, I], for experts [E, O, I]; objective values f_t [T]."""

    gradient_matrix: dict[str, Tensor]
    objective: Tensor
    replay_error: float


def local_relevance(
    model: nn.Module,
    architecture: Architecture,
    capture: Capture,
    response: Response,
    layers: tuple[str, ...],
    objective: Objective,
    *,
    check: bool = True,
) -> LocalRelevance:
    """Relevance of every generated token at layers of the last block from its out-projection on.

    The attention is not repeated: the recorded outputs of the out-projection stand in for it, and the T deciding rows
    run through the rest of the block as if they were a sequence of T positions.

    Args:
        check: compare what the replay computes with what the generation did (`replay_error`).
    """
    prompt, count = response.prompt_length, response.new_tokens
    last = len(architecture.blocks) - 1
    projection = architecture.layer_name(last, architecture.out_projection)
    replayed = replay(
        model,
        architecture,
        first_block=last,
        hidden=capture.deciding(capture.hidden, prompt, count),
        ids=response.seen[:, prompt - 1 :],
        layers=tuple(dict.fromkeys((projection, *layers))),
        blocks_return_tuples=capture.returns_tuples,
        given_outputs={projection: capture.deciding(capture.projections, prompt, count)},
        head=_short_head(architecture, response.tokens, layers, objective),
    )
    recorded = capture.deciding(capture.outputs, prompt, count)
    error = replay_error(replayed.output, recorded) if check else 0.0
    tapped = list(replayed.taps)
    sources = [replayed.hidden, *(replayed.taps[name].y for name in tapped)]
    values, (hidden_grad, *rest) = _backward(replayed, response.tokens, sources, objective)
    # OPT's layers return [B * s, O]; the input's tap says what B and s are.
    grads = {name: g.reshape(*replayed.taps[name].x.shape[:2], -1) for name, g in zip(tapped, rest, strict=True)}
    x = {name: replayed.taps[name].x[0] for name in layers}
    if projection in x:
        # What the stand-in attention fed to the projection is meaningless; generation's own input was recorded.
        x[projection] = capture.deciding(capture.projection_inputs, prompt, count)[0]
    grad = {name: grads[name][0] for name in layers}
    routes = {name: tap.route[0] for name in layers if (tap := replayed.taps[name]).route is not None}
    return LocalRelevance(x, grad, hidden_grad[0], grads[projection][0], values, error, routes)


def reverse_relevance(
    model: nn.Module,
    architecture: Architecture,
    capture: Capture,
    response: Response,
    layers: tuple[str, ...],
    objective: Objective,
) -> ReverseRelevance:
    """Gradient matrices of sum_t f_t for layers of any depth: one backward pass through the traced blocks."""
    prompt, count = response.prompt_length, response.new_tokens
    length = prompt - 1 + count
    rows = torch.arange(prompt - 1, length, device=response.ids.device)
    replayed = replay(
        model,
        architecture,
        first_block=min(architecture.block_of(name) for name in layers),
        hidden=capture.sequence(length),
        ids=response.seen,
        layers=layers,
        blocks_return_tuples=capture.returns_tuples,
        logits_rows=rows,
        head=_short_head(architecture, response.tokens, layers, objective),
    )
    recorded = capture.deciding(capture.outputs, prompt, count)
    error = replay_error(replayed.output[:, prompt - 1 : length], recorded)
    values, grads = _backward(replayed, response.tokens, [replayed.taps[name].y for name in layers], objective)
    matrices = {
        name: gradient_matrix(model, name, replayed.taps[name], grad) for name, grad in zip(layers, grads, strict=True)
    }
    return ReverseRelevance(matrices, values, error)


def replay_error(replayed: Tensor, recorded: Tensor) -> float:
    """Relative RMS difference between what the replay and the generation computed for the same rows.

    Raises:
        GenerationError: it is beyond rounding, so the replay was of another computation.
    """
    difference = (replayed.double() - recorded.double()).norm()
    error = float(difference / recorded.double().norm().clamp(min=1e-300))
    limit = REPLAY_TOLERANCE.get(recorded.dtype, 1e-1)
    if not error <= limit:
        raise GenerationError(
            "model",
            expected=f"a replay of the traced blocks within {limit:g} of the generation",
            got=f"a relative difference of {error:.3g}",
            remedy="Something in this model depends on more than its hidden states; nothing was attributed",
        )
    return error


def _backward(
    replayed: Replayed, tokens: Tensor, sources: Sequence[Tensor], objective: Objective
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Objective values [T] and the gradients of their sum at the sources."""
    # The caller may be under no_grad, where even taking row 0 of the logits would cut the graph.
    with torch.enable_grad():
        logits = replayed.logits[0]
        # A head that gathered rows returns a vocabulary of one.
        chosen = torch.zeros_like(tokens) if logits.shape[-1] == 1 else tokens
        values = objective_values(logits, chosen, objective)
        # Nothing flows back to a layer that only chooses which positions or experts take part.
        grads = torch.autograd.grad(values.sum(), list(sources), allow_unused=True, materialize_grads=True)
    return values.detach(), grads


def _accumulated(grad: Tensor, x: Tensor) -> Tensor:
    """sum over rows of g x^T in fp32 or better: rows [n, O] and [n, I] give [O, I]."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.to(wide).T @ x.to(wide)


def gradient_matrix(model: nn.Module, name: str, tap: Tap, grad: Tensor) -> Tensor:
    """d sum_t f_t / dW of one layer as [O, I]; of experts [E, O, I], each from the slots that were routed to it."""
    layer = layer_of(model, name)
    grad = grad.reshape(-1, layer.rows)
    if layer.kind == "embedding":
        wide = torch.promote_types(grad.dtype, torch.float32)
        table = torch.zeros(layer.columns, layer.rows, dtype=wide, device=grad.device)
        return table.index_add_(0, tap.x.flatten(), grad.to(wide)).T
    x = tap.x.reshape(-1, layer.columns)
    if tap.route is None:
        return _accumulated(grad, x)
    assert layer.experts is not None
    experts = tap.route.flatten()
    return torch.stack([_accumulated(grad[experts == e], x[experts == e]) for e in range(layer.experts)])


def _short_head(
    architecture: Architecture, tokens: Tensor, layers: Sequence[str], objective: Objective
) -> Callable[[Tensor], Tensor] | None:
    """What to call instead of the head: one row of it per token where that is all the objective looks at."""
    if objective != "logit" or architecture.head_name in layers or not is_plain(architecture.head):
        return None
    return gathered_head(architecture.head, tokens)
