"""Runs the steps of bench/gpu.py: each a process group of its own with a time limit of its own.

Steps of one wave run side by side, waves one after another. What the steps have found is collected into the report on
disk every few seconds, so that it is there whatever ends the run; a step that fails, hangs or loses the device takes
none of the others with it. SIGTERM and Ctrl-C end all steps, and the report says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOTAL_SECONDS = 525.0
TAIL = 4000
WRITE_EVERY = 5.0


@dataclass
class Step:
    """A command with a time limit; ``shows`` keeps the end of its output also when it went well.

    PROTOKEN_GPU_UNTIL tells the command when it will be ended (seconds since the epoch), which is before its own limit
    when the whole run is late.
    """

    name: str
    command: list[str]
    seconds: float
    wave: int
    environment: dict[str, str] = field(default_factory=dict)
    rows_file: Path | None = None
    shows: bool = False


class Stopped(BaseException):
    """SIGTERM: whoever runs this is out of time."""


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into `Stopped` for the length of the block."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(f"signal {number}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_steps(steps: Sequence[Step], report: dict[str, Any], out: Path, total: float = TOTAL_SECONDS) -> None:
    """Run wave by wave within ``total`` seconds, keeping the report on disk up to date."""
    begin = time.monotonic()
    running: list[Running] = []
    ended = "stopped"
    try:
        with stopped_by_sigterm():
            for wave in sorted({step.wave for step in steps}):
                for step in (step for step in steps if step.wave == wave):
                    left = total - (time.monotonic() - begin)
                    if left < 5:
                        report["steps"][step.name] = {"status": "skipped", "reason": "no time left"}
                    else:
                        running.append(Running(step, min(step.seconds, left)))
                _watch(running, steps, report, out)
        ended = "done"
    except (Stopped, KeyboardInterrupt) as signalled:
        report["stopped"] = str(signalled) or type(signalled).__name__
    finally:
        for item in running:
            report["steps"][item.step.name] = item.finish("stopped")
        report["rows"] = collect(steps)
        report["seconds"] = round(time.monotonic() - begin, 1)
        report["ended"] = ended
        write(report, out)


def _watch(running: list[Running], steps: Sequence[Step], report: dict[str, Any], out: Path) -> None:
    """Until all have ended."""
    written = time.monotonic()
    while running:
        for item in list(running):
            if item.ended() or item.late():
                report["steps"][item.step.name] = item.finish("timeout")
                running.remove(item)
                written = 0.0
        if time.monotonic() - written > WRITE_EVERY:
            report["rows"] = collect(steps)
            write(report, out)
            written = time.monotonic()
        time.sleep(0.1)


class Running:
    """A step under way. A command that cannot be started is a step that has failed."""

    def __init__(self, step: Step, limit: float) -> None:
        self.step, self.started, self.limit = step, time.monotonic(), limit
        self.process: subprocess.Popen[bytes] | None = None
        self.problem = ""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - read when the step ends
        try:
            self.process = subprocess.Popen(
                step.command,
                env=os.environ | step.environment | {"PROTOKEN_GPU_UNTIL": f"{time.time() + limit:.1f}"},
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                cwd=tempfile.gettempdir(),
                process_group=0,
            )
        except OSError as error:
            self.problem = str(error)

    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def late(self) -> bool:
        return time.monotonic() - self.started > self.limit

    def finish(self, otherwise: str) -> dict[str, Any]:
        """The outcome; one that still runs is ended with all it started, and its status is ``otherwise``."""
        if self.process is None:
            return {"status": "failed", "seconds": 0.0, "reason": self.problem}
        status = {None: otherwise, 0: "ok"}.get(self.process.poll(), "failed")
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that the driver holds cannot be waited for
            self.process.wait(10)
        outcome: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - self.started, 1)}
        outcome["returncode"] = self.process.returncode
        if status != "ok" or self.step.shows:
            self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - TAIL))
            outcome["output"] = self.log.read().decode(errors="replace")
        self.log.close()
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
    """All or nothing, so that a reader never sees half a report."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(out.suffix + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(out)
