"""What the server did, written as updates that add up to it.

The ledger records contributions c_k with G_r - G_{r-1} = sum_k rho_k c_k + residual. FedAvg and FedProx are that
already. Server optimisers are linear in the clients' updates too, once each client has its own share of the server's
state:

    FedAvgM   m_k <- beta m_k + rho_k delta_k                 c_k = eta m_k
    FedAdam   m_k <- beta_1 m_k + (1 - beta_1) rho_k delta_k  c_k = eta / (sqrt(v) + tau) * m_k
    FedYogi   as FedAdam, with Yogi's v                       (v is shared, taken right after the aggregation)
    FedAdagrad  as FedAdam with beta_1 = 0, v <- v + (sum_k rho_k delta_k)^2

(FedAvgM: Hsu et al. 2019, arXiv 1909.06335; the others: Reddi et al. 2020, arXiv 2003.00295.) So a client keeps
contributing after a round it sat out, as its momentum does. These c_k carry weight 1.

Median, trimmed mean and Krum are not weighted means; recorded_robust() gives the weights under which they are
recorded, and what differs is residual. Clipping is applied before recording; noise is residual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from protoken.errors import ArgumentError, LayerError, ShapeError
from protoken.ledger.tensors import LowRank, norm
from protoken.ledger.updates import ClientUpdate, Value, deltas_of

if TYPE_CHECKING:
    from protoken.ledger.ledger import Ledger
    from protoken.ledger.rounds import Round

SECURE_AGGREGATION = "secure-aggregation"
SERVER_OPTIMISERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
"""Rules whose rounds record contributions of weight 1; what the server averaged with is in metadata["server"], as
{**rule.settings(), "weights": {client: rho_k}}, which Flower's strategies write by themselves."""
Buffers = dict[str, dict[str, Tensor]]


@dataclass
class FedAvgM:
    """Server momentum. ``buffers[client][parameter]`` is m_k; hand them over to continue in another process."""

    momentum: float = 0.9
    server_learning_rate: float = 1.0
    buffers: Buffers = field(default_factory=dict)
    rule: str = "fedavgm"

    def settings(self) -> dict[str, object]:
        """What the rule was run with, for metadata["server"], beside "weights": the participants' rho_k by client."""
        return {"rule": self.rule, "momentum": self.momentum, "learning_rate": self.server_learning_rate}

    @classmethod
    def resume(cls, ledger: Ledger) -> FedAvgM:
        """The rule as the last round left it: m_k = c_k / eta, from what the ledger recorded.

        The last round's metadata["server"] must hold `settings()`. ArgumentError when it is not of this rule.
        """
        last = ledger.round("last")
        found = last.metadata.get("server")
        settings = found if isinstance(found, dict) else {}
        beta, eta = settings.get("momentum"), settings.get("learning_rate")
        if last.rule != "fedavgm" or not isinstance(beta, float | int) or not isinstance(eta, float | int) or not eta:
            raise ArgumentError("ledger", expected="a last round of fedavgm with its settings", got=last.rule)
        buffers = {
            record.client: {name: delta.float() * (record.weight / eta) for name, delta in last.deltas(record.client)}
            for record in last.usable
        }
        return cls(float(beta), float(eta), buffers)

    def step(self, updates: Sequence[ClientUpdate], base: Mapping[str, Value]) -> list[ClientUpdate]:
        """Contributions of this round: of its participants, and of everybody whose momentum still acts."""
        if not self.momentum:
            self.buffers.clear()
        for momentum in self.buffers.values():
            for tensor in momentum.values():
                tensor.mul_(self.momentum)
        _accumulate(self.buffers, updates, base, 1.0)
        gains = dict.fromkeys(base, self.server_learning_rate)
        return _contributions(self.buffers, updates, gains)


