"""From a captured generation to a `Trace`: which way, relevance, projection, and the record of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import Architecture
from .attachment import Attachment
from .bank import Bank, Rounds, select_rounds
from .dispatch import ORDER, choose
from .errors import ArgumentError
from .forward_mode import forward_scores
from .generation import Generated
from .ledger import Ledger
from .methods.paper import client_weights, paper_scores
from .methods.replayed import REPLAYED, Settings, moving_parameters, replayed_scores
from .methods.weights import Updates
from .precision import warn_of_noise
from .projection import Scores, project_local, project_reverse
from .relevance import Objective, Response, local_relevance, reverse_relevance
from .results import Trace, TraceInfo
from .text import tokens_of
from .versions import versions

Way = Literal["auto", "local", "reverse", "forward"]
Method = Literal[
    "protoken",
    "paper",
    "aumann_shapley",
    "shapley",
    "paired_shapley",
    "leave_one_out",
    "chance",
    "aggregation_weight",
    "update_norm",
    "cosine",
    "client_log_prob",
    "activation_only",
    "head_only",
    "tracefl",
]


@dataclass(frozen=True)
class Plan:
    """Every choice of one trace, resolved: nothing in it is "auto" but the backend."""

    layers: tuple[str, ...]
    first_block: int
    way: str
    objective: Objective
    method: Method
    backend: str
    blocks: int | None = 1
    patterns: tuple[str, ...] | None = None
    settings: Settings = field(default_factory=Settings)

    @property
    def replays(self) -> bool:
        """Whether the finished response is replayed at other weights, instead of scored from what was captured."""
        return self.method in REPLAYED

    @property
    def needs_sequence(self) -> bool:
        """Whether hidden states of all positions must be recorded, not only of the deciding ones."""
        return self.way in ("reverse", "forward") and not self.replays


def make_plan(
    architecture: Architecture,
    blocks: int | None,
    layers: list[str] | None,
    way: Way,
    objective: Objective | None,
    method: Method,
    backend: str,
    settings: Settings | None = None,
) -> Plan:
    """Resolve the caller's choices; `blocks` is 1 for the first-order methods, and all that is recorded for others.

    Raises:
        ArgumentError: an unknown word, or a way that is not exact for these layers.
        LayerError: a layer pattern that names nothing.
    """
    _check_word("method", method, get_args(Method))
    _check_word("way", way, get_args(Way))
    _check_word("backend", backend, ("auto", *ORDER))
    objective = objective or ("logit" if method == "paper" else "log_prob")
    _check_word("objective", objective, get_args(Objective))
    if method in REPLAYED:
        return _replay_plan(architecture, blocks, layers, way, objective, method, backend, settings or Settings())
    names = architecture.traced_layers(1 if blocks is None else blocks, layers)
    return Plan(
        layers=names,
        first_block=min(architecture.block_of(name) for name in names),
        way="paper" if method == "paper" else _choose_way(architecture, names, way),
        objective=objective,
        method=method,
        backend=backend,
    )


def _replay_plan(
    architecture: Architecture,
    blocks: int | None,
    layers: list[str] | None,
    way: Way,
    objective: Objective,
    method: Method,
    backend: str,
    settings: Settings,
) -> Plan:
    """Of a method that replays the response: totals (reverse) or tokens (forward) for aumann_shapley alone."""
    ways = ("auto", "reverse", "forward") if method == "aumann_shapley" else ("auto",)
    if way not in ways:
        raise ArgumentError("way", expected=f'one of {", ".join(ways)} for method "{method}"', got=way)
    if blocks is not None or layers is not None:
        architecture.traced_layers(len(architecture.blocks) if blocks is None else blocks, layers)
    chosen = "replay" if method != "aumann_shapley" else "forward" if way == "forward" else "reverse"
    return Plan(
        layers=(),
        first_block=len(architecture.blocks) - 1,
        way=chosen,
        objective=objective,
        method=method,
        backend=backend,
        blocks=blocks,
        patterns=None if layers is None else tuple(layers),
        settings=replace(settings, per_token=chosen == "forward"),
    )


def read_source(own: Attachment, model: PreTrainedModel, plan: Plan, rounds: Rounds) -> Bank | Updates:
    """The clients' updates that a plan needs: the traced layers' bank, or every parameter that moves."""
    numbers = select_rounds(own.ledger, rounds, own.round)
    if not plan.replays:
        return own.bank(model, plan.layers, numbers)
    patterns = None if plan.patterns is None else list(plan.patterns)
    names = moving_parameters(plan.method, own.ledger, numbers, model, own.architecture, plan.blocks, patterns)
    return own.moving(model, names, numbers)


def _choose_way(architecture: Architecture, names: tuple[str, ...], way: Way) -> str:
    """Local where it is exact, else forward: scores per token either way. Totals alone must be asked for."""
    local = local_layers(architecture)
    if way == "auto":
        return "local" if set(names) <= local else "forward"
    if way == "local" and not set(names) <= local:
        raise ArgumentError(
            "way",
            expected=f'"forward" or "reverse" for these layers; "local" is exact only for {", ".join(sorted(local))}',
            got="local",
            remedy='Use blocks=1 with the default layers, way="forward" (per token) or way="reverse" (totals)',
        )
    return "local" if way == "forward" and set(names) <= local else way


def local_layers(architecture: Architecture) -> set[str]:
    """Layers whose output reaches no other position: the last block's out-projection, all outside attention, the head.

    A tied head is the embeddings as well; both are traced then, and the embeddings are not local.
    """
    last = len(architecture.blocks) - 1
    attention = architecture.out_projection.split(".")[0] + "."
    inside = {
        architecture.layer_name(last, name)
        for name in architecture.linear_layers(last)
        if name == architecture.out_projection or not name.startswith(attention)
    }
    return inside | ({architecture.head_name} - {""})


def attribute(
    model: PreTrainedModel,
    architecture: Architecture,
    generated: Generated,
    bank: Bank | Updates,
    plan: Plan,
    ledger: Ledger,
) -> Scores:
    """Scores of the response under the plan; a response without tokens has none."""
    capture, response = generated.capture, generated.response
    if isinstance(bank, Updates):
        return replayed_scores(
            plan.method,
            model,
            architecture,
            response,
            bank,
            ledger,
            objective=plan.objective,
            settings=plan.settings,
            backend=plan.backend,
        )
    if response.new_tokens == 0:
        return Scores.empty(len(plan.layers), len(bank.clients))
    if plan.method == "paper":
        return _paper(model, response, bank, plan)
    near = [name for name in plan.layers if name in local_layers(architecture)]
    warn_of_noise(model, architecture, generated, bank, near, plan.objective)
    if plan.way == "local":
        local = local_relevance(model, architecture, capture, response, plan.layers, plan.objective)
        return project_local(local, bank, plan.layers, plan.backend)
    if plan.way == "forward":
        return _forward(model, architecture, generated, bank, plan)
    reverse = reverse_relevance(model, architecture, capture, response, plan.layers, plan.objective)
    return project_reverse(reverse, bank, plan.layers, plan.backend)


def _forward(model: nn.Module, architecture: Architecture, generated: Generated, bank: Bank, plan: Plan) -> Scores:
    """Tangents for the layers that later positions can see, the local way for the last block's others."""
    local_names = tuple(name for name in plan.layers if name in local_layers(architecture))
    deeper = [name for name in plan.layers if name not in local_names]
    capture, response = generated.capture, generated.response
    local = local_relevance(model, architecture, capture, response, local_names, plan.objective)
    # The change rides along as one more direction, so that conservation is measured here, too.
    banks = {name: bank.with_change(name) for name in deeper}
    raw = forward_scores(model, architecture, capture, response, deeper, banks, local).double().cpu()
    tokens, changed = (raw[:-1] * bank.weights[:, None]).T, raw[-1]
    if local_names:
        near = project_local(local, bank, local_names, plan.backend)
        assert near.tokens is not None
        assert near.change_tokens is not None
        tokens, changed = tokens + near.tokens, changed + near.change_tokens
    return Scores.of_weighted_deltas(
        tokens=tokens.contiguous(),
        layer_totals=None,
        change_tokens=changed,
        change=float(changed.sum()),
        objective=local.objective.double().cpu(),
    )


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
    scores, objective = paper_scores(model, response.ids, response.prompt_length, matrices, plan.objective)
    deltas, changed = scores[..., count : 2 * count] @ bank.weights, scores[..., -1]
    return Scores(
        tokens=scores[..., :count].sum(0),
        layer_totals=scores[..., :count].sum(1),
        change_tokens=changed.sum(0),
        change=float(changed.sum()),
        objective=objective,
        residual_tokens=(changed - deltas).sum(0),
        residual=float((changed - deltas).sum()),
    )


