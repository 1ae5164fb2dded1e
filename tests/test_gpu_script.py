"""bench/gpu.py on a machine without a GPU: arguments, the step runner, partial results, the report."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from protoken.dispatch import OPS, interpreter_fault

ROOT = Path(__file__).parents[1]


BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    before = set(sys.modules)
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(BENCH))
        for name in set(sys.modules) - before:
            if name == "gpu" or name.startswith("gpu_"):
                del sys.modules[name]


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


def test_a_step_may_have_to_fail_as_a_control_does(gpu: ModuleType, tmp_path: Path) -> None:
    report = empty_report()
    steps = [gpu.Step(f"{n}", [sys.executable, "-c", f"raise SystemExit({n})"], 20.0, 0, expects=9) for n in (9, 0)]
    gpu.run_steps(steps, report, tmp_path / "r.json")
    assert {name: step["status"] for name, step in report["steps"].items()} == {"9": "ok", "0": "failed"}


DIES = """
import os, time
from pathlib import Path
from gpu_device import Rows
rows = Rows(Path(ROWS), 60, patience=4.0, strikes=2)
for number, (name, kind, does) in enumerate(CASES):
    def work():
        if does == "abort": os.abort()
        if does == "hang": time.sleep(60)
        if does == "raise": raise ValueError("no")
        return {"ok": True, "number": number}
    rows.attempt(name, work, kind)
rows.close()
"""


def dying(gpu: ModuleType, rows: Path, cases: list[tuple[str, str, str]]) -> Any:
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r})\n" + DIES.replace("ROWS", repr(str(rows)), 1)
    environment = {"PROTOKEN_GPU_DRY_RUN": "1"}
    command = [sys.executable, "-c", code.replace("CASES", repr(cases), 1)]
    return gpu.Step("dies", command, 100.0, 0, environment, rows)


def test_a_step_that_dies_goes_on_behind_what_it_died_of(gpu: ModuleType, tmp_path: Path) -> None:
    """A kernel that traps, one that hangs, one that is wrong: the cases behind them are seen all the same."""
    cases = [("a", "", "run"), ("b", "", "abort"), ("c", "", "raise"), ("d", "", "hang"), ("e", "", "run")]
    report = empty_report()
    gpu.run_steps([dying(gpu, tmp_path / "rows.jsonl", cases)], report, tmp_path / "r.json")
    found = {row["case"]: row for row in report["rows"] if "case" in row}
    assert {name: row["ok"] for name, row in found.items()} == {
        "a": True,
        "b": False,
        "c": False,
        "hangs: d": False,
        "e": True,
    }
    assert found["b"]["problem"] == "ended: exit status -6"
    assert len([row for row in report["rows"] if row.get("number") == 0]) == 1  # "a" was not run again
    assert report["steps"]["dies"]["status"] == "failed"
    assert report["steps"]["dies"]["died_with"] == [-6, 3]
    assert report["steps"]["dies"]["returncode"] == 0


def test_after_two_deaths_others_of_their_kind_are_left_out(gpu: ModuleType, tmp_path: Path) -> None:
    cases = [(name, "wide", "abort") for name in "abc"] + [("d", "narrow", "run")]
    report = empty_report()
    gpu.run_steps([dying(gpu, tmp_path / "rows.jsonl", cases)], report, tmp_path / "r.json")
    assert [row["left_out"] for row in report["rows"] if "left_out" in row] == ["c"]
    assert {row["case"]: row["ok"] for row in report["rows"] if "case" in row} == {"a": False, "b": False, "d": True}


def test_a_step_that_dies_before_it_begins_anything_is_not_started_again(gpu: ModuleType, tmp_path: Path) -> None:
    rows, starts = tmp_path / "rows.jsonl", tmp_path / "starts"
    code = f"open({str(starts)!r}, 'a').write('x'); open({str(rows)!r}, 'a').close(); raise SystemExit(1)"
    report = empty_report()
    gpu.run_steps([step(gpu, "broken", code, seconds=60.0, rows=rows)], report, tmp_path / "r.json")
    assert starts.read_text() == "x"
    assert report["steps"]["broken"]["status"] == "failed"
    assert report["rows"] == []


def test_a_bench_goes_on_behind_a_way_that_died(gpu: ModuleType, tmp_path: Path) -> None:
    """torch's times from before the death count still; auto, which would run the same kernel, is left out."""
    pytest.importorskip("triton", reason="the bench imports triton's kernels")
    rows = tmp_path / "rows.jsonl"
    code = (
        f"import sys, os; sys.path.insert(0, {str(BENCH)!r})\n"
        "from pathlib import Path\nimport torch, gpu_bench, gpu_bench_ops, gpu_device\n"
        "def work(*_):\n"
        "    same = lambda: torch.ones(3)\n"
        "    about = {'op': 'client_scores', 'format': 'bf16', 'shape': 's', 'T': 1, 'K': 3}\n"
        "    ours = {'cuda': os.abort, 'triton': same, 'auto': same}\n"
        "    return gpu_bench.Work(about, 12, ours, {'torch.bmm': same}, lambda got: [got], [torch.ones(3)])\n"
        "gpu_bench_ops.dense = work\n"
        f"rows = gpu_device.Rows(Path({str(rows)!r}), 60)\n"
        "gpu_bench.bench(rows, 'dense')\nrows.close()\n"
    )
    step = gpu.Step("bench", [sys.executable, "-c", code], 100.0, 0, {"PROTOKEN_GPU_DRY_RUN": "1"}, rows)
    report = empty_report()
    gpu.run_steps([step], report, tmp_path / "r.json")
    assert [row["backend"] for row in report["rows"] if "median_s" in row] == ["torch.bmm", "triton"]
    timed = {row["backend"]: row for row in report["rows"] if "median_s" in row}
    assert timed["triton"]["best_torch"] == timed["torch.bmm"]["median_s"]
    assert [row["case"].split(" {")[0] for row in report["rows"] if row.get("ok") is False] == ["bench cuda"]
    assert [row["left_out"].split(" {")[0] for row in report["rows"] if "left_out" in row] == ["bench auto"]
    assert report["steps"]["bench"]["died_with"] == [-6]


