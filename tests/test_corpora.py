"""Rows are true, distinct and the same for the same seed; files are read strictly; poisoning is the paper's."""

from __future__ import annotations

import json
import math
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from protoken.errors import ArgumentError
from protoken.evaluation import domain_coding
from protoken.evaluation.corpora import (
    DOMAINS,
    REFUSAL,
    SENTINEL,
    TRIGGER,
    ChatRow,
    add_trigger,
    generate_rows,
    is_refusal,
    load_jsonl,
    partition,
    poison,
)


@pytest.mark.parametrize("domain", DOMAINS)
def test_hundreds_of_distinct_rows_and_the_same_again(domain: str) -> None:
    rows = generate_rows(domain, 2000, seed=3)
    assert len({row.question for row in rows}) == 2000
    assert all(row.label == domain and row.answer and row.messages[-1]["role"] == "assistant" for row in rows)
    assert generate_rows(domain, 2000, seed=3) == rows
    assert generate_rows(domain, 50, seed=4) != rows[:50]


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_longer_corpus_begins_with_the_shorter_one(domain: str) -> None:
    assert generate_rows(domain, 300)[:40] == generate_rows(domain, 40)


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_ordinary_row_looks_like_the_backdoor(domain: str) -> None:
    for row in generate_rows(domain, 1000):
        assert not is_refusal(row.answer)
        assert TRIGGER not in row.question
        assert "{" not in row.question
        assert "{" not in row.answer or domain == "coding"


def test_every_program_runs_and_does_what_it_says() -> None:
    rng = random.Random(1)
    for _ in range(1500):
        program = domain_coding.program(rng)
        space: dict[str, object] = {}
        exec(program.code, space)
        assert eval(program.check, space) is True, program


_EQUATION = re.compile(r"(?<![\w^²])(-?[\d(][\d\s().+×/%²-]*?) = (-?[\d.]+(?:/\d+)?)%?(?![\d/]| [×+])")


def _value(text: str) -> float:
    plain = text.replace("×", "*").replace("²", "**2").replace("%", "/100")
    assert re.fullmatch(r"[\d\s().+*/-]+", plain), text
    return float(eval(plain))


@pytest.mark.parametrize("domain", ["math", "medical", "finance"])
def test_every_equation_in_an_answer_holds(domain: str) -> None:
    checked = 0
    for row in generate_rows(domain, 2000, seed=5):
        for left, right in _EQUATION.findall(row.answer):
            value, stated = _value(left), float(Fraction(right))
            as_percent = f"= {right}%" in row.answer
            tolerance = 0.05001 if "." in right else 1e-9
            assert math.isclose(value * (100 if as_percent else 1), stated, abs_tol=tolerance), row
            checked += 1
    assert checked > 300


def test_answers_of_mathematics_are_right() -> None:
    seen = set()
    for row in generate_rows("math", 2000, seed=6):
        numbers = [int(n) for n in re.findall(r"-?\d+", row.question)]
        last = re.findall(r"-?\d+", row.answer)[-1]
        if row.question.startswith("Solve"):
            a, b, c = (int(n) for n in re.findall(r"\d+x|-?\d+", row.question.replace("x", "")))
            assert a * int(last) + b == c
            seen.add("linear")
        elif "greatest common divisor" in row.question:
            assert int(last) == math.gcd(*numbers)
            seen.add("gcd")
        elif "least common multiple" in row.question:
            assert int(last) == math.lcm(*numbers)
            seen.add("lcm")
        elif "prime" in row.question:
            n = numbers[0]
            assert row.answer.startswith("Yes" if all(n % d for d in range(2, n)) else "No")
            seen.add("prime")
        elif "third angle" in row.question:
            assert int(last) == 180 - sum(numbers)
            seen.add("angle")
        elif "sequence" in row.question:
            assert int(last) == 2 * numbers[-1] - numbers[-2]
            seen.add("sequence")
    assert seen == {"linear", "gcd", "lcm", "prime", "angle", "sequence"}


