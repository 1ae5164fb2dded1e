"""Parts of a trace: spans, phrases and sentences, in whole tokens that add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results_cases import make

from protoken.errors import ArgumentError
from protoken.results import Token
from protoken.results.spans import phrase_ranges, sentence_ranges


def test_span_sums_its_own_tokens_and_conserves() -> None:
    trace = make()
    part = trace.span(1, 4)
    assert part.response == " INR is fine"
    assert trace.token_scores is not None
    assert np.array_equal(part.totals, trace.token_scores[1:4].sum(axis=0))
    assert part.totals.sum() + part.residual == pytest.approx(part.change, rel=1e-12)
    assert part.layer_totals is None
    assert (part.start, part.span(1, 2).start) == (1, 2)


@settings(deadline=None)
@given(cut=st.integers(1, 7), seed=st.integers(0, 100))
def test_parts_of_a_trace_add_up_to_it(cut: int, seed: int) -> None:
    trace = make([f" w{i}" for i in range(8)], seed=seed)
    left, right = trace.span(0, cut), trace.span(cut, 8)
    assert left.totals + right.totals == pytest.approx(trace.totals, rel=1e-9, abs=1e-12)
    assert left.change + right.change == pytest.approx(trace.change, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("limits", [(-1, 2), (2, 2), (3, 2), (0, 6), (5, 6)])
def test_span_refuses_ranges_outside_the_answer(limits: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match=r"span: expected 0 <= start < stop <= 5"):
        make().span(*limits)


def test_find_asks_about_the_tokens_that_say_a_phrase() -> None:
    trace = make([" so", "rry", ", I", " am", " Sor", "ry", ".", "<|sorry|>"])
    (part,) = trace.find("sorry")
    assert (part.response, part.start) == (" sorry", 0)
    assert trace.token_scores is not None
    assert np.array_equal(part.totals, trace.token_scores[0:2].sum(axis=0))
    assert part.totals.sum() + part.residual == pytest.approx(part.change, rel=1e-12)
    assert [found.start for found in trace.find("SORRY", ignore_case=True)] == [0, 4]
    assert [found.start for found in trace.find("r")] == [1, 1, 4, 5]
    assert trace.find("glad") == []
    assert trace.span(3, 8).find("Sorry")[0].start == 4
    with pytest.raises(ArgumentError, match="phrase: expected at least one character, got ''"):
        trace.find("")


def said(phrase: str, *texts: str) -> list[tuple[int, int]]:
    return phrase_ranges([Token(0, text, text.startswith("<|")) for text in texts], phrase)


def test_phrases_are_whole_tokens_and_take_the_pieces_of_a_split_character() -> None:
    assert said("b", "abc") == [(0, 1)]
    assert said("cd", "abc", "def", "g") == [(0, 2)]
    assert said("aa", "aaa", "a") == [(0, 1), (0, 2)]
    assert said("é", "caf", "", "é", "!") == [(1, 3)]
    assert said("x", "", "x", "", "y") == [(0, 2)]
    assert said("end", "<|end|>", "the end", "<|end|>") == [(1, 2)]
    assert said(" ", "a", "<|end|>") == []
    assert said(".*", "a", ".", "*") == [(1, 3)]


@settings(deadline=None)
@given(texts=st.lists(st.text("ab ", max_size=3), max_size=8), phrase=st.text("ab ", min_size=1, max_size=3))
def test_every_occurrence_of_a_phrase_lies_inside_its_range(texts: list[str], phrase: str) -> None:
    found = said(phrase, *texts)
    assert len(found) == "".join(texts).count(phrase)
    for first, end in found:
        assert phrase in "".join(texts[first:end])


def split(*texts: str) -> list[str]:
    tokens = [Token(0, text, text.startswith("<|")) for text in texts]
    return ["".join(token.text for token in tokens[i:j]) for i, j in sentence_ranges(tokens)]


def test_sentences_end_at_full_stops_and_not_inside_numbers_or_after_titles() -> None:
    assert split("Take", " 3", ".", "5", " mg", ".", " Ask", " Dr", ".", " No", ".") == [
        "Take 3.5 mg.",
        " Ask Dr. No.",
    ]


def test_sentences_end_at_line_breaks_and_keep_list_numbers() -> None:
    assert split("1", ".", " One", "\n", "2", ".", " Two") == ["1. One\n", "2. Two"]


def test_sentence_end_inside_a_token_goes_with_its_first_visible_character() -> None:
    assert split("Stop", "!\n\nGo", " on") == ["Stop!\n\nGo", " on"]
    assert split('"Yes', '?" ', "she", " said") == ['"Yes?" ', "she said"]


def test_special_and_empty_tokens_stay_with_the_sentence_before() -> None:
    assert split("<|begin|>", "Yes", ".", "", " No", ".", "<|im_end|>") == ["<|begin|>Yes.", " No.<|im_end|>"]


def test_sentences_without_spaces_between_them() -> None:
    assert split("你好", "。", "世界", "！") == ["你好。", "世界！"]


@settings(deadline=None)
@given(st.lists(st.text(alphabet=" .!?\n\t'\"aB3。<|", max_size=4), max_size=30))
def test_every_token_is_in_exactly_one_sentence(texts: list[str]) -> None:
    ranges = sentence_ranges([Token(0, text, "<|" in text) for text in texts])
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(len(texts)))
    assert all(start < stop for start, stop in ranges)


def test_sentences_are_spans_that_add_up() -> None:
    trace = make(["Yes", ".", " But", " why", "?"])
    parts = trace.sentences()
    assert [part.response for part in parts] == ["Yes.", " But why?"]
    assert sum(part.totals for part in parts) == pytest.approx(trace.totals)
    assert make([], scores=np.zeros((0, 3))).sentences() == []


def test_a_part_has_confidences_of_its_own() -> None:
    """Also where those of the whole were looked at first."""
    read, fresh = make(clients=12), make(clients=12)
    whole = [client.confidence for client in read.clients]
    part = [client.confidence for client in read.span(0, 2).clients]
    assert part == [client.confidence for client in fresh.span(0, 2).clients]
    assert part != whole