def assemble(
    tokenizer: Any,
    response: Response,
    bank: Bank | Updates,
    scores: Scores,
    plan: Plan,
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
        objective=plan.objective,
        layers=_layers_of(scores, bank, plan),
        rounds=bank.rounds,
        settings=scores.settings,
        backend=_picked(plan, response.ids.device),
        versions=versions(),
        generate_arguments={name: _printable(value) for name, value in generate_arguments.items()},
        **measured,
    )
    return Trace(
        prompt=tokenizer.decode(prompt_ids) if tokenizer is not None else "",
        prompt_ids=tuple(prompt_ids),
        response="".join(token.text for token in tokens),
        token_list=tokens,
        client_ids=bank.clients,
        weights=bank.weights.numpy(),
        token_scores=None if scores.tokens is None else scores.tokens.numpy(),
        totals=scores.totals.numpy(),
        objective_values=scores.objective.numpy(),
        token_residual=None if scores.residual_tokens is None else scores.residual_tokens.numpy(),
        residual=scores.residual,
        change=scores.change,
        layer_totals=None if scores.layer_totals is None else scores.layer_totals.numpy(),
        standard_errors=None if scores.standard_errors is None else scores.standard_errors.numpy(),
        info=info,
    )


def _layers_of(scores: Scores, source: Bank | Updates, plan: Plan) -> tuple[str, ...]:
    """The layers of the record. A baseline's totals are of the whole model at once: its one row has no layer's name."""
    layers = source.layers if isinstance(source, Updates) else plan.layers
    return layers if scores.layer_totals is None or len(scores.layer_totals) == len(layers) else ("all",)


def model_name(model: PreTrainedModel) -> str:
    """Where the model came from, or its class."""
    return str(getattr(model.config, "name_or_path", "") or type(model).__name__)


def _picked(plan: Plan, device: torch.device) -> str:
    if plan.method == "paper" or (plan.replays and plan.way != "reverse"):
        return "torch"
    op = "client_totals" if plan.way == "reverse" else "client_scores"
    return choose(op, plan.backend, device).name


def _check_word(argument: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(argument, expected=f"one of {', '.join(known)}", got=value)


def _printable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)[:200]
