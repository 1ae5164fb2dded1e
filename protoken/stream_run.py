"""One streamed generation, from inside: it is called with where to hand its tokens, and runs to the end.

generate ─▶ token chosen ─▶ stopping criterion: relevance, scores ─▶ the caller's streamer ─▶ handed over
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .assembly import assemble, model_name
from .attachment import Attachment
from .bank import Bank
from .handover import OwnSeed
from .layer_bank import scores
from .leaf_tap import LeafTap, TokenRelevance
from .origin import remember
from .patching import evaluation_mode
from .plan import Plan
from .precision import warn_of_noise
from .projection import Scores, project_local
from .relevance import LocalRelevance, Response
from .results import Trace
from .text import tokens_of


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
        architecture = self.own.architecture
        tap = LeafTap(self.model, architecture, self.plan.layers, self.plan.objective, self.plan.backend)
        with (
            evaluation_mode(self.model),
            OwnSeed(self.seed, self.row.device) as seed,
            tap.installed(check),
            _Step(self, tap, push, seed).clocked() as step,
        ):
            criteria = [*(self.arguments.get("stopping_criteria") or []), _Chosen(step)]
            extra = {"stopping_criteria": StoppingCriteriaList(criteria), "streamer": step}
            # The class's own: inside `tracing` the instance's would replay the response under our hooks.
            type(self.model).generate(self.model, inputs=self.row, **{**self.arguments, **extra})
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
            model=model_name(self.model),
            ledger=self.own.ledger.run,
            seed=self.seed,
            seconds_generate=self.seconds - self.seconds_scoring,
            seconds_trace=self.seconds,
            generate_arguments=self.given,
        )
        remember(trace, self.model, self.own)
        return trace


class _Step(BaseStreamer):  # type: ignore[misc]
    """Between two tokens: scores the one chosen, and hands it over when the streamer's turn has come.

    Stopping criteria are asked before the streamer or after it, depending on the version, and on some devices one
    token later; a token is handed over as soon as both have seen it.
    """

    def __init__(
        self,
        run: StreamRun,
        tap: LeafTap,
        push: Callable[[StreamedToken], object],
        seed: OwnSeed,
    ) -> None:
        self.run, self.tap, self.push, self.seed = run, tap, push, seed
        self.streamer = run.arguments.get("streamer")
        self.speller = _Speller(run.tokenizer, run.row[0].tolist())
        self.totals = torch.zeros(len(run.bank.clients), dtype=torch.float64)
        self.waiting: deque[StreamedToken] = deque()
        self.put_calls = self.handed = 0
        self.ended = False
        self.asleep = 0.0

    @contextmanager
    def clocked(self) -> Iterator[_Step]:
        """Counts the seconds of generating, without those in which the consumer had the word."""
        began = time.perf_counter()
        try:
            yield self
        finally:
            self.run.seconds = time.perf_counter() - began - self.asleep
            self.end()

    def score(self, ids: Tensor) -> None:
        """The token at the end of ids [1, n + 1] has just been chosen."""
        began, run = time.perf_counter(), self.run
        found = self.tap.relevance(ids)
        if not run.found:
            self._check_precision()
        own = run.project(found)
        self.totals += own
        token = int(ids[0, -1])
        named = dict(zip(run.bank.clients, own.tolist(), strict=True))
        totals = dict(zip(run.bank.clients, self.totals.tolist(), strict=True))
        value = float(found.objective[0])
        self.waiting.append(StreamedToken(len(run.found), token, self.speller.add(token), value, named, totals))
        run.found.append(found)
        run.seconds_scoring += time.perf_counter() - began
        self._hand_over()

    def _check_precision(self) -> None:
        """Of the prompt's own token, whose block was captured."""
        run, first = self.run, self.tap.replayed
        if first is not None:
            with self.tap.paused():
                warn_of_noise(run.model, run.own.architecture, first, run.bank, run.plan.layers, run.plan.objective)

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""
        if self.streamer is not None:
            self.streamer.put(value)
        self.put_calls += 1
        self._hand_over()

    def end(self) -> None:
        """Also where the generation was left early, so that nobody goes on waiting for the caller's streamer."""
        if self.streamer is not None and self.put_calls and not self.ended:
            self.ended = True
            self.streamer.end()

    def _hand_over(self) -> None:
        while self.waiting and self.handed < self.put_calls - 1:
            token = self.waiting.popleft()
            self.handed += 1
            began = time.perf_counter()
            try:
                with self.tap.paused(), self.seed.lent():
                    self.push(token)
            finally:
                self.asleep += time.perf_counter() - began


class _Chosen(StoppingCriteria):  # type: ignore[misc]
    """Never stops anything; it is where `generate` shows the token that it has chosen."""

    def __init__(self, step: _Step) -> None:
        self.step = step

    def __call__(self, input_ids: Tensor, scores: object, **_: Any) -> Tensor:
        self.step.score(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Speller:
    """The text that each token adds, as `tokens_of` would give it for the whole response."""

    def __init__(self, tokenizer: Any, prompt_ids: list[int]) -> None:
        self.tokenizer, self.seen, self.pending = tokenizer, prompt_ids[-8:], list[int]()

    def add(self, token: int) -> str:
        self.pending.append(token)
        text = tokens_of(self.tokenizer, self.seen, self.pending)[-1].text
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            # A character is not complete yet: it belongs to the token that completes it.
            return ""
        self.seen, self.pending = [*self.seen, *self.pending][-8:], []
        return text


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
