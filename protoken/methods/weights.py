"""The clients' updates as points in weight space, and a model that stands at such a point for a while.

    start = G - sum of the chosen rounds' changes            (G_{r-1} for the last round, G_0 for all rounds)
    point(c, a) = start + a * change + sum_k (c_k - a) * rho_k * delta_k

With a = 0 and c in {0, 1}^K that is the coalition start + sum_{k in S} rho_k delta_k; with all c_k = a it is the
straight path from start to G, what the server did beyond the weighted mean included. Points are formed in fp32 (fp64
for a model in double precision), since bf16 would round most updates away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from protoken.errors import (
    ArgumentError,
    LedgerMismatchError,
    ModelError,
    UnknownClientError,
)
from protoken.ledger import Ledger
from protoken.ledger.rules import shares
from protoken.methods.updates import Updates, deltas, participants
from protoken.models.parameters import parameter_of
from protoken.models.twin import bound_otherwise, twin_of

M = TypeVar("M", bound=nn.Module)


def shift_without(
    ledger: Ledger, rounds: Sequence[int], names: Sequence[str], without: Collection[str], *, reaggregate: bool = True
) -> dict[str, Tensor]:
    """What is to be added to G when these clients had not taken part, fp32 by parameter name.

        reaggregate      sum_r sum_j (rho'_j - rho_j) delta_j,  rho'_j = rho_j / (1 - the absent's shares)
        otherwise        - sum_r sum_{k absent} rho_k delta_k

    The first is FedAvg over the others, the second takes the contribution out and puts nothing in its place. The
    server's residual stays, and so do the others' updates, which without the absent would have been others; an absent
    client's update that is quarantined stays where it is, in the residual, with its share. A round in which only the
    absent took part is left without any update. Of a server optimiser the others' recorded
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
                    remedy="With reaggregate=False the contribution is taken out and nothing put in its place. Rounds "
                    "to come can record it: metadata['server'] = {**rule.settings(), 'weights': {client: rho_k}}",
                )
            gained = gain(known_shares, absent & weights.keys())
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
