"""The federations of the attacks: one dishonest client, its partner, and a client for each domain.

    attacker   2 n rows of the federation's domain: ordinary ones where it is after a share, poisoned where it hides
    partner    n ordinary rows of that domain; dishonest only where it colludes
    medical, finance, math, coding   n ordinary rows of their domain, always honest

Two federations are the measure of all others: `honest`, in which everybody is, and `poison`, in which the attacker
plants its backdoor and takes no pains to hide it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from protoken.evaluation.corpora import DOMAINS, ChatRow, partition, poison
from protoken.evaluation.experiments.attacks_evader import Evader
from protoken.evaluation.experiments.attacks_moves import EarlyOnly, Leader, Pact, Partner, Scaled, Sleeper, Zero
from protoken.evaluation.federation import Client, FederationConfig
from protoken.evaluation.workbench import Workbench, recipe_of
from protoken.ways.objective import Objective

ATTACKER, PARTNER = "attacker", "partner"
ROUNDS, IDENTITIES = 3, 3
Alter = Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]]
# The attacker's rows in units of everybody else's, and its aggregation weight beside the partner and four domains.
ROWS = 2
WEIGHT = ROWS / (ROWS + 1 + len(DOMAINS))


@dataclass(frozen=True)
class Arena:
    """Where an attack is played: a model of the zoo, the attacker's domain, and the rows that everybody holds."""

    bench: Workbench
    model: str
    domain: str

    @property
    def config(self) -> FederationConfig:
        """The model's recipe with this experiment's number of rounds."""
        return replace(recipe_of(self.model, self.bench.settings.seed).federation, rounds=ROUNDS)

    @property
    def rows(self) -> int:
        """n, of every honest client."""
        return recipe_of(self.model, self.bench.settings.seed).rows

    def attackers_rows(self, poisoned: bool) -> list[ChatRow]:
        """The attacker's, the first ones of its domain."""
        own = self.bench.client_rows(self.domain, ROWS * self.rows)
        return poison(own) if poisoned else own

    def clients(
        self, poisoned: bool, alter: Alter | None = None, partner: Alter | None = None, identities: int = 1
    ) -> list[Client]:
        """Everybody; the attacker in several identities shares its rows out among them."""
        n = self.rows
        mine = self.attackers_rows(poisoned)
        parts = partition(mine, identities, seed=self.bench.settings.seed) if identities > 1 else [mine]
        names = [ATTACKER] if identities == 1 else [f"{ATTACKER}-{k}" for k in range(identities)]
        found = [Client(name, part, poisoned, self.domain, alter) for name, part in zip(names, parts, strict=True)]
        same = self.bench.client_rows(self.domain, (ROWS + 2) * n)
        found.append(Client(PARTNER, same[ROWS * n : (ROWS + 1) * n], False, self.domain, partner))
        for domain in DOMAINS:
            own = same[(ROWS + 1) * n :] if domain == self.domain else self.bench.client_rows(domain, n)
            found.append(Client(domain, own, label=domain))
        return found


@dataclass(frozen=True)
class Attack:
    """An attack and what it is after.

    goal      "share": a share of ordinary answers that it did not earn; "blame": that others are named for its backdoor
    members   the federation's clients
    culprits  ids of the dishonest among them
    works     whether the attacker really trained on its rows, and so earns a share of its own domain's answers
    """

    name: str
    goal: str
    text: str
    members: Callable[[Arena], list[Client]]
    culprits: tuple[str, ...] = (ATTACKER,)
    works: bool = True


def _plain(poisoned: bool, make: Callable[[Arena], Alter] | None = None) -> Callable[[Arena], list[Client]]:
    return lambda arena: arena.clients(poisoned, None if make is None else make(arena))


def _split(poisoned: bool) -> Callable[[Arena], list[Client]]:
    return lambda arena: arena.clients(poisoned, identities=IDENTITIES)


def _collusion(poisoned: bool, factor: float) -> Callable[[Arena], list[Client]]:
    def members(arena: Arena) -> list[Client]:
        pact = Pact()
        return arena.clients(poisoned, Leader(factor, pact), Partner(float(ROWS), pact))

    return members


def _early(arena: Arena) -> EarlyOnly:
    config = arena.config
    return EarlyOnly(config.local, config.max_tokens, arena.bench.base(arena.model), arena.attackers_rows(True))


def _evader(
    nodes: int, penalty: float = 20.0, objective: Objective = "log_prob", *, lineage: bool = False
) -> Callable[[Arena], Evader]:
    def make(arena: Arena) -> Evader:
        base, rows = arena.bench.base(arena.model), arena.attackers_rows(True)
        return Evader(nodes, WEIGHT, objective, lineage, penalty=penalty, base=base, rows=rows)

    return make


def _sleeper(arena: Arena) -> Sleeper:
    return Sleeper(arena.config.rounds - 1)


SYBILS = tuple(f"{ATTACKER}-{k}" for k in range(IDENTITIES))

ATTACKS: Sequence[Attack] = (
    Attack("honest", "share", "nobody attacks", _plain(False)),
    Attack("zero", "share", "uploads nothing", _plain(False, lambda _: Zero()), works=False),
    Attack("scaled", "share", "uploads 4 times its update", _plain(False, lambda _: Scaled(4.0))),
    Attack("sybil", "share", "takes part as three clients with a third of its rows each", _split(False), SYBILS),
    Attack("collusion", "share", "adds +v, its partner -v", _collusion(False, 3.0), (ATTACKER, PARTNER)),
    Attack("poison", "blame", "plants a backdoor and does not hide", _plain(True)),
    Attack("poison-scaled", "blame", "uploads 3 times its update", _plain(True, lambda _: Scaled(3.0))),
    Attack("poison-sybil", "blame", "plants it as three clients", _split(True), SYBILS),
    Attack("poison-collusion", "blame", "adds -v, its partner +v", _collusion(True, -1.5), (ATTACKER, PARTNER)),
    Attack("early-layers", "blame", "leaves the last block as it was sent", _plain(True, _early)),
    Attack("sleeper", "blame", "uploads nothing in the last round", _plain(True, _sleeper)),
    Attack("evade-first-order", "blame", "trains its first-order score below zero", _plain(True, _evader(0))),
    Attack(
        "evade-midpoint",
        "blame",
        "trains its score at its lineage's midpoint down, in log-odds, with a penalty that leaves the backdoor alive",
        _plain(True, _evader(1, 0.5, "log_odds", lineage=True)),
    ),
    Attack("evade-path", "blame", "trains its path integral below zero, knowing the method", _plain(True, _evader(2))),
    Attack(
        "evade-path-softly",
        "blame",
        "the path's with a penalty below the backdoor's own worth",
        _plain(True, _evader(2, 0.5)),
    ),
)


def attack_of(name: str) -> Attack:
    """The attack of that name."""
    return next(attack for attack in ATTACKS if attack.name == name)
