"""The clients' updates as points in weight space, and a model that stands at such a point for a while.

    start = G - sum of the chosen rounds' changes            (G_{r-1} for the last round, G_0 for all rounds)
    point(c, a) = start + a * change + sum_k (c_k - a) * rho_k * delta_k

With a = 0 and c in {0, 1}^K that is the coalition start + sum_{k in S} rho_k delta_k; with all c_k = a it is the
straight path from start to G, what the server did beyond the weighted mean included. Points are formed in fp32 (fp64
for a model in double precision), since bf16 would round most updates away.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from protoken.errors import (
    ArgumentError,
    LayerError,
    LedgerMismatchError,
    ModelError,
    ProtokenWarning,
    UnknownClientError,
)
from protoken.ledger import Ledger, Round, lineage_gaps
from protoken.ledger.round_files import RoundReader, dense
from protoken.ledger.rules import shares
from protoken.models.adapters import PEFT_PREFIX, active_in, require_acting
from protoken.models.quantised import is_quantised
from protoken.models.twin import bound_otherwise, twin_of

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Updates:
    """What K clients changed in the chosen parameters.

    Attributes:
        clients: K ids; quarantined updates are left out, their effect is part of the change alone.
        weights: fp64 [K]: rho_k of the one round, or 1 where weighted deltas were summed over several rounds.
        rounds: the rounds covered.
        names: the parameters that move, as the ledger records them.
        parameters: recorded name -> the model's own name for it (PEFT wraps and renames).
        deltas: per client name -> delta_k as stored (one round) or sum_r rho_k^r delta_k^r in fp32 (several).
        change: name -> the rounds' changes summed, fp32.
        gaps: rounds that do not start where the one before ended.
    """

    clients: tuple[str, ...]
    weights: Tensor
    rounds: tuple[int, ...]
    names: tuple[str, ...]
    parameters: Mapping[str, str]
    deltas: tuple[Mapping[str, Tensor], ...]
    change: Mapping[str, Tensor]
    gaps: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The model's parameters by the names of their layers: "….weight" left out, "….bias" and others kept."""
        own = (self.parameters[name] for name in self.names)
        return tuple(name.removesuffix(".weight").removesuffix(".base_layer") for name in own)


def read_updates(ledger: Ledger, model: nn.Module, rounds: Sequence[int], names: Sequence[str]) -> Updates:
    """The updates of `rounds` to the parameters `names`.

    Raises:
        LayerError: a round holds no such parameter.
        LedgerMismatchError: the model has no such parameter, or one of another shape.
    """
    records = [ledger.round(number) for number in rounds]
    own = own_names(records, model, names)
    if len(records) == 1:
        (record,) = records
        weights = participants(record)
        each = dict(deltas(record, weights, names))
        return Updates(
            clients=tuple(weights),
            weights=torch.tensor(list(weights.values()), dtype=torch.float64),
            rounds=tuple(rounds),
            names=tuple(names),
            parameters=own,
            deltas=tuple(each[client] for client in weights),
            change={name: record.change(name) for name in names},
        )
    totals = _lineages(records, names)
    clients = tuple(sorted(totals))
    return Updates(
        clients=clients,
        weights=torch.ones(len(clients), dtype=torch.float64),
        rounds=tuple(rounds),
        names=tuple(names),
        parameters=own,
        deltas=tuple(totals[client] for client in clients),
        change={name: torch.stack([r.change(name).float() for r in records]).sum(0) for name in names},
        gaps=warned_of_gaps(records, names),
    )


def warned_of_gaps(records: Sequence[Round], names: Sequence[str]) -> tuple[int, ...]:
    """`lineage_gaps` of the rounds, said aloud: the path over them does not begin at a model that was."""
    found = lineage_gaps(records, names)
    if found:
        rounds = ", ".join(map(str, found))
        warnings.warn(
            f"round {rounds} of the ledger does not start from the weights that the round before ended with: what "
            "changed in between is in nobody's update. Scores and changes are those of the recorded rounds; the models "
            "before it are taken without what changed in between",
            ProtokenWarning,
            stacklevel=2,
        )
    return found


