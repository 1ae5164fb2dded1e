"""From scores to a `Trace`: tokens with their text, numbers as arrays, and how it all came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from protoken.banks.bank import Bank, LedgerBank
from protoken.dispatch import choose
from protoken.generation_record import recorded
from protoken.ledger import Ledger, Round
from protoken.methods.updates import Updates, participants
from protoken.planning.plan import Plan
from protoken.results import Trace, TraceInfo
from protoken.results.checks import Array
from protoken.text import tokens_of
from protoken.versions import versions
from protoken.ways.projection import Scores
from protoken.ways.relevance import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def assemble(
    tokenizer: Any,
    response: Response,
    bank: Bank | LedgerBank | Updates,
    scores: Scores,
    plan: Plan,
    ledger: Ledger,
    *,
    generate_arguments: Mapping[str, Any],
    **measured: Any,
) -> Trace:
    """The trace object: numbers as float64 arrays, tokens with their text, and how it all came about."""
    ids = response.ids[0].tolist()
    prompt_ids, new_ids = ids[: response.prompt_length], ids[response.prompt_length :]
    tokens = tokens_of(tokenizer, prompt_ids, new_ids)
    info = TraceInfo(
        method=plan.method,
        way=plan.way,
        granularity=plan.granularity,
        reason=plan.reason,
        objective=plan.objective,
        layers=_layers_of(scores, bank, plan),
        rounds=bank.rounds,
        settings=scores.settings,
        backend=_picked(plan, response.ids.device),
        ledger=ledger.run,
        versions=versions(),
        generate_arguments=recorded(generate_arguments),
        **measured,
    )
    return Trace(
        prompt=tokenizer.decode(prompt_ids) if tokenizer is not None else "",
        prompt_ids=tuple(prompt_ids),
        response="".join(token.text for token in tokens),
        token_list=tokens,
        client_ids=bank.clients,
        weights=_average_weights([ledger.round(number) for number in bank.rounds], bank.clients),
        token_scores=_array(scores.tokens),
        totals=scores.totals.numpy(),
        objective_values=scores.objective.numpy(),
        token_residual=_array(scores.residual_tokens),
        residual=scores.residual,
        change=scores.change,
        layer_totals=_array(scores.layer_totals),
        standard_errors=_array(scores.standard_errors),
        token_layer_scores=_array(scores.layer_tokens),
        position_scores=_array(scores.positions),
        info=info,
    )


def _average_weights(rounds: Sequence[Round], clients: Sequence[str]) -> Array:
    """[K] mean of rho_k^r over the rounds, 0 for a round without the client; of one round, its own weights.

    Not those of the bank: sums over several rounds hold the weights already.
    """
    by_round = [participants(record) for record in rounds]
    mean: Array = np.array([[weights.get(client, 0.0) for client in clients] for weights in by_round]).mean(axis=0)
    return mean


def _array(values: Tensor | None) -> Any:
    return None if values is None else values.numpy()


def _layers_of(scores: Scores, source: Bank | LedgerBank | Updates, plan: Plan) -> tuple[str, ...]:
    """The layers of the record. A baseline's totals are of the whole model at once: its one row has no layer's name."""
    layers = source.layers if isinstance(source, Updates) else plan.layers
    return layers if scores.layer_totals is None or len(scores.layer_totals) == len(layers) else ("all",)


def model_name(model: PreTrainedModel) -> str:
    """Where the model came from, or its class."""
    return str(getattr(model.config, "name_or_path", "") or type(model).__name__)


def _picked(plan: Plan, device: torch.device) -> str:
    if plan.method == "paper" or (plan.replays and plan.way != "reverse"):
        return "torch"
    if plan.way == "reverse" and plan.granularity != "sequence":
        return "torch"
    op = "client_totals" if plan.way == "reverse" else "client_scores"
    return choose(op, plan.backend, device).name
