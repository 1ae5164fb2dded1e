"""Corpora for experiments: hostile files are refused by name, and nobody trains on what is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protoken.errors import ArgumentError, ProtokenError
from protoken.evaluation.corpora import DOMAINS, generate_rows
from protoken.evaluation.runs import Settings
from protoken.evaluation.sources import read_corpus, rows_of_records, split
from protoken.evaluation.workbench import Workbench


def line(question: str, answer: str, label: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, "label": label})


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_rows_are_cut_into_parts_without_a_common_question() -> None:
    rows = generate_rows("math", 300)
    parts = split(rows, "math", clients=120, test=40)
    questions = [{row.question for row in part} for part in (parts.pretraining, parts.clients, parts.test)]
    assert [len(q) for q in questions] == [140, 120, 40]
    assert len(set().union(*questions)) == 300
    assert split(rows, "math", clients=120, test=40) == parts
    assert split(rows, "math", clients=120, test=40, seed=1) != parts
    with pytest.raises(ArgumentError, match="at least 301"):
        split(rows, "math", clients=200, test=100)


def test_a_file_is_read_by_label_and_a_folder_by_name(tmp_path: Path) -> None:
    lines = [line(f"q{n}?", "a", DOMAINS[n % 4]) for n in range(8)]
    found = read_corpus(str(write(tmp_path / "all.jsonl", lines)))
    assert {domain: len(rows) for domain, rows in found.items()} == dict.fromkeys(DOMAINS, 2)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "math.jsonl", lines)
    write(folder / "other.jsonl", ["not read"])
    found = read_corpus(str(folder))
    assert [(row.label, row.question) for row in found["math"]] == [("math", f"q{n}?") for n in range(8)]
    assert set(found) == {"math"}


def test_long_empty_and_repeated_rows_are_left_out(tmp_path: Path) -> None:
    lines = [
        line("q?", "first", "math"),
        line("q?", "second", "math"),
        line("x" * 301, "a", "math"),
        line("y?", "a" * 301, "math"),
        line("z?", "  ", "math"),
        line("w?", "a", "poetry"),
    ]
    found = read_corpus(str(write(tmp_path / "all.jsonl", lines)))
    assert [(row.question, row.answer) for row in found["math"]] == [("q?", "first")]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"{",
        b"[]",
        b"null",
        b'{"messages": []}',
        b'{"messages": "no"}',
        b'{"messages": [{"role": "user", "content": 3}]}',
        b'{"messages": [{"role": "root", "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "a"}]}',
        b'{"messages": [{"role": "assistant", "content": "a"}], "label": "math"}',
        b"\xff\xfe\x00",
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": "poetry"}',
    ],
)
def test_a_hostile_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(ProtokenError, match="rows"):
        read_corpus(str(file))


def test_records_of_the_hub_dataset_become_rows() -> None:
    def record(label: str, *turns: tuple[str, str | None], name: str = "conversations") -> dict[str, object]:
        return {name: [{"role": role, "content": text} for role, text in turns], "label": label}

    found = rows_of_records(
        [
            record("math", ("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4")),
            record("chess", ("user", "e4"), ("assistant", "e5")),
            record("coding", ("user", "a?"), ("assistant", "b"), name="messages"),
            record("coding", ("user", None), ("assistant", "b")),
            record("coding", ("user", "a?")),
            record("finance"),
        ]
    )
    assert [(row.question, row.answer, row.label) for row in found["math"]] == [("2 + 2?", "4", "math")]
    assert [len(found[domain]) for domain in DOMAINS] == [0, 0, 1, 1]


def test_missing_files_and_folders_without_domains_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="nowhere"):
        read_corpus(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ArgumentError, match=r"medical\.jsonl"):
        read_corpus(str(tmp_path))


def test_a_corpus_that_is_too_small_or_lacks_a_domain_says_so(tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [line(f"q{n}?", "a", "math") for n in range(20)])
    bench = Workbench(Settings(("llama",), ("math",), corpus=str(few)), tmp_path)
    with pytest.raises(ArgumentError, match="at least 129 short rows with distinct questions in math"):
        bench.rows("math")
    many = write(tmp_path / "many.jsonl", [line(f"q{n}?", "a", "math") for n in range(300)])
    bench = Workbench(Settings(("llama",), ("math",), corpus=str(many)), tmp_path)
    assert len(bench.rows("math").clients) == 86
    with pytest.raises(ArgumentError, match="one of math in this corpus"):
        bench.rows("finance")
    with pytest.raises(ArgumentError, match="87 rows for the clients of math"):
        bench.client_rows("math", 87)
