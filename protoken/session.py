"""What `trace` does once and `tracing` for every call: one model, its ledger and one plan, generation to traces."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor

from protoken.assembly import assemble, model_name
from protoken.attachment import Attachment, attachment_of, make_attachment
from protoken.attribution import attribute, read_source, settle
from protoken.banks.bank import LedgerBank
from protoken.generation import Generated, check_ids_are_all, generate, teacher_forced
from protoken.ledger import Ledger
from protoken.methods.updates import Updates
from protoken.models.layers import input_device
from protoken.models.patching import evaluation_mode
from protoken.origin import remember
from protoken.planning.options import Options
from protoken.planning.plan import Plan, make_plan
from protoken.results import Trace
from protoken.text import as_row, check_tokenizer
from protoken.ways.capture import Capture
from protoken.ways.relevance import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Session:
    """The choices of one `trace` or `tracing`, resolved against a model and its ledger."""

    model: PreTrainedModel
    own: Attachment
    tokenizer: Any
    plan: Plan
    source: LedgerBank | Updates

    @staticmethod
    def of(
        model: PreTrainedModel,
        ledger: Ledger | str | PathLike[str] | None,
        tokenizer: Any,
        options: Options,
        *,
        seed: int | None = None,
    ) -> Session:
        """Resolve the choices; nothing has been generated when one of them is refused."""
        own = attachment_of(model) if ledger is None else make_attachment(model, ledger, tokenizer)
        return Session.attached(model, own, options, tokenizer=tokenizer, seed=seed)

    @staticmethod
    def attached(
        model: PreTrainedModel,
        own: Attachment,
        options: Options,
        *,
        tokenizer: Any = None,
        seed: int | None = None,
    ) -> Session:
        """The same against an attachment that is at hand."""
        check_tokenizer(tokenizer)
        own.follow(model)
        plan = make_plan(own.architecture, options, seed=seed or 0)
        source = read_source(own, model, plan, options.rounds)
        return Session(model, own, own.tokenizer if tokenizer is None else tokenizer, plan, source)

    def look_again(self) -> None:
        """Before a later call of the same session: modules may have been replaced, or adapters switched, since.

        Raises:
            ModelError, LedgerMismatchError, LayerError: the updates are not those of what acts now.
        """
        self.source = self.own.renewed(self.model, self.source)

    def check_memory(self, prompt: int, new_tokens: int) -> None:
        """Refuse a ceiling that such a response cannot be attributed under.

        Raises:
            ArgumentError: it is too low; the message says what would be enough.
        """
        if self.plan.limit is not None and isinstance(self.source, LedgerBank):
            settle(self.model, self.own.architecture, self.plan, self.source, prompt, new_tokens)

    def run(
        self,
        arguments: dict[str, Any],
        *,
        call: Callable[..., Any],
        prompt: Tensor,
        attention_mask: Tensor | None,
        given: Mapping[str, Any],
        seed: int | None = None,
    ) -> tuple[Any, list[Trace]]:
        """Generate with `call(**arguments)`; what it returned, and the trace of each sequence in it.

        Args:
            prompt, attention_mask: [B, P], the same as in `arguments`.
            given: the arguments as the caller wrote them, for the record.

        Raises:
            GenerationError: the method runs the ids again, and they are not all that the response came from.
        """
        if self.plan.replays or self.plan.method == "paper":
            check_ids_are_all(arguments)
        began = time.perf_counter()
        with evaluation_mode(self.model):
            output, found = generate(
                self.model,
                self.own.architecture,
                arguments,
                call=call,
                prompt=prompt,
                attention_mask=attention_mask,
                first_block=self.plan.first_block,
                sequence=self.plan.needs_sequence,
                seed=seed,
            )
            seconds = time.perf_counter() - began
            traces = [self.trace(one, seconds, given, seed) for one in found]
        return output, traces

    def forced(
        self,
        ids: Sequence[int],
        prompt_length: int,
        *,
        given: Mapping[str, Any] | None = None,
        seed: int | None = None,
        forced: bool = True,
    ) -> Trace:
        """The trace of a response that is there already, by one pass over prompt and response, ids [P + T].

        Args:
            given, seed, forced: what the record says of how the response came about.
        """
        response = Response(as_row(ids, input_device(self.model)), prompt_length)
        with evaluation_mode(self.model):
            capture = Capture(every=True)
            if not self.plan.replays:
                plan = self.plan
                capture = teacher_forced(
                    self.model, self.own.architecture, response, plan.first_block, plan.needs_sequence
                )
            return self.trace(Generated(response, capture), 0.0, given or {}, seed, forced=forced)

    def trace(
        self,
        generated: Generated,
        seconds: float,
        given: Mapping[str, Any],
        seed: int | None = None,
        *,
        forced: bool = False,
    ) -> Trace:
        """The trace of one finished sequence, whose generation took so many seconds."""
        began = time.perf_counter()
        plan, scores = attribute(self.model, self.own.architecture, generated, self.source, self.plan, self.own.ledger)
        trace = assemble(
            self.tokenizer,
            generated.response,
            self.source,
            scores,
            plan,
            self.own.ledger,
            model=model_name(self.model),
            seed=seed,
            seconds_generate=seconds,
            seconds_trace=seconds + time.perf_counter() - began,
            generate_arguments=given,
            forced=forced,
        )
        remember(trace, self.model, self.own)
        return trace
