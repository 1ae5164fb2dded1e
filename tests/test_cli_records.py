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

    rows = ['"plain"', '{"text": "text", "source": 3}', '{"prompt": "who", "response": "you", "id": "r7"}', ""]
    (tmp_path / "records.jsonl").write_text("\n".join(rows))
    scored = run(app, ["records", "score", str(probe), str(tmp_path / "records.jsonl"), "--model", str(model),
                       "--out", str(tmp_path / "scores.json")])  # fmt: skip
    assert scored.exit_code == 0, scored.output
    assert "r7" in scored.output
    scores = RecordScores.load(tmp_path / "scores.json")
    assert scores.keys == ("0", "1", "r7")
    assert "plain" not in (tmp_path / "scores.json").read_text()


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_lines_that_are_no_json_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'"fine"\n' + content)
    with pytest.raises(ArgumentError, match="records"):
        read_records(path)
