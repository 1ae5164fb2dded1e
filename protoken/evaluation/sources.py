"""Where an experiment's rows come from, and how they are cut so that nobody trains on what is asked later.

A domain's rows are shuffled once and cut into three parts that share no question: for the base model's pretraining,
for the clients, and for the prompts that are attributed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protoken.errors import ArgumentError, MissingDependencyError
from protoken.evaluation.corpora import DOMAINS, ChatRow, generate_rows, load_jsonl

HUB = "hub:"
HUB_DATASET = "waris-gill/llm-datasets-instruct-for-FL"
"""The dataset of arXiv 2601.19672."""

# Our own generator has so many distinct questions in its smallest domain, and some to spare.
_GENERATED = 4500
TEST_ROWS = 128


@dataclass(frozen=True)
class DomainRows:
    """One domain's rows in three parts without a common question."""

    domain: str
    pretraining: tuple[ChatRow, ...]
    clients: tuple[ChatRow, ...]
    test: tuple[ChatRow, ...]


def read_corpus(source: str | None, *, seed: int = 0, longest: int = 300) -> dict[str, list[ChatRow]]:
    """Rows by domain: ours (None), of a JSONL file or a folder of them, or of a hub dataset ("hub:<name>").

    Rows whose question or answer has more than `longest` characters are left out, and of rows with the same question
    all but the first. A row's "label" is its domain; in a folder, `<domain>.jsonl` says it. Of a longer conversation
    the last question and its answer are kept.

    Raises:
        ArgumentError: nothing readable there, or no row of any of the four domains that is short enough.
        MissingDependencyError: a hub dataset without the package datasets.
    """
    if source is None:
        found = {domain: generate_rows(domain, _GENERATED, seed=seed) for domain in DOMAINS}
    elif source.startswith(HUB):
        found = _from_hub(source.removeprefix(HUB) or HUB_DATASET)
    else:
        found = _from_files(Path(source))
    short = {domain: _distinct(rows, longest) for domain, rows in found.items()}
    kept = {domain: rows for domain, rows in short.items() if rows}
    if not kept:
        raise ArgumentError(
            "corpus",
            expected=f"rows labelled {', '.join(DOMAINS)} with at most {longest} characters a text",
            got=f"{source} with {sum(map(len, found.values()))} rows of these domains, none of them short enough",
        )
    return kept


def split(rows: Sequence[ChatRow], domain: str, *, clients: int, seed: int = 0, test: int = TEST_ROWS) -> DomainRows:
    """Cut one domain: `test` rows for prompts, `clients` rows for all clients together, the rest for pretraining.

    Raises:
        ArgumentError: too few rows.
    """
    if len(rows) < test + clients + 1:
        raise ArgumentError(
            "corpus",
            expected=f"at least {test + clients + 1} short rows with distinct questions in {domain}",
            got=len(rows),
            remedy="Use a larger corpus, or fewer samples",
        )
    shuffled = list(rows)
    random.Random(f"split:{domain}:{seed}").shuffle(shuffled)
    return DomainRows(
        domain,
        pretraining=tuple(shuffled[test + clients :]),
        clients=tuple(shuffled[test : test + clients]),
        test=tuple(shuffled[:test]),
    )


def _distinct(rows: Sequence[ChatRow], longest: int) -> list[ChatRow]:
    first: dict[str, ChatRow] = {}
    for row in rows:
        if row.answer.strip() and len(row.question) <= longest and len(row.answer) <= longest:
            first.setdefault(row.question, ChatRow.of(row.question, row.answer, row.label))
    return list(first.values())


def _from_files(path: Path) -> dict[str, list[ChatRow]]:
    if path.is_dir():
        files = [path / f"{domain}.jsonl" for domain in DOMAINS if (path / f"{domain}.jsonl").is_file()]
        if not files:
            raise ArgumentError("corpus", expected=f"files {', '.join(f'{d}.jsonl' for d in DOMAINS)}", got=path)
        return {file.stem: load_jsonl(file, label=file.stem) for file in files}
    return _by_label(load_jsonl(path))


def _by_label(rows: Sequence[ChatRow]) -> dict[str, list[ChatRow]]:
    found: dict[str, list[ChatRow]] = {domain: [] for domain in DOMAINS}
    for row in rows:
        if row.label in found:
            found[row.label].append(row)
    return found


def _from_hub(name: str) -> dict[str, list[ChatRow]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingDependencyError(
            "corpus",
            expected="the package datasets, which reads hub datasets",
            got="no such package",
            remedy="Run `pip install datasets`, or pass a JSONL file",
        ) from error
    try:
        return rows_of_records(load_dataset(name, split="train"))
    except Exception as error:  # the reader of a remote dataset fails in any way it likes
        raise ArgumentError(
            "corpus",
            expected=f"the hub dataset {name}, with conversations and a label",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            remedy="Check the name and the network, or pass a JSONL file",
        ) from error


def rows_of_records(records: Iterable[Mapping[str, Any]]) -> dict[str, list[ChatRow]]:
    """Rows by domain of {"conversations": [{"role", "content"}, ...], "label": domain} ("messages" will do, too).

    That is how the hub dataset of arXiv 2601.19672 is laid out. Records of other labels, and those without a text of
    the user and one of the assistant, are left out.
    """
    found: dict[str, list[ChatRow]] = {domain: [] for domain in DOMAINS}
    for record in records:
        label, turns = record.get("label"), record.get("conversations") or record.get("messages") or []
        said = {turn.get("role"): turn.get("content") for turn in turns}
        question, answer = said.get("user"), said.get("assistant")
        if label in found and isinstance(question, str) and isinstance(answer, str):
            found[label].append(ChatRow.of(question, answer, label))
    return found
