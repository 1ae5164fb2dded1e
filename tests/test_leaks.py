"""Many traces in one process: memory, open files, threads and hooks stay where they were after the first few.

PROTOKEN_LEAK_TRACES sets how many (10,000 takes some minutes); each of the forms below makes its share of them.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from test_trace_errors import fingerprint
from tiny_federation import TinyFederation, tiny_federation

import protoken

TRACES = int(os.environ.get("PROTOKEN_LEAK_TRACES", "160"))
PROMPT = [5, 17, 42, 8]
NEW = {"max_new_tokens": 3, "do_sample": False}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files and memory through /proc"),
]


def by_trace(federation: TinyFederation) -> None:
    protoken.trace(federation.model, PROMPT, **NEW)


def by_trace_with_its_own_ledger(federation: TinyFederation) -> None:
    protoken.trace(federation.model, PROMPT, ledger=federation.path, **NEW)


def by_forward_way(federation: TinyFederation) -> None:
    protoken.trace(federation.model, PROMPT, blocks=2, **NEW)


def by_tracing(federation: TinyFederation) -> None:
    with protoken.tracing(federation.model):
        federation.model.generate(torch.tensor([PROMPT]), **NEW)


def by_stream(federation: TinyFederation) -> None:
    stream = protoken.stream(federation.model, PROMPT, **NEW)
    assert len(list(stream)) == 3
    assert stream.trace.totals.any()


def by_stream_left_early(federation: TinyFederation) -> None:
    for _ in protoken.stream(federation.model, PROMPT, ledger=federation.path, seed=1, **NEW):
        break


def by_callback(federation: TinyFederation) -> None:
    seen: list[protoken.StreamedToken] = []
    protoken.stream(federation.model, PROMPT, on_token=seen.append, **NEW)


def by_refused_call(federation: TinyFederation) -> None:
    with pytest.raises(protoken.errors.GenerationError):
        protoken.stream(federation.model, PROMPT, num_beams=2)


FORMS = [
    by_trace,
    by_trace_with_its_own_ledger,
    by_forward_way,
    by_tracing,
    by_stream,
    by_stream_left_early,
    by_callback,
    by_refused_call,
]


@dataclass
class Usage:
    """What one process holds. Resident memory in bytes."""

    resident: int
    files: int
    mapped: int
    threads: int
    objects: int
    tensors: int

    @staticmethod
    def now() -> Usage:
        gc.collect()
        with open("/proc/self/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            mapped = sum("ledger" in line for line in maps)
        objects = gc.get_objects()
        tensors = sum(issubclass(type(one), torch.Tensor) for one in objects)
        return Usage(
            resident, len(os.listdir("/proc/self/fd")), mapped, threading.active_count(), len(objects), tensors
        )


def grown(form: Callable[[TinyFederation], None], federation: TinyFederation, count: int) -> tuple[Usage, Usage]:
    """Usage after the first fifth and after the rest."""
    warm = max(count // 5, 10)
    for _ in range(warm):
        form(federation)
    before = Usage.now()
    for _ in range(count - warm):
        form(federation)
    return before, Usage.now()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_nothing_grows(tmp_path_factory: pytest.TempPathFactory, form: Callable[[TinyFederation], None]) -> None:
    federation = tiny_federation(tmp_path_factory.mktemp("leaks"))
    protoken.attach(federation.model, federation.path)
    left_alone = fingerprint(federation.model)
    before, after = grown(form, federation, max(TRACES // len(FORMS), 20))
    print(f"{form.__name__}: {before} -> {after}")
    assert fingerprint(federation.model) == left_alone
    assert (after.files, after.mapped, after.threads) == (before.files, before.mapped, before.threads)
    assert after.tensors == before.tensors
    assert after.objects - before.objects < 50
    # The allocator's own ups and downs; a kept trace of this size is about 20 KB.
    assert after.resident - before.resident < 6 << 20
    protoken.detach(federation.model)
