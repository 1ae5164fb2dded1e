"""Build, check and bench everything on a machine with a GPU: `python bench/gpu.py --out FILE.json`.

One command, no network, under nine minutes. Every step is a process of its own with a time limit of its own; what a
step has found is on disk seconds after it is found, a step that fails, hangs or runs out of time is reported as such
and the rest goes on (gpu_runner.py). A step whose process dies of a kernel is started again behind that kernel. The
JSON holds the device, the versions, each step's outcome and every row.

Steps: build (gpu_build.py, into a temporary folder); then side by side the checks: cuda and triton, each op a step or
several, graph by backend, trace, tests, four compute-sanitizer tools, and two runs that have to make it object; beside
them Triton compiles for the bench; then alone on the device the bench, in four steps. gpu_steps.py names what they do.
`--steps cuda bench` takes all steps of these names, `--steps cuda:client_totals` one.

`--dry-run` needs no GPU: the same steps at tiny sizes on the CPU (gpu_device.py), to see that the script works.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_bars import bars
from gpu_runner import TOTAL_SECONDS, Step, run_steps, write

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
OPS = ("client_scores", "client_scores_lowrank", "client_totals", "relevance_head", "capture_append")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SLOW = 3  # how many times as long a dry run may take: an interpreter on a busy machine
FOUND = 9  # compute-sanitizer's exit status when it has something to object to
CONTROLLED = ("memcheck", "initcheck")  # whose control step plants an error and wants it found
# In how many processes Triton's kernels of an op are checked: to compile them takes a processor one to two minutes.
PARTS = {"client_scores_lowrank": 4, "client_scores": 3, "relevance_head": 3}
TOOLKIT = Path("/usr/local/cuda/bin")


def plan(workdir: Path, site: Path, chosen: Sequence[str], dry_run: bool = False) -> list[Step]:
    """All steps, or those whose names, with or without what follows the colon, are in ``chosen``."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    run = tools() | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(workdir / "triton")}
    if dry_run:
        run |= {"PROTOKEN_GPU_DRY_RUN": "1", "TRITON_INTERPRET": "1"}
    slow = SLOW if dry_run else 1
    # Two dozen processes at once share the cores.
    together = run | {"OMP_NUM_THREADS": "2"}

    def python(
        name: str,
        seconds: float,
        wave: int,
        environment: dict[str, str],
        *prefix: str,
        action: str = "",
        expects: int = 0,
    ) -> Step:
        rows = workdir / f"{name.replace(':', '-')}.jsonl"
        command = [*prefix, sys.executable, str(HERE / "gpu_steps.py"), action or name, str(rows)]
        return Step(name, command, slow * seconds, wave, environment, rows, shows=bool(prefix), expects=expects)

    cuda = os.environ.get("PROTOKEN_CUDA", "1") if dry_run else "1"
    build = tools() | {"PROTOKEN_CUDA": cuda, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 2)}
    steps = [Step("build", [sys.executable, str(HERE / "gpu_build.py"), str(site)], slow * 180, 0, build)]
    steps += [python(f"cuda:{op}", 140, 1, together) for op in OPS]
    steps += [python(f"triton:{part}", 140, 1, together) for op in OPS for part in parts(op)]
    steps += [python(f"graph:{backend}", 100, 1, together) for backend in ("cuda", "triton", "auto")]
    steps += [python("trace", 120, 1, together), Step("tests", tests(), slow * 140, 1, together, shows=True)]
    for tool in SANITIZERS:
        prefix = () if dry_run else sanitizer(tool)
        steps.append(python(tool, 140, 1, together | sanitized(), *prefix, action="sanitize"))
    for tool in CONTROLLED:
        prefix, expects = ((), 0) if dry_run else (sanitizer(tool, control=True), FOUND)
        steps.append(python(f"control:{tool}", 100, 1, together | sanitized(), *prefix, expects=expects))
    steps += [
        python("compile", 140, 1, together | {"PROTOKEN_GPU_FEW_CLIENTS": "1"}),
        python("bench:dense", 90, 2, run),
        python("bench:lowrank", 40, 3, run),
        python("bench:others", 50, 4, run),
        python("bench:more", 200, 5, run),  # what the others leave
    ]
    return [step for step in steps if not chosen or any(f"{step.name}:".startswith(f"{name}:") for name in chosen)]


def parts(op: str) -> list[str]:
    count = PARTS.get(op, 1)
    return [op] if count == 1 else [f"{op}:{number}of{count}" for number in range(1, count + 1)]


def tools() -> dict[str, str]:
    """Where nvcc, cmake and ninja are looked for: beside this Python, on the path, in the toolkit's usual folder."""
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), str(TOOLKIT)]
    return {"PATH": os.pathsep.join(path)}