@dataclass
class FedAdam:
    """Adaptive server optimiser. ``second_moment[parameter]`` is v, ``buffers`` are the m_k.

    ``initial`` is v before the first round (0 in Flower; tau^2 in the paper).
    """

    server_learning_rate: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    initial: float = 0.0
    buffers: Buffers = field(default_factory=dict)
    second_moment: dict[str, Tensor] = field(default_factory=dict)
    rule: str = "fedadam"

    def settings(self) -> dict[str, object]:
        """What the rule was run with, for metadata["server"], beside "weights": the participants' rho_k by client."""
        rates = {"learning_rate": self.server_learning_rate, "beta_1": self.beta_1, "beta_2": self.beta_2}
        return {"rule": self.rule, **rates, "tau": self.tau, "initial": self.initial}

    def step(
        self,
        updates: Sequence[ClientUpdate],
        base: Mapping[str, Value],
        *,
        second_moment: Mapping[str, Tensor] | None = None,
    ) -> list[ClientUpdate]:
        """Contributions of this round. ``second_moment`` is the server's own v right after aggregating, if at hand."""
        if not self.beta_1:
            self.buffers.clear()
        for momentum in self.buffers.values():
            for tensor in momentum.values():
                tensor.mul_(self.beta_1)
        total = _accumulate(self.buffers, updates, base, 1.0 - self.beta_1)
        for name, mean in total.items():
            before = self.second_moment.get(name, torch.full_like(mean, self.initial))
            own = self._moment(before, mean.square())
            self.second_moment[name] = own if second_moment is None else second_moment[name].float()
        gains = {name: self.server_learning_rate / (self.second_moment[name].sqrt() + self.tau) for name in total}
        return _contributions(self.buffers, updates, gains)

    def _moment(self, before: Tensor, square: Tensor) -> Tensor:
        return self.beta_2 * before + (1 - self.beta_2) * square


@dataclass
class FedYogi(FedAdam):
    """FedAdam with v <- v - (1 - beta_2) d^2 sign(v - d^2)."""

    rule: str = "fedyogi"

    def _moment(self, before: Tensor, square: Tensor) -> Tensor:
        return before - (1 - self.beta_2) * square * torch.sign(before - square)


@dataclass
class FedAdagrad(FedAdam):
    """FedAdam without momentum (beta_1 = 0), with v <- v + d^2."""

    beta_1: float = 0.0
    rule: str = "fedadagrad"

    def _moment(self, before: Tensor, square: Tensor) -> Tensor:
        return before + square


def recorded_robust(
    rule: str, updates: Sequence[ClientUpdate], *, selected: Sequence[str] | None = None
) -> list[ClientUpdate]:
    """The same updates with the weights under which a robust rule is recorded; what it did otherwise is residual.

    median, trimmed-mean: 1 / K each. krum: 1 / m for the m ``selected`` clients, 0 for the others (exact).
    """
    if rule in ("median", "trimmed-mean"):
        weights = {update.client: 1.0 / len(updates) for update in updates}
    elif rule == "krum":
        chosen = set(selected or ())
        unknown = chosen - {update.client for update in updates}
        if not chosen or unknown:
            raise ArgumentError("selected", expected="clients that Krum kept", got=sorted(unknown) or "none")
        weights = {update.client: (update.client in chosen) / len(chosen) for update in updates}
    else:
        raise ArgumentError("rule", expected="median, trimmed-mean or krum", got=ascii(rule)[:40])
    return [replace(update, weight=weights[update.client]) for update in updates]


def clipped(update: ClientUpdate, base: Mapping[str, Value], max_norm: float) -> ClientUpdate:
    """The update as a clipping server applies it: delta * min(1, max_norm / ||delta||), norm over all parameters."""
    if not max_norm > 0:
        raise ArgumentError("max_norm", expected="a number above 0", got=max_norm)
    deltas = {name: _dense(value) for name, value in deltas_of(update, base).items()}
    total = sum(norm(delta) ** 2 for delta in deltas.values()) ** 0.5
    factor = min(1.0, max_norm / total) if total else 1.0
    return replace(update, state=None, delta={n: d * factor for n, d in deltas.items()}, key=None, signature=None)


def group_update(
    group: str, members: Sequence[str], weight: float, delta: Mapping[str, Value]
) -> tuple[ClientUpdate, dict[str, list[str]]]:
    """One group under secure aggregation: its summed update as one client, and its entry for metadata["groups"].

    Secure aggregation hides single updates on purpose, so attribution ends at the group. Commit such rounds with
    rule="secure-aggregation" and metadata={"groups": {...}}.
    """
    if len(members) < 2:
        raise ArgumentError("members", expected="at least 2 (a group of one hides nothing)", got=list(members))
    return ClientUpdate(group, weight, delta=delta), {group: list(members)}


def shares(record: Round) -> dict[str, float] | None:
    """Each client's share of what the server averaged in a round, quarantined updates included; they sum to 1.

        weighted means      rho_k / sum_j rho_j; all 0 where nobody has any weight
        server optimisers   the same of metadata["server"]["weights"]; 0 for clients whose momentum alone still acts

    None where a server optimiser's round does not say: no such weights beside contributions that all have weight 1,
    or none that could be a mean's. None, too, where a weight is negative or the sum is not finite.
    """
    weights: dict[str, float] = {client.client: client.weight for client in record.clients}
    optimiser = record.rule in SERVER_OPTIMISERS
    if optimiser:
        server = record.metadata.get("server")
        found = server.get("weights") if isinstance(server, dict) else None
        # Metadata is what the server wrote: anything that JSON can hold.
        if isinstance(found, dict) and all(type(weight) in (int, float) for weight in found.values()):
            weights = {client: float(found.get(client, 0.0)) for client in weights}
        elif found is not None or all(weight == 1 for weight in weights.values()):
            return None
    total = sum(weights.values())
    if any(weight < 0 for weight in weights.values()) or not total < math.inf or (optimiser and not total):
        return None
    return {client: weight / total if total else 0.0 for client, weight in weights.items()}


