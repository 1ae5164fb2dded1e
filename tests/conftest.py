"""Fixtures shared by the tests."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty returns NaN, so that an element nobody wrote shows."""
    real = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = real(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() and not kwargs.get("pin_memory") else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def instruction_sets() -> Iterator[list[str]]:
    """What the CPU kernels can run here; the choice is put back afterwards."""
    from protoken import _C

    before = _C.instruction_set()
    yield _C.instruction_sets()
    _C.use_instruction_set(before)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """As many threads afterwards as before."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small lose more than they gain by a second thread, much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
