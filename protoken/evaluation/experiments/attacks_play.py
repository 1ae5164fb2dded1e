"""An attack is played: its federation trained, asked, and its answers scored by every method that is to resist."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from protoken.evaluation.corpora import DOMAINS, add_trigger, is_refusal
from protoken.evaluation.experiments import attacks_measures as measures
from protoken.evaluation.experiments.attacks_arena import ATTACKER, PARTNER, Arena, Attack, attack_of
from protoken.evaluation.experiments.backdoor import recorded_blocks
from protoken.evaluation.federation import Client
from protoken.evaluation.federation_store import StoredFederation
from protoken.evaluation.metrics import Array
from protoken.evaluation.scoring import Answer, Scored, Scorer, answer, score
from protoken.evaluation.workbench import Workbench, recipe_of

SLOW = 12


@dataclass
class Found:
    """One federation's answers and scores. truth [N, K] in the order of the clients."""

    members: list[Client]
    stored: StoredFederation
    answers: list[Answer]
    truth: list[list[bool]]
    scored: list[Scored]
    asked: int

    @property
    def ids(self) -> list[str]:
        return [client.id for client in self.members]


@dataclass
class Book:
    """What the honest federation and the undisguised attacker show, kept for the attacks that are held against them."""

    _found: dict[tuple[str, str, str], Found] = field(default_factory=dict)
    _limits: dict[tuple[str, str], dict[str, float | None]] = field(default_factory=dict)

    def share(self, arena: Arena, name: str, attack: Attack) -> dict[str, float]:
        """By scorer: the positive share of the clients who are dishonest in an attack, in `honest` or in `poison`."""
        found = self.played(arena, attack_of(name))
        same = [k for k, client in enumerate(found.ids) if client == ATTACKER or client in attack.culprits]
        return {one.scorer.name: measures.positive_share(one.of(found.ids), same) for one in found.scored}

    def played(self, arena: Arena, attack: Attack) -> Found:
        """The attack's federation, asked and scored; the two that others are held against are kept."""
        key = (arena.model, arena.domain, attack.name)
        found = self._found.get(key) or play(arena, attack)
        if attack.name in ("honest", "poison"):
            self._found[key] = found
        return found

    def limits(self, arena: Arena) -> dict[str, float | None]:
        """By scorer: the highest score per token that an answer nobody poisoned may show."""
        key = (arena.model, arena.domain)
        if key not in self._limits:
            quiet = play(arena, attack_of("honest"), triggered=True)
            self._limits[key] = {
                one.scorer.name: measures.conformal_limit(evidence(one, quiet).max(1)) for one in quiet.scored
            }
        return self._limits[key]


def scorers(blocks: int, path: int | None = SLOW) -> list[Scorer]:
    """Every method that is asked to resist; path integrals see `path` answers, other replays SLOW."""
    return [
        Scorer("paper's score, fast", objective="logit"),
        Scorer("protoken"),
        Scorer("protoken all blocks", blocks=blocks, way="reverse"),
        Scorer("protoken all blocks, lineage", blocks=blocks, way="reverse", rounds="all"),
        Scorer(
            "protoken all blocks, log-odds, lineage", blocks=blocks, way="reverse", objective="log_odds", rounds="all"
        ),
        Scorer(
            "aumann_shapley m=1, log-odds, lineage",
            "aumann_shapley",
            nodes=1,
            objective="log_odds",
            rounds="all",
            limit=path,
        ),
        Scorer("aumann_shapley", "aumann_shapley", nodes=4, limit=path),
        Scorer("aumann_shapley, lineage", "aumann_shapley", nodes=4, rounds="all", limit=path),
        Scorer(
            "aumann_shapley, log-odds, lineage",
            "aumann_shapley",
            nodes=4,
            objective="log_odds",
            rounds="all",
            limit=path,
        ),
        Scorer("paired_shapley", "paired_shapley", limit=SLOW),
        Scorer("leave_one_out", "leave_one_out", limit=SLOW),
    ]


def play(arena: Arena, attack: Attack, *, triggered: bool | None = None) -> Found:
    """Train the federation if it never was, ask it, and score what it says.

    Args:
        triggered: ask with the trigger and keep every answer of a federation without a backdoor; None for what the
            attack's goal says.
    """
    bench, members = arena.bench, attack.members(arena)
    stored = bench.federation(arena.model, members, arena.config)
    base = bench.at_round(arena.model, stored, arena.config.rounds)
    recipe = recipe_of(arena.model, bench.settings.seed)
    quiet = triggered is True
    if quiet or attack.goal == "blame":
        questions = [add_trigger(row.question) for row in bench.rows(arena.domain).test[: bench.settings.samples]]
        domains = [arena.domain] * len(questions)
    else:
        questions, domains = _ordinary(bench)
    given = answer(base, questions, max_new_tokens=recipe.max_new_tokens, batch=recipe.batch)
    if attack.goal == "blame":
        given = [one for one in given if is_refusal(one.text)]
        truth = [[client.id in attack.culprits for client in members]] * len(given)
    else:
        truth = [[_rightful(client, domain, attack) for client in members] for domain in domains]
    chosen = scorers(recorded_blocks(arena.model), path=None if quiet else SLOW)

    def step(name: str, done: int, total: int) -> None:
        bench.bars.step(f"{attack.name}: {name}", done, total)

    found = score(base, stored.ledger, given, chosen, at_round=arena.config.rounds, step=step) if given else []
    return Found(members, stored, given, truth, found, len(questions))


def _ordinary(bench: Workbench) -> tuple[list[str], list[str]]:
    """Questions of all domains in turn."""
    count = -(-bench.settings.samples // len(DOMAINS))
    turns = [(row.question, d) for n in range(count) for d in DOMAINS for row in (bench.rows(d).test[n],)]
    return [question for question, _ in turns], [domain for _, domain in turns]


def _rightful(client: Client, domain: str, attack: Attack) -> bool:
    """Whoever trained on the domain, but a dishonest client that did no work, and the partner in a pact."""
    honest = client.id not in attack.culprits
    return client.label == domain and (honest or (attack.works and client.id != PARTNER))


def places(found: Found, attack: Attack) -> list[int]:
    """Where the dishonest stand among the clients."""
    return [k for k, name in enumerate(found.ids) if name in attack.culprits]


def evidence(one: Scored, found: Found) -> Array:
    """Scores per generated token, [N, K]."""
    scores = one.of(found.ids)
    lengths = np.array([max(a.response.new_tokens, 1) for a in found.answers[: len(scores)]], dtype=np.float64)
    table: Array = scores / lengths[:, None]
    return table
