"""Runs the steps of bench/gpu.py: each a process group of its own with a time limit of its own.

Steps of one wave run side by side, as many as the cores can serve; waves one after another. What the steps have found
is collected into the report on disk every few seconds, so that it is there whatever ends the run; a step that fails,
hangs or loses the device takes none of the others with it. SIGTERM and Ctrl-C end all steps, and the report says so.

A step with a rows file says there what it begins (``{"begin": ...}``) and that it came to its end (``{"end": true}``).
One that died before is started again, as long as there is time and it gets further each time: it goes on behind what it
had begun, so that one kernel that hangs or traps does not hide what the others do.
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
TAIL = 12_000  # characters of a step's output
WRITE_EVERY = 5.0
SIDE_BY_SIDE = max(4, 2 * (os.cpu_count() or 2))  # more only wait for each other, and their time runs out meanwhile
WORTH_A_START = 20.0  # seconds: importing torch takes a part of them


@dataclass
class Step:
    """A command with a time limit; ``shows`` keeps the end of its output also when it went well.

    ``expects`` is the exit status of a step that went well. PROTOKEN_GPU_UNTIL tells the command when it will be ended
    (seconds since the epoch), which is before its own limit when the whole run is late.
    """

    name: str
    command: list[str]
    seconds: float
    wave: int
    environment: dict[str, str] = field(default_factory=dict)
    rows_file: Path | None = None
    shows: bool = False
    expects: int = 0


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
                waiting = [step for step in steps if step.wave == wave]
                while waiting or running:
                    while waiting and len(running) < SIDE_BY_SIDE:
                        step, left = waiting.pop(0), total - (time.monotonic() - begin)
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
    """Until one or more have ended."""
    written, under_way = time.monotonic(), len(running)
    while running and len(running) == under_way:
        for item in list(running):
            if item.ended() or item.late():
                report["steps"][item.step.name] = item.finish("timeout")
                running.remove(item)
        if len(running) < under_way or time.monotonic() - written > WRITE_EVERY:
            report["rows"] = collect(steps)
            write(report, out)
            written = time.monotonic()
        time.sleep(0.1)


class Running:
    """A step under way. A command that cannot be started is a step that has failed."""

    def __init__(self, step: Step, limit: float) -> None:
        self.step, self.begun, self.limit = step, time.monotonic(), limit
        self.until = time.time() + limit
        self.process: subprocess.Popen[bytes] | None = None
        self.problem = ""
        self.deaths: list[int] = []
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - read when the step ends
        self._start()

    def _start(self) -> None:
        self.far = len(self._rows())
        try:
            self.process = subprocess.Popen(
                self.step.command,
                env=os.environ | self.step.environment | {"PROTOKEN_GPU_UNTIL": str(self.until)},
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                cwd=tempfile.gettempdir(),
                process_group=0,
            )
        except OSError as error:
            self.problem = str(error)

    def ended(self) -> bool:
        """Whether the step is over; one that died on the way is started again."""
        if self.process is None:
            return True
        status = self.process.poll()
        if status is None:
            return False
        rows = self._rows()
        over = self.step.rows_file is None or (bool(rows) and "end" in rows[-1])
        further = any("begin" in row for row in rows[self.far :])
        if over or not further or time.time() + WORTH_A_START > self.until:
            return True
        self._end_group()
        self._note_death(f"exit status {status}")
        self.deaths.append(status)
        self._start()
        return self.process is None

    def late(self) -> bool:
        return time.monotonic() - self.begun > self.limit

    def finish(self, otherwise: str) -> dict[str, Any]:
        """The outcome; one that still runs is ended with all it started, and its status is ``otherwise``."""
        if self.process is None:
            return {"status": "failed", "seconds": 0.0, "reason": self.problem}
        status = {None: otherwise, self.step.expects: "ok"}.get(self.process.poll(), "failed")
        self._end_group()
        if status == "ok" and self.deaths:
            status = "failed"
        elif status in ("failed", "timeout"):
            self._note_death(status if status == "timeout" else f"exit status {self.process.returncode}")
        outcome: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - self.begun, 1)}
        outcome["returncode"] = self.process.returncode
        if self.deaths:
            outcome["died_with"] = self.deaths
        if status != "ok" or self.step.shows:
            self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - TAIL))
            outcome["output"] = self.log.read().decode(errors="replace")
        self.log.close()
        return outcome

    def _end_group(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that the driver holds cannot be waited for
            self.process.wait(10)

    def _rows(self) -> list[dict[str, Any]]:
        return lines_of(self.step.rows_file)

    def _note_death(self, how: str) -> None:
        """A row for what the process was at when it ended, unless it has said so itself."""
        rows = self._rows()
        if rows and "begin" in rows[-1]:
            assert self.step.rows_file is not None
            with self.step.rows_file.open("a") as file:  # after a line that may be cut off
                row = {"case": rows[-1]["begin"], "ok": False, "problem": f"ended: {how}"}
                file.write("\n" + json.dumps(row) + "\n")


def lines_of(path: Path | None) -> list[dict[str, Any]]:
    """What a step has written so far; a line that is cut off is left out."""
    rows: list[dict[str, Any]] = []
    if path is None or not path.exists():
        return rows
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def collect(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """What the steps have found so far."""
    return [
        {"step": step.name} | row
        for step in steps
        for row in lines_of(step.rows_file)
        if not row.keys() & {"begin", "end", "done"}
    ]


def write(report: dict[str, Any], out: Path) -> None:
    """All or nothing, so that a reader never sees half a report."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(out.suffix + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(out)
