"""Build, check and bench everything on a machine with a GPU: `python bench/gpu.py --out FILE.json`.

One command, no network, under nine minutes. Every step is a process of its own with a time limit of its own; what a
step has found is on disk the moment it is found, a step that fails or runs out of time is reported as such and the
rest goes on. The JSON holds the device, the versions, each step's outcome and every measured row.

Steps: build (a wheel's install into a temporary folder), then side by side the checks (cuda, triton, graph, tests and
four compute-sanitizer tools), then alone on the device the bench. bench/gpu_steps.py names what they do.

`--dry-run` needs no GPU: the same steps at tiny sizes on the CPU (bench/gpu_device.py), to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS_FILE = Path(__file__).with_name("gpu_steps.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TOTAL_SECONDS = 530.0
TAIL = 4000


@dataclass
class Step:
    """A command with a time limit. Steps of one ``wave`` run side by side, waves one after another."""

    name: str
    command: list[str]
    seconds: float
    wave: int
    environment: dict[str, str] = field(default_factory=dict)
    rows_file: Path | None = None


def plan(workdir: Path, site: Path, chosen: Sequence[str], dry_run: bool = False) -> list[Step]:
    """All steps, or those whose names are in ``chosen``."""
    run = {"PYTHONPATH": str(site), "PYTHONUNBUFFERED": "1"}
    if dry_run:
        run |= {"PROTOKEN_GPU_DRY_RUN": "1", "TRITON_INTERPRET": "1"}

    def python(name: str, seconds: float, wave: int, *prefix: str) -> Step:
        rows = workdir / f"{name}.jsonl"
        action = "sanitize" if name in SANITIZERS else name
        seconds *= 3 if dry_run else 1  # an interpreter on a busy machine
        command = [*prefix, sys.executable, str(STEPS_FILE), action, str(rows), str(seconds - 8)]
        return Step(name, command, seconds, wave, run, rows)

    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    cuda = os.environ.get("PROTOKEN_CUDA", "1") if dry_run else "1"
    build = {"PROTOKEN_CUDA": cuda, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 2)}
    steps = [
        Step("build", [*install, "--target", str(site), str(ROOT)], 230, 0, build),
        python("cuda", 110, 1),
        python("triton", 170, 1),
        python("graph", 60, 1),
        Step("tests", [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests()], 170, 1, run),
        python("bench", 180, 2),
    ]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ("--error-exitcode", "9", "--kernel-name", "kns=protoken")
    steps += [python(tool, 170, 1, *(() if dry_run else (sanitizer, "--tool", tool, *options))) for tool in SANITIZERS]
    return [step for step in steps if not chosen or step.name in chosen]


def tests() -> list[str]:
    """The test files that also check a GPU when there is one."""
    return [str(path) for path in sorted((ROOT / "tests").glob("test_triton_kernels.py"))]


def run_steps(steps: Sequence[Step], report: dict[str, Any], out: Path, total: float = TOTAL_SECONDS) -> None:
    """Run wave by wave; after every step the report is on disk."""
    begin = time.monotonic()
    for wave in sorted({step.wave for step in steps}):
        running = []
        for step in (step for step in steps if step.wave == wave):
            left = total - (time.monotonic() - begin)
            if left < 5:
                report["steps"][step.name] = {"status": "skipped", "reason": "no time left"}
                continue
            running.append((step, start(step), time.monotonic(), min(step.seconds, left)))
        while running:
            for item in list(running):
                step, process, started, limit = item
                seconds = time.monotonic() - started
                if process.poll() is None and seconds < limit:
                    continue
                report["steps"][step.name] = finish(step, process, seconds)
                report["rows"] = collect(steps)
                write(report, out)
                running.remove(item)
            time.sleep(0.1)
    report["seconds"] = round(time.monotonic() - begin, 1)
    write(report, out)


def start(step: Step) -> subprocess.Popen[str] | Failed:
    log = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115 - read when the step ends
    environment = os.environ | step.environment
    try:
        process = subprocess.Popen(
            step.command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
    except OSError as error:
        return Failed(str(error))
    process.log = log.name  # type: ignore[attr-defined]
    return process


@dataclass
class Failed:
    """Stands for a command that could not even be started."""

    reason: str
    returncode: int = 127

    def poll(self) -> int:
        return self.returncode


def finish(step: Step, process: subprocess.Popen[str] | Failed, seconds: float) -> dict[str, Any]:
    """The outcome of a step; one that still runs is out of time and is ended with all it started."""
    if isinstance(process, Failed):
        return {"status": "failed", "seconds": 0.0, "reason": process.reason}
    status = {None: "timeout", 0: "ok"}.get(process.poll(), "failed")
    if status == "timeout":
        os.killpg(process.pid, 9)
        process.wait()
    log = Path(process.log)  # type: ignore[attr-defined]
    text = log.read_text(errors="replace")
    log.unlink()
    outcome: dict[str, Any] = {"status": status, "seconds": round(seconds, 1), "returncode": process.returncode}
    if status != "ok" or step.name in SANITIZERS or step.name == "tests":
        outcome["output"] = text[-TAIL:]
    return outcome


def collect(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """What the steps have written so far; a line that is cut off is left out."""
    rows = []
    for step in steps:
        if step.rows_file is None or not step.rows_file.exists():
            continue
        for line in step.rows_file.read_text().splitlines():
            try:
                rows.append({"step": step.name} | json.loads(line))
            except ValueError:
                continue
    return rows


def write(report: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(out.suffix + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(out)


def describe() -> dict[str, Any]:
    """Device and versions."""
    import torch

    about: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": None}
    for name in ("triton", "transformers", "numpy"):
        try:
            about[name] = __import__(name).__version__
        except ImportError:
            about[name] = None
    for name, command in (
        ("nvcc", ["nvcc", "--version"]),
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    ):
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
            about[name] = run.stdout.strip().splitlines()[-2 if name == "nvcc" else 0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            about[name] = f"not found: {error}"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return about


def summarize(report: dict[str, Any]) -> str:
    """A short table for the end of the output."""
    lines = [
        f"{name:10s} {step['status']:8s} {step.get('seconds', 0):7.1f} s" for name, step in report["steps"].items()
    ]
    failures = [row for row in report["rows"] if row.get("ok") is False]
    lines += [f"WRONG {row.get('case', row)}" for row in failures[:20]]
    lines.append(f"checks: {sum('ok' in row for row in report['rows'])}, wrong: {len(failures)}")
    for row in report["rows"]:
        if "median_s" in row:
            share = f"{row['bandwidth_share']:.0%}" if row.get("bandwidth_share") else "-"
            ratio = f"{row['ratio_to_best_torch']:.1f}x" if row.get("ratio_to_best_torch") else "-"
            lines.append(
                f"{row['op']:22s} {row['backend']:12s} {row['format']:5s} {row['shape']:24s} "
                f"K={row['K']:<6d} T={row['T']:<4d} {row['median_s'] * 1e3:9.3f} ms  {share:>5s} of copy  "
                f"{ratio:>7s} best torch"
            )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build, check and bench protoken on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--steps", nargs="*", default=[], help="only these steps (default: all)")
    parser.add_argument("--site", type=Path, help="folder to install into, or that holds an installed protoken")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="time for everything")
    parser.add_argument("--dry-run", action="store_true", help="the same steps on the CPU, at tiny sizes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every step ended well and every check was right, 1 when not, 2 without a CUDA device."""
    options = parse(arguments)
    about = describe()
    report: dict[str, Any] = {**about, "dry_run": options.dry_run, "steps": {}, "rows": []}
    if about["device"] is None and not options.dry_run:
        print("bench/gpu.py: no CUDA device", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        site = options.site or Path(folder) / "site"
        steps = plan(Path(folder), site, options.steps, options.dry_run)
        run_steps(steps, report, options.out, options.seconds)
    report["copy_bandwidth"] = next((row["copy_bandwidth"] for row in report["rows"] if "copy_bandwidth" in row), None)
    write(report, options.out)
    print(summarize(report))
    right = all(row.get("ok") is not False for row in report["rows"])
    return 0 if right and all(step["status"] == "ok" for step in report["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
