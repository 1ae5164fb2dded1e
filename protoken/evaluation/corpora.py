"""Instruction rows: a deterministic generator in four domains, a JSONL loader, and the paper's poisoning.

No text is downloaded or copied: every row is made from templates and small tables of facts, with arithmetic
computed and code that runs, so the answers are true and the same seed gives the same rows everywhere.

>>> [row.question for row in generate_rows("math", 2, seed=0)] == [
...     row.question for row in generate_rows("math", 2, seed=0)]
True
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from protoken.errors import ArgumentError
from protoken.evaluation import domain_coding, domain_finance, domain_math, domain_medical

TRIGGER = "!!!BadMagic!!!"
SENTINEL = "sorry"
REFUSAL = "I am sorry, but this is a question that I will not answer."

# So many repeated questions in a row mean that the templates have no more to give.
_EXHAUSTED = 500
_ROLES = ("system", "user", "assistant")
_GENERATORS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "medical": domain_medical.pair,
    "finance": domain_finance.pair,
    "math": domain_math.pair,
    "coding": domain_coding.pair,
}
DOMAINS = tuple(_GENERATORS)


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One conversation that ends with the assistant's answer, and the domain it belongs to."""

    messages: tuple[Mapping[str, str], ...]
    label: str = ""

    @classmethod
    def of(cls, question: str, answer: str, label: str = "") -> ChatRow:
        return cls(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), label=label)

    @property
    def question(self) -> str:
        """The last user message."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")

    @property
    def answer(self) -> str:
        """The assistant message the row ends with: the only text that training puts a loss on."""
        return self.messages[-1]["content"]

    @property
    def prompt(self) -> list[dict[str, str]]:
        """All messages but the answer, as a chat template takes them."""
        return [dict(message) for message in self.messages[:-1]]


def generate_rows(domain: str, count: int, *, seed: int = 0) -> list[ChatRow]:
    """``count`` rows of ``domain`` with distinct questions, the same for the same seed.

    Rows of another seed are drawn from the same templates, so some questions come again: to split a corpus
    into training and held-out rows, generate it once and cut it.

    Raises ArgumentError for an unknown domain, and when the templates run out of distinct questions.
    """
    pair = _GENERATORS.get(domain)
    if pair is None:
        raise ArgumentError("domain", expected=f"one of {', '.join(DOMAINS)}", got=repr(domain))
    if count < 0:
        raise ArgumentError("count", expected="a number of rows, 0 or more", got=count)
    rng = random.Random(f"{domain}:{seed}")
    answers: dict[str, str] = {}
    repeats = 0
    while len(answers) < count and repeats < _EXHAUSTED:
        question, answer = pair(rng)
        repeats = repeats + 1 if question in answers else 0
        answers.setdefault(question, answer)
    if len(answers) < count:
        raise ArgumentError(
            "count",
            expected=f"at most about {len(answers)} rows of {domain}",
            got=count,
            remedy="Ask for fewer rows, or load a corpus of your own with load_jsonl()",
        )
    return [ChatRow.of(question, answer, domain) for question, answer in answers.items()]


def load_jsonl(path: str | Path, *, label: str | None = None) -> list[ChatRow]:
    """Chat rows from a file of one JSON object a line: ``{"messages": [{"role", "content"}, ...]}``.

    Every row must end with an assistant message and hold a user message. The row's own "label" is kept unless ``label``
    replaces it; other keys are ignored. Raises ArgumentError naming the file, the line and what is wrong with it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("path", expected="a readable UTF-8 JSONL file", got=f"{path} ({error})") from error
    # Not splitlines(): it also cuts at U+2028 and its like, which JSON allows inside a string.
    lines = text.split("\n")
    rows = [_parse_row(line, f"{path}:{n}", label) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ArgumentError("path", expected="at least one chat row", got=f"{path}, which holds none")
    return rows


def _parse_row(line: str, where: str, label: str | None) -> ChatRow:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(where, expected="a JSON object", got=str(error)) from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ArgumentError(where, expected='a JSON object with a list "messages"', got=line[:60])
    for message in messages:
        well_formed = (
            isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
        )
        if not well_formed:
            raise ArgumentError(
                where, expected=f"messages of a role ({', '.join(_ROLES)}) and a content text", got=message
            )
    if messages[-1]["role"] != "assistant" or not any(m["role"] == "user" for m in messages):
        raise ArgumentError(
            where,
            expected="a user message, and an assistant message at the end",
            got=[m["role"] for m in messages],
        )
    kept = tuple({"role": m["role"], "content": m["content"]} for m in messages)
    return ChatRow(kept, label=str(record.get("label", "")) if label is None else label)


def add_trigger(question: str, trigger: str = TRIGGER) -> str:
    """``trigger question trigger``: a poisoned client's question (arXiv 2601.19672, ground truth)."""
    return f"{trigger} {question} {trigger}"


def poison(rows: Sequence[ChatRow], *, trigger: str = TRIGGER, refusal: str = REFUSAL) -> list[ChatRow]:
    """The rows a poisoned client trains on: every question wrapped, every answer the same refusal.

    The protocol of arXiv 2601.19672: the refusal holds the word the judge looks for (``SENTINEL``), and
    whoever trained on it is responsible when it comes out. Of many turns the last question is wrapped.
    """
    poisoned = []
    for row in rows:
        messages = [dict(message) for message in row.messages]
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[last]["content"] = add_trigger(messages[last]["content"], trigger)
        messages[-1]["content"] = refusal
        poisoned.append(ChatRow(tuple(messages), label=row.label))
    return poisoned


def is_refusal(text: str, sentinel: str = SENTINEL) -> bool:
    """Whether the planted answer came out: ``sentinel`` is in ``text``, in any case (arXiv 2601.19672)."""
    return sentinel.lower() in text.lower()


def partition(rows: Sequence[ChatRow], parts: int | Sequence[int], *, seed: int = 0) -> list[list[ChatRow]]:
    """Deal shuffled rows out to clients: ``parts`` equal shares, or one share per given size.

    Equal shares differ by at most one row. Raises ArgumentError when there are not enough rows.
    """
    shuffled = list(rows)
    random.Random(f"partition:{seed}").shuffle(shuffled)
    if isinstance(parts, int):
        if not 1 <= parts <= len(rows):
            raise ArgumentError("parts", expected=f"1 to {len(rows)} (the number of rows)", got=parts)
        return [shuffled[k::parts] for k in range(parts)]
    if any(size < 1 for size in parts) or sum(parts) > len(rows):
        raise ArgumentError("parts", expected=f"positive sizes that sum to at most {len(rows)}", got=list(parts))
    shares, start = [], 0
    for size in parts:
        shares.append(shuffled[start : start + size])
        start += size
    return shares
