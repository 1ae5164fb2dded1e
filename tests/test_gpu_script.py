"""bench/gpu.py on a machine without a GPU: arguments, the step runner, partial results, the report."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from protoken.dispatch import interpreter_fault

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", ROOT / "bench" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_script"] = module
    spec.loader.exec_module(module)
    return module


def empty_report() -> dict[str, Any]:
    return {"steps": {}, "rows": []}


def step(gpu: ModuleType, name: str, code: str, seconds: float = 20.0, wave: int = 0, rows: Path | None = None) -> Any:
    return gpu.Step(name, [sys.executable, "-c", code], seconds, wave, {}, rows)


def test_a_failing_step_is_reported_and_the_rest_goes_on(gpu: ModuleType, tmp_path: Path) -> None:
    report = empty_report()
    steps = [step(gpu, "bad", "print('why'); raise SystemExit(3)"), step(gpu, "good", "pass", wave=1)]
    gpu.run_steps(steps, report, tmp_path / "r.json")
    assert report["steps"]["bad"]["status"] == "failed"
    assert "why" in report["steps"]["bad"]["output"]
    assert report["steps"]["good"]["status"] == "ok"
    assert json.loads((tmp_path / "r.json").read_text()) == report


def test_a_step_out_of_time_is_ended_and_keeps_what_it_had_found(gpu: ModuleType, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    found = '{"case": "one", "ok": true}\n{"ca'
    code = f"import time; f = open({str(rows)!r}, 'w'); f.write({found!r}); f.flush(); time.sleep(60)"
    report = empty_report()
    gpu.run_steps([step(gpu, "slow", code, seconds=3.0, rows=rows)], report, tmp_path / "r.json")
    assert report["steps"]["slow"]["status"] == "timeout"
    assert report["rows"] == [{"step": "slow", "case": "one", "ok": True}]


def test_a_command_that_does_not_exist_is_a_failed_step(gpu: ModuleType, tmp_path: Path) -> None:
    report = empty_report()
    gpu.run_steps([gpu.Step("none", ["/no/such/tool"], 5.0, 0)], report, tmp_path / "r.json")
    assert report["steps"]["none"]["status"] == "failed"
    assert "/no/such/tool" in report["steps"]["none"]["reason"]


def test_steps_of_a_wave_run_side_by_side_and_waves_in_order(gpu: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    wait = f"import time, pathlib; time.sleep(1.0); pathlib.Path({str(log)!r}).open('a').write('first ')"
    after = f"import pathlib; pathlib.Path({str(log)!r}).open('a').write('second')"
    report = empty_report()
    gpu.run_steps(
        [step(gpu, "a", wait), step(gpu, "b", wait), step(gpu, "c", after, wave=1)], report, tmp_path / "r.json"
    )
    assert log.read_text() == "first first second"


def test_without_time_left_steps_are_skipped_and_said_so(gpu: ModuleType, tmp_path: Path) -> None:
    report = empty_report()
    gpu.run_steps([step(gpu, "late", "pass")], report, tmp_path / "r.json", total=1.0)
    assert report["steps"]["late"]["status"] == "skipped"


def test_the_plan_fits_into_nine_minutes(gpu: ModuleType, tmp_path: Path) -> None:
    steps = gpu.plan(tmp_path, tmp_path / "site", [])
    names = {step.name for step in steps}
    assert names >= {
        "build",
        "cuda",
        "triton",
        "graph",
        "tests",
        "bench",
        "memcheck",
        "racecheck",
        "initcheck",
        "synccheck",
    }
    assert gpu.TOTAL_SECONDS < 540
    waves = {step.wave for step in steps}
    assert sum(max(step.seconds for step in steps if step.wave == wave) for wave in waves) < 600
    assert [step.name for step in gpu.plan(tmp_path, tmp_path, ["build", "bench"])] == ["build", "bench"]


def test_the_summary_names_wrong_cases_and_ratios(gpu: ModuleType) -> None:
    timed = {
        "op": "client_scores",
        "backend": "cuda",
        "format": "bf16",
        "shape": "Llama-3.1-8B",
        "K": 55,
        "T": 16,
        "median_s": 0.0021,
        "bandwidth_share": 0.93,
        "ratio_to_best_torch": 2.5,
    }
    report = {"steps": {"cuda": {"status": "ok", "seconds": 3.0}}, "rows": [{"case": "x", "ok": False}, timed]}
    text = gpu.summarize(report)
    assert "WRONG x" in text
    assert "93%" in text
    assert "2.5x" in text


def test_an_output_file_must_be_named(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse([])
    assert "--out" in capsys.readouterr().err
    options = gpu.parse(["--out", "x.json", "--steps", "build", "bench", "--seconds", "60"])
    assert (options.out, options.steps, options.seconds) == (Path("x.json"), ["build", "bench"], 60.0)


def test_without_a_device_the_script_says_so(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "describe", lambda: {"device": None})
    assert gpu.main(["--out", str(tmp_path / "r.json")]) == 2


def test_a_dry_run_goes_through_the_steps_without_a_gpu(gpu: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the steps run triton's kernels in its interpreter")
    if fault := interpreter_fault():
        pytest.skip(fault)
    out = tmp_path / "r.json"
    steps = ["cuda", "graph", "bench"]
    code = gpu.main(["--dry-run", "--site", str(tmp_path), "--out", str(out), "--seconds", "900", "--steps", *steps])
    report = json.loads(out.read_text())
    assert report["dry_run"] is True
    assert {name: step["status"] for name, step in report["steps"].items()} == dict.fromkeys(steps, "ok")
    assert code == 0
    timed = {(row["op"], row["backend"]) for row in report["rows"] if "median_s" in row}
    ops = ("client_scores", "client_scores_lowrank", "client_totals", "relevance_head", "capture_append")
    assert timed >= {(op, backend) for op in ops for backend in ("auto", "triton")}
    checked = [row["case"] for row in report["rows"] if row["step"] == "cuda"]
    assert any("relevance_head" in case for case in checked)
    assert all(row["ok"] for row in report["rows"] if "ok" in row)
