"""What a Flower strategy does to updates, written as contributions that add up to it.

| strategy | recorded as |
|---|---|
| FedAvg, FedProx | the updates, rho_k = n_k / sum n |
| FedAvgM, FedAdam, FedYogi, FedAdagrad | each client's share of the server's momentum (`protoken.ledger.rules`) |
| Krum, MultiKrum | the updates, rho_k = n_k / sum n over those that were kept, 0 for the others |
| QFedAvg | the updates, rho_k proportional to loss_k^q |
| FedMedian, FedTrimmedAvg, Bulyan | the updates, rho_k = 1 / K; what the rule did otherwise is residual |
| any other | the updates, rho_k = n_k / sum n (1 / K without counts); what it did otherwise is residual |
| any with differential privacy around it | as the strategy inside, of the clipped updates; the noise is residual |
| SecAgg+ (`SecAggPlusWorkflow`) | one group: single updates are hidden from the server, and so from the ledger |

Strategies are told by the names of Flower's classes among their base classes: your own subclass of FedAvg counts as
FedAvg, and what it does otherwise is residual.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoken.errors import ArgumentError
from protoken.integrations.flower_messages import Reply
from protoken.ledger import ClientUpdate, rules
from protoken.ledger.updates import Value

_MEANS = {"FedAvg": "fedavg", "FedProx": "fedprox"}
_ROBUST = {"FedMedian": "median", "FedTrimmedAvg": "trimmed-mean", "Bulyan": "bulyan"}
_KRUM = ("Krum", "MultiKrum")
_OPTIMISERS = ("FedAvgM", "FedAdam", "FedYogi", "FedAdagrad")
GROUP = "secure-aggregation-group"


@dataclass(frozen=True)
class Applied:
    """A round as it is recorded."""

    rule: str
    updates: list[ClientUpdate]
    metadata: dict[str, Any] = field(default_factory=dict)


class Rule:
    """Of one strategy; keeps the clients' momentum from round to round."""

    def __init__(self, strategy: Any) -> None:
        self._outer, self._inner = strategy, _innermost(strategy)
        self._kind = _kind(self._inner)
        self._split: rules.FedAvgM | rules.FedAdam | None = None

    @property
    def strategy(self) -> str:
        """The strategy's class, and those it stands in, for the record."""
        names, current = [], self._outer
        while current is not self._inner:
            names.append(type(current).__name__)
            current = current.strategy
        return " of ".join([*names, type(self._inner).__name__])[:200]

    def applied(
        self,
        updates: Sequence[ClientUpdate],
        replies: Sequence[Reply],
        base: Mapping[str, Value],
        after: Mapping[str, Value],
        server_round: int,
    ) -> Applied:
        """The updates with the weights that the strategy applied, or what its optimiser made of them."""
        group = _secure_group(updates, replies)
        if group is not None:
            return group
        shares = _shares([reply.examples for reply in replies])
        if self._kind in _ROBUST:
            return Applied(_ROBUST[self._kind], _weighted(updates, [1 / len(updates)] * len(updates)))
        if self._kind in _KRUM:
            return Applied("krum", _weighted(updates, self._kept(updates, shares, base, after)))
        if self._kind == "QFedAvg":
            return Applied("qfedavg", _weighted(updates, self._fair(updates, replies, base, after)))
        if self._kind == "FedAvgM" and not (self._inner.server_momentum or self._inner.server_learning_rate != 1.0):
            return Applied("fedavg", _weighted(updates, shares))
        if self._kind in _OPTIMISERS:
            return self._optimised(_weighted(updates, shares), base, server_round)
        return Applied(_MEANS.get(self._kind, _rule_name(self._kind)), _weighted(updates, shares))

    # ---- optimisers ------------------------------------------------------------------------------------------------

    def _optimised(self, updates: list[ClientUpdate], base: Mapping[str, Value], server_round: int) -> Applied:
        inner = self._inner
        if self._split is None:
            self._split = _new_split(self._kind, inner)
        split = self._split
        if isinstance(split, rules.FedAdam):
            split.server_learning_rate = float(inner.eta * _correction(self._kind, inner, server_round))
            contributions = split.step(updates, base, second_moment=_moments(inner.v_t, base))
        else:
            contributions = split.step(updates, base)
        weights = {update.client: update.weight for update in updates}
        return Applied(split.rule, contributions, {"server": {**split.settings(), "weights": weights}})

    # ---- rules whose weights have to be found out ------------------------------------------------------------------

    def _kept(
        self,
        updates: Sequence[ClientUpdate],
        shares: Sequence[float],
        base: Mapping[str, Value],
        after: Mapping[str, Value],
    ) -> list[float]:
        """Which updates Krum kept: those with the largest coefficients in the least-squares fit of the change."""
        inner = self._inner
        wanted = int(inner.num_nodes_to_select if hasattr(inner, "num_nodes_to_select") else inner.num_clients_to_keep)
        gram, right = _normal_equations(updates, base, after)
        fitted = np.linalg.lstsq(gram, right, rcond=None)[0]
        kept = np.argsort(-fitted, kind="stable")[: max(1, wanted)]
        total = sum(shares[i] for i in kept)
        return [shares[i] / total if i in kept and total else 0.0 for i in range(len(updates))]

    def _fair(
        self,
        updates: Sequence[ClientUpdate],
        replies: Sequence[Reply],
        base: Mapping[str, Value],
        after: Mapping[str, Value],
    ) -> list[float]:
        """G_r - G_{r-1} = s sum_k loss_k^q delta_k with one s for all clients, which the change itself tells."""
        inner = self._inner
        key = inner.train_loss_key if hasattr(inner, "train_loss_key") else "loss"
        q = float(inner.q if hasattr(inner, "q") else inner.q_param)
        losses = [(loss(key) or 0.0) ** q for loss in (reply.loss for reply in replies)]
        gram, right = _normal_equations(updates, base, after)
        powers = np.asarray(losses)
        square = float(powers @ gram @ powers)
        scale = max(float(powers @ right) / square, 0.0) if square > 0 else 0.0
        return [float(scale * power) for power in powers]


