"""One streamed generation, from inside: it is called with where to hand its tokens, and runs to the end.

generate ─▶ token chosen ─▶ stopping criterion: relevance, scores ─▶ the caller's streamer ─▶ handed over
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from protoken.assembly import assemble, model_name
from protoken.attachment import Attachment
from protoken.banks.bank import Bank
from protoken.banks.layer_bank import scores
from protoken.models.patching import evaluation_mode
from protoken.origin import remember
from protoken.planning.plan import Plan
from protoken.results import Trace
from protoken.streaming.handover import OwnSeed
from protoken.streaming.leaf_tap import LeafTap, TokenRelevance
from protoken.ways.projection import Scores, project_local
from protoken.ways.relevance import LocalRelevance, Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StreamedToken:
    """One generated token, as soon as it is chosen.

    index       0-based
    text        what it adds to the response; "" while a character spans several tokens
    objective   its log-probability, log-odds or raw logit, as was asked
    scores      per client rho_k * sum over layers of <g, delta_k x>, in the objective's unit
    totals      per client the scores of all tokens so far, this one included
    """

    index: int
    id: int
    text: str
    objective: float
    scores: dict[str, float]
    totals: dict[str, float]

    @property
    def top(self) -> str:
        """The client that scores highest on this token; ties go by id."""
        return min(self.scores, key=lambda client: (-self.scores[client], client))


@dataclass
class StreamRun:
    """What a stream knows; `tokens` are those that have arrived, `found` the relevance of all that were chosen."""

    model: PreTrainedModel
    own: Attachment
    tokenizer: Any
    plan: Plan
    bank: Bank
    row: Tensor
    arguments: dict[str, Any]
    given: dict[str, Any]
    seed: int | None
    tokens: list[StreamedToken] = field(default_factory=list)
    found: list[TokenRelevance] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0.0
    seconds_scoring: float = 0.0

    def __call__(self, push: Callable[[StreamedToken], object], check: Callable[[], None]) -> None:
        """Generate; `push` takes each token, `check` raises where the generation shall end early."""
        # Its classes are transformers', which is not loaded before there is a model.
        from protoken.streaming.step import Step

        architecture = self.own.architecture
        tap = LeafTap(self.model, architecture, self.plan.layers, self.plan.objective, self.plan.backend)
        with (
            evaluation_mode(self.model),
            OwnSeed(self.seed, self.row.device) as seed,
            tap.installed(check),
            Step(self, tap, push, seed).clocked() as step,
        ):
            # The class's own: inside `tracing` the instance's would replay the response under our hooks.
            type(self.model).generate(self.model, inputs=self.row, **{**self.arguments, **step.arguments()})
        self.finished = True

    def project(self, found: TokenRelevance) -> Tensor:
        """The scores of one token, fp64 [K]."""
        layers = self.plan.layers
        banks = [self.bank.layers[name] for name in layers]
        xs, grads = [found.x[name] for name in layers], [found.grad[name] for name in layers]
        routes = [found.routes.get(name) for name in layers]
        by_layer = scores(banks, xs, grads, routes, self.plan.backend)[..., 0]
        return by_layer.double().sum(0) * self.bank.weights

    def trace(self) -> Trace:
        """The trace of the tokens that have arrived so far."""
        new = torch.tensor([[token.id for token in self.tokens]], dtype=self.row.dtype, device=self.row.device)
        response = Response(torch.cat([self.row, new], dim=1), self.row.shape[1])
        found = self.found[: len(self.tokens)]
        if found:
            attributed = project_local(_joined(found), self.bank, self.plan.layers, self.plan.backend)
        else:
            attributed = Scores.empty(len(self.plan.layers), len(self.bank.clients))
        trace = assemble(
            self.tokenizer,
            response,
            self.bank,
            attributed,
            self.plan,
            self.own.ledger,
            model=model_name(self.model),
            seed=self.seed,
            seconds_generate=self.seconds - self.seconds_scoring,
            seconds_trace=self.seconds,
            generate_arguments=self.given,
        )
        remember(trace, self.model, self.own)
        return trace


def _joined(found: list[TokenRelevance]) -> LocalRelevance:
    """T tokens' relevance as the local way has it; gradients for earlier blocks are not part of a stream."""
    nothing = torch.empty(0)
    return LocalRelevance(
        x={name: torch.cat([one.x[name] for one in found]) for name in found[0].x},
        grad={name: torch.cat([one.grad[name] for one in found]) for name in found[0].grad},
        objective=torch.cat([one.objective for one in found]),
        hidden_grad=nothing,
        projection_grad=nothing,
        replay_error=0.0,
        routes={name: torch.cat([one.routes[name] for one in found]) for name in found[0].routes},
    )
