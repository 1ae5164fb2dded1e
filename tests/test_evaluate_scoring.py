"""Answers in batches and scores of many methods equal what `protoken.trace` says of one prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
from character_tokenizer import character_tokenizer
from tiny_federation import CLIENTS, TinyFederation, tiny_federation

import protoken
from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.scoring import Scorer, answer, forced, score, up_to

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = ["2 + 2?", "What is the square of 12?", "a", "Name a colour, please."]
SCORERS = [
    Scorer("protoken"),
    Scorer("all", blocks=4, way="reverse", rounds="all"),
    Scorer("aumann_shapley", "aumann_shapley", rounds="all", nodes=3),
    Scorer("paper", "paper", limit=2),
    Scorer("update_norm", "update_norm"),
]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param, rounds=2)


@pytest.fixture
def base(federation: TinyFederation) -> BaseModel:
    return BaseModel(federation.model, character_tokenizer(), "tiny", "")


def test_scores_are_those_of_trace(federation: TinyFederation, base: BaseModel) -> None:
    answers = answer(base, QUESTIONS, max_new_tokens=7, batch=3)
    assert [one.question for one in answers] == QUESTIONS
    found = score(base, federation.ledger, answers, SCORERS)
    for scored in found:
        scorer = scored.scorer
        assert scored.scores.shape == (scorer.limit or len(QUESTIONS), len(CLIENTS))
        assert len(scored.seconds) == len(scored.residuals) == len(scored.scores)
        for row, one in zip(scored.scores, answers, strict=False):
            trace = protoken.trace(
                base.model,
                [{"role": "user", "content": one.question}],
                ledger=federation.ledger,
                tokenizer=base.tokenizer,
                method=scorer.method,
                blocks=scorer.blocks,
                way=scorer.way,
                rounds=scorer.rounds,
                nodes=scorer.nodes,
                max_new_tokens=7,
                do_sample=False,
                eos_token_id=base.tokenizer.eos_token_id,
                pad_token_id=base.tokenizer.pad_token_id,
            )
            assert [token.id for token in trace.token_list] == one.response.tokens.tolist()
            assert trace.client_ids == scored.clients
            size = np.abs(trace.totals).max()
            np.testing.assert_allclose(row, trace.totals, rtol=0, atol=2e-4 * size, err_msg=scorer.name)


def test_clients_that_the_rounds_do_not_know_score_zero(federation: TinyFederation, base: BaseModel) -> None:
    answers = answer(base, QUESTIONS[:1], max_new_tokens=3)
    (scored,) = score(base, federation.ledger, answers, SCORERS[:1])
    shown = scored.of(["stranger", "bob", "null"])
    assert shown.shape == (1, 3)
    assert shown[0, 0] == 0
    assert shown[0, 1] == scored.scores[0, scored.clients.index("bob")] != 0
    assert shown[0, 2] == 0


def test_completeness_of_the_path_integral_is_reported(federation: TinyFederation, base: BaseModel) -> None:
    answers = answer(base, QUESTIONS[:2], max_new_tokens=5)
    coarse, fine = score(
        base,
        federation.ledger,
        answers,
        [Scorer("1", "aumann_shapley", nodes=1), Scorer("16", "aumann_shapley", nodes=16)],
    )
    assert max(fine.residuals) < 0.01
    assert max(coarse.residuals) > max(fine.residuals)


def test_a_forced_answer_is_the_text_and_its_end(base: BaseModel) -> None:
    one = forced(base, "2 + 2?", "No.")
    ids = one.response.tokens.tolist()
    assert base.tokenizer.decode(ids) == "No.<eos>"
    assert base.tokenizer.decode(one.response.ids[0, : one.response.prompt_length].tolist()) == "u:2 + 2?<eos>a:"


def test_an_answer_is_cut_after_the_word_and_its_tokens_score_as_before(
    federation: TinyFederation, base: BaseModel
) -> None:
    whole = forced(base, "2 + 2?", "I am Sorry, no.")
    cut = up_to(base, whole, "sorry")
    assert cut.text == "I am Sorry"
    assert up_to(base, whole, "absent") is whole
    before, after = (score(base, federation.ledger, [one], SCORERS[:1])[0].scores for one in (cut, whole))
    assert not np.allclose(before, after)
    other = up_to(base, forced(base, "2 + 2?", "I am Sorry! Really."), "sorry")
    np.testing.assert_array_equal(score(base, federation.ledger, [other], SCORERS[:1])[0].scores, before)