def parameter_of(model: nn.Module, recorded: str, known: Collection[str] | None = None) -> str | None:
    """The model's own name of a recorded parameter, or None.

    PEFT prefixes names, wraps a layer's weight as its base_layer's (an update of the effective weight moves that one:
    the adapter is added to it), and puts the adapter's name into its factors'.

    Args:
        known: the names of the model's parameters, where they are at hand.
    """
    if known is None:
        known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stem, _, leaf = recorded.rpartition(".")
    shapes = [recorded, f"{stem}.base_layer.{leaf}"]
    if stem.endswith((".lora_A", ".lora_B")):
        shapes += [f"{stem}.{adapter}.{leaf}" for adapter in active_in(model)]
    return next((name for shape in shapes for name in (shape, PEFT_PREFIX + shape) if name in known), None)


def participants(record: Round) -> dict[str, float]:
    """Aggregation weights by client, of the updates that can be read."""
    return {client.client: client.weight for client in record.clients if client.quarantined is None}


def _lineages(records: Sequence[Round], names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """sum_r rho_k^r delta_k^r in fp32, by client and name."""
    totals: dict[str, dict[str, Tensor]] = {}
    for record in records:
        weights = participants(record)
        for client, own in deltas(record, weights, names):
            total = totals.setdefault(client, {name: torch.zeros(delta.shape) for name, delta in own.items()})
            for name, delta in own.items():
                total[name].add_(delta.float(), alpha=weights[client])
    return totals


def deltas(record: Round, clients: Iterable[str], names: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Clients and their updates by name, one after the other: each shard is opened once for all its parameters."""
    with RoundReader(record) as reader:
        for client in clients:
            stored = reader.stored(client, names)
            yield client, {name: dense(value) for name, value in zip(names, stored, strict=True)}


def shift_without(
    ledger: Ledger, rounds: Sequence[int], names: Sequence[str], without: Collection[str], *, reaggregate: bool = True
) -> dict[str, Tensor]:
    """What is to be added to G when these clients had not taken part, fp32 by parameter name.

        reaggregate      sum_r sum_j (rho'_j - rho_j) delta_j,  rho'_j = rho_j / (1 - the absent's shares)
        otherwise        - sum_r sum_{k absent} rho_k delta_k

    The first is FedAvg over the others, the second takes the contribution out and puts nothing in its place. The
    server's residual stays, and so do the others' updates, which without the absent would have been others. A round
    in which only the absent took part is left without any update. Of a server optimiser the others' recorded
    contributions grow alike (`protoken.ledger.rules.shares`): exact for momentum where everybody took part in every
    round with the same weight; FedAdam's v stays as it was.

    Raises:
        ArgumentError: nobody is absent, or a round does not record the shares that reaggregating asks for.
        UnknownClientError: a client took part in none of the rounds, or only by updates that are quarantined.
    """
    absent = set(without)
    records = [ledger.round(number) for number in rounds]
    known = {client for record in records for client in participants(record)}
    if not absent:
        raise ArgumentError("without", expected="at least one client", got=sorted(absent))
    if hidden := absent & {record.client for one in records for record in one.clients} - known:
        raise UnknownClientError(
            "without",
            expected=f"clients whose updates in rounds {list(rounds)} can be read",
            got=sorted(hidden),
            remedy="Their updates are quarantined: what the model would be without them is not known",
        )
    if absent - known:
        raise UnknownClientError("without", expected=f"clients of rounds {list(rounds)}", got=sorted(absent - known))
    shift = {name: torch.zeros(records[0].parameters[name].shape) for name in names}
    for record in records:
        weights = participants(record)
        gained = 0.0
        if reaggregate and not absent.isdisjoint(weights):
            known_shares = shares(record)
            if known_shares is None:
                raise ArgumentError(
                    "reaggregate",
                    expected=f"False: round {record.number} ({record.rule}) does not record what share of the average "
                    "each client had",
                    got=True,
                    remedy="With reaggregate=False the contribution is taken out and nothing put in its place",
                )
            gained = gain(known_shares, absent)
        alphas = {client: -weight if client in absent else weight * gained for client, weight in weights.items()}
        for client, own in deltas(record, [client for client, alpha in alphas.items() if alpha], names):
            for name, delta in own.items():
                shift[name].add_(delta.float(), alpha=alphas[client])
    return shift


def gain(known: Mapping[str, float], absent: Collection[str]) -> float:
    """c with rho'_j = (1 + c) rho_j, what the others gain when a round is averaged without the absent.

        c = a / (1 - a),   a = the absent's shares

    0 where nobody else has a share.
    """
    gone = sum(share for client, share in known.items() if client in absent)
    left = sum(share for client, share in known.items() if client not in absent)
    return gone / left if left > 0 else 0.0


def at_weights(model: M, shift: Mapping[str, Tensor]) -> M:
    """A model that answers with `shift` added to the parameters: a twin, so that others may use `model` meanwhile.

    Raises:
        ModelError: the model has none: a forward was put onto one of its modules that is bound to it.
    """
    twin = twin_of(model)
    if twin is model:
        raise ModelError(
            "model",
            expected="modules with the methods of their classes, or accelerate's hooks",
            got=f"a forward on {bound_otherwise(model)} that is bound to it, and others may be generating with it",
            remedy="Take that off, or load the model again without it",
        )
    moved = {id(parameter): nn.Parameter(value, requires_grad=False) for parameter, value in _moved(model, shift)}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in moved:
                module._parameters[name] = moved[id(parameter)]
    return twin


def _moved(model: nn.Module, shift: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters that `shift` names and their moved values.

    Raises:
        LedgerMismatchError: one has another shape.
    """
    for name, addend in shift.items():
        parameter = model.get_parameter(parameter_of(model, name) or name)
        data = parameter.data
        if addend.shape != data.shape:
            raise LedgerMismatchError("shift", expected=f"{name} of shape {tuple(data.shape)}", got=addend.shape)
        yield parameter, (wide(data) + addend.to(data.device)).to(data.dtype)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is in fp64: what weights are added up in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def point(start: Mapping[str, Tensor], updates: Updates, coefficients: Tensor, along: float = 0.0) -> dict[str, Tensor]:
    """start + along * change + sum_k (c_k - along) rho_k delta_k, by name.

    Clients are added one after the other in their fixed order, from the start each time: a client whose delta is
    zero changes no bit, and nothing drifts over many points.
    """
    found = {}
    for name, origin in start.items():
        value = origin.clone()
        if along:
            value.add_(updates.change[name].to(value), alpha=along)
        for k, delta in enumerate(updates.deltas):
            factor = float((coefficients[k] - along) * updates.weights[k])
            if factor:
                value.add_(delta[name].to(value), alpha=factor)
        found[name] = value
    return found


def own_names(records: Sequence[Round], model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The model's names of the recorded ones, after checking that every round has them, in the model's shape."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name in names:
        for record in records:
            if name not in record.parameters:
                raise LayerError(
                    "layers",
                    expected=f"parameters that round {record.number} of the ledger holds",
                    got=name,
                    remedy=f"It holds {', '.join(list(record.parameters)[:6])}",
                )
        theirs = tuple(records[0].parameters[name].shape)
        own = parameter_of(model, name, parameters)
        if own is not None:  # First, for packed weights have another shape.
            _check_acts(model, own, parameters[own])
        ours = tuple(parameters[own].shape) if own else None
        if ours != theirs:
            raise LedgerMismatchError(
                "ledger",
                expected=f"{name} of the ledger's shape {theirs}",
                got="no such parameter in the model" if ours is None else ours,
            )
        assert own is not None
        found[name] = own
    return found


def require_in_memory(own: str, parameter: Tensor) -> None:
    """ModelError for a parameter whose numbers are elsewhere: nothing can be added to it."""
    if parameter.is_meta:
        raise ModelError(
            "model",
            expected=f"{own} in memory, to run the response at other values of it",
            got="a weight that was offloaded",
            remedy='Load the model without offloading, or use method="protoken"',
        )


def _check_acts(model: nn.Module, own: str, parameter: nn.Parameter) -> None:
    """ModelError for what cannot be moved: an adapter's factors that do not act, and packed weights."""
    require_acting(model, own)
    require_in_memory(own, parameter)
    if is_quantised(parameter):
        raise ModelError(
            "model",
            expected=f"{own} in floating point, to replay the response at other values of it",
            got=f"a quantised weight ({type(parameter).__name__}, {parameter.dtype})",
            remedy='Load the model unquantised, or use method="protoken"',
        )