def test_steps_of_a_wave_run_side_by_side_and_waves_in_order(gpu: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    wait = f"import time, pathlib; time.sleep(1.0); pathlib.Path({str(log)!r}).open('a').write('first ')"
    after = f"import pathlib; pathlib.Path({str(log)!r}).open('a').write('second')"
    report = empty_report()
    gpu.run_steps(
        [step(gpu, "a", wait), step(gpu, "b", wait), step(gpu, "c", after, wave=1)], report, tmp_path / "r.json"
    )
    assert log.read_text() == "first first second"


def test_more_steps_than_the_cores_can_serve_take_turns(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["gpu_runner"], "SIDE_BY_SIDE", 2)
    log = tmp_path / "log"
    code = f"import time\nfor word in ('in', 'out'):\n    open({str(log)!r}, 'a').write(word + ' '); time.sleep(1.0)"
    report = empty_report()
    gpu.run_steps([step(gpu, name, code) for name in "abc"], report, tmp_path / "r.json")
    inside = [0]
    for word in log.read_text().split():
        inside.append(inside[-1] + (1 if word == "in" else -1))
    assert len(inside) == 7
    assert max(inside) <= 2
    assert {name: outcome["status"] for name, outcome in report["steps"].items()} == dict.fromkeys("abc", "ok")


def test_without_time_left_steps_are_skipped_and_said_so(gpu: ModuleType, tmp_path: Path) -> None:
    report = empty_report()
    gpu.run_steps([step(gpu, "late", "pass")], report, tmp_path / "r.json", total=1.0)
    assert report["steps"]["late"]["status"] == "skipped"


def test_the_plan_fits_into_nine_minutes(gpu: ModuleType, tmp_path: Path) -> None:
    steps = gpu.plan(tmp_path, tmp_path / "site", [])
    names = {step.name for step in steps}
    assert names >= {"build", "trace", "tests", "memcheck", "racecheck", "initcheck", "synccheck"}
    assert names >= {f"cuda:{op}" for op in OPS}
    assert {":".join(name.split(":")[:2]) for name in names} >= {f"triton:{op}" for op in OPS}
    assert names >= {"control:memcheck", "control:initcheck", "compile"}
    assert names >= {f"graph:{backend}" for backend in ("cuda", "triton", "auto")}
    assert names >= {"bench:dense", "bench:lowrank", "bench:others", "bench:more"}
    assert gpu.TOTAL_SECONDS < 540
    named = [step for step in steps if step.name != "bench:more"]  # which takes what the others leave
    waves = {step.wave for step in named}
    assert sum(max(step.seconds for step in named if step.wave == wave) for wave in waves) < gpu.TOTAL_SECONDS
    assert [step.name for step in gpu.plan(tmp_path, tmp_path, ["build", "bench:dense"])] == ["build", "bench:dense"]
    assert len(gpu.plan(tmp_path, tmp_path, ["bench"])) == 4
    assert {step.name for step in gpu.plan(tmp_path, tmp_path, ["triton:client_scores"])} == {
        f"triton:client_scores:{n}of3" for n in (1, 2, 3)
    }
    assert len({step.rows_file for step in steps if step.rows_file}) == len(steps) - 2  # build and tests have none


def test_the_parts_of_a_check_are_the_whole(gpu: ModuleType, tmp_path: Path) -> None:
    code = (
        "import gpu_checks, gpu_steps; from gpu_cases import cases\n"
        "part = lambda text: [c.name for c in gpu_checks.list_of('cuda', *gpu_steps.share(text))]\n"
        "op = 'client_scores'; whole = [c.name for c in cases('cuda', op)]\n"
        "assert part(op) == whole\n"
        "parts = [name for n in (1, 2, 3) for name in part(f'{op}:{n}of3')]\n"
        "assert len(whole) > 3 and sorted(parts) == sorted(whole)\n"
    )
    pytest.importorskip("triton", reason="the steps import triton's kernels")
    environment = os.environ | {"PROTOKEN_GPU_DRY_RUN": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=BENCH, env=environment, timeout=100, check=True)


def test_sanitizers_side_by_side_do_not_share_a_port(gpu: ModuleType, tmp_path: Path) -> None:
    steps = gpu.plan(tmp_path, tmp_path / "site", [*gpu.SANITIZERS, "control"])
    ports = [int(step.command[step.command.index("--port") + 1]) for step in steps]
    assert len(steps) == 6
    assert all(abs(one - other) >= 10 for n, one in enumerate(ports) for other in ports[:n])  # each tries up to ten


def test_sanitizers_see_what_is_written_and_where_a_tensor_ends(gpu: ModuleType, tmp_path: Path) -> None:
    for step in gpu.plan(tmp_path, tmp_path / "site", list(gpu.SANITIZERS)):
        assert step.command[1:3] == ["--tool", step.name]
        assert step.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert step.environment["PROTOKEN_GPU_HOST_OPERANDS"] == "1"
        assert step.command[step.command.index("--kernel-name") + 1] == "kns=protoken"
        assert step.command[step.command.index("--destroy-on-device-error") + 1] == "kernel"  # the others are seen, too
        assert ("--check-api-memory-access" in step.command) == (step.name == "initcheck")
        assert step.expects == 0
    for step in gpu.plan(tmp_path, tmp_path / "site", ["control"]):
        assert step.expects == int(step.command[step.command.index("--error-exitcode") + 1]) != 0
        assert step.name == f"control:{step.command[2]}"


def test_stopped_by_a_signal_the_report_is_whole_and_nothing_runs_on(tmp_path: Path) -> None:
    out, rows, mark = tmp_path / "r.json", tmp_path / "rows.jsonl", tmp_path / "pid"
    step_code = (
        f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); "
        f'f = open({str(rows)!r}, \'w\'); f.write(\'{{"case": "one", "ok": true}}\\n\'); f.flush(); time.sleep(60)'
    )
    code = (
        "import sys; from pathlib import Path; from gpu_runner import Step, run_steps\n"
        f"steps = [Step('slow', [sys.executable, '-c', {step_code!r}], 50.0, 0, {{}}, Path({str(rows)!r})),\n"
        "         Step('later', [sys.executable, '-c', 'pass'], 50.0, 1)]\n"
        f"run_steps(steps, {{'steps': {{}}, 'rows': []}}, Path({str(out)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=BENCH)
    until(lambda: rows.exists() and rows.read_text().endswith("\n"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    report = json.loads(out.read_text())
    assert report["ended"] == "stopped"
    assert report["steps"]["slow"]["status"] == "stopped"
    assert "later" not in report["steps"]
    assert report["rows"] == [{"step": "slow", "case": "one", "ok": True}]
    assert not Path(f"/proc/{mark.read_text()}").exists()


def until(seen: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_findings_are_on_disk_while_a_step_is_still_at_work(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["gpu_runner"], "WRITE_EVERY", 0.2)
    out, rows, copy = tmp_path / "r.json", tmp_path / "rows.jsonl", tmp_path / "copy.json"
    finds = f"import time; open({str(rows)!r}, 'w').write('{{}}\\n'); time.sleep(3)"
    looks = (
        f"import time, shutil, pathlib\nwhile '\"step\"' not in (p := pathlib.Path({str(out)!r})).read_text():\n"
        f"    time.sleep(0.05)\nshutil.copy(p, {str(copy)!r})"
    )
    report = empty_report()
    sys.modules["gpu_runner"].write(report, out)
    gpu.run_steps([step(gpu, "finds", finds, rows=rows), step(gpu, "looks", looks)], report, out)
    early = json.loads(copy.read_text())
    assert early["rows"] == [{"step": "finds"}]
    assert "finds" not in early["steps"]


def test_a_step_knows_how_much_time_is_left_for_it(gpu: ModuleType, tmp_path: Path) -> None:
    code = "import os, time; raise SystemExit(not 0 < float(os.environ['PROTOKEN_GPU_UNTIL']) - time.time() <= 10)"
    report = empty_report()
    gpu.run_steps([step(gpu, "late", code, seconds=100.0)], report, tmp_path / "r.json", total=10.0)
    assert report["steps"]["late"]["status"] == "ok"


def test_a_kernel_that_hangs_ends_its_step_and_is_named(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from gpu_device import Rows\n"
        "rows = Rows(Path('ROWS'), 60, patience=1.0); rows.add(error=float('inf')); rows.begin('the kernel')\n"
        "time.sleep(60)\n"
    ).replace("ROWS", str(tmp_path / "rows.jsonl"))
    environment = os.environ | {"PROTOKEN_GPU_DRY_RUN": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=BENCH, env=environment, timeout=50, check=False)
    assert run.returncode == 3
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    begun = {"begin": "the kernel", "kind": ""}
    assert found == [{"error": None}, begun, {"case": "hangs: the kernel", "ok": False}]


def test_without_pip_or_nvcc_what_can_be_built_is_built(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    building = importlib.import_module("gpu_build")
    tried: list[str] = []

    def run(command: list[str]) -> bool:
        assert (tmp_path / "site" / "protoken" / "kernels" / "client_scores.py").exists()  # before any compiler runs
        tried.append("pip" if "pip" in command else next((a for a in command if "PROTOKEN_CUDA" in a), command[1]))
        return "-DPROTOKEN_CUDA=0" in command or command[1] == "--build"

    monkeypatch.setattr(building, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu_build.py", str(tmp_path / "site")])
    monkeypatch.setenv("PROTOKEN_CUDA", "1")
    assert building.main() == 1
    assert tried == ["pip", "-DPROTOKEN_CUDA=1", "-DPROTOKEN_CUDA=0", "--build"]
    package = tmp_path / "site" / "protoken"
    assert (package / "kernels" / "client_scores.py").exists()
    assert (package / "ops" / "cuda.py").exists()
    assert not list(package.rglob("*.so"))


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


def timed(op: str, shape: str, dtype: str, clients: int, tokens: int, backend: str, median: float) -> dict[str, Any]:
    about = {"op": op, "shape": shape, "format": dtype, "K": clients, "T": tokens, "backend": backend}
    return about | {"median_s": median, "bandwidth_share": 0.9}


def test_bars_are_judged_by_the_rows_that_are_there(gpu: ModuleType) -> None:
    large, small = "Llama-3.1-8B", "SmolLM2-135M x30"
    rows = [
        {"case": "x", "ok": True},
        timed("client_scores", large, "bf16", 55, 16, "auto", 0.0028),
        timed("client_scores", large, "bf16", 55, 16, "triton", 0.0001),
        timed("client_scores", large, "fp8", 55, 16, "auto", 0.0016),
        timed("client_scores", small, "bf16", 6, 16, "auto", 0.0001),
        timed("client_scores", small, "bf16", 6, 16, "torch.loop", 0.0011),
        timed("client_scores_lowrank", large, "bf16", 10_000, 64, "auto", 0.002),
    ]
    found = [(bar["figure"], bar["wanted"], bar["met"]) for bar in gpu.bars(rows)]
    assert found == [(0.9, 0.9, True), (1.75, 1.8, False), (11.0, 10.0, True), (2.0, 2.0, False)]
    text = gpu.summarize({"steps": {}, "rows": rows, "bars": gpu.bars(rows)})
    assert "MISSED    1.750 of 1.8: fp8 as fast as bf16, times, T = 16" in text
    assert gpu.bars([]) == []


def test_the_benchs_first_rows_are_those_of_the_bars(tmp_path: Path) -> None:
    """A name changed in one place would leave the bars without rows, and nobody would be told."""
    pytest.importorskip("triton", reason="the bench imports triton's kernels")
    code = (
        "import gpu_bench, gpu_bars\n"
        "dense, lowrank = gpu_bench.groups()['dense'], gpu_bench.groups()['lowrank']\n"
        "rows = lambda of: [(op.__name__, *arguments) for op, arguments in of]\n"
        "for tokens in (1, 16, 64, 128): assert ('dense', gpu_bars.LARGE, 'bf16', 55, tokens, 1) in rows(dense)\n"
        "for tokens in (16, 128): assert ('dense', gpu_bars.LARGE, 'fp8', 55, tokens, 1) in rows(dense)\n"
        "small, _, blocks = gpu_bars.SMALL.partition(' x')\n"
        "for tokens in (16, 128): assert ('dense', small, 'bf16', 6, tokens, int(blocks)) in rows(dense)\n"
        "assert rows(lowrank)[0] == ('lowrank', gpu_bars.LARGE, 10_000, 8, 64)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PROTOKEN_GPU_DRY_RUN"}
    subprocess.run([sys.executable, "-c", code], cwd=BENCH, env=environment, timeout=100, check=True)


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
    steps = ["cuda:client_totals", "cuda:relevance_head", "graph:cuda", "trace"]
    steps += ["bench:dense", "bench:lowrank", "bench:others"]
    code = gpu.main(["--dry-run", "--site", str(tmp_path), "--out", str(out), "--seconds", "900", "--steps", *steps])
    report = json.loads(out.read_text())
    assert report["dry_run"] is True
    assert {name: step["status"] for name, step in report["steps"].items()} == dict.fromkeys(steps, "ok")
    assert code == 0
    timed = {(row["op"], row["backend"]) for row in report["rows"] if "median_s" in row}
    ops = ("client_scores", "client_scores_lowrank", "client_totals", "relevance_head", "capture_append")
    assert timed >= {(op, backend) for op in ops for backend in ("auto", "triton")}
    checked = [row["case"] for row in report["rows"] if row["step"].startswith("cuda:")]
    assert any("relevance_head" in case for case in checked)
    assert all(row["ok"] for row in report["rows"] if "ok" in row)
