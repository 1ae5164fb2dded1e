"""From a client to its records: which rows of training text would this response have moved?

Bidirectional gradient optimisation (arXiv 2606.04928): had the model learned from the response, or unlearned it, which
records would it predict better, or worse? The probed weights W are moved both ways along the response's gradient,

    W+ = W + eta g / |g|        W- = W - eta g / |g|        g = d/dW sum_t log p(y_t | y_<t),  eta = step * |W|

(`steps` times, with g anew at each point, where more than one is asked for), and a record z is scored by

    score(z) = (loss(z; W-) - loss(z; W+)) / 2        loss: mean -log p of the tokens of z's answer, nats per token

so positive means: what makes the response likelier makes the record likelier. The difference of both directions
cancels what any move of the weights does to every record; its first order is eta <g / |g|, -d loss(z) / dW>.

    probe = protoken.record_probe(trace)             at the server, which knows the response
    scores = probe.score(model, records, tokenizer)  at the client, whose records never leave it

The published abstract leaves the step, the norm and the probed weights open: those here are this package's choice, and
docs/records.md shows what was measured for them.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from protoken.arguments import check_count, check_rate
from protoken.confidence import check_trace
from protoken.errors import ArgumentError, LedgerMismatchError, NonFiniteError
from protoken.ledger import Ledger, tensor_digest
from protoken.ledger.transfer import save_tensors
from protoken.methods.moved import Moved
from protoken.methods.replayed import recorded_parameters
from protoken.models.architectures import architecture_of
from protoken.models.layers import input_device
from protoken.models.parameters import own_names, parameter_of
from protoken.models.patching import evaluation_mode, refuse_inference_mode
from protoken.origin import ids_of, origin_of
from protoken.paths import file_to_read
from protoken.planning.options import names_of
from protoken.records.scores import RecordScores
from protoken.records.text import EncodedRecord, Record, encode_record
from protoken.results import Trace
from protoken.text import as_row, check_tokenizer
from protoken.ways.objective import objective_values
from protoken.ways.relevance import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_STEP = 5e-4
SCHEMA = 1

_KIND = "protoken record probe"


@dataclass(frozen=True, eq=False, repr=False)
class RecordProbe:
    """The two moves of the probed weights; all that a client needs, beside its model, to score its records.

    up, down    name -> what is added to the global model's parameter for W+ and W-, fp32 (fp64 for such a model)
    digests     name -> SHA-256 of the parameter the probe was made at
    step        length of either path over the length of the probed weights together
    steps       gradient steps it was walked in
    """

    up: Mapping[str, Tensor]
    down: Mapping[str, Tensor]
    digests: Mapping[str, str]
    step: float
    steps: int

    def score(
        self,
        model: PreTrainedModel,
        records: Sequence[Record],
        tokenizer: Any,
        *,
        batch_size: int = 4,
        max_tokens: int = 512,
        chat: bool | None = None,
    ) -> RecordScores:
        """Score records: two passes of the probed blocks and one of those below them per record.

        Args:
            model: the global model the probe was made at; left as it was found.
            records: see `records.Record`; a client's own, which this function shows to nobody.
            tokenizer: the model's; records are text.
            batch_size: records at a time; neighbours in a batch change nothing but rounding.
            max_tokens: longer records are cut.
            chat: wrap prompts in the tokenizer's chat template; None: if it has one.

        Raises:
            ArgumentError: no records, or one that cannot be read.
            LedgerMismatchError: the model is not the one that the probe was made at.
        """
        refuse_inference_mode(model)
        if isinstance(records, str | bytes) or not isinstance(records, Sequence) or not records:
            raise ArgumentError("records", expected="a sequence of at least one record", got=type(records).__name__)
        check_count("batch_size", batch_size, 1)
        check_count("max_tokens", max_tokens, 2)
        check_tokenizer(tokenizer)
        if tokenizer is None:
            raise ArgumentError("tokenizer", expected="the model's tokenizer, since records are text", got="None")
        encoded = [
            encode_record(tokenizer, record, i, max_tokens=max_tokens, chat=chat) for i, record in enumerate(records)
        ]
        losses = torch.zeros(2, len(encoded), dtype=torch.float64)
        # Neighbours in length share a batch, so that little is spent on padding.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
        # The twin keeps the mode in which it is made: a client's model has mostly just been trained.
        with evaluation_mode(model), torch.no_grad():
            moved = self._moved(model)
            ends = [
                {name: value + by[name].to(value) for name, value in moved.values.items()}
                for by in (self.up, self.down)
            ]
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                losses[:, chosen] = _losses(moved, ends, [encoded[i] for i in chosen], input_device(model))
        return RecordScores(
            keys=tuple(record.key for record in encoded),
            clients=tuple(record.client for record in encoded),
            loss_up=losses[0].numpy(),
            loss_down=losses[1].numpy(),
            step=self.step,
            steps=self.steps,
            texts=tuple(record.text for record in encoded),
        )

    def _moved(self, model: PreTrainedModel) -> Moved:
        known = dict(model.named_parameters(remove_duplicate=False))
        own = {name: parameter_of(model, name) for name in self.up}
        for name, found in own.items():
            if found is None or tensor_digest(known[found].detach()) != self.digests[name]:
                raise LedgerMismatchError(
                    "model",
                    expected=f"the global model that the probe was made at, with its {name}",
                    got="no such parameter" if found is None else "other weights",
                    remedy="Load the global model of the round that was traced",
                )
        return Moved(model, architecture_of(model), {name: found for name, found in own.items() if found is not None})

    def __repr__(self) -> str:
        return f"RecordProbe({len(self.up)} parameters, step {self.step:g} in {self.steps})"

    def save(self, path: str | PathLike[str]) -> None:
        """Write the probe as one safetensors file: what the server sends to the clients.

        Raises:
            DurabilityError: the file system refused.
        """
        tensors = {f"up.{name}": tensor.contiguous() for name, tensor in self.up.items()}
        tensors |= {f"down.{name}": tensor.contiguous() for name, tensor in self.down.items()} if self.steps > 1 else {}
        about = {"kind": _KIND, "schema": SCHEMA, "step": self.step, "steps": self.steps, "digests": dict(self.digests)}
        save_tensors(path, {name: tensor.cpu() for name, tensor in tensors.items()}, {"probe": json.dumps(about)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RecordProbe:
        """Read what `save` wrote.

        Raises:
            ArgumentError: the file is something else, or damaged.
        """
        path = file_to_read("path", path, "a file written by RecordProbe.save")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["probe"])
                if (about["kind"], about["schema"]) != (_KIND, SCHEMA):
                    raise ValueError(f"schema {about['schema']!r} of {about['kind']!r}")
                steps, digests = int(about["steps"]), dict(about["digests"])
                up = {name: file.get_tensor(f"up.{name}") for name in digests}
                down = {n: file.get_tensor(f"down.{n}") if steps > 1 else -up[n] for n in digests}
                step = float(about["step"])
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, SafetensorError) as error:
            raise ArgumentError(
                "path", expected="a file written by RecordProbe.save", got=f"{path}: {error}"
            ) from error
        if not all(torch.isfinite(tensor).all() for tensor in (*up.values(), *down.values())):
            raise NonFiniteError("path", expected="finite moves of the weights", got=f"NaN or infinity in {path}")
        return cls(up, down, digests, step, steps)


def record_probe(
    trace: Trace,
    *,
    span: tuple[int, int] | None = None,
    step: float = DEFAULT_STEP,
    steps: int = 1,
    blocks: int | None = None,
    layers: list[str] | None = None,
    model: PreTrainedModel | None = None,
    ledger: Ledger | str | PathLike[str] | None = None,
    tokenizer: Any = None,
) -> RecordProbe:
    """Move the weights along and against a response, to ask clients which of their records move with it.

    Args:
        span: tokens [i, j) of the response; None for all of it.
        step: length of either path over the length of the probed weights together.
        steps: gradient steps it is walked in; one gradient for both directions if 1, else one per step and direction.
        blocks, layers: probe the last so many blocks, or layers by name or pattern; None: every parameter that the
            ledger records for the trace's rounds.
        model, ledger, tokenizer: where the trace does not know them any more (loaded from a file).

    Raises:
        ArgumentError: a step that is not positive, a span outside the response or without tokens, or a trace that is a
            part of an answer and does not begin where the answer does.
        ModelError: the trace does not know its model, or that model is gone.
        LedgerMismatchError: the model is not the one that the ledger was written for.
        NonFiniteError: the gradient vanishes or is not finite, so it gives no direction.
    """
    check_trace(trace)
    check_rate("step", step)
    if layers is not None:
        layers = list(names_of(layers))
    step, steps = float(step), check_count("steps", steps, 1)
    if blocks is not None:
        check_count("blocks", blocks, 1)
    ids, prompt_length = ids_of(trace)
    model, own = origin_of(trace, model, ledger, tokenizer)
    refuse_inference_mode(model)
    own.follow(model)
    start, stop = _checked_span(span, len(trace.token_list))
    names = recorded_parameters(own.ledger, trace.info.rounds, model, own.architecture, blocks, layers)
    parameters = own_names([own.ledger.round(number) for number in trace.info.rounds], model, names)
    if own.verify:
        own.check_weights(model, names)
    response = Response(as_row(ids, input_device(model)), prompt_length)
    with evaluation_mode(model):  # in which the twin has to be made, too
        moved = Moved(model, own.architecture, parameters)
        up, down = _walk(moved, response, slice(start, stop), step, steps)
    known = dict(model.named_parameters(remove_duplicate=False))
    digests = {name: tensor_digest(known[found].detach()) for name, found in parameters.items()}
    return RecordProbe(up, down, digests, step, steps)


def _checked_span(span: tuple[int, int] | None, count: int) -> tuple[int, int]:
    pair = (0, count) if span is None else span
    if isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(place, Integral) for place in pair):
        start, stop = map(operator.index, pair)
        if 0 <= start < stop <= count:
            return start, stop
    raise ArgumentError(
        "span", expected=f"tokens (i, j) with 0 <= i < j <= {count}, the response's length", got=repr(span)
    )


def _walk(
    moved: Moved, response: Response, tokens: slice, step: float, steps: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is added for W+ and for W-, by name."""
    entry = moved.enter(response.seen)
    first = response.prompt_length - 1 + tokens.start
    rows = torch.arange(first, response.prompt_length - 1 + tokens.stop, device=response.ids.device)

    def direction(at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
        with torch.enable_grad():
            values = objective_values(moved.logits(leaves, entry, rows)[0], response.tokens[tokens], "log_prob")
            grads = torch.autograd.grad(values.sum(), list(leaves.values()), materialize_grads=True)
        size = _length(grads)
        if not 0 < size < float("inf"):
            raise NonFiniteError(
                "trace",
                expected="a response whose gradient gives a direction",
                got=f"a gradient of length {size}",
                remedy="Probe a span with tokens the model was less than certain of, or other layers",
            )
        return {name: grad / size for name, grad in zip(leaves, grads, strict=True)}

    reach = step * _length(list(moved.values.values())) / steps

    def walk(sign: float) -> dict[str, Tensor]:
        at = dict(moved.values)
        for _ in range(steps):
            along = direction(at)
            at = {name: value + sign * reach * along[name] for name, value in at.items()}
        return {name: value - moved.values[name] for name, value in at.items()}

    if steps == 1:
        up = {name: reach * along for name, along in direction(moved.values).items()}
        return up, {name: -along for name, along in up.items()}
    return walk(1.0), walk(-1.0)


def _length(tensors: Sequence[Tensor]) -> float:
    """Euclidean length of all entries together."""
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5)


def _losses(
    moved: Moved, ends: Sequence[Mapping[str, Tensor]], batch: Sequence[EncodedRecord], device: torch.device
) -> Tensor:
    """Mean -log p of the answers' tokens, fp64 [ends, B]. Padding stands to the right, where causality hides it."""
    width = max(len(record.ids) for record in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long, device=device)
    for row, record in enumerate(batch):
        ids[row, : len(record.ids)] = torch.tensor(record.ids, device=device)
    first = min(record.answer_start for record in batch) - 1
    rows = torch.arange(first, width - 1, device=device)
    entry = moved.enter(ids)
    found = torch.zeros(len(ends), len(batch), dtype=torch.float64)
    for i, weights in enumerate(ends):
        logits = moved.logits(weights, entry, rows)
        for j, record in enumerate(batch):
            scored = logits[j, record.answer_start - 1 - first : len(record.ids) - 1 - first]
            targets = ids[j, record.answer_start : len(record.ids)]
            found[i, j] = functional.cross_entropy(scored.double(), targets).cpu()
    return found
