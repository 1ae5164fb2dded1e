"""Kill writers and look at what they leave. Prints counts as JSON.

    python tests/fuzz_ledger_kill.py boundaries FOLDER        kill -9 at every boundary between file operations
    python tests/fuzz_ledger_kill.py random FOLDER KILLS      kill -9 of a running writer at random times

A process of its own: it forks, and a fork of a process with threads is not safe.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from ledger_cases import check_round, commit_next, reopen, small_ledger

from protoken.ledger import Ledger
from protoken.ledger.files import FileLayer
from protoken.ledger.verification import verify

T = TypeVar("T")


class KillingLayer(FileLayer):
    """Kills its own process before or after the n-th change of the file system; counts them when n is 0."""

    def __init__(self, root: Path, at: int, after: bool) -> None:
        super().__init__(root, sync=False)  # a killed process loses nothing that the kernel has
        self.at, self.after, self.count = at, after, 0

    def _change(self, operation: str, name: str, action: Callable[[], T]) -> T:
        self.count += 1
        if self.count == self.at and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = super()._change(operation, name, action)
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def forked(work: Callable[[], None]) -> int:
    """Run work in a child; the answer is its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    finally:
        os._exit(1)


def check(path: Path, acknowledged: int) -> tuple[int, int]:
    """(acknowledged rounds lost, 1 if unreadable); a new writer must be able to go on."""
    try:
        ledger = reopen(path)
        lost = max(0, acknowledged - ledger.head.round)
        for read in ledger.select("all" if ledger.head.round < 4 else slice(-3, None)):
            check_round(read)
        commit_next(ledger)
        report = verify(path)
        return lost, int(not report.ok or bool(report.leftovers))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 0, 1


def boundaries(folder: Path) -> dict[str, int]:
    layer = KillingLayer(small_ledger(folder / "count", 1).path, 0, False)
    commit_next(Ledger.open(folder / "count", files=layer))
    result = {"operations": layer.count, "killed": 0, "lost": 0, "unreadable": 0}
    for at in range(1, layer.count + 1):
        # Killed after one operation is killed before the next; only the last one has no next.
        for after in (False, True) if at == layer.count else (False,):
            path = folder / "ledger"
            small_ledger(path, 1)
            killing = KillingLayer(path, at, after)
            child = forked(lambda killing=killing: commit_next(Ledger.open(killing.root, files=killing)))
            _, status = os.waitpid(child, 0)
            result["killed"] += os.WIFSIGNALED(status)
            lost, unreadable = check(path, 1)
            result["lost"] += lost
            result["unreadable"] += unreadable
            shutil.rmtree(path)
    return result


def at_random(folder: Path, kills: int) -> dict[str, int]:
    chance = random.Random(kills)
    result = {"killed": 0, "acknowledged": 0, "lost": 0, "unreadable": 0}
    path = folder / "ledger"
    small_ledger(path, 1)
    for _ in range(kills):
        if Ledger.open(path).head.round > 30:
            shutil.rmtree(path)
            small_ledger(path, 1)
        read_end, write_end = os.pipe()

        def work(write_end: int = write_end) -> None:
            ledger = reopen(path)
            while True:
                commit_next(ledger)
                os.write(write_end, ledger.head.round.to_bytes(4, "little"))  # the acknowledgement

        child = forked(work)
        os.close(write_end)
        # Half of them are killed somewhere in their first commit, half some time after one was acknowledged.
        told = os.read(read_end, 4) if chance.random() < 0.5 else b""
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        result["killed"] += os.WIFSIGNALED(status)
        told += os.read(read_end, 1 << 16)
        os.close(read_end)
        acknowledged = int.from_bytes(told[-4:], "little") if told else 1
        result["acknowledged"] += len(told) // 4
        lost, unreadable = check(path, acknowledged)
        result["lost"] += lost
        result["unreadable"] += unreadable
    return result


def main() -> None:
    torch.set_num_threads(1)
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "boundaries":
        print(json.dumps(boundaries(folder)))
    else:
        print(json.dumps(at_random(folder, int(sys.argv[3]))))


if __name__ == "__main__":
    main()