def check_groups(rule: str, clients: Sequence[str], metadata: Mapping[str, object]) -> None:
    """ArgumentError when a secure-aggregation round claims to know single clients."""
    if rule != SECURE_AGGREGATION:
        return
    groups = metadata.get("groups")
    unnamed = [client for client in clients if not isinstance(groups, dict) or client not in groups]
    if unnamed:
        raise ArgumentError(
            "rule",
            expected="updates of groups, named in metadata['groups']",
            got=f"{unnamed[0]} as a single client",
            remedy="Secure aggregation hides single updates: record one update per group with rules.group_update().",
        )


def lora_factor_split(
    base: Mapping[str, Value], aggregate: Mapping[str, Value], updates: Sequence[ClientUpdate]
) -> list[ClientUpdate]:
    """Exact contributions when a server averages the factors A and B apart (avg B avg A is not avg BA):

        c_k = s [ dB_k (A_r + A_{r-1}) / 2  +  (B_r + B_{r-1}) / 2 dA_k ],    dX_k = X_k - X_{r-1}

    so that sum_k rho_k c_k = s (B_r A_r - B_{r-1} A_{r-1}) when A_r, B_r are the weighted means. Updates give
    ``state``; LowRank parameters must keep rank and scale, dense ones are plain differences.
    """
    result = []
    for update in updates:
        if update.state is None:
            raise ArgumentError(f"update of {update.client}", expected="state (the client's factors)", got="delta")
        deltas: dict[str, Value] = {}
        for name, before in base.items():
            if name not in update.state or name not in aggregate:
                raise LayerError(f"state of {update.client}", expected=f"{name}", got="none")
            mine, after = update.state[name], aggregate[name]
            if isinstance(before, LowRank) and isinstance(mine, LowRank) and isinstance(after, LowRank):
                deltas[name] = _split(name, before, after, mine)
            else:
                deltas |= deltas_of(replace(update, state={name: mine}), {name: before})
        result.append(replace(update, state=None, delta=deltas))
    return result


def _split(name: str, before: LowRank, after: LowRank, mine: LowRank) -> LowRank:
    shapes = {(value.a.shape, value.b.shape, value.scale) for value in (before, after, mine)}
    if len(shapes) != 1:
        raise ShapeError(
            name, expected="one rank and scale for base, aggregate and clients", got=sorted(map(str, shapes))
        )
    mean_a = (after.a.float() + before.a.float()) / 2
    mean_b = (after.b.float() + before.b.float()) / 2
    moved_a, moved_b = mine.a.float() - before.a.float(), mine.b.float() - before.b.float()
    return factor_contribution(mean_a, mean_b, moved_a, moved_b, before.scale)


def factor_contribution(mean_a: Tensor, mean_b: Tensor, da: Tensor, db: Tensor, scale: float) -> LowRank:
    """c = s [ dB mean_A + mean_B dA ] of rank 2 r; a mean is (X_r + X_{r-1}) / 2 of A [r, I] or B [O, r]."""
    return LowRank(torch.cat([mean_a, da.float()]), torch.cat([db.float(), mean_b], dim=1), scale)


def _accumulate(
    buffers: Buffers, updates: Sequence[ClientUpdate], base: Mapping[str, Value], factor: float
) -> dict[str, Tensor]:
    """buffers[k] += factor rho_k delta_k; returns sum_k rho_k delta_k."""
    total: dict[str, Tensor] = {}
    for update in updates:
        own = buffers.setdefault(update.client, {})
        for name, value in deltas_of(update, base).items():
            share = _dense(value) * update.weight
            own[name] = own[name] + factor * share if name in own else factor * share
            total[name] = total[name] + share if name in total else share
    return total


def _contributions(
    buffers: Buffers, updates: Sequence[ClientUpdate], gains: Mapping[str, float | Tensor]
) -> list[ClientUpdate]:
    examples = {update.client: update.examples for update in updates}
    return [
        ClientUpdate(
            client,
            1.0,
            delta={name: tensor * gains[name] for name, tensor in buffers[client].items()},
            examples=examples.get(client),
        )
        for client in sorted(buffers)
    ]


def _dense(value: Value) -> Tensor:
    return value.dense() if isinstance(value, LowRank) else value.detach().cpu().float()
