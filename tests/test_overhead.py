"""The overhead bench on a tiny model: every way runs, and figures are consistent with one another."""

from __future__ import annotations

import errno
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model

from protoken.benchmarks import overhead
from protoken.benchmarks.measuring import peak_bytes, quartiles
from protoken.benchmarks.overhead_cases import cases, random_ledger
from protoken.errors import ArgumentError
from protoken.evaluation.base_model import BaseModel
from protoken.models.architectures import architecture_of


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is made, not downloaded; everything else is the bench's own."""
    monkeypatch.setattr(overhead, "load_base", lambda _: BaseModel(tiny_model("smollm"), None, "tiny", ""))


def run(path: Path | None = None, console: Console | None = None, **choices: object) -> list[dict[str, object]]:
    settings = {"model": "tiny", "prompt_tokens": [5], "new_tokens": [3], "clients": [2], "repeats": 2,
                "oracle": False, "json_path": path, "device": "cpu", **choices}  # fmt: skip
    return overhead.run_overhead(console or Console(quiet=True), **settings)  # type: ignore[arg-type]


def test_every_way_is_timed_against_generation_of_the_same_round() -> None:
    rows = run(oracle=True)
    assert [row["way"] for row in rows] == [case.name for case in cases(4)]
    for row in rows:
        low, high = row["ratio_trace_to_generate_spread"]  # type: ignore[misc]
        assert 0 < low <= row["ratio_trace_to_generate"] <= high  # type: ignore[operator]
        assert row["seconds_oracle"] > 0  # type: ignore[operator]
        beyond = row["bytes_trace_beyond"]
        assert beyond is None or beyond >= 0  # type: ignore[operator]


def test_grid_and_ways_are_chosen() -> None:
    rows = run(ways=["streaming"], prompt_tokens=[4, 6], clients=[1, 2])
    assert {(row["seconds_oracle"], row["ratio_oracle_to_trace"]) for row in rows} == {(None, None)}
    found = [(row["clients"], row["prompt_tokens"], row["way"]) for row in rows]
    names = ["streaming, logit", "streaming, log_prob"]
    assert found == [(k, p, name) for k in (1, 2) for p in (4, 6) for name in names]
    with pytest.raises(ArgumentError, match="ways: expected some of local, streaming, forward, reverse, got sideways"):
        run(ways=["sideways"])


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "figures.json", []

    def interrupted(*of: Any) -> int | None:
        calls.append(of)
        if len(calls) == 3:  # two of a way: within the second
            raise KeyboardInterrupt
        return peak_bytes(*of)

    monkeypatch.setattr(overhead, "peak_bytes", interrupted)
    console = Console(file=StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        run(path, console=console)
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == ["local, logit"]
    assert rows[0]["ratio_trace_to_generate"] > 0
    assert "local, logit" in console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_of_other_settings_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    run(path, ways=["local"])
    run(path, ways=["local"], prompt_tokens=[6])
    run(path, ways=["local"], prompt_tokens=[6])
    record = json.loads(path.read_text())
    assert [row["prompt_tokens"] for row in record["rows"]] == [5, 5, 6, 6]
    record["machine"]["cores"] = -1
    path.write_text(json.dumps(record))
    with pytest.raises(ArgumentError, match="figures of this machine"):
        run(path, ways=["local"])


@pytest.mark.parametrize("text", ["", "[1]", '{"rows": 1}', "no json", "kernels"])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "figures.json"
    if text == "kernels":
        run(path, ways=["local"])
        text = path.read_text().replace('"way"', '"backend"')
    path.write_text(text)
    with pytest.raises(ArgumentError, match="json_path: expected a new file"):
        run(path, ways=["local"])
    assert path.read_text() == text


def test_a_write_that_fails_leaves_the_rows_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    run(path, ways=["local"])
    before = path.read_text()

    def full(place: str, text: str) -> None:
        Path(place).write_text(text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("protoken.benchmarks.overhead.write_text", full)
    with pytest.raises(OSError, match="No space"):
        run(path, ways=["local"], prompt_tokens=[6])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_ledger_reaches_as_deep_as_asked(tmp_path: Path) -> None:
    model = tiny_model("smollm")
    architecture = architecture_of(model)
    ledger = random_ledger(tmp_path / "ledger", model, architecture, 3, blocks=2)
    record = ledger.round("last")
    names = [f"{layer}.weight" for layer in architecture.traced_layers(2)]
    assert sorted(record.parameters) == sorted(names)
    mean = sum(c.weight * record.delta(c.client, names[0]) for c in record.clients)
    assert torch.allclose(mean, record.change(names[0]), atol=1e-6)


def test_peak_memory_sees_an_allocation_that_is_gone_afterwards() -> None:
    size = 64 << 20

    def allocating() -> None:
        torch.ones(size, dtype=torch.uint8).sum()

    idle, busy = (peak_bytes(call, torch.device("cpu")) for call in (lambda: None, allocating))
    if idle is None or busy is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert busy - idle > size // 2


def test_memory_that_an_earlier_call_freed_is_not_counted_again() -> None:
    pieces = 20_000

    def small_pieces() -> None:
        kept = [torch.ones(1000) for _ in range(pieces)]
        assert len(kept) == pieces

    device = torch.device("cpu")
    before = peak_bytes(lambda: None, device)
    small_pieces()
    after = peak_bytes(lambda: None, device)
    if before is None or after is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert after - before < pieces * 4000 // 2


def test_spread_is_the_quartiles() -> None:
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == [2.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0]
