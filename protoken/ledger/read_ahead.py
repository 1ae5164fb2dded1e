"""Many small files from a cold disk: what comes next is asked for while the last ones are checked.

One file at a time, a disk answers one question at a time. A few threads that only open the next files and tell the
system that they will be needed keep its queue full. Where the files lie in memory already, this would be so much work
for nothing, so it is done only while the process is seen to read from disks at all.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from protoken.errors import ProtokenError
from protoken.ledger.shards import ShardRef

THREADS = 8
# Shards between two looks at the disk, and how many are asked for ahead.
STEP, WINDOW = 32, 512


def blocks_read() -> int:
    """Blocks that this process has had to fetch from disks so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


class ReadAhead:
    """Goes ahead of somebody who reads ``refs`` in order; a context manager that ends when nothing is under way."""

    def __init__(
        self, open_shard: Callable[[ShardRef], int], refs: Sequence[ShardRef], pool: ThreadPoolExecutor
    ) -> None:
        self._open, self._refs, self._pool = open_shard, refs, pool
        self._asked, self._blocks = 0, blocks_read()
        self._under_way: list[Future[None]] = []

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        for future in self._under_way:
            future.cancel()
        wait(self._under_way)

    def reached(self, position: int) -> None:
        """The reader is about to read refs[position]."""
        if position % STEP:
            return
        before, self._blocks = self._blocks, blocks_read()
        if self._blocks == before:
            return
        end = min(position + WINDOW, len(self._refs))
        for start in range(max(self._asked, position + 1), end, STEP):
            self._under_way.append(self._pool.submit(self._ask, self._refs[start : min(start + STEP, end)]))
        self._asked = max(self._asked, end)

    def _ask(self, refs: Sequence[ShardRef]) -> None:
        for ref in refs:
            # What is wrong with a file is said when it is read.
            with contextlib.suppress(ProtokenError, OSError):
                handle = self._open(ref)
                try:
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)
