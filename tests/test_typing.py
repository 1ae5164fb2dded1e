"""The types that the package hands to its users: py.typed is a promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_users_program_passes_mypy_strict() -> None:
    """With the project's settings, and so the cache that `make types` leaves: without one it takes half a minute."""
    pytest.importorskip("mypy", reason="mypy comes with the extra dev")
    command = [sys.executable, "-m", "mypy", "--strict", "tests/typing_user.py"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
