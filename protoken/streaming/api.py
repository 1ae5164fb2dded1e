"""`stream(model, prompt)`: every token with its score per client, at the moment it is chosen.

    for token in protoken.stream(model, "How is a fever treated?"):
        print(token.text, token.top, token.totals)

Scores are those of `trace` for one traced block, and exact: all that the newest token's relevance depends on is at hand
when the token is chosen (see leaf_tap.py). The gradients are taken in a stopping criterion that never stops; the
streamer's `put` then hands the token on, after the caller's own streamer has had it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from protoken.arguments import check_callable
from protoken.attachment import attachment_of, make_attachment
from protoken.banks.bank import Rounds, require_usable, select_rounds
from protoken.dispatch import choose
from protoken.generation import check_seed, complete_arguments, with_length
from protoken.ledger import Ledger
from protoken.models.layers import input_device
from protoken.models.patching import refuse_inference_mode
from protoken.planning.options import Options
from protoken.planning.plan import make_plan
from protoken.results import Trace
from protoken.streaming.checks import checked_arguments
from protoken.streaming.handover import pulled
from protoken.streaming.run import StreamedToken, StreamRun
from protoken.text import Prompt, as_row, check_ids, encode_prompt
from protoken.ways.objective import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Stream", "StreamedToken", "stream"]


class Stream(Iterator[StreamedToken]):
    """An iterator over the tokens of one generation, and its `trace`.

    Leaving early (`break`, `close()`, the end of a `with`, an exception) ends the generation and leaves the model as it
    was found; `trace` is then that of the tokens streamed so far. Between two tokens the model is at rest.
    """

    def __init__(self, run: StreamRun) -> None:
        self._run = run
        self._tokens: Generator[StreamedToken, None, None] = pulled(run)
        # Also at the interpreter's exit, while the sleeping thread can still be woken.
        weakref.finalize(self, self._tokens.close)

    def __next__(self) -> StreamedToken:
        token = next(self._tokens)
        self._run.tokens.append(token)
        return token

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the generation here; no error if it has ended."""
        self._tokens.close()

    @property
    def tokens(self) -> tuple[StreamedToken, ...]:
        """The tokens streamed so far."""
        return tuple(self._run.tokens)

    @property
    def finished(self) -> bool:
        """Whether the generation came to its own end."""
        return self._run.finished

    @property
    def trace(self) -> Trace:
        """The trace of the tokens streamed so far; of the whole response once `finished`."""
        return self._run.trace()


def stream(
    model: PreTrainedModel,
    prompt: Prompt,
    *,
    ledger: Ledger | str | PathLike[str] | None = None,
    tokenizer: Any = None,
    rounds: Rounds = "last",
    layers: list[str] | None = None,
    objective: Objective | None = None,
    backend: str = "auto",
    chat: bool | None = None,
    seed: int | None = None,
    on_token: Callable[[StreamedToken], object] | None = None,
    **generate_arguments: Any,
) -> Stream:
    """Generate a response and attribute every token at the moment it is chosen.

    Args:
        model, prompt, ledger, tokenizer, rounds, objective, backend, chat, seed: as in `protoken.trace`.
        layers: names or shell patterns of layers of the last block whose output reaches no other position: its
            attention out-projection, and all outside the attention. None: out-projection and MLP-final layer.
        on_token: called with each `StreamedToken`. The generation then runs to its end in this call and this thread,
            and the stream that comes back is finished. Without it nothing runs before the first `next`; after that
            the generation, with the caller's streamer, stopping criteria and processors, runs in a thread of its own
            that takes turns with the caller's.
        **generate_arguments: for the model's own `generate`, `streamer` included.

    Returns:
        A `Stream` of `StreamedToken`; its `trace` is that of `protoken.trace(..., way="local")`.

    Raises:
        GenerationError: beams, drafts, guidance or several sequences, whose tokens are not chosen by one pass over one
            row; `protoken.trace` and `protoken.tracing` replay such generations afterwards.
        ModelError, PromptError, ArgumentError, LayerError, UnknownRoundError, BackendError, LedgerMismatchError: as
            in `protoken.trace`.
    """
    refuse_inference_mode(model)
    arguments = with_length(checked_arguments(model, prompt, generate_arguments))
    check_seed(seed)
    check_callable("on_token", on_token)
    own = attachment_of(model) if ledger is None else make_attachment(model, ledger, tokenizer)
    own.follow(model)
    tokenizer = own.tokenizer if tokenizer is None else tokenizer
    options = Options(
        rounds=rounds,
        blocks=1,
        layers=layers,
        way="local",
        granularity="token",
        objective=objective,
        backend=backend,
    )
    plan = make_plan(own.architecture, options)
    numbers = select_rounds(own.ledger, rounds, own.round)
    require_usable(own.ledger, numbers)
    bank = own.bank(model, plan.layers, numbers)
    device = input_device(model)
    choose("client_scores", backend, device)
    ids = encode_prompt(tokenizer, prompt, chat)
    check_ids(model, ids)
    row = as_row(ids, device)
    complete = complete_arguments(model, arguments, len(ids), tokenizer)
    complete.setdefault("attention_mask", torch.ones_like(row))
    # A compiled pass ignores hooks that were placed after its compilation.
    complete["disable_compile"] = True
    run = StreamRun(model, own, tokenizer, plan, bank, row, complete, arguments, seed)
    found = Stream(run)
    if on_token is not None:
        found.close()  # Nothing is left to iterate over.
        run(partial(_noted, run.tokens, on_token), lambda: None)
    return found


def _noted(tokens: list[StreamedToken], on_token: Callable[[StreamedToken], object], token: StreamedToken) -> None:
    tokens.append(token)
    on_token(token)
