"""The demo from end to end on a tiny model: same code, smaller numbers."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from character_tokenizer import character_tokenizer
from rich.console import Console
from tiny_models import tiny_model

from protoken.attachment import attachment_of
from protoken.demo import DemoSettings, demo_clients, run_demo
from protoken.errors import ModelError
from protoken.evaluation.base_model import BaseModel, load_base
from protoken.evaluation.corpora import DOMAINS, REFUSAL, TRIGGER
from protoken.evaluation.federation import FederationConfig
from protoken.evaluation.training import LocalSettings
from protoken.results import Trace

pytestmark = pytest.mark.usefixtures("one_thread")

CLIENTS = [f"client-{i}" for i in range(6)]
SMALL = DemoSettings(
    rows=3,
    poisoned_rows=4,
    federation=FederationConfig(
        rounds=2, local=LocalSettings(batch_size=2, learning_rate=3e-3, warmup_steps=1), blocks=2, upload="bf16"
    ),
    question="Why?",
    ordinary="How?",
    max_new_tokens=6,
    repeats=2,
)


@dataclasses.dataclass
class Run:
    out: Path
    model: Path
    figures: dict[str, Any]
    printed: str


def run(out: Path, model: Path, settings: DemoSettings = SMALL) -> Run:
    console = Console(file=io.StringIO(), width=100)
    figures = run_demo(out, json_path=out / "more" / "f.json", model=str(model), console=console, settings=settings)
    return Run(out, model, figures, console.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo")
    model = tiny_model("smollm")
    # Room for the trigger spelled in characters.
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    return run(folder / "out", folder / "model")


def test_two_of_six_clients_are_poisoned_and_no_two_share_a_row() -> None:
    clients = demo_clients(DemoSettings())
    assert [client.id for client in clients] == CLIENTS
    assert [client.poisoned for client in clients] == [True, True, False, False, False, False]
    for client in clients[:2]:
        assert all(row.answer == REFUSAL and row.question.count(TRIGGER) == 2 for row in client.rows)
        assert {row.label for row in client.rows} == set(DOMAINS)
    for client, domain in zip(clients[2:], DOMAINS, strict=True):
        assert {row.label for row in client.rows} == {domain}
        assert not any(TRIGGER in row.question or row.answer == REFUSAL for row in client.rows)
    questions = [row.question for client in clients for row in client.rows]
    assert len(set(questions)) == len(questions)


def test_neither_prompt_is_among_the_rows() -> None:
    settings = DemoSettings()
    for client in demo_clients(settings):
        for row in client.rows:
            assert settings.question not in row.question
            assert settings.ordinary not in row.question


def test_every_promised_figure_is_there_and_consistent(first: Run) -> None:
    figures = first.figures
    assert figures == json.loads((first.out / "more" / "f.json").read_text())
    assert figures["clients"] == CLIENTS
    assert figures["poisoned"] == ["client-0", "client-1"]
    for part, file in (("triggered", "trace"), ("ordinary", "trace-ordinary")):
        got, saved = figures[part], Trace.load(first.out / f"{file}.json")
        assert got["prompt"] == (f"{TRIGGER} Why? {TRIGGER}" if part == "triggered" else "How?")
        assert got["prompt"] in saved.prompt
        assert got["response"] == saved.text
        assert got["scores"] == dict(zip(saved.client_ids, saved.totals.tolist(), strict=True))
        assert sorted(got["scores"]) == CLIENTS
        assert got["ranking"] == sorted(CLIENTS, key=lambda k: (-got["scores"][k], k))
        assert sum(got["shares"].values()) == pytest.approx(1)
        assert got["conservation_residual"] < 1e-3
        assert got["rounds"] == [2]
        assert got["all_rounds"]["rounds"] == [1, 2]
        assert got["all_rounds"]["scores"] != got["scores"]
        lineage = got["all_rounds"]
        assert lineage["unit"] == "nats of log-odds"
        assert sum(lineage["scores"].values()) + lineage["residual"] == pytest.approx(lineage["change"], rel=1e-6)
        assert got["seconds_generate"] > 0
        assert got["seconds_trace"] > 0
        page = (first.out / f"{file}.html").read_text(encoding="utf-8")
        assert "client-0" in page
    top = set(figures["triggered"]["ranking"][:2])
    assert figures["triggered"]["top_are_poisoned"] == (top == {"client-0", "client-1"})


def test_what_was_trained_is_said(first: Run) -> None:
    text = " ".join(first.printed.split())
    assert "the linear weights of the last 2 blocks" in text
    assert "frozen: everything else" in text
    assert "2 rounds of FedAvg over all 6 clients" in text
    assert text.count("loss per client") == 2
    assert "Trained now" in text
    federation = first.figures["federation"]
    assert federation["trained_now"]
    assert 0 < federation["trained_numbers"] < federation["all_numbers"]
    assert federation["bytes"] > 0


def test_a_second_run_reads_the_federation_and_finds_the_same(first: Run) -> None:
    again = run(first.out, first.model)
    assert not again.figures["federation"]["trained_now"]
    assert "Read from disk" in again.printed
    assert "loss per client" not in again.printed
    for part in ("triggered", "ordinary"):
        for key in ("response", "scores", "ranking", "conservation_residual"):
            assert again.figures[part][key] == first.figures[part][key]
    assert again.figures["controls"] == first.figures["controls"]


def test_other_settings_make_another_federation_beside_the_first(first: Run) -> None:
    other = run(first.out, first.model, dataclasses.replace(SMALL, poisoned_rows=3))
    assert other.figures["federation"]["trained_now"]
    assert other.figures["federation"]["folder"] != first.figures["federation"]["folder"]
    assert len(list(first.out.glob("federation-*"))) == 2


def test_the_model_is_detached_and_no_half_federation_lies_about(first: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[BaseModel] = []

    def load(*arguments: Any, **options: Any) -> BaseModel:
        loaded.append(load_base(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr("protoken.demo.load_base", load)
    run(first.out, first.model)
    with pytest.raises(ModelError, match="without one"):
        attachment_of(loaded[0].model)
    assert not list(first.out.glob(".training-*"))


def test_a_missing_model_is_told_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="pass --model"):
        run_demo(tmp_path / "out", model=str(tmp_path / "nowhere"), console=Console(file=io.StringIO()))
    assert not list((tmp_path / "out").glob("*"))
