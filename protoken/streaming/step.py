"""Between two tokens of a streamed generation: what `generate` calls, and how each token gets its text.

Once a token is chosen it is scored, then handed over when the caller's own streamer has seen it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from protoken.precision import warn_of_noise
from protoken.streaming.handover import OwnSeed
from protoken.streaming.leaf_tap import LeafTap
from protoken.streaming.run import StreamedToken, StreamRun
from protoken.text import tokens_of


class Step(BaseStreamer):  # type: ignore[misc]
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

    def arguments(self) -> dict[str, Any]:
        """The arguments of `generate` through which it is called."""
        criteria = [*(self.run.arguments.get("stopping_criteria") or []), _Chosen(self)]
        return {"stopping_criteria": StoppingCriteriaList(criteria), "streamer": self}

    @contextmanager
    def clocked(self) -> Iterator[Step]:
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

    def __init__(self, step: Step) -> None:
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
