"""Records as a client keeps them (text, question and answer, conversations) and as a model reads them (token ids)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protoken.errors import ArgumentError, PromptError
from protoken.results.checks import utf8
from protoken.text import encode_prompt, encode_text


@dataclass(frozen=True)
class PlacedRecord:
    """A record with the words by which errors name it: the line of its file, say."""

    record: str | tuple[str, str] | Mapping[str, Any]
    where: str


Record = str | tuple[str, str] | Mapping[str, Any] | PlacedRecord
"""Plain text or {"text": ...}; (prompt, answer) or {"prompt": ..., "response": ...}; or {"messages": [...]} that ends
with the answer.

A mapping may carry an "id" and a "client" to find the record again; other keys are ignored, and so are nulls. Errors
name a record by its place in the sequence, a PlacedRecord by its own words.
"""

_CONVERSATION = ("prompt", "response", "messages")


@dataclass(frozen=True)
class EncodedRecord:
    """Token ids of a record; those from `answer_start` on carry the loss. `key` names it, `text` is for the eye."""

    ids: tuple[int, ...]
    answer_start: int
    key: str
    client: str | None
    text: str


def encode_record(tokenizer: Any, record: Record, index: int, *, max_tokens: int, chat: bool | None) -> EncodedRecord:
    """Token ids of the `index`-th record, cut at `max_tokens`; the answer is closed by the end-of-sequence token.

    Plain text carries its loss from the second token on, a conversation on its last turn. `chat` is as in `trace`.

    Raises:
        ArgumentError: a record of another form or of two, without an answer, or whose prompt leaves no room for one.
    """
    placed = record if isinstance(record, PlacedRecord) else PlacedRecord(record, f"records[{index}]")
    record, where = placed.record, placed.where
    prompt, answer = _parts(record, where)
    named = record if isinstance(record, Mapping) else {}
    found, holder = named.get("id"), named.get("client")
    key = utf8(where, str(index if found is None else found))
    client = None if holder is None else utf8(where, str(holder))
    if prompt is None:
        ids = _encoded(where, tokenizer, answer)
        start, shown = 1, answer
    else:
        try:
            ids = encode_prompt(tokenizer, prompt, chat)
        except PromptError as error:
            raise ArgumentError(where, expected="a prompt that can be encoded", got=str(error)) from error
        start, shown = len(ids), answer
        ids = [*ids, *_encoded(where, tokenizer, answer, add_special_tokens=False)]
        ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if len(ids[:max_tokens]) <= start:
        raise ArgumentError(
            where,
            expected=f"at least one token of answer within max_tokens = {max_tokens}",
            got=f"{len(ids)} tokens, {start} before the answer",
            remedy="Leave the record out, shorten its prompt, or raise max_tokens",
        )
    return EncodedRecord(tuple(ids[:max_tokens]), start, key, client, shown)


def _encoded(where: str, tokenizer: Any, text: str, **options: Any) -> list[int]:
    try:
        return encode_text("text", tokenizer, text, **options)
    except PromptError as error:
        raise ArgumentError(where, expected="text that can be encoded", got=str(error)) from error


def _parts(record: Any, where: str) -> tuple[str | Sequence[Mapping[str, str]] | None, str]:
    if isinstance(record, str):
        return None, record
    if isinstance(record, Mapping) and record.get("text") is not None:
        return None, _text(record, where)
    prompt: Any = None
    answer: Any = None
    if isinstance(record, tuple) and len(record) == 2:
        prompt, answer = record
    elif isinstance(record, Mapping) and {"prompt", "response"} <= set(record):
        prompt, answer = record["prompt"], record["response"]
    elif isinstance(record, Mapping) and isinstance(record.get("messages"), Sequence) and len(record["messages"]) > 1:
        *prompt, last = record["messages"]
        answer = last.get("content") if isinstance(last, Mapping) and last.get("role") == "assistant" else None
    if not isinstance(answer, str) or not isinstance(prompt, str | list):
        held = f" with {sorted(map(str, record))[:5]}" if isinstance(record, Mapping) else ""
        raise ArgumentError(
            where,
            expected=(
                'text, {"text"}, (prompt, answer), {"prompt", "response"}, or {"messages"} that ends with the assistant'
            ),
            got=f"{type(record).__name__}{held}",
        )
    return prompt, answer


def _text(record: Mapping[str, Any], where: str) -> str:
    others = [key for key in _CONVERSATION if record.get(key) is not None]
    if others:
        raise ArgumentError(
            where,
            expected='either "text" or a prompt and its answer',
            got=f'"text" and {", ".join(others)}',
            remedy="Leave out what the model was not trained on",
        )
    text = record["text"]
    if not isinstance(text, str):
        raise ArgumentError(where, expected='"text" to be a string', got=type(text).__name__)
    return text