def sanitizer(tool: str, control: bool = False) -> list[str]:
    """compute-sanitizer's command. Only protoken's kernels are instrumented: torch's would take all the time."""
    command = {
        "tool": tool,
        "error-exitcode": str(FOUND),
        "kernel-name": "kns=protoken",
        # Importing torch takes longer than the ten seconds that it waits for a process to show itself, and the several
        # that run side by side shall not look for theirs behind the same door.
        "launch-timeout": "0",
        "port": str(49_152 + 20 * (SANITIZERS.index(tool) + len(SANITIZERS) * control)),
        "target-processes": "application-only",
        # After an error the device is as before, so that the other kernels are seen, too.
        "destroy-on-device-error": "kernel",
        # Of what the host was at, the rows say more than its stack, which is long and takes long.
        "show-backtrace": "no",
        "print-limit": "50",
    }
    if tool == "memcheck":
        # torch asks the driver for functions that are not there, which is no error; a gap behind every allocation
        # shows small overruns.
        command |= {"report-api-errors": "no", "padding": "64"}
    if tool == "initcheck":  # what torch's kernels wrote counts as not written, when it is copied to the host
        command |= {"check-api-memory-access": "no"}
    return [found_sanitizer(), *(part for name, value in command.items() for part in (f"--{name}", value))]


def found_sanitizer() -> str:
    return shutil.which("compute-sanitizer", path=tools()["PATH"]) or str(TOOLKIT / "compute-sanitizer")


def sanitized() -> dict[str, str]:
    """Allocations that end where the tensor ends, and operands whose writing the sanitizer sees (gpu_device.py)."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PROTOKEN_GPU_HOST_OPERANDS": "1"}


def tests() -> list[str]:
    """pytest on the test file that runs on a GPU when there is one."""
    spread = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    quiet = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    return [sys.executable, "-m", "pytest", *quiet, *spread, str(ROOT / "tests" / "test_triton_kernels.py")]


def describe() -> dict[str, Any]:
    """Device and versions."""
    import torch

    about: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": None}
    for name in ("triton", "transformers", "numpy", "setuptools", "pybind11"):
        try:
            about[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            about[name] = None
    nvcc = shutil.which("nvcc", path=tools()["PATH"]) or "nvcc"
    smi = ["nvidia-smi", "--format=csv,noheader"]
    # What others do with the device, and how it is set, explains figures.
    card = "name,compute_mode,memory.used,utilization.gpu,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit"
    for name, command, line in (
        ("nvcc", [nvcc, "--version"], -2),
        ("sanitizer", [found_sanitizer(), "--version"], -1),
        ("driver", [*smi, "--query-gpu=driver_version"], 0),
        ("card", [*smi, f"--query-gpu={card}"], 0),
    ):
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
            about[name] = run.stdout.strip().splitlines()[line]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            about[name] = f"not found: {error}"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "device": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return about


def summarize(report: dict[str, Any]) -> str:
    """What was timed, then what is wrong, the bars and the steps: whoever sees the end alone sees what matters."""
    lines = []
    for row in report["rows"]:
        if "median_s" in row:
            share = f"{row['bandwidth_share']:.0%}" if row.get("bandwidth_share") else "-"
            ratio = f"{row['ratio_to_best_torch']:.1f}x" if row.get("ratio_to_best_torch") else "-"
            lines.append(
                f"{row['op']:22s} {row['backend']:12s} {row['format']:5s} {row['shape']:24s} "
                f"K={row['K']:<6d} T={row['T']:<4d} {row['median_s'] * 1e3:9.3f} ms  {share:>5s} of copy  "
                f"{ratio:>7s} best torch"
            )
    failures = [row for row in report["rows"] if row.get("ok") is False]
    lines += [f"WRONG {row.get('case', row)} {row.get('problem', '')}"[:200] for row in failures[:20]]
    lines += [
        f"{'met' if bar['met'] else 'MISSED':6s} {bar['figure']:8.3f} of {bar['wanted']:g}: {bar['bar']}"
        for bar in report.get("bars", [])
    ]
    lines += [
        f"{name:28s} {step['status']:8s} {step.get('seconds', 0):7.1f} s" for name, step in report["steps"].items()
    ]
    lines.append(f"checks: {sum('ok' in row for row in report['rows'])}, wrong: {len(failures)}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build, check and bench protoken on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--steps", nargs="*", default=[], help="only these steps (default: all)")
    parser.add_argument("--site", type=Path, help="folder to install into, or that holds an installed protoken")
    parser.add_argument("--seconds", type=float, help=f"time for everything (default: {TOTAL_SECONDS:.0f})")
    parser.add_argument("--dry-run", action="store_true", help="the same steps on the CPU, at tiny sizes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every step ended well and every check was right, 1 when not, 2 without a CUDA device."""
    options = parse(arguments)
    begin = time.monotonic()
    about = describe()
    report: dict[str, Any] = {**about, "dry_run": options.dry_run, "steps": {}, "rows": []}
    if about["device"] is None and not options.dry_run:
        print("bench/gpu.py: no CUDA device", file=sys.stderr)
        return 2
    write(report, options.out)
    # A process that the driver holds may still write into it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        site = options.site or Path(folder) / "site"
        steps = plan(Path(folder), site, options.steps, options.dry_run)
        seconds = options.seconds or TOTAL_SECONDS * (SLOW if options.dry_run else 1)
        run_steps(steps, report, options.out, seconds - (time.monotonic() - begin))
    copies = [row["copy_bandwidth"] for row in report["rows"] if "copy_bandwidth" in row]
    report["copy_bandwidth"] = max(copies, default=None)
    report["bars"] = [] if options.dry_run else bars(report["rows"])
    write(report, options.out)
    print(summarize(report))
    right = all(row.get("ok") is not False for row in report["rows"])
    well = all(step["status"] == "ok" for step in report["steps"].values())
    return 0 if right and well and report["ended"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
