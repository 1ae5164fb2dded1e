"""Threads of a parallel runtime that only wait are let go."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from protoken.streaming import openmp


def workers() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("two_threads")
def test_idle_workers_are_let_go_and_come_back() -> None:
    if not openmp._runtimes():
        pytest.skip("this torch does not use GNU's OpenMP runtime")
    values = torch.linspace(0, 1, 1 << 20)
    expected = values.exp().sum()
    busy = workers()
    openmp.release_idle_workers()
    assert workers() < busy
    assert torch.equal(values.exp().sum(), expected)
    assert workers() == busy


def test_release_is_harmless_in_a_thread_without_workers() -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            openmp.release_idle_workers()
        except BaseException as error:  # to be shown by the test, not by the thread
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures


def test_without_such_a_runtime_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_runtimes", tuple)
    openmp.release_idle_workers()
    assert openmp._runtimes() == ()
