"""The published algorithm (arXiv 2601.19672), as plainly as it can be written: the oracle of the test suite.

For each generated token t: a forward pass over the whole context without cache, a backward pass from the token's
objective, and for every traced layer l

    s[k, t] = sum_l sum_{pos <= t} < W_k^l x^l[pos], g_t^l[pos] >

where W_k is a matrix that a module applies. A weight that is used in any other way (experts kept in one parameter,
their router, embeddings) is scored through its own gradient, which is the same sum:

    sum_{pos <= t} < W_k x[pos], g_t[pos] >  =  < W_k, d f_t / d W >

With the paper's own choices W_k are the clients' full weights, the objective is the raw logit and aggregation weights
are left out. With deltas for W_k and the log-probability it is what the fast ways must equal.

Cost: T forward and backward passes over up to P + T positions, 13 to 20 times plain generation. No limit on layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from protoken.errors import GenerationError
from protoken.models.adapters import effective_weight
from protoken.models.layers import layer_of
from protoken.models.patching import after, hooks, replaced_attribute
from protoken.models.quantised import straight_through
from protoken.ways.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def paper_scores(
    model: PreTrainedModel,
    ids: Tensor,
    prompt_length: int,
    weights: Mapping[str, Sequence[Tensor]],
    objective: Objective = "logit",
) -> tuple[Tensor, Tensor]:
    """Scores of every generated token, layer and client.

    Args:
        model: a causal language model in evaluation mode.
        ids: prompt and generated tokens, [1, P + T].
        prompt_length: P.
        weights: per layer name, K matrices [O, I] (experts: [E, O, I]): full client weights (the paper) or deltas.
        objective: "logit", "log_prob" or "log_odds".

    Returns:
        Scores [L, T, K] and objective values [T], both fp64.
    """
    scores, values = [], []
    for end in range(prompt_length, ids.shape[1]):
        value, taps = objective_and_taps(model, ids[:, :end], int(ids[0, end]), list(weights), objective)
        grads = torch.autograd.grad(value, [y for _, y in taps.values()])
        found = {name: (x, grad) for (name, (x, _)), grad in zip(taps.items(), grads, strict=True)}
        scores.append([[_inner(weight, *found[name]) for weight in weights[name]] for name in weights])
        values.append(value.item())
    shape = (len(scores), len(weights), len(next(iter(weights.values()))))
    by_token = torch.tensor(scores, dtype=torch.float64).reshape(shape)
    return by_token.transpose(0, 1), torch.tensor(values, dtype=torch.float64)


def client_weights(model: PreTrainedModel, layer: str, change: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
    """W_k = G - (G - G_prev) + delta_k in fp32, [O, I] each: the clients' full weights of a layer."""
    sent = effective_weight(layer_of(model, layer)).float() - change.float()
    return [sent + delta.float() for delta in deltas]


def objective_and_taps(
    model: PreTrainedModel, context: Tensor, token: int, layers: list[str], objective: Objective
) -> tuple[Tensor, dict[str, tuple[Tensor | None, Tensor]]]:
    """f_t, and per layer (x, y) of the module, or (None, [O, I] weight) where the weight itself is the leaf."""
    taps: dict[str, tuple[Tensor | None, Tensor]] = {}
    leaves: dict[str, Tensor] = {}

    def tap(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # Frozen models carry no gradient: adding a zero that wants one starts the graph here. `Game.taps` does the
            # same; the oracle shares no code with what is held against it.
            output = output + torch.zeros_like(output).requires_grad_()
            taps[name] = (args[0].detach(), output)
            return output.clone()

        return hook

    found = [layer_of(model, name) for name in layers]
    arguments = {"input_ids": context, "use_cache": False}
    with torch.enable_grad(), straight_through([model]), ExitStack() as stack:
        for layer in found:
            if layer.kind == "embedding":
                # torch leaves the padding token's row out of the gradient, also where the token is really meant.
                stack.enter_context(replaced_attribute(layer.owner, "padding_idx", None))
            if layer.kind != "linear":
                if layer.weight.is_meta:
                    raise GenerationError(
                        "method",
                        expected=f"{layer.parameter} in memory for method paper",
                        got="an offloaded weight",
                        remedy="Use another method, or trace linear layers alone",
                    )
                weight = layer.weight.detach()
                weight = (weight.mT if layer.transposed else weight).requires_grad_()
                taps[layer.name] = (None, weight)
                leaves[layer.parameter] = weight.mT if layer.transposed else weight
            else:
                stack.enter_context(hooks(after(layer.module, tap(layer.name))))
        output: Any = functional_call(model, leaves, (), arguments, tie_weights=False)
        logits = output.logits[0, -1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        value = logits[token]
        if objective == "log_prob":
            value = logits.log_softmax(-1)[token]
        elif objective == "log_odds":
            # log p - log(1 - p), with 1 - p as the sum of all other tokens' probabilities.
            others = torch.cat([logits[:token], logits[token + 1 :]])
            value = logits[token] - others.logsumexp(0)
    return value, taps


def _inner(weight: Tensor, x: Tensor | None, grad: Tensor) -> float:
    """sum over positions of <W x[pos], g[pos]>, or, without x, <W, df/dW>."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if x is None:
        return float((weight.to(wide) * grad.to(wide)).sum(dtype=torch.float64))
    x, grad = x.flatten(0, -2).to(wide), grad.flatten(0, -2).to(wide)
    return float(((x @ weight.to(wide).T) * grad).sum(dtype=torch.float64))
