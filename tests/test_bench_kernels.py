"""`protoken bench kernels`: the rows it writes add up, and a choice that is not there is refused."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from protoken.benchmarks import kernels
from protoken.benchmarks.kernel_cases import Case
from protoken.benchmarks.kernels import run_kernels
from protoken.benchmarks.turns import paired_ratio, take_turns
from protoken.cli import app
from protoken.errors import ArgumentError

SMALL = ["--models", "SmolLM2-135M", "--clients", "6", "--tokens", "1", "--seconds", "0"]
KEYS = {"op", "backend", "format", "shape", "T", "K", "median_s", "bytes", "bandwidth_share", "best_torch"}
KEYS |= {"ratio_to_best_torch", "paired_ratio", "paired_interval", "pairs", "max_error"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "k.json"
    done = CliRunner().invoke(app, ["bench", "kernels", *SMALL, "--formats", "int8", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "o_proj" in done.output
    return json.loads(file.read_text())


def test_every_backend_has_a_row_for_every_case(report: dict[str, Any]) -> None:
    rows = {(row["op"], row["layer"], row["backend"]) for row in report["rows"]}
    assert rows >= {
        (op, layer, backend)
        for op in ("client_scores", "client_totals")
        for layer in ("o_proj", "down_proj")
        for backend in ("cpp", "torch", "auto")
    }
    assert report["skipped"] == []
    assert report["device"]["kind"] == "cpu"


def test_the_figures_of_a_row_fit_together(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert set(row) >= KEYS
        outputs, inputs = row["shape"]
        assert row["bytes"] > 6 * outputs * inputs  # one byte a weight, and the scales, inputs and result
        assert row["ratio_to_best_torch"] == pytest.approx(row["best_torch"] / row["median_s"])
        assert row["paired_interval"][0] <= row["paired_ratio"] <= row["paired_interval"][1]
        assert row["pairs"] == 1
        assert row["max_error"] < 1e-4


def test_pairs_see_what_a_drifting_machine_hides_from_medians() -> None:
    """Ours takes half of torch's time in every round; the machine slows down after ours has left."""
    pace = [1.0] * 50 + [3.0] * 100
    theirs, ours = [2.0 * p for p in pace], [1.0 * p for p in pace[:60]]
    assert statistics.median(theirs) / statistics.median(ours) == 6
    assert paired_ratio(theirs, ours) == (2, 2, 2, 60)


def test_a_hopeless_way_is_called_once() -> None:
    """Over a second and ten times the fastest; without it the others take as many turns as they would alone."""
    calls = {"slow": 0, "fast": 0}

    def call(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    ways = {"slow": partial(call, "slow", 1.01), "fast": partial(call, "fast", 0.001)}
    times = take_turns(ways, torch.device("cpu"), 0.01)
    assert calls["slow"] == len(times["slow"]) == 1
    assert times["slow"][0] > 1
    assert calls["fast"] - 1 == len(times["fast"]) >= 3


def test_what_was_measured_before_an_interruption_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "k.json"
    measure = kernels._measure

    def interrupted(case: Case, *others: Any) -> Any:
        if case.layer == "down_proj":
            raise KeyboardInterrupt
        return measure(case, *others)

    monkeypatch.setattr(kernels, "_measure", interrupted)
    chosen: dict[str, Any] = {"models": ["SmolLM2-135M"], "clients": [6], "formats": ["fp32"], "tokens": [1]}
    with pytest.raises(KeyboardInterrupt):
        run_kernels("cpu", file, ops=["client_totals"], seconds=0.0, **chosen)
    assert {row["layer"] for row in json.loads(file.read_text())["rows"]} == {"o_proj"}


def test_the_interval_of_paired_ratios_holds_the_true_median() -> None:
    """In about 95 of 100 draws of 200 pairs; a hundred draws from one seed are what is asserted."""
    draw = random.Random(0)
    held = 0
    for _ in range(100):
        ratios = [1.1 * math.exp(draw.gauss(0, 0.3)) for _ in range(200)]
        median, low, high, count = paired_ratio(ratios, [1.0] * 200)
        assert low <= median <= high
        assert count == 200
        held += low <= 1.1 <= high
    assert 90 <= held <= 99
    assert paired_ratio([3.0], [2.0]) == (1.5, 1.5, 1.5, 1)


def test_backends_of_a_case_share_one_copy_of_memory(report: dict[str, Any]) -> None:
    copies: dict[tuple[str, str], list[float]] = {}
    for row in report["rows"]:
        copies.setdefault((row["op"], row["layer"]), []).append(row["bytes"] / row["median_s"] / row["bandwidth_share"])
    for found in copies.values():
        assert found == pytest.approx([found[0]] * len(found))
    every = [copy for found in copies.values() for copy in found]
    assert min(every) * 0.999 <= report["copy_bandwidth"] <= max(every) * 1.001


def test_rows_beyond_memory_or_time_are_named_with_the_reason() -> None:
    chosen: dict[str, Any] = {"models": ["SmolLM2-135M"], "clients": [6], "formats": ["fp32"], "seconds": 0.0}
    little = run_kernels("cpu", tokens=[1], ops=["client_totals"], memory_bytes=1000, **chosen)
    slow = run_kernels("cpu", tokens=[512], ops=["client_scores"], longest_call=1e-9, **chosen)
    assert little["rows"] == slow["rows"] == []
    assert all("GB allowed" in row["reason"] for row in little["skipped"])
    assert all("matmul rate" in row["reason"] for row in slow["skipped"])
    assert len(little["skipped"]) == len(slow["skipped"]) == 2


@pytest.mark.parametrize(
    ("argument", "value"),
    [("models", "GPT-5"), ("formats", "int3"), ("clients", 7), ("ops", "softmax"), ("tokens", 2)],
)
def test_an_unknown_choice_is_refused(argument: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=argument):
        run_kernels("cpu", **{argument: [value]})  # type: ignore[arg-type]


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ArgumentError, match="device"):
        run_kernels("tpu")
