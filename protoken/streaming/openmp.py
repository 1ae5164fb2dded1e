"""Let go of a thread's idle OpenMP workers.

GNU's runtime keeps a pool of workers for every thread that ever computed in parallel. As soon as all pools together
hold more workers than there are cores, none of them waits actively any more, and every parallel region starts with
waking somebody up: generating in a second thread while the first one merely waits costs a third more on two cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

# omp_pause_soft: workers may go, what threads have stored stays.
_SOFT = 1


def release_idle_workers() -> None:
    """End the calling thread's pool; its next parallel region makes a new one. Nothing to do without GNU's runtime."""
    for pause in _runtimes():
        pause(_SOFT)


@lru_cache(maxsize=1)
def _runtimes() -> tuple[Callable[[int], int], ...]:
    """`omp_pause_resource_all` of every libgomp in this process: packages bring their own."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ()
    paths = sorted({line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line})
    found = []
    for path in paths:
        try:
            found.append(ctypes.CDLL(path).omp_pause_resource_all)
        except (OSError, AttributeError):
            # Gone from the disk, or of a version before OpenMP 5: its workers stay.
            continue
    return tuple(found)
