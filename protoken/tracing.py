"""`with tracing(model) as tape:` — every `generate` inside yields traces, and returns what it always returns.

Only this model instance is patched, by one attribute that is removed again whatever happens. Calls from every thread
are traced; where several tapes are open, each call lands on the one that its own thread or task has opened, and a call
from elsewhere on none. A server that answers some requests untraced calls `protoken.trace` for the others: that
concerns its own thread alone.

Batches with left padding, sampling, beams, several returned sequences, assisted and guided decoding, streamers and
caches of any kind: each returned sequence gets a trace of its own, in the order of the output's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from protoken.banks.bank import Rounds
from protoken.continuous import ContinuousBatches
from protoken.errors import GenerationError
from protoken.generation import bound_of, check_seed, refuse_paged, setting, stop_tokens
from protoken.ledger import Ledger
from protoken.models.patching import current_method, refuse_inference_mode, replaced_method
from protoken.planning.options import Granularity, Method, Options, Way
from protoken.results import Trace
from protoken.session import Session
from protoken.ways.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Tape:
    """Traces of the calls made so far; `traces` is flat, `calls` keeps each call's own list."""

    calls: list[list[Trace]] = field(default_factory=list)

    @property
    def traces(self) -> list[Trace]:
        """All traces so far, call by call, in the order of each call's rows."""
        return [trace for call in self.calls for trace in call]

    def __len__(self) -> int:
        return len(self.traces)

    def __getitem__(self, index: int) -> Trace:
        return self.traces[index]

    def __iter__(self) -> Iterator[Trace]:
        return iter(self.traces)


_opened: ContextVar[tuple[_Recorder, ...]] = ContextVar("protoken_tapes_opened_here", default=())
_generating: ContextVar[tuple[_Recorder, ...]] = ContextVar("protoken_tapes_at_work_here", default=())


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
    granularity: Granularity = "auto",
    objective: Objective | None = None,
    method: Method = "protoken",
    backend: str = "auto",
    nodes: int | None = None,
    pairs: int | None = None,
    memory_limit: int | str | None = None,
    seed: int | None = None,
) -> Iterator[Tape]:
    """Trace every `model.generate(...)` and `model.generate_batch(...)` inside the `with`.

    Args and errors are those of `protoken.trace`; `seed` is that of the sampled methods' coalitions alone, since the
    calls draw their tokens as they would without protoken. A call that cannot be traced (embeddings instead of ids, an
    encoder, padding on the right, a manager of continuous batching that outlives its call) raises `GenerationError`
    before anything is generated. Where a call is interrupted, its error goes through, the traces of earlier calls stay
    on the tape, and the model is as it was.

    >>> with protoken.tracing(model) as tape:
    ...     inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ...     out = model.generate(**inputs, max_new_tokens=32)
    >>> tape.traces[0].show()
    """
    refuse_inference_mode(model)
    check_seed(seed)
    options = Options(
        rounds=rounds,
        blocks=blocks,
        layers=layers,
        way=way,
        granularity=granularity,
        objective=objective,
        method=method,
        backend=backend,
        nodes=nodes,
        pairs=pairs,
        memory_limit=memory_limit,
    )
    recorder = _Recorder(Session.of(model, ledger, tokenizer, options, seed=seed), current_method(model, "generate"))
    methods: dict[str, Callable[..., Any]] = {"generate": recorder.generate}
    if hasattr(model, "generate_batch"):
        methods |= ContinuousBatches(recorder.session, recorder.tape.calls).methods()
    with ExitStack() as stack:
        stack.callback(_opened.set, _opened.get())
        _opened.set((*_opened.get(), recorder))
        for name, own in methods.items():
            stack.enter_context(replaced_method(model, name, own, meant=recorder.was_opened_here, shared=True))
        yield recorder.tape


@dataclass(eq=False)
class _Recorder:
    """Stands in for one model's `generate` for the length of a `with`."""

    session: Session
    call: Callable[..., Any]
    tape: Tape = field(default_factory=Tape)

    def was_opened_here(self) -> bool:
        """Whether the `with` is one of the thread's or task's that asks."""
        return self in _opened.get()

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if self in _generating.get():
            # A model that drafts for itself: the call that is being traced calls again.
            return self.call(inputs, *args, **kwargs)
        before = _generating.set((*_generating.get(), self))
        try:
            return self._traced(inputs, *args, **kwargs)
        finally:
            _generating.reset(before)

    def _traced(self, inputs: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        model = self.session.model
        refuse_inference_mode(model)
        prompt = _prompt_of(inputs, args, kwargs)
        refuse_paged(model, kwargs)
        self.session.look_again()
        self.session.check_memory(prompt.shape[1], bound_of(model, kwargs, prompt.shape[1]))
        arguments = dict(kwargs) if inputs is None else {"inputs": inputs, **kwargs}
        output, traces = self.session.run(
            arguments,
            call=self.call,
            prompt=prompt,
            attention_mask=_mask_of(model, prompt, arguments),
            # The batch; each trace has its own row of it.
            given={k: v for k, v in kwargs.items() if k not in ("inputs", "input_ids", "attention_mask")},
        )
        self.tape.calls.append(traces)
        return output


def _prompt_of(inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The prompt ids [B, P] of a call.

    Raises:
        GenerationError: there are none, or not a token in them, or they came with arguments by position.
    """
    prompt = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs"))
    if args or kwargs.get("inputs_embeds") is not None or not isinstance(prompt, Tensor) or prompt.dim() != 2:
        raise GenerationError(
            "generate",
            expected="prompt ids [B, P] as first argument or input_ids, all else by name",
            got="inputs_embeds" if kwargs.get("inputs_embeds") is not None else type(prompt).__name__,
            remedy="Pass token ids; generations from embeddings or from nothing cannot be traced",
        )
    if not prompt.numel():
        raise GenerationError("generate", expected="at least one token in one prompt", got=f"ids {tuple(prompt.shape)}")
    return prompt


def _mask_of(model: PreTrainedModel, prompt: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The attention mask of the call; without one, padding tokens are masked unless they are stop tokens.

    That is the guess of transformers; the mask is passed on, so that generation and replay cannot disagree.
    """
    mask = arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(prompt)
        pads = stop_tokens(setting(model, arguments, "pad_token_id"))
        if pads and not pads & stop_tokens(setting(model, arguments, "eos_token_id")):
            mask = (prompt != pads.pop()).long()
        arguments["attention_mask"] = mask
    return mask
