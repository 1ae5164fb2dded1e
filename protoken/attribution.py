"""From a captured generation to scores: the updates, the plan settled by the response's length, the method."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from protoken.attachment import Attachment
from protoken.banks.bank import Bank, BankInParts, LedgerBank, Rounds, require_usable, select_rounds
from protoken.first_order import FirstOrder
from protoken.generation import Generated
from protoken.ledger import Ledger
from protoken.methods.paper import client_weights, paper_scores
from protoken.methods.replayed import moving_parameters, replayed_scores
from protoken.methods.updates import Updates
from protoken.models.architectures import Architecture
from protoken.models.twin import twin_of, uncompiled
from protoken.planning.cost import cheaper
from protoken.planning.memory import Chunks, fitted
from protoken.planning.plan import Plan
from protoken.planning.sizes import Sizes, sizes_of
from protoken.ways.projection import Scores
from protoken.ways.relevance import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_source(own: Attachment, model: PreTrainedModel, plan: Plan, rounds: Rounds) -> LedgerBank | Updates:
    """The clients' updates that a plan needs: the traced layers' bank, or every parameter that moves."""
    uncompiled(model, own.architecture)  # What cannot be attributed is refused before it is generated.
    numbers = select_rounds(own.ledger, rounds, own.round)
    require_usable(own.ledger, numbers)
    if not plan.replays:
        return own.ledger_bank(model, plan.layers, numbers)
    patterns = None if plan.patterns is None else list(plan.patterns)
    names = moving_parameters(plan.method, own.ledger, numbers, model, own.architecture, plan.blocks, patterns)
    return own.moving(model, names, numbers)


def settle(
    model: nn.Module, architecture: Architecture, plan: Plan, bank: LedgerBank, prompt: int, new_tokens: int
) -> tuple[Plan, Sizes, Chunks]:
    """What the response's length decides: forward or reverse, and the chunks that keep below the ceiling.

    Raises:
        ArgumentError: the ceiling is below what the smallest chunks take.
    """
    sizes = sizes_of(model, architecture, plan, bank, prompt, new_tokens)
    if plan.way == "auto":
        plan = plan.settled(*cheaper(sizes, plan.granularity))
    return plan, sizes, fitted(plan, sizes, plan.limit)


def attribute(
    model: PreTrainedModel,
    architecture: Architecture,
    generated: Generated,
    source: LedgerBank | Updates,
    plan: Plan,
    ledger: Ledger,
) -> tuple[Plan, Scores]:
    """Scores of the response, and the plan with its way settled; a response without tokens has no scores."""
    response = generated.response
    model, architecture = uncompiled(model, architecture)
    if isinstance(source, Updates):
        scores = replayed_scores(
            plan.method,
            model,
            architecture,
            response,
            source,
            ledger,
            objective=plan.objective,
            settings=plan.settings,
            backend=plan.backend,
        )
        return plan, scores.noting(gaps=list(source.gaps)) if source.gaps else scores
    if plan.method == "paper":
        if not response.new_tokens:
            return plan, _nothing(plan, source, response)
        return plan, _paper(model, response, source.whole(model), plan)
    plan, _, chunks = settle(model, architecture, plan, source, response.prompt_length, response.new_tokens)
    if not response.new_tokens:
        return plan, _nothing(plan, source, response)
    bank = source.whole(model) if chunks.kept else BankInParts(source, model, chunks.clients)
    scores = FirstOrder(model, architecture, generated, bank, plan, chunks).scores()
    if plan.limit is not None:
        scores = scores.noting(memory_limit=plan.limit, chunks=asdict(chunks))
    return plan, scores


def _nothing(plan: Plan, source: LedgerBank, response: Response) -> Scores:
    """Scores of no tokens, at the plan's granularity."""
    clients, layers = len(source.clients), len(plan.layers)
    empty = Scores.empty(layers, clients)
    if plan.granularity in ("sequence", "position"):
        empty = replace(empty, tokens=None, change_tokens=None, residual_tokens=None)
    if plan.granularity == "layer":
        empty = replace(empty, layer_tokens=torch.zeros(0, layers, clients, dtype=torch.float64))
    if plan.granularity == "position":
        seen = max(response.prompt_length - 1, 0)
        empty = replace(empty, positions=torch.zeros(seen, clients, dtype=torch.float64))
    return empty


def _paper(model: nn.Module, response: Response, bank: Bank, plan: Plan) -> Scores:
    """Full client weights, no aggregation weight; the deltas ride along for the conservation check only."""
    count = len(bank.clients)
    matrices: dict[str, list[Tensor]] = {
        name: [
            *client_weights(model, name, bank.change[name], bank.deltas[name]),
            *bank.deltas[name],
            bank.change[name],
        ]
        for name in plan.layers
    }
    scores, objective = paper_scores(twin_of(model), response.ids, response.prompt_length, matrices, plan.objective)
    deltas, changed = scores[..., count : 2 * count] @ bank.weights, scores[..., -1]
    own = scores[..., :count]
    tokens = plan.granularity != "sequence"
    return Scores(
        tokens=own.sum(0) if tokens else None,
        layer_totals=own.sum(1),
        change_tokens=changed.sum(0) if tokens else None,
        change=float(changed.sum()),
        objective=objective,
        residual_tokens=(changed - deltas).sum(0) if tokens else None,
        residual=float((changed - deltas).sum()),
        layer_tokens=own.transpose(0, 1).contiguous() if plan.granularity == "layer" else None,
    )
