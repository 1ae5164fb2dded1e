"""What README and docs print runs as it is printed: code blocks on a small federation, commands by their options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from character_tokenizer import character_tokenizer
from tiny_federation import tiny_federation
from tiny_models import tiny_model

import protoken
from protoken.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(document: str) -> list[str]:
    found = CODE.findall((ROOT / document).read_text(encoding="utf-8"))
    assert found, f"no code in {document}"
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the `global-model` and the `federation.ledger` that the documents speak of."""
    federation = tiny_federation(tmp_path, "smollm", rounds=2)
    federation.model.generation_config.max_new_tokens = 8
    federation.model.save_pretrained(tmp_path / "global-model")
    character_tokenizer().save_pretrained(tmp_path / "global-model")
    federation.path.rename(tmp_path / "federation.ledger")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_code_of_the_readme_runs_from_top_to_bottom(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known: dict[str, Any] = {
        "prompts": ["how is a fever treated?", "what is a bond?"],
        "records": [{"prompt": "what is a bond?", "response": "a loan."}],
    }
    ran = 0
    for code in blocks("README.md"):
        if "Ledger.create" in code or "flower" in code:
            continue
        exec(code, known)
        ran += 1
    assert ran >= 5
    assert "how is a fever" in capsys.readouterr().out.lower()
    assert (here / "trace.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert len(known["tape"].traces) == 2
    assert len(known["scores"]) == 1


def test_code_of_the_readme_fills_a_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = tiny_federation(tmp_path, "smollm", clients=("a", "b"), weights=(0.25, 0.75))
    record = federation.ledger.round(1)
    before, *states = (tiny_model("smollm") for _ in range(3))
    for name in record.parameters:
        start = federation.model.get_parameter(name).detach() - record.change(name)
        before.get_parameter(name).data.copy_(start)
        for client, state in zip("ab", states, strict=True):
            state.get_parameter(name).data.copy_(start + record.delta(client, name))
    (code,) = [code for code in blocks("README.md") if "Ledger.create" in code]
    monkeypatch.chdir(tmp_path)
    clients = [("a", 0.25, states[0]), ("b", 0.75, states[1])]
    known: dict[str, Any] = {
        "protoken": protoken, "model": federation.model, "model_before": before, "clients": clients,
    }  # fmt: skip
    exec(code, known)
    made = protoken.Ledger.open("federation.ledger").round(1)
    assert {client.client: client.weight for client in made.clients} == {"a": 0.25, "b": 0.75}
    assert max(made.relative_residual.values()) < 1e-5


def test_code_about_a_reported_answer_runs_from_top_to_bottom(here: Path) -> None:
    known: dict[str, Any] = {}
    for code in blocks("docs/incident.md"):
        exec(code, known)
    assert known["trace"].info.forced
    assert known["ranking"].info.rounds == known["whole"].info.rounds == known["history"].rounds == (1, 2)
    assert known["without"].without == tuple(sorted(known["suspects"]))
    assert known["without"].response is not None
    assert [part.response for part in known["words"]] == ["sorry"]
    assert (here / "history.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_code_about_memory_runs(here: Path) -> None:
    known: dict[str, Any] = {"protoken": protoken, "model": tiny_model("smollm"), "prompt": [5, 6, 7]}
    federation = tiny_federation(here / "other", "smollm")
    known["model"] = federation.model
    protoken.attach(federation.model, federation.path)
    (code,) = blocks("docs/ways.md")
    exec(code.replace("max_new_tokens=256", "max_new_tokens=4"), known)
    assert known["trace"].info.settings["chunks"]


def test_code_that_estimates_a_ledger_runs() -> None:
    (code,) = [code for code in blocks("docs/federations.md") if "estimate_bytes" in code]
    known: dict[str, Any] = {"model": tiny_model("smollm")}
    exec(code.replace(".total", ".total > 0 or 1 / 0"), known)
    assert len(known["shapes"]) == 4


def test_code_that_checks_a_shard_by_hand_prints_the_manifests_hash(here: Path) -> None:
    (code,) = blocks("docs/ledger-format.md")
    manifest = (here / "federation.ledger" / "rounds" / "00000001" / "manifest.json").read_text(encoding="utf-8")
    shards = sorted((here / "federation.ledger" / "rounds" / "00000001").rglob("*.safetensors"))
    assert shards
    for shard in shards:
        done = subprocess.run([sys.executable, "-c", code, str(shard)], capture_output=True, text=True, check=True)
        assert f'"sha256":"{done.stdout.strip()}"' in manifest


def commands(document: Path) -> Iterator[str]:
    """Commands of our own that a document prints, in backticks or by themselves on an indented line."""
    text = document.read_text(encoding="utf-8")
    for found in re.findall(r"`(protoken [^`]+)`", text) + re.findall(r"^    (protoken .+)$", text, re.MULTILINE):
        # "a | b" lists alternatives; a comment explains.
        yield re.sub(r"\s+", " ", found).split(" # ")[0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_that_a_document_prints_is_there(document: Path) -> None:
    for line in commands(document):
        command: Any = typer.main.get_command(app)
        words = shlex.split(line.split(" | ")[0])[1:]
        while hasattr(command, "commands") and words:
            assert words[0] in command.commands, f"{line}: no command {words[0]}"
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in options, f"{line}: no option {word}"
