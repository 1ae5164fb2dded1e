"""Scores as the methods hand them on."""

from __future__ import annotations

import torch

from protoken.ways.projection import Scores


def test_what_was_noted_before_stays() -> None:
    errors = torch.ones(3)
    scores = Scores.empty(1, 3).noting(standard_errors=errors, pairs=4).noting(evaluations=9).noting(pairs=5)
    assert scores.settings == {"pairs": 5, "evaluations": 9}
    assert scores.standard_errors is errors
