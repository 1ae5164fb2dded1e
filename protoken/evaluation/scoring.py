"""Answer prompts in batches, and score the same answers by many methods: what all experiments are made of.

Every answer is generated once. A method that works on what was captured gets a capture by teacher forcing, which is
exact (see generation.py); one that replays gets the answer. So methods differ in nothing but themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from protoken.attachment import make_attachment
from protoken.attribution import attribute, read_source
from protoken.banks.bank import Rounds
from protoken.evaluation.base_model import BaseModel
from protoken.generation import Generated
from protoken.ledger import Ledger
from protoken.models.patching import evaluation_mode
from protoken.planning.options import Method, Options, Way
from protoken.planning.plan import make_plan
from protoken.results.checks import Array
from protoken.ways.capture import Capture, capturing, run_whole
from protoken.ways.objective import Objective
from protoken.ways.relevance import Response


@dataclass(frozen=True)
class Scorer:
    """One way to attribute, by the arguments of `protoken.trace`; refused at once where `trace` would refuse them.

    name     what the results call it
    limit    score only so many of the samples (slow methods); None for all
    """

    name: str
    method: Method = "protoken"
    blocks: int | None = None
    layers: tuple[str, ...] | None = None
    way: Way = "auto"
    objective: Objective | None = None
    rounds: Rounds = "last"
    nodes: int | None = None
    pairs: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        _ = self.options

    @property
    def options(self) -> Options:
        """What `protoken.trace` would make of the arguments."""
        return Options(
            rounds=self.rounds,
            blocks=self.blocks,
            layers=self.layers,
            way=self.way,
            objective=self.objective,
            method=self.method,
            nodes=self.nodes,
            pairs=self.pairs,
        )


@dataclass(frozen=True)
class Answer:
    """A prompt's answer by greedy decoding: token ids, text, and whether it ended by itself."""

    question: str
    response: Response
    text: str


@dataclass
class Scored:
    """What a scorer says of N answers: scores [N, K] of the clients, completeness and seconds per answer.

    residuals   |residual| / |change|; NaN for baselines, which have nothing to add up to
    """

    scorer: Scorer
    clients: tuple[str, ...]
    scores: Array
    residuals: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def of(self, clients: Sequence[str]) -> Array:
        """Scores in the order of these clients; 0 for one that the rounds do not know."""
        place = {client: k for k, client in enumerate(self.clients)}
        columns = [self.scores[:, place[c]] if c in place else np.zeros(len(self.scores)) for c in clients]
        return np.stack(columns, axis=1)


def answer(
    base: BaseModel,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    batch: int = 32,
    step: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Greedy answers in the order of the questions, generated in batches of similar length.

    An answer includes its end-of-turn token, if it came to it.
    """
    tokenizer = base.tokenizer
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in questions
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for i, ids in zip(chosen, _generate(base, [prompts[i] for i in chosen], max_new_tokens), strict=True):
            text = tokenizer.decode(ids[len(prompts[i]) :], skip_special_tokens=True)
            found[i] = Answer(questions[i], Response(torch.tensor([ids]), len(prompts[i])), text)
        if step is not None:
            step(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


def forced(base: BaseModel, question: str, text: str) -> Answer:
    """The answer `text` to a question, whoever wrote it, with its end of turn: for a counterpart of what came out."""
    tokenizer = base.tokenizer
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids = [*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Answer(question, Response(torch.tensor([ids]), len(prompt)), text)


def up_to(base: BaseModel, one: Answer, text: str) -> Answer:
    """The answer cut after the token that completes the first `text` in it, in any case; whole where it has none.

    Its tokens' own scores are what they were: no token depends on what comes after it.
    """
    ids, start = one.response.ids[0].tolist(), one.response.prompt_length
    for end in range(start + 1, len(ids)):
        said = base.tokenizer.decode(ids[start:end], skip_special_tokens=True)
        if text.lower() in said.lower():
            return Answer(one.question, Response(one.response.ids[:, :end], start), said)
    return one


def score(
    base: BaseModel,
    ledger: Ledger,
    answers: Sequence[Answer],
    scorers: Sequence[Scorer],
    *,
    at_round: int | None = None,
    step: Callable[[str, int, int], None] | None = None,
) -> list[Scored]:
    """Score the same answers by every scorer; the model must hold the weights after `at_round`."""
    own = make_attachment(base.model, ledger, base.tokenizer, at_round=at_round)
    captures = _Captures(base.model, own.architecture)
    found = []
    for scorer in scorers:
        plan = make_plan(own.architecture, scorer.options)
        source = read_source(own, base.model, plan, scorer.rounds)
        chosen = answers[: scorer.limit]
        scored = Scored(scorer, source.clients, np.zeros((len(chosen), len(source.clients))))
        with evaluation_mode(base.model):
            for n, one in enumerate(chosen):
                generated = captures.of(plan, n, one.response)
                began = time.perf_counter()
                _, scores = attribute(base.model, own.architecture, generated, source, plan, own.ledger)
                scored.seconds.append(time.perf_counter() - began)
                scored.scores[n] = scores.totals.numpy()
                scored.residuals.append(abs(scores.residual / scores.change) if scores.change else float("nan"))
                if step is not None:
                    step(scorer.name, n + 1, len(chosen))
        found.append(scored)
    return found


class _Captures:
    """Captures of the answers by teacher forcing, each made once; what the last block needs is in all of them."""

    def __init__(self, model: Any, architecture: Any) -> None:
        self._model, self._architecture = model, architecture
        self._made: dict[tuple[int | None, int], Generated] = {}
        self._any: dict[int, Generated] = {}

    def of(self, plan: Any, number: int, response: Response) -> Generated:
        """What a plan needs of the answer of that number; a method that replays needs the response alone."""
        if plan.replays:
            return Generated(response, Capture(every=True))
        first = plan.first_block if plan.needs_sequence else None
        found = self._made.get((first, number)) or (self._any.get(number) if first is None else None)
        if found is None:
            found = self._capture(response, first)
            self._made[first, number] = self._any[number] = found
        return found

    def _capture(self, response: Response, first: int | None) -> Generated:
        sequence = first is not None
        with capturing(self._architecture, first or 0, sequence=sequence, every=True) as capture, torch.no_grad():
            run_whole(self._model, response.seen)
        return Generated(response, capture)


def _generate(base: BaseModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Ids of prompt and answer, each row without its padding, up to and including its end of turn."""
    width = max(map(len, prompts))
    pad, stop = base.tokenizer.pad_token_id, base.tokenizer.eos_token_id
    pad = stop if pad is None else pad
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad(), evaluation_mode(base.model):
        made = base.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=stop,
        )
    rows = []
    for prompt, row in zip(prompts, made[:, width:].tolist(), strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        rows.append([*prompt, *row[:end]])
    return rows
