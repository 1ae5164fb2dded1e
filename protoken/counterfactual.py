"""What if these clients had not taken part? The same response under the model that the others would have made.

    G without S = G + sum_r sum_j (rho'_j - rho_j) delta_j        rho' = rho over the others, scaled up to sum to 1

Every token of the response is replayed there by teacher forcing: what it loses in log-probability is what it owes to
the absent clients. With `generate`, that model also answers the prompt anew. The updates of the others stay what they
were: this is the server's counterfactual, not a new training run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from protoken.arguments import check_flag, listed
from protoken.errors import ArgumentError
from protoken.generation_record import replayed
from protoken.ledger import Ledger
from protoken.methods.game import Game
from protoken.methods.replayed import recorded_parameters
from protoken.methods.weights import at_weights, shift_without
from protoken.models.layers import input_device
from protoken.models.patching import evaluation_mode
from protoken.origin import ids_of, origin_of
from protoken.results import Trace
from protoken.results.checks import Array
from protoken.results.parts import UNITS
from protoken.text import as_row, tokens_of
from protoken.ways.relevance import Response

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False, repr=False)
class Counterfactual:
    """The response of a trace without some clients. T tokens.

    without       the clients that are absent
    tokens        the texts of the T tokens
    before        [T] objective of each token under G
    after         [T] the same without the clients
    response      the new answer to the prompt without them, or None if none was asked for
    response_ids  its token ids
    unit          "nats", "nats of log-odds" or "logit units"
    reaggregate   whether the others' weights were scaled up
    rounds        the rounds they are absent from: those of the trace
    """

    without: tuple[str, ...]
    tokens: tuple[str, ...]
    before: Array
    after: Array
    unit: str
    reaggregate: bool
    rounds: tuple[int, ...]
    response: str | None = None
    response_ids: tuple[int, ...] = field(default=())

    @property
    def change(self) -> Array:
        """[T], before - after: positive where a token is less likely without the clients."""
        difference: Array = self.before - self.after
        return difference

    @property
    def total(self) -> float:
        """Sum of the change over the tokens: what the response owes to the absent clients."""
        return float(self.change.sum())

    def __repr__(self) -> str:
        text = f"without {', '.join(self.without)}: {self.before.sum():+.3f} -> {self.after.sum():+.3f} {self.unit}"
        return f"Counterfactual({text}, owed {self.total:+.3f})"

    def __rich__(self) -> Text:
        from rich.text import Text

        from protoken.report.visible import visible

        lines = [repr(self)]
        if self.response is not None:
            lines.append(f"answered anew: {visible(self.response)}")
        return Text("\n".join(lines))


def counterfactual(
    trace: Trace,
    without: str | Collection[str],
    *,
    reaggregate: bool = True,
    generate: bool = False,
    model: PreTrainedModel | None = None,
    ledger: Ledger | str | PathLike[str] | None = None,
    tokenizer: Any = None,
) -> Counterfactual:
    """Replay a trace's response without some clients, in the rounds the trace covers.

    Args:
        without: a client, or several that are absent together.
        reaggregate: the others' weights scaled up to sum to 1 (FedAvg without the absent); otherwise their
            contribution is taken out and nothing put in its place.
        generate: also answer the prompt anew, with the trace's own generation arguments and seed. A twin of the model
            answers, with a copy of the weights that move; other threads keep the model as it is. Streamers and what
            only concerns the output's form are left out, a draft model with a `ProtokenWarning`.
        model, ledger, tokenizer: where the trace does not know them any more (loaded from a file).

    Raises:
        ArgumentError: the trace is a part of an answer that does not begin where the answer does; nobody is absent;
            or, with `generate`, an argument that changes the answer is not in the record (a processor, a criterion, a
            function; a list, in a trace from an earlier version), or is not what its name asks for; or a server
            optimiser's round does not record the shares that `reaggregate` asks for (`protoken.ledger.rules.shares`).
        ModelError: the trace does not know its model, or that model is gone; its weights were offloaded; or, with
            `generate`, it has no twin (a module has a forward that is bound to it by more than its method).
        UnknownClientError: a client took part in none of the rounds, or only by updates that are quarantined.
        LedgerMismatchError: the model is not the one that the ledger was written for.
    """
    ids, prompt_length = ids_of(trace)
    model, own = origin_of(trace, model, ledger, tokenizer)
    reaggregate, generate = check_flag("reaggregate", reaggregate), check_flag("generate", generate)
    absent = _absent(without)
    given = replayed(trace.info.generate_arguments) if generate else {}
    rounds = trace.info.rounds
    names = recorded_parameters(own.ledger, rounds, model, own.architecture)
    updates = own.moving(model, names, rounds)
    shift = shift_without(own.ledger, rounds, names, absent, reaggregate=reaggregate)
    device = input_device(model)
    arguments = _complete(given, model, own.tokenizer, trace) if generate else {}
    answered: tuple[str | None, tuple[int, ...]] = (None, ())
    with evaluation_mode(model):
        before = after = np.zeros(0)
        if trace.token_list:
            response = Response(as_row(ids, device), prompt_length)
            game = Game(model, own.architecture, response, updates, trace.info.objective)
            before = game.value_at_end().numpy()
            after = game.value_at({name: value + shift[name].to(value) for name, value in game.end.items()}).numpy()
        if generate:
            answered = _answer(at_weights(model, shift), own.tokenizer, trace, arguments)
    return Counterfactual(
        without=absent,
        tokens=tuple(token.text for token in trace.token_list),
        before=before,
        after=after,
        unit=UNITS[trace.info.objective],
        reaggregate=reaggregate,
        rounds=rounds,
        response=answered[0],
        response_ids=answered[1],
    )


def _absent(without: str | Collection[str]) -> tuple[str, ...]:
    expected = "a client, or a list of one or more"
    found = (without,) if isinstance(without, str) else listed("without", without, expected)
    if not found or not all(isinstance(client, str) for client in found):
        raise ArgumentError("without", expected=expected, got=repr(without))
    return tuple(sorted(set(found)))


def _complete(given: dict[str, Any], model: PreTrainedModel, tokenizer: Any, trace: Trace) -> dict[str, Any]:
    """The arguments of the new answer, which is one sequence.

    Raises:
        ArgumentError: there is no tokenizer for its stop strings.
    """
    from protoken.generation import check_arguments, complete_arguments, setting, with_length

    if setting(model, given, "num_return_sequences") not in (None, 1):
        given["num_return_sequences"] = 1
    check_arguments(model, given)
    if tokenizer is None and setting(model, given, "stop_strings"):
        expected = "a tokenizer, to find the stop strings of the trace with"
        raise ArgumentError("tokenizer", expected=expected, got="none", remedy="Pass tokenizer=")
    device = input_device(model)
    here = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    # The record of a generation without a length is of a call that had none; a response from a log has no call.
    return complete_arguments(model, with_length(here) if trace.info.forced else here, len(trace.prompt_ids), tokenizer)


def _answer(
    model: PreTrainedModel, tokenizer: Any, trace: Trace, arguments: dict[str, Any]
) -> tuple[str, tuple[int, ...]]:
    from protoken.generation import seeded

    row = as_row(trace.prompt_ids, input_device(model))
    with torch.no_grad(), seeded(trace.info.seed, row.device):
        output: Any = model.generate(row, attention_mask=torch.ones_like(row), **arguments)
    sequence = getattr(output, "sequences", output)[0].tolist()
    new = sequence[row.shape[1] :]
    return "".join(token.text for token in tokens_of(tokenizer, trace.prompt_ids, new)), tuple(new)