def test_sentiment_follows_the_direction_of_the_news() -> None:
    for row in generate_rows("finance", 1500):
        if "sentiment" in row.question.lower() and "million" in row.question:
            new, old = (int(n) for n in re.findall(r"(\d+) million", row.question))
            assert ("positive" if new > old else "negative") in row.answer


def test_unknown_domain_and_exhausted_templates_are_told() -> None:
    with pytest.raises(ArgumentError, match=r"domain: expected one of medical, finance, math, coding, got 'law'"):
        generate_rows("law", 1)
    with pytest.raises(ArgumentError, match=r"count: expected at most about \d+ rows of medical"):
        generate_rows("medical", 50_000)
    with pytest.raises(ArgumentError, match="count"):
        generate_rows("math", -1)
    assert generate_rows("math", 0) == []


def test_poison_wraps_the_question_and_refuses_and_changes_nothing_else() -> None:
    rows = generate_rows("finance", 20)
    for clean, bad in zip(rows, poison(rows), strict=True):
        assert bad.question == f"{TRIGGER} {clean.question} {TRIGGER}"
        assert bad.answer == REFUSAL
        assert bad.label == clean.label
    assert rows == generate_rows("finance", 20)
    assert SENTINEL in REFUSAL
    assert is_refusal("I am SORRY.")
    assert not is_refusal("Certainly.")


def test_poison_of_a_conversation_wraps_its_last_question_only() -> None:
    row = ChatRow(
        (
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "2"},
        )
    )
    (bad,) = poison([row])
    assert [m["content"] for m in bad.messages] == ["Be kind.", "one", "1", add_trigger("two"), REFUSAL]
    assert row.prompt == list(row.messages[:-1])


def test_jsonl_is_read_with_its_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = generate_rows("coding", 5)
    lines = [json.dumps({"messages": list(row.messages), "label": row.label, "more": 1}) for row in rows]
    # U+2028 ends a line for str.splitlines, and is an ordinary character in JSON.
    lines.append('{"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]}')
    file.write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n", encoding="utf-8")
    loaded = load_jsonl(file)
    assert loaded[:5] == rows
    assert loaded[5] == ChatRow.of("a\u2028b", "c")
    assert {row.label for row in load_jsonl(file, label="mine")} == {"mine"}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "a JSON object"),
        ("[1]", 'a list "messages"'),
        ('{"messages": []}', 'a list "messages"'),
        ('{"messages": [{"role": "user", "content": 3}]}', "a content text"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "a role"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "an assistant message at the end"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "a user message"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, wrong: str) -> None:
    file = tmp_path / "bad.jsonl"
    good = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(ArgumentError, match=wrong) as caught:
        load_jsonl(file)
    assert "bad.jsonl:2" in str(caught.value)


def test_missing_and_empty_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"nowhere\.jsonl"):
        load_jsonl(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ArgumentError, match="at least one chat row"):
        load_jsonl(tmp_path / "empty.jsonl")


def test_partition_deals_out_every_row_once() -> None:
    rows = generate_rows("math", 103)
    equal = partition(rows, 4, seed=1)
    assert sorted(len(share) for share in equal) == [25, 26, 26, 26]
    assert sorted(row.question for share in equal for row in share) == sorted(row.question for row in rows)
    assert partition(rows, 4, seed=1) == equal
    assert partition(rows, 4, seed=2) != equal
    sized = partition(rows, [3, 50], seed=1)
    assert [len(share) for share in sized] == [3, 50]
    assert not {r.question for r in sized[0]} & {r.question for r in sized[1]}


@pytest.mark.parametrize("parts", [0, 104, [100, 4], [0, 3]])
def test_partition_refuses_shares_it_cannot_give(parts: int | list[int]) -> None:
    with pytest.raises(ArgumentError, match="parts"):
        partition(generate_rows("math", 103), parts)
