"""`protoken records`, from the trace's file to the scores' file, as a server and a client run it."""

from __future__ import annotations

from pathlib import Path

import pytest
from character_tokenizer import character_tokenizer
from tiny_federation import tiny_federation
from typer.testing import CliRunner

from protoken.cli import app
from protoken.cli.records import read_records
from protoken.errors import ArgumentError
from protoken.records.scores import RecordScores
from protoken.records.text import encode_record

run = CliRunner().invoke


def test_a_server_probes_and_a_client_scores(tmp_path: Path) -> None:
    made = tiny_federation(tmp_path, "smollm")
    model = tmp_path / "model"
    made.model.save_pretrained(model)
    character_tokenizer().save_pretrained(model)
    where = ["--model", str(model), "--ledger", str(made.path)]
    said = run(app, ["trace", "hello", *where, "--json", str(tmp_path / "trace.json"), "--max-new-tokens", "4"])
    assert said.exit_code == 0, said.output

    probe = tmp_path / "probe.safetensors"
    result = run(
        app, ["records", "probe", str(tmp_path / "trace.json"), *where, "--out", str(probe), "--span", "0", "3"]
    )
    assert result.exit_code == 0, result.output

    rows = [
        '"plain"',
        '{"text": "text", "source": 3, "id": "row-17", "client": "ada"}',
        '{"prompt": "who", "response": "you", "id": "r7"}',
        "",
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(rows))
    scored = run(app, ["records", "score", str(probe), str(tmp_path / "records.jsonl"), "--model", str(model),
                       "--out", str(tmp_path / "scores.json")])  # fmt: skip
    assert scored.exit_code == 0, scored.output
    assert "r7" in scored.output
    scores = RecordScores.load(tmp_path / "scores.json")
    assert scores.keys == ("0", "row-17", "r7")
    assert scores.clients == (None, "ada", None)
    assert "plain" not in (tmp_path / "scores.json").read_text()


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_lines_that_are_no_json_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'"fine"\n' + content)
    with pytest.raises(ArgumentError, match="records"):
        read_records(path)


@pytest.mark.parametrize(
    "row",
    ['{"text": "a", "prompt": "q", "response": "a"}', '{"text": 3}', '{"prompt": "q"}', "5", '""',
     '{"text": "abc", "id": "\\ud800"}'],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named_by_its_line_of_the_file(tmp_path: Path, row: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(f'\n"fine"\n\n{row}\n')
    fine, bad = read_records(path)
    assert encode_record(character_tokenizer(), fine, 0, max_tokens=512, chat=None).text == "fine"
    with pytest.raises(ArgumentError, match=r"^\S+/records\.jsonl:4: expected"):
        encode_record(character_tokenizer(), bad, 1, max_tokens=512, chat=None)


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"first"\r\n"second"\r\n')
    assert [row.record for row in read_records(path)] == ["first", "second"]


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_a_file_without_records_is_said_to_have_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(
        ArgumentError, match=r"^records: expected at least one record, .*records\.jsonl, which has none"
    ):
        read_records(path)
