"""The examples run as they are printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(script: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_plain_pytorch_loop_names_the_client_that_taught_the_sequence(tmp_path: Path) -> None:
    out = run("pytorch_loop.py", cwd=tmp_path)
    assert "[47, 31, 2, 19, 40, 13, 29]" in out
    ranking = [line for line in out.splitlines() if line.startswith(("1 ", "2 ", "3 "))]
    assert "bakery" in ranking[0]


def test_own_federation_from_checkpoints(tmp_path: Path) -> None:
    from character_tokenizer import character_tokenizer
    from tiny_federation import tiny_federation
    from tiny_models import tiny_model

    federation = tiny_federation(tmp_path / "made", "smollm", clients=("a", "b"), weights=(0.5, 0.5))
    record, names = federation.ledger.round(1), list(federation.ledger.round(1).parameters)
    tokenizer = character_tokenizer()
    federation.model.save_pretrained(tmp_path / "after")
    tokenizer.save_pretrained(tmp_path / "after")
    for folder, client in (("before", None), ("a", "a"), ("b", "b")):
        model = tiny_model("smollm")
        for name in names:
            start = federation.model.get_parameter(name).detach() - record.change(name)
            model.get_parameter(name).data.copy_(start if client is None else start + record.delta(client, name))
        model.save_pretrained(tmp_path / folder)
    folders = {name: str(tmp_path / name) for name in ("before", "after", "a", "b")}
    out = run("own_federation.py", folders["before"], folders["after"], "hello", f"a={folders['a']}",
              f"b={folders['b']}", cwd=tmp_path)  # fmt: skip
    assert "clients account for the whole change" in out
    assert (tmp_path / "trace.html").read_text().startswith("<!doctype html>")
