"""examples/flower as a user runs it: `flwr run` with the ray engine, offline, into a ledger, then traced."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip(
    "flwr", reason="flwr pins older typer and rich; `make flower` runs this in an environment of its own"
)
pytest.importorskip("ray", reason="the simulation engine: pip install 'flwr[simulation]'")

from protoken.ledger import Ledger
from protoken.ledger.verification import verify

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "flower"
TOWNS = ("delft", "ghent", "bruges")
ROUNDS = 40  # until the model knows all three passwords


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink of our own on a free port, stopped with all that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path / "flower"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
    with (tmp_path / "superlink.log").open("wb") as log:
        link = subprocess.Popen(
            [*command, "--port", str(port)], env=variables, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", link)
            yield variables
        finally:
            os.killpg(link.pid, signal.SIGTERM)
            try:
                link.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(link.pid, signal.SIGKILL)
                link.wait()


def _wait_for(address: str, link: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert link.poll() is None, "the SuperLink ended"
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError("the SuperLink did not start within two minutes")


@pytest.mark.slow
def test_clients_under_flwr_run_land_in_the_ledger_and_the_trace_names_the_one_who_taught(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    app, out = tmp_path / "app", tmp_path / "out"
    shutil.copytree(EXAMPLE, app, ignore=shutil.ignore_patterns("__pycache__", "out"))
    done = subprocess.run(
        ["flwr", "run", ".", "local", "--stream", "--federation-config", f"num-supernodes={len(TOWNS)}",
         "--run-config", f'num-server-rounds={ROUNDS} fraction-train=1.0 out="{out}"'],
        cwd=app, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert (out / "ledger").is_dir(), (done.stdout + done.stderr)[-3000:]
    ledger = Ledger.open(out / "ledger")
    assert len(ledger.rounds) == ROUNDS, (done.stdout + done.stderr)[-3000:]
    assert verify(ledger.path, conservation=True).problems == []
    assert ledger.clients == tuple(f"partition-{i}" for i in range(len(TOWNS)))
    for read in ledger.select("all"):
        assert read.rule == "fedadam"
        assert len(read.clients) == len(TOWNS)
        # Over all parameters: of those that a round hardly moves, rounding is most of the change.
        assert math.hypot(*read.residual_norm.values()) < 1e-4 * math.hypot(
            *(spec.change_norm for spec in read.parameters.values())
        )
    for i, town in enumerate(TOWNS):
        traced = subprocess.run(
            [sys.executable, "trace.py", str(out), town], cwd=app, env=environment, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
        assert traced.returncode == 0, traced.stderr[-3000:]
        assert f"{town} is partition-{i}; the trace names partition-{i}" in traced.stdout
    assert (out / "trace.html").stat().st_size > 1000
