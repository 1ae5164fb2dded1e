"""Totals per client over many responses, with intervals and control of false discoveries: for alerts and rewards.

    book = protoken.account(traces)
    book.clients      ranked: total, mean per response, interval, p- and q-value
    book.flagged      clients that stand out, with the share of false ones held below the rate asked for

Saved traces are enough: no model and no ledger is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protoken.arguments import check_count, check_flag, check_rate, generator_of
from protoken.confidence import traces_of
from protoken.errors import ArgumentError, UnknownClientError
from protoken.results import Trace
from protoken.results.checks import Array

EXACT_UP_TO = 12
_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class ClientAccount:
    """One client over the responses it could be scored in.

    responses   how many
    total       summed raw score; `low` and `high` bound it (percentile bootstrap over responses)
    mean        per response
    p_value     of "no more than the others": see `account`
    q_value     smallest false-discovery rate at which it is flagged
    flagged     q_value <= the rate asked for
    """

    client: str
    responses: int
    total: float
    low: float
    high: float
    mean: float
    p_value: float
    q_value: float
    flagged: bool


@dataclass(frozen=True)
class Account:
    """Totals of many responses, as `account` adds them up. `book["clinic-a"]` is one client's entry.

    clients     one `ClientAccount` each, by descending total
    responses   how many traces were added up
    method      of all of them
    unit        of the scores: "nats", "nats of log-odds", "logit units", or a baseline's own
    rate        the false-discovery rate asked for
    """

    clients: tuple[ClientAccount, ...]
    responses: int
    method: str
    unit: str
    rate: float

    @property
    def flagged(self) -> tuple[str, ...]:
        """Clients that stand out, by descending total."""
        return tuple(entry.client for entry in self.clients if entry.flagged)

    def __getitem__(self, client: str) -> ClientAccount:
        """One client's entry; UnknownClientError for a client of none of the responses."""
        for entry in self.clients:
            if isinstance(client, str) and entry.client == client:
                return entry
        raise UnknownClientError("client", expected="a client of one of the responses", got=ascii(client)[:80])


def account(
    traces: Iterable[Trace],
    *,
    rate: float = 0.05,
    confidence: float = 0.95,
    draws: int = 2000,
    dependent: bool = True,
    seed: int = 0,
) -> Account:
    """Add up the clients' scores over many responses, and say who stands out.

    The test is one-sided and paired within each response: d_i = S_ki - mean of the other clients' S_i. If client k
    were as the others, the sign of each d_i would be a coin: p is how often random signs give a sum as large (all 2^n
    up to 12 responses, else `draws` and the observed one). q-values follow Benjamini and Yekutieli (2001), valid
    however the clients depend on each other (they do: scores of a response share its tokens), or Benjamini and
    Hochberg (1995) with `dependent=False`.

    Args:
        traces: of one method, objective and unit; rounds and clients may differ.
        rate: false-discovery rate, the expected share of wrongly flagged among the flagged.
        confidence: of the intervals.
        draws: bootstrap and sign resamples.

    Raises:
        ArgumentError: no traces, traces that cannot be added up, or a parameter out of range.
    """
    listed = traces_of("traces", traces)
    if not listed:
        raise ArgumentError("traces", expected="at least one", got=0)
    kinds = {(trace.info.method, trace.unit) for trace in listed}
    if len(kinds) > 1:
        raise ArgumentError("traces", expected="one method and unit", got=sorted(kinds))
    check_rate("rate", rate)
    check_rate("confidence", confidence)
    check_count("draws", draws, 1)
    check_flag("dependent", dependent)
    generator = generator_of(seed)
    ids = sorted({client for trace in listed for client in trace.client_ids})
    rows = [_of_client(client, listed, confidence, draws, generator) for client in ids]
    q_values = adjusted(np.array([row[-1] for row in rows]), dependent=dependent)
    entries = [
        ClientAccount(client, *row, q_value=float(q), flagged=bool(q <= rate))
        for client, row, q in zip(ids, rows, q_values, strict=True)
    ]
    ((method, unit),) = kinds
    return Account(tuple(sorted(entries, key=lambda e: (-e.total, e.client))), len(listed), method, unit, rate)


def adjusted(p_values: NDArray[np.float64], *, dependent: bool = True) -> Array:
    """q-values: min over j >= i of c m p_(j) / j, at most 1; c = sum_{j <= m} 1/j where tests may depend, else 1."""
    count = len(p_values)
    factor = float((1 / np.arange(1, count + 1)).sum()) if dependent else 1.0
    order = np.argsort(p_values)
    scaled = factor * count * p_values[order] / np.arange(1, count + 1)
    found = np.empty(count)
    found[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return found


def _of_client(
    client: str, traces: list[Trace], confidence: float, draws: int, generator: np.random.Generator
) -> tuple[int, float, float, float, float, float]:
    """Responses, total, low, high, mean and p-value."""
    scores, differences = [], []
    for trace in traces:
        if client in trace.client_ids:
            k = trace.client_ids.index(client)
            own = float(trace.totals[k])
            scores.append(own)
            if len(trace.client_ids) > 1:
                differences.append(own - (float(trace.totals.sum()) - own) / (len(trace.client_ids) - 1))
    values = np.array(scores)
    resampled = (
        values[generator.integers(0, len(values), size=(some, len(values)))] for some in _pieces(draws, values)
    )
    sums = np.concatenate([sample.sum(axis=1) for sample in resampled])
    tail = (1 - confidence) / 2
    low, high = np.quantile(sums, [tail, 1 - tail])
    p = sign_test(np.array(differences), draws, generator)
    return len(values), float(values.sum()), float(low), float(high), float(values.mean()), p


def sign_test(differences: Array, draws: int, generator: np.random.Generator) -> float:
    """P(sum of randomly signed differences >= their sum): exact for few, else Monte Carlo with the observed counted."""
    count = len(differences)
    if not count or not differences.any():
        return 1.0
    observed = differences.sum()
    # Sums that are equal but for rounding count as reaching the observed one.
    slack = 1e-12 * np.abs(differences).sum()
    if count <= EXACT_UP_TO:
        signs = np.array(list(itertools.product((1, -1), repeat=count)))
        return float(np.mean(signs @ differences >= observed - slack))
    reached = 0
    for some in _pieces(draws, differences):
        signs = generator.integers(0, 2, size=(some, count)) * 2 - 1
        reached += int(np.sum(signs @ differences >= observed - slack))
    return float((1 + reached) / (draws + 1))


def _pieces(draws: int, values: Array) -> list[int]:
    """Draws that may be in memory together, until there are all of them."""
    piece = max(1, _NUMBERS_AT_ONCE // len(values))
    return [min(piece, draws - start) for start in range(0, draws, piece)]
