"""Ordinary answers looked at by themselves: which came out right, and who acted together in them.

The generator knows every right answer. Answers with arithmetic are beyond models of a million parameters, while
their wording is learnt, so there are two degrees of right; and what the model said before the federation tells
whether an answer was learnt in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from protoken.attachment import make_attachment
from protoken.attribution import read_source
from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.scoring import Answer
from protoken.ledger import Ledger
from protoken.methods.coalitions import Coalitions
from protoken.methods.game import Game
from protoken.methods.shapley import shapley_by_order
from protoken.methods.updates import Updates
from protoken.models.patching import evaluation_mode
from protoken.planning.options import Options
from protoken.planning.plan import make_plan
from protoken.results.checks import Array

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def in_words(text: str) -> str:
    """A text with every number replaced by "#".

    >>> in_words("The dose is 5 × 62.5 = 312.5 mg.")
    'The dose is # × # = # mg.'
    """
    return _NUMBER.sub("#", text.strip())


def subsets(texts: Sequence[str], before: Sequence[str], right: Sequence[str]) -> dict[str, Array]:
    """Masks [N] over answers, by name.

        all             every answer
        right           right but for its numbers
        word for word   right
        learnt          right but for its numbers, and the model before the federation said something else

    Args:
        texts: what was answered. before: what the base model answered. right: the right answers.
    """
    words = [in_words(text) for text in texts]
    good = np.array([a == in_words(b) for a, b in zip(words, right, strict=True)], dtype=bool)
    known = np.array([in_words(a) == b for a, b in zip(before, words, strict=True)], dtype=bool)
    exact = np.array([a.strip() == b.strip() for a, b in zip(texts, right, strict=True)], dtype=bool)
    return {"all": np.ones(len(words), dtype=bool), "right": good, "word for word": exact, "learnt": good & ~known}


def orders(base: BaseModel, ledger: Ledger, answers: Sequence[Answer], at_round: int) -> Array:
    """[N, K]: how much of the exact Shapley values over all rounds stems from 1, 2, ..., K clients acting together.

        share[n] = sum_k |part[n, k]| / sum_m sum_k |part[m, k]|,     part as in methods.shapley.shapley_by_order

    The model must hold the weights after `at_round`.
    """
    own = make_attachment(base.model, ledger, base.tokenizer, at_round=at_round)
    plan = make_plan(own.architecture, Options(method="shapley", rounds="all"))
    source = read_source(own, base.model, plan, "all")
    assert isinstance(source, Updates)
    found = np.zeros((len(answers), len(source.clients)))
    with evaluation_mode(base.model):
        for n, one in enumerate(answers):
            coalitions = Coalitions(Game(base.model, own.architecture, one.response, source))
            count = len(coalitions.players)
            sizes = shapley_by_order(coalitions, count).sum(1).abs().sum(1).numpy()
            found[n, :count] = sizes / max(float(sizes.sum()), np.finfo(float).tiny)
    return found
