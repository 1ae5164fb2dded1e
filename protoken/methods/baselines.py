"""What simpler rules would say, kept honest: each does its best with what it may look at.

chance              uniformly random scores, seeded by the response: what top-1 is worth without any knowledge
aggregation_weight  rho_k, averaged over the rounds
update_norm         || rho_k delta_k ||, over every parameter that moved
cosine              cos(delta_k, df/dW at G): first order without the size of the update
client_log_prob     f_t under the client's own model C_k = G_prev + delta_k, of the last round it took part in
activation_only     rho_k * sum over outputs of delta_k x_t: the published score with the gradient left out (g = 1)
head_only           rho_k < delta_k h_t, df_t/dz_t > at the output head alone, z the head's output
tracefl             per layer l: < delta_k, df/dW_l > standardised over the clients; averaged over layers. A rendering
                    of TraceFL's layer-by-layer provenance (arXiv 2312.13632) for language models, not its code

None of them conserves anything: their traces carry change 0 and residual 0, and their scores are comparable within one
response only. Costs: none, one backward pass (cosine, tracefl), one forward pass (activation_only, head_only), or K
forward passes (client_log_prob).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from protoken.ledger import Ledger
from protoken.methods.aumann_shapley import project
from protoken.methods.game import Game
from protoken.methods.updates import participants
from protoken.models.layers import is_conv1d
from protoken.ops import client_scores, client_scores_reference
from protoken.ways.projection import Scores


def chance(game: Game, ledger: Ledger) -> Tensor:
    """[K] uniform in [0, 1)."""
    seed = hash((tuple(game.response.ids[0].tolist()), game.response.prompt_length)) & (2**62 - 1)
    return torch.rand(len(game.updates.clients), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def aggregation_weight(game: Game, ledger: Ledger) -> Tensor:
    """[K], the mean of rho_k over the rounds, absent ones included."""
    shares = [participants(ledger.round(number)) for number in game.updates.rounds]
    found = [sum(share.get(client, 0.0) for share in shares) / len(shares) for client in game.updates.clients]
    return torch.tensor(found, dtype=torch.float64)


def update_norm(game: Game, ledger: Ledger) -> Tensor:
    """[K], Frobenius norms of what was added to G."""
    return _norms(game) * game.updates.weights


def cosine(game: Game, ledger: Ledger) -> Tensor:
    """[K] in [-1, 1]; 0 for a client without an update."""
    _, grads = game.gradient(game.end)
    size = torch.stack([grad.double().norm() for grad in grads.values()]).norm().cpu()
    return _ratio(project(game, grads).sum(0), _norms(game) * size)


def client_log_prob(game: Game, ledger: Ledger) -> Tensor:
    """[T, K], log-probabilities of the response's tokens under each client's own model."""
    return torch.stack([game.value_at(_client_model(game, ledger, c)) for c in game.updates.clients], dim=1)


def activation_only(game: Game, ledger: Ledger) -> Tensor:
    """[T, K], from the traced layers' inputs at the deciding positions."""
    layers = game.updates.layers
    found = torch.zeros(game.response.new_tokens, len(game.updates.clients), dtype=torch.float64)
    for layer, (x, y, _) in game.taps(layers).items():
        found += _scores(x, torch.ones_like(y), _matrices(game, layer))
    return found * game.updates.weights


def head_only(game: Game, ledger: Ledger) -> Tensor:
    """[T, K], from the head's input and the objective's gradient at its output."""
    name = next(n for n, module in game.model.named_modules() if module is game.architecture.head)
    x, _, grad = game.taps([name])[name]
    (parameter,) = game.updates.names
    return _scores(x, grad, [delta[parameter] for delta in game.updates.deltas]) * game.updates.weights


def tracefl(game: Game, ledger: Ledger) -> Tensor:
    """[K], the mean over layers of scores that are standardised within their layer."""
    _, grads = game.gradient(game.end)
    scores = project(game, grads)  # [L, K]
    centred = scores - scores.mean(1, keepdim=True)
    return _ratio(centred, centred.std(1, correction=0, keepdim=True).expand_as(centred)).mean(0)


BASELINES: dict[str, Callable[[Game, Ledger], Tensor]] = {
    "chance": chance,
    "aggregation_weight": aggregation_weight,
    "update_norm": update_norm,
    "cosine": cosine,
    "client_log_prob": client_log_prob,
    "activation_only": activation_only,
    "head_only": head_only,
    "tracefl": tracefl,
}


def baseline_scores(name: str, game: Game, ledger: Ledger) -> Scores:
    """A baseline's scores: per token where it has them, else totals spread over no layer.

    `change` and `residual` are 0: there is nothing that a baseline's scores must add up to.
    """
    found = BASELINES[name](game, ledger)
    per_token = found.dim() == 2
    return Scores(
        tokens=found if per_token else None,
        layer_totals=None if per_token else found[None],
        change_tokens=None,
        change=0.0,
        objective=game.value_at_end(),
        residual_tokens=torch.zeros(len(found), dtype=torch.float64) if per_token else None,
        residual=0.0,
    )


def _client_model(game: Game, ledger: Ledger, client: str) -> dict[str, Tensor]:
    """C_k: the moving parameters as the client sent them back in its last round."""
    took_part = [r for r in game.updates.rounds if client in participants(ledger.round(r))]
    last = took_part[-1]
    weights = {name: value.clone() for name, value in game.end.items()}
    for number in game.updates.rounds:
        if number >= last:
            for name in game.updates.names:
                weights[name].sub_(ledger.round(number).change(name).to(weights[name]))
    for name, delta in ledger.round(last).deltas(client, game.updates.names):
        weights[name].add_(delta.to(weights[name]))
    return weights


def _norms(game: Game) -> Tensor:
    """|| delta_k || over all moving parameters, fp64 [K]."""
    return torch.stack(
        [torch.stack([d.double().norm() for d in delta.values()]).norm().cpu() for delta in game.updates.deltas]
    )


def _matrices(game: Game, layer: str) -> list[Tensor]:
    """The layer's deltas as [O, I]."""
    module: nn.Module = game.model.get_submodule(layer)
    name = game.updates.names[game.updates.layers.index(layer)]
    deltas = [delta[name] for delta in game.updates.deltas]
    return [delta.T for delta in deltas] if is_conv1d(module) else deltas


def _scores(x: Tensor, grad: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """<grad_t, delta_k x_t>, fp64 [T, K]."""
    bank = [matrix.to(x.device) for matrix in matrices]
    if x.dtype == torch.float64:
        return client_scores_reference(x, grad, torch.stack(bank)).double().cpu().T
    return client_scores(x, grad, bank).double().cpu().T


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0."""
    return torch.where(whole > 0, part / whole.clamp(min=1e-300), torch.zeros_like(part))
