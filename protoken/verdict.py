"""Which clients to name for a response, and when to name none.

    leading(totals)               the clients above the widest gap of the ranked scores: one, or several together
    Abstention.fit(null_traces)   a threshold at a chosen false-alarm rate; .judge(trace) names clients or abstains

Saved traces are enough: no model and no ledger is needed. What both are worth on real federations: docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from protoken.arguments import check_count, check_rate, finite, generator_of, listed
from protoken.confidence import check_trace, resampled_totals, traces_of
from protoken.errors import ArgumentError
from protoken.results import Trace
from protoken.results.checks import vector


def leading(totals: ArrayLike) -> tuple[tuple[int, ...], float]:
    """The clients above the widest gap between neighbours in the ranked positive totals [K], and how wide it is.

    The gap is given as a share of the top total, 0 to 1; negative totals count as 0. Clients that taught the same thing
    lead together: with totals of 3.0 and 2.8 and others below 0.2, the first two do. Ties go to fewer clients.

    Returns:
        Places in `totals` by descending total (their names are `trace.client_ids[k]`), none where no total
        is positive; and the gap.

    Raises:
        ArgumentError: no totals, or what is no finite number.
    """
    totals = vector("totals", totals)
    if not len(totals):
        raise ArgumentError("totals", expected="at least one", got="none")
    order = np.argsort(-totals, kind="stable")
    ranked = np.append(np.maximum(totals[order], 0.0), 0.0)
    if not ranked[0] > 0:
        return (), 0.0
    gaps = ranked[:-1] - ranked[1:]
    last = int(np.argmax(gaps))
    return tuple(int(k) for k in order[: last + 1]), float(gaps[last] / ranked[0])


@dataclass(frozen=True)
class Verdict:
    """What to say about a response.

    kind         "client", "mostly pretraining" (no client's evidence is beyond what unrelated answers show), or
                 "no client stands out" (there is evidence, but not for some clients rather than the others)
    clients      the named clients, by descending score; empty if none is
    evidence     the top client's total per token, in the trace's unit
    lead         how often all named clients are above all others in resampled responses; for a trace with totals
                 alone the gap below them, as a share of the top total
    """

    kind: Literal["client", "mostly pretraining", "no client stands out"]
    clients: tuple[str, ...]
    evidence: float
    lead: float

    @property
    def client(self) -> str | None:
        """The first of the named clients, or None."""
        return self.clients[0] if self.clients else None


@dataclass(frozen=True)
class Abstention:
    """When to name no client. Fitted on traces of answers that no client taught.

    evidence       the highest total per token that an unrelated answer may show
    lead           how often the leading clients must lead over resampled tokens
    gap            for totals alone: the gap below them, as a share of the top total
    false_alarm    the rate that was asked for; holds for exchangeable answers, whatever the scores' distribution
    samples        unrelated answers it was fitted on
    kind           method and unit of these answers' traces: those of the traces it may judge; None: not checked
    """

    evidence: float
    lead: float
    gap: float
    false_alarm: float
    samples: int
    kind: tuple[str, str] | None = None

    @staticmethod
    def fit(
        null_traces: Sequence[Trace], *, false_alarm: float = 0.01, lead: float = 0.9, gap: float = 0.5
    ) -> Abstention:
        """From traces of unrelated answers, by the same method and objective as those to be judged.

        Raises:
            ArgumentError: too few answers for that rate: n >= 1 / false_alarm - 1 are needed; another rate than
                between 0 and 1; or traces of several methods or units.
        """
        for name, share in (("lead", lead), ("gap", gap)):
            if not 0 <= finite(name, share) <= 1:
                raise ArgumentError(name, expected="from 0 to 1", got=share)
        listed = traces_of("null_traces", null_traces)
        kinds = {_kind(trace) for trace in listed}
        if len(kinds) > 1:
            raise ArgumentError("null_traces", expected="one method and unit", got=sorted(kinds))
        highest = threshold([evidence_of(trace) for trace in listed], false_alarm)
        return Abstention(highest, lead, gap, false_alarm, len(listed), kinds.pop())

    def judge(self, trace: Trace, *, draws: int = 500, seed: int = 0) -> Verdict:
        """Name the leading clients, or abstain and say why. More than half of all clients do not stand out.

        Raises:
            ArgumentError: no trace, one of another method or unit than those it was fitted on, whose scores are of
                another size, or `draws` or `seed` that is no count.
        """
        check_trace(trace)
        if self.kind is not None and _kind(trace) != self.kind:
            raise ArgumentError(
                "trace",
                expected=f"one as those it was fitted on, {' in '.join(self.kind)}",
                got=" in ".join(_kind(trace)),
                remedy="Fit on traces of the same method and objective",
            )
        check_count("draws", draws, 1)
        if trace.token_scores is None or not len(trace.token_scores):
            return self.judge_totals(trace.totals, len(trace.token_list), trace.client_ids)
        found, _ = leading(trace.totals)
        lead = _resampled_lead(trace, found, draws, seed)
        return self._decide(found, evidence_of(trace), lead, lead >= self.lead, trace.client_ids)

    def judge_totals(self, totals: ArrayLike, tokens: int, clients: Sequence[str]) -> Verdict:
        """The same from totals [K] of a response of so many tokens, by the gap below the leading clients."""
        check_count("tokens", tokens, 0)
        totals = vector("totals", totals)
        found, gap = leading(totals)
        clients = listed("clients", clients)
        if len(clients) != len(totals):
            raise ArgumentError("clients", expected=f"{len(totals)}, one for each of the totals", got=len(clients))
        evidence = float(totals.max()) / tokens if tokens else 0.0
        return self._decide(found, evidence, gap, gap >= self.gap, clients)

    def _decide(
        self, found: tuple[int, ...], evidence: float, lead: float, clear: bool, clients: Sequence[str]
    ) -> Verdict:
        if evidence <= self.evidence:
            return Verdict("mostly pretraining", (), evidence, lead)
        if not clear or (len(found) > 1 and 2 * len(found) > len(clients)):
            return Verdict("no client stands out", (), evidence, lead)
        return Verdict("client", tuple(clients[k] for k in found), evidence, lead)


def _kind(trace: Trace) -> tuple[str, str]:
    return trace.info.method, trace.unit


def threshold(evidence: ArrayLike, false_alarm: float) -> float:
    """The ceil((n + 1)(1 - false_alarm))-th smallest evidence of n unrelated answers.

    A fresh unrelated answer exceeds it with probability at most `false_alarm` (split conformal prediction,
    Vovk et al. 2005).

    Raises:
        ArgumentError: too few answers for that rate, or another rate than between 0 and 1.
    """
    check_rate("false_alarm", false_alarm)
    found = np.sort(vector("evidence", evidence))
    count = len(found)
    # Rounded against 99 * 0.99 = 98.01000000000001.
    place = math.ceil(round((count + 1) * (1 - false_alarm), 9))
    if place > count or count == 0:
        raise ArgumentError(
            "null_traces",
            expected=f"at least {math.ceil(round(1 / false_alarm - 1, 9))} for a false-alarm rate of {false_alarm}",
            got=count,
            remedy="Trace more answers that no client taught, or allow more false alarms",
        )
    return float(found[place - 1])


def evidence_of(trace: Trace) -> float:
    """The top client's total per generated token; 0 for an empty response."""
    check_trace(trace)
    return float(trace.totals.max()) / len(trace.token_list) if trace.token_list else 0.0


def _resampled_lead(trace: Trace, found: tuple[int, ...], draws: int, seed: int) -> float:
    """The share of resampled responses in which every one of `found` is above everybody else."""
    others = [k for k in range(len(trace.totals)) if k not in found]
    if not found or not others:
        return float(bool(found))
    sampled = resampled_totals(trace, draws, None, generator_of(seed))
    return float((sampled[:, list(found)].min(axis=1) > sampled[:, others].max(axis=1)).mean())
