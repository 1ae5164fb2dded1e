"""`with tracing(model) as tape:` — every `generate` inside yields traces, and returns what it always returns.

Only this model instance is patched, by one attribute that is removed again whatever happens. Batches with left
padding, sampling, beams, several returned sequences, assisted and guided decoding, streamers and caches of any kind:
each returned sequence gets a trace of its own, in the order of the output's rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attachment import Attachment, attachment_of, make_attachment
from .attribution import Method, Plan, Way, assemble, attribute, make_plan, model_name, read_source
from .bank import Bank, Rounds
from .counterfactual import remember
from .errors import GenerationError
from .generation import Generated, generate
from .ledger import Ledger
from .methods.replayed import Settings
from .methods.weights import Updates
from .patching import evaluation_mode, refuse_inference_mode, replaced_method
from .relevance import Objective
from .results import Trace


@dataclass
class Tape:
    """Traces of the calls made so far; `traces` is flat, `calls` keeps each call's own list."""

    calls: list[list[Trace]] = field(default_factory=list)

    @property
    def traces(self) -> list[Trace]:
        return [trace for call in self.calls for trace in call]

    def __len__(self) -> int:
        return len(self.traces)

    def __getitem__(self, index: int) -> Trace:
        return self.traces[index]

    def __iter__(self) -> Iterator[Trace]:
        return iter(self.traces)


@contextmanager
def tracing(
    model: PreTrainedModel,
    *,
    ledger: Ledger | str | PathLike[str] | None = None,
    tokenizer: Any = None,
    rounds: Rounds = "last",
    blocks: int | None = None,
    layers: list[str] | None = None,
    way: Way = "auto",
    objective: Objective | None = None,
    method: Method = "protoken",
    backend: str = "auto",
    nodes: int = 4,
    pairs: int | None = None,
) -> Iterator[Tape]:
    """Trace every `model.generate(...)` inside the `with`.

    Args and errors are those of `protoken.trace`. A call that cannot be traced (embeddings instead of ids, an
    encoder, padding on the right) raises `GenerationError` before anything is generated.

    >>> with protoken.tracing(model) as tape:
    ...     out = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=32)
    >>> tape.traces[0].show()
    """
    refuse_inference_mode(model)
    own = attachment_of(model) if ledger is None else make_attachment(model, ledger, tokenizer)
    settings = Settings(nodes=nodes, pairs=pairs)
    plan = make_plan(own.architecture, blocks, layers, way, objective, method, backend, settings)
    bank = read_source(own, model, plan, rounds)
    tokenizer = own.tokenizer if tokenizer is None else tokenizer
    recorder = _Recorder(model, model.generate, own, tokenizer, plan, bank)
    with replaced_method(model, "generate", recorder.generate):
        yield recorder.tape


@dataclass
class _Recorder:
    """Stands in for one model's `generate` for the length of a `with`."""

    model: PreTrainedModel
    call: Callable[..., Any]
    own: Attachment
    tokenizer: Any
    plan: Plan
    bank: Bank | Updates
    tape: Tape = field(default_factory=Tape)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        refuse_inference_mode(self.model)
        prompt = _prompt_of(inputs, args, kwargs)
        arguments = dict(kwargs) if inputs is None else {"inputs": inputs, **kwargs}
        began = time.perf_counter()
        with evaluation_mode(self.model):
            output, found = generate(
                self.model,
                self.own.architecture,
                arguments,
                call=self.call,
                prompt=prompt,
                attention_mask=_mask_of(self.model, prompt, arguments),
                first_block=self.plan.first_block,
                sequence=self.plan.needs_sequence,
            )
            generated_at = time.perf_counter()
            self.tape.calls.append([self._trace(one, generated_at - began, kwargs) for one in found])
        return output

    def _trace(self, generated: Generated, seconds_generate: float, arguments: dict[str, Any]) -> Trace:
        began = time.perf_counter()
        scores = attribute(self.model, self.own.architecture, generated, self.bank, self.plan, self.own.ledger)
        trace = assemble(
            self.tokenizer,
            generated.response,
            self.bank,
            scores,
            self.plan,
            model=model_name(self.model),
            ledger=self.own.ledger.run,
            seconds_generate=seconds_generate,
            seconds_trace=seconds_generate + time.perf_counter() - began,
            generate_arguments={k: v for k, v in arguments.items() if not isinstance(v, Tensor)},
        )
        remember(trace, self.model, self.own)
        return trace


def _prompt_of(inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The prompt ids [B, P] of a call.

    Raises:
        GenerationError: there are none, or they came with arguments by position.
    """
    prompt = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs"))
    if args or kwargs.get("inputs_embeds") is not None or not isinstance(prompt, Tensor) or prompt.dim() != 2:
        raise GenerationError(
            "generate",
            expected="prompt ids [B, P] as first argument or input_ids, all else by name",
            got="inputs_embeds" if kwargs.get("inputs_embeds") is not None else type(prompt).__name__,
            remedy="Pass token ids; generations from embeddings or from nothing cannot be traced",
        )
    return prompt


def _mask_of(model: PreTrainedModel, prompt: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The attention mask of the call; without one, padding tokens on the left of a row are taken for padding.

    transformers makes the same guess, but only if the padding token is no stop token; the mask is passed on, so that
    generation and replay cannot disagree.
    """
    mask = arguments.get("attention_mask")
    if mask is None:
        pad = arguments.get("pad_token_id", model.generation_config.pad_token_id)
        mask = torch.ones_like(prompt)
        stops = model.generation_config.eos_token_id
        if pad is not None and pad not in (stops if isinstance(stops, list) else [stops]):
            mask = ((prompt != pad).cumsum(1) > 0).long()
        arguments["attention_mask"] = mask
    return mask
