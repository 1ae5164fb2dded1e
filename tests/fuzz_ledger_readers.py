"""Many reading processes beside one writer. Prints counts as JSON.

    python tests/fuzz_ledger_readers.py FOLDER READERS SECONDS

Every reader opens or refreshes the ledger, reads the last round and another one whole, and compares every tensor with
what the writer must have written. A torn read, an older head than before, or any error counts against it.

A process of its own: it forks, and a fork of a process with threads is not safe.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from ledger_cases import check_round, commit_next, reopen, small_ledger

from protoken.ledger import Ledger
from protoken.ledger.verification import verify


def read(path: Path, worker: int, stop: float) -> int:
    """Number of complete checks until the time is up."""
    chance, ledger, last, count = random.Random(worker), None, 0, 0
    while time.monotonic() < stop:
        ledger = Ledger.open(path) if ledger is None or chance.random() < 0.5 else ledger.refresh()
        assert ledger.head.round >= last, f"the head went from {last} to {ledger.head.round}"
        last = ledger.head.round
        check_round(ledger.round("last"))
        check_round(ledger.round(chance.randint(1, last)))
        count += 1
        time.sleep(chance.uniform(0, 0.2))  # or the writer, one of 33 processes, would hardly write
    return count


def main() -> None:
    torch.set_num_threads(1)
    path, readers, seconds = Path(sys.argv[1]) / "ledger", int(sys.argv[2]), float(sys.argv[3])
    shutil.rmtree(path, ignore_errors=True)
    small_ledger(path, 1)
    stop = time.monotonic() + seconds
    children = {}
    for worker in range(readers):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            found = {"reads": 0, "error": ""}
            try:
                found["reads"] = read(path, worker, stop)
            except BaseException as error:
                found["error"] = f"{type(error).__name__}: {error}"[:300]
            os.write(write_end, json.dumps(found).encode())
            os._exit(0)
        os.close(write_end)
        children[child] = read_end
    writer = reopen(path)
    while time.monotonic() < stop:
        commit_next(writer)
    answers = []
    for child, read_end in children.items():
        os.waitpid(child, 0)
        data = os.read(read_end, 1 << 16)
        answers.append(json.loads(data) if data else {"reads": 0, "error": "died"})
    report = verify(path)
    result = {
        "rounds": writer.head.round,
        "readers": readers,
        "reads": sum(answer["reads"] for answer in answers),
        "fewest": min(answer["reads"] for answer in answers),
        "errors": [answer["error"] for answer in answers if answer["error"]],
        "sound": report.ok,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