def rule_of(strategy: Any) -> Rule:
    """The rule under which a strategy's rounds are recorded."""
    return Rule(strategy)


def _innermost(strategy: Any) -> Any:
    """What stands inside wrappers such as DifferentialPrivacyServerSideFixedClipping."""
    for _ in range(8):
        inner = getattr(strategy, "strategy", None)
        if inner is None or not (hasattr(inner, "aggregate_train") or hasattr(inner, "aggregate_fit")):
            break
        strategy = inner
    return strategy


def _kind(strategy: Any) -> str:
    """The nearest of Flower's own classes, or the class itself."""
    own = [cls.__name__ for cls in type(strategy).__mro__ if cls.__module__.split(".")[0] == "flwr"]
    known = [*_MEANS, *_ROBUST, *_KRUM, *_OPTIMISERS, "QFedAvg"]
    return next((name for name in own if name in known), type(strategy).__name__)


def _rule_name(kind: str) -> str:
    """Of a class, within the ledger's charset."""
    return re.sub(r"[^a-z0-9._-]", "-", kind.lower()).lstrip("._-")[:64] or "custom"


def _shares(examples: Sequence[float | None]) -> list[float]:
    """n_k / sum n; 1 / K where not every client gave a number, or all gave 0."""
    counts = [count for count in examples if count is not None]
    total = sum(counts)
    if len(counts) < len(examples) or not 0 < total < float("inf"):
        return [1 / len(examples)] * len(examples)
    return [count / total for count in counts]


def _weighted(updates: Sequence[ClientUpdate], weights: Sequence[float]) -> list[ClientUpdate]:
    return [replace(update, weight=weight) for update, weight in zip(updates, weights, strict=True)]


def _new_split(kind: str, strategy: Any) -> rules.FedAvgM | rules.FedAdam:
    if kind == "FedAvgM":
        return rules.FedAvgM(float(strategy.server_momentum), float(strategy.server_learning_rate))
    cls = {"FedAdam": rules.FedAdam, "FedYogi": rules.FedYogi, "FedAdagrad": rules.FedAdagrad}[kind]
    return cls(beta_1=float(strategy.beta_1), beta_2=float(strategy.beta_2), tau=float(strategy.tau))


def _correction(kind: str, strategy: Any, server_round: int) -> float:
    """Flower's FedAdam corrects its step for the bias of the first rounds, the others do not."""
    if kind != "FedAdam":
        return 1.0
    later = server_round + 1.0
    return float((1 - strategy.beta_2**later) ** 0.5 / (1 - strategy.beta_1**later))


def _moments(found: Any, base: Mapping[str, Value]) -> dict[str, Tensor] | None:
    """The server's own v, where it keeps it by name; a list has no names, and the split computes its own."""
    if not isinstance(found, Mapping) or any(name not in found for name in base):
        return None
    return {name: torch.from_numpy(np.array(found[name], dtype=np.float32)) for name in base}


def _normal_equations(
    updates: Sequence[ClientUpdate], base: Mapping[str, Value], after: Mapping[str, Value]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(D D^T [K, K], D change [K]) over all parameters, fp64; updates that cannot be used count as zero."""
    gram, right = torch.zeros(len(updates), len(updates), dtype=torch.float64), torch.zeros(len(updates)).double()
    for name, before in base.items():
        moved = after.get(name)
        if not isinstance(before, Tensor) or not isinstance(moved, Tensor) or moved.shape != before.shape:
            raise ArgumentError(f"aggregate[{name!r}]", expected=f"a tensor of shape {tuple(before.shape)}", got="none")
        rows = torch.stack([_row(update, name, before) for update in updates])
        gram += rows @ rows.T
        right += rows @ (moved.double() - before.double()).reshape(-1)
    return gram.numpy(), right.numpy()


def _row(update: ClientUpdate, name: str, before: Tensor) -> Tensor:
    assert update.delta is not None
    delta = update.delta.get(name)
    if not isinstance(delta, Tensor) or delta.shape != before.shape or not bool(torch.isfinite(delta).all()):
        return torch.zeros(before.numel(), dtype=torch.float64)
    return delta.double().reshape(-1)


def _secure_group(updates: Sequence[ClientUpdate], replies: Sequence[Reply]) -> Applied | None:
    """SecAgg+ puts the one aggregate it can see in place of every client's result: that is one group's update."""
    arrays = [list(reply.arrays.values()) for reply in replies]
    if (
        len(arrays) < 2
        or not arrays[0]
        or not all(
            len(other) == len(arrays[0]) and all(one is two for one, two in zip(arrays[0], other, strict=True))
            for other in arrays[1:]
        )
    ):
        return None
    assert updates[0].delta is not None
    update, groups = rules.group_update(GROUP, [u.client for u in updates], 1.0, updates[0].delta)
    return Applied(rules.SECURE_AGGREGATION, [update], {"groups": groups})
