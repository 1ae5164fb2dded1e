"""Where a trace came from, so that it can be asked again: its model, its ledger, its tokens.

Kept beside the trace, weakly: keeping traces keeps neither models nor the updates that were read for them.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from protoken.attachment import Attachment, attachment_of, make_attachment
from protoken.errors import ArgumentError, ModelError
from protoken.ledger import Ledger
from protoken.results import Trace
from protoken.text import OF_TEXT, TENSOR_OF

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ORIGIN = "_origin"


@dataclass(frozen=True)
class _Origin:
    """What a trace knows of where it came from. `own` may be gone while the model lives: a ledger given by the call."""

    model: weakref.ref[PreTrainedModel]
    own: weakref.ref[Attachment]
    ledger: Ledger
    tokenizer: Any
    round: int
    verify: bool

    def __deepcopy__(self, memo: object) -> _Origin:
        return self  # a copy of a trace asks the same model

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Nothing: a trace that went to another process is like one that was loaded."""
        return type(None), ()


def remember(trace: Trace, model: PreTrainedModel, own: Attachment) -> None:
    """Let the trace find its model again, for as long as the model lives; not saved, and not part of equality."""
    origin = _Origin(weakref.ref(model), weakref.ref(own), own.ledger, own.tokenizer, own.round, own.verify)
    object.__setattr__(trace, _ORIGIN, origin)


def origin_of(
    trace: Trace,
    model: PreTrainedModel | None,
    ledger: Ledger | str | PathLike[str] | None,
    tokenizer: Any,
) -> tuple[PreTrainedModel, Attachment]:
    """The model and attachment of a trace, or those given in their place.

    Raises:
        ModelError: the trace was loaded, or its model is gone, and none was given.
    """
    origin: _Origin | None = trace.__dict__.get(_ORIGIN)
    model = origin.model() if model is None and origin is not None else model
    if model is None:
        raise ModelError(
            "model",
            expected="the global model this trace was made with",
            got="a trace that was loaded, or whose model is gone",
            remedy="Pass model= and ledger=",
        )
    if ledger is not None:
        return model, make_attachment(model, ledger, tokenizer)
    if origin is None:
        return model, attachment_of(model)
    known = origin.tokenizer if tokenizer is None else tokenizer
    own = origin.own()
    if own is not None and model is origin.model():
        # The banks and checks already made for the model are shared.
        return model, own if own.tokenizer is known else replace(own, tokenizer=known)
    return model, make_attachment(model, origin.ledger, known, at_round=origin.round, verify=origin.verify)


def ids_of(trace: Trace) -> tuple[list[int], int]:
    """The ids [P + T] of a trace's prompt and response, and P.

    Raises:
        ArgumentError: the trace is a part of an answer that does not begin where the answer does, or the answer is
            one to more than text.
    """
    if trace.start:
        raise ArgumentError(
            "trace",
            expected="a trace that begins with the response",
            got=f"a part of one, from token {trace.start} on",
            remedy="Ask the whole trace: what is per token there holds for the part as well",
        )
    given = trace.info.generate_arguments
    others = [name for name in given if str(given[name]).startswith(TENSOR_OF) and name not in OF_TEXT]
    if others:
        raise ArgumentError(
            "trace",
            expected="a trace of what was generated from token ids alone",
            got=f"one with {', '.join(others)} beside them, which it does not hold",
            remedy="What the trace says stands; asking the model again would leave them out",
        )
    return [*trace.prompt_ids, *(token.id for token in trace.token_list)], len(trace.prompt_ids)
