"""What an attack gained: shares, blame, and whether it would have been seen at a given rate of false alarms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from protoken.evaluation.metrics import Array
from protoken.ledger import Ledger

FALSE_ALARM = 0.01


def softmax_share(scores: Array, members: Sequence[int]) -> float:
    """Mean over answers of the published share, softmax over clients, that these clients have together."""
    table = np.exp(scores - scores.max(axis=1, keepdims=True))
    return float((table[:, list(members)].sum(1) / table.sum(1)).mean())


def positive_share(scores: Array, members: Sequence[int]) -> float:
    """Mean over answers of these clients' part of the summed positive scores; 0 where no score is positive.

    Scores of the clients are summed first, so that neither identities nor a vector that cancels change it.
    """
    rest = [k for k in range(scores.shape[1]) if k not in set(members)]
    own = np.maximum(scores[:, list(members)].sum(1), 0.0)
    whole = own + np.maximum(scores[:, rest], 0.0).sum(1)
    return float(np.divide(own, whole, out=np.zeros_like(own), where=whole > 0).mean())


def each_positive_share(scores: Array, members: Sequence[int]) -> float:
    """As `positive_share`, every client's positive part for itself: what a server pays that knows of no pact."""
    parts = np.maximum(scores, 0.0)
    whole = parts.sum(1)
    own = parts[:, list(members)].sum(1)
    return float(np.divide(own, whole, out=np.zeros_like(own), where=whole > 0).mean())


def conformal_limit(values: Sequence[float] | Array, rate: float = FALSE_ALARM) -> float | None:
    """The ceil((n + 1)(1 - rate))-th smallest: a fresh exchangeable value exceeds it with probability <= rate.

    None for fewer than 1 / rate - 1 values. Source: Vovk et al. 2005.
    """
    count = len(values)
    place = math.ceil(round((count + 1) * (1 - rate), 9))
    return float(np.sort(np.asarray(values))[place - 1]) if 0 < place <= count else None


def alarms(evidence: Array, limit: float | None, culprits: Sequence[int]) -> dict[str, float | None]:
    """How often the top client exceeds the limit and is a culprit (`detected`), or is not (`framed`)."""
    if limit is None or not len(evidence):
        return {"detected": None, "framed": None}
    raised = evidence.max(1) > limit
    guilty = np.isin(evidence.argmax(1), list(culprits))
    return {"detected": float((raised & guilty).mean()), "framed": float((raised & ~guilty).mean())}


# ---- updates themselves ----------------------------------------------------------------------------------------


def update_features(ledger: Ledger, number: int) -> tuple[list[str], Array]:
    """Of every update of a round: log of its norm over the round's median norm, and its lowest cosine with another.

    An update of zeros has log norm -30 and cosine 0.
    """
    record = ledger.round(number)
    ids = [client.client for client in record.clients if client.quarantined is None]
    flat = []
    for client in ids:
        parts = [delta.float().flatten().numpy() for _, delta in record.deltas(client, tuple(record.parameters))]
        flat.append(np.concatenate(parts).astype(np.float64))
    table = np.stack(flat)
    norms = np.linalg.norm(table, axis=1)
    units = table / np.maximum(norms, 1e-300)[:, None]
    cosines = units @ units.T
    np.fill_diagonal(cosines, 1.0)
    centre = float(np.median(norms))
    sizes = np.log(np.maximum(norms / centre, math.exp(-30.0)))
    return ids, np.stack([sizes, cosines.min(1)], axis=1)


def prediction_limits(values: Array, rate: float = FALSE_ALARM, *, lower_only: bool = False) -> tuple[float, float]:
    """Bounds that a fresh value of the same normal distribution leaves with probability `rate`.

    mean -+ t s sqrt(1 + 1 / n), t of n - 1 degrees of freedom (Cornish and Fisher's expansion). A federation has too
    few honest updates for bounds without an assumption.
    """
    count = len(values)
    z = NormalDist().inv_cdf(1 - (rate if lower_only else rate / 2))
    free = count - 1
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    half = t * float(values.std(ddof=1)) * math.sqrt(1 + 1 / count)
    mean = float(values.mean())
    return mean - half, math.inf if lower_only else mean + half
