"""Many rounds as one: a client's weighted updates summed first, so that lineage scores cost one round.

G_R = G_0 + sum_r ( sum_k rho_k^r delta_k^r + e_r ), so for any set of rounds

    change   = sum_r (G_r - G_{r-1})
    lineage  = sum_r rho_k^r delta_k^r        of client k, 0 in the rounds it sat out
    residual = change - sum_k lineage_k

The weights are inside the sums: a lineage delta has weight 1. What the change does not explain, f(G_0), is the
pretraining's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch import Tensor

from protoken.errors import ArgumentError, DtypeError, UnknownClientError, UnknownRoundError
from protoken.ledger.rounds import Round, add_weighted
from protoken.ledger.tensors import LowRank, concatenate


def lineage_clients(rounds: Sequence[Round]) -> tuple[str, ...]:
    """Everybody with a usable update in one of the rounds, sorted; those absent from the last round included."""
    _require(rounds)
    return tuple(sorted({c.client for r in rounds for c in r.usable}))


def lineage_delta(rounds: Sequence[Round], client: str, parameter: str) -> Tensor:
    """sum_r rho_k^r delta_k^r of one parameter, fp32, already weighted. Quarantined updates count as absent.

    UnknownClientError when the client took part in none of the rounds, LayerError when one of its rounds does not
    hold the parameter.
    """
    total: Tensor | None = None
    for current in _rounds_of(rounds, client):
        weight = current.client(client).weight
        if total is None:
            total = current.delta(client, parameter).float().mul_(weight)
        else:
            layout, parts = current.stored(client, parameter)
            add_weighted(total, layout, parts, weight)
    assert total is not None
    return total


def lineage_factors(rounds: Sequence[Round], client: str, parameter: str) -> LowRank:
    """The same as factors of rank sum_r r: exact, nothing multiplied out. DtypeError when a round is stored dense."""
    terms = []
    for current in _rounds_of(rounds, client):
        layout = current.layout(client, parameter)
        if layout not in ("lora", "lowrank"):
            raise DtypeError(f"{client}: {parameter}", expected="factors in every round", got=layout)
        a, b, scale = current.factors(client, parameter)
        terms.append((current.client(client).weight, LowRank(a, b, scale)))
    return concatenate(terms)


def lineage_change(rounds: Sequence[Round], parameter: str) -> Tensor:
    """sum_r (G_r - G_{r-1}) of one parameter, fp32: G_R - G_0 when the rounds are all of them without a gap."""
    _require(rounds)
    total = rounds[0].change(parameter)
    for current in rounds[1:]:
        total += current.change(parameter)
    return total


def lineage_residual(rounds: Sequence[Round], parameter: str) -> Tensor:
    """sum_r e_r of one parameter, fp32: owed to nobody."""
    _require(rounds)
    total = rounds[0].residual(parameter)
    for current in rounds[1:]:
        total += current.residual(parameter)
    return total


def lineage_gaps(rounds: Sequence[Round], parameters: Iterable[str]) -> tuple[int, ...]:
    """Numbers of the rounds that do not start where the one before ended, in any of these parameters.

    Of neighbouring rounds alone: between others, rounds that were left out changed the model. By digests; no tensor is
    read. What happened in a gap is in nobody's update: it is not recorded.
    """
    names = tuple(parameters)
    found = []
    for before, current in itertools.pairwise(sorted(rounds, key=lambda one: one.number)):
        shared = [name for name in names if name in before.parameters and name in current.parameters]
        same = all(before.parameters[name].aggregate == current.parameters[name].base for name in shared)
        if current.number == before.number + 1 and not same:
            found.append(current.number)
    return tuple(found)


def _rounds_of(rounds: Sequence[Round], client: str) -> list[Round]:
    _require(rounds)
    found = [r for r in rounds if r.has_client(client) and r.client(client).quarantined is None]
    if not found:
        known = lineage_clients(rounds)
        raise UnknownClientError(
            "client",
            expected=f"one of {len(known)} clients of {len(rounds)} rounds",
            got=ascii(client)[:80],
            remedy=f"The first are {', '.join(known[:5])}.",
        )
    return found


def _require(rounds: Sequence[Round]) -> None:
    if not isinstance(rounds, Sequence) or not all(isinstance(current, Round) for current in rounds):
        raise ArgumentError("rounds", expected="a list of rounds, as Ledger.select gives them", got=repr(rounds))
    if not rounds:
        raise UnknownRoundError("rounds", expected="at least one round", got="none")
    numbers = [current.number for current in rounds]
    if len(set(numbers)) != len(numbers):
        raise UnknownRoundError("rounds", expected="each round once", got=numbers)
