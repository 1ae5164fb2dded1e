"""What bench/gpu.py's steps run on the device: `python gpu_steps.py ACTION[:PART] ROWS_FILE`.

Each finding is one JSON line in ROWS_FILE, written at once. Actions: cuda:OP, triton:OP[:NofM] (gpu_checks.py: an op in
every format and odd shape against fp64, NaN-poisoned outputs, 100 equal runs, client order), graph:BACKEND
(gpu_graph.py: capture and replay), trace (gpu_trace.py: the package itself), sanitize, control:TOOL (gpu_checks.py: a
small run for compute-sanitizer, and one that it has to object to), compile (gpu_bench.py: Triton's kernels of the
bench), bench:GROUP (gpu_bench.py: correctness of the very operands first, then timings).

Exit status 0: the step came to its end; 1: this process can do no more, another one may.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from gpu_bench import bench, compile_ahead
from gpu_checks import check, control, sanitize
from gpu_device import DRY_RUN, Lost, Rows, alive
from gpu_graph import graph
from gpu_trace import traces

# Seconds without a finding after which a kernel is taken to hang. Triton compiles, and sanitizers are slow.
PATIENCE = {"cuda": 30.0, "graph": 45.0, "bench": 45.0}


def main() -> int:
    name, path = sys.argv[1], Path(sys.argv[2])
    action, _, part = name.partition(":")
    alive()  # starts the device: with two dozen processes at once that takes long, and no kernel is to blame for it
    seconds = float(os.environ["PROTOKEN_GPU_UNTIL"]) - time.time() - 4  # to end before it is ended
    patience = None if DRY_RUN else PATIENCE.get(action, 60.0)
    rows = Rows(path, seconds, patience, strikes=1 if action == "bench" else 2)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        {
            "cuda": lambda: check(rows, "cuda", part),
            "triton": lambda: check(rows, "triton", *share(part)),
            "graph": lambda: graph(rows, part),
            "trace": lambda: traces(rows),
            "sanitize": lambda: sanitize(rows),
            "control": lambda: control(rows, part),
            "compile": lambda: compile_ahead(rows),
            "bench": lambda: bench(rows, part),
        }[action]()
        if action != "control" and not alive():
            raise Lost(name)
    except Lost as lost:
        rows.add(case=f"{name}: the device no longer answers this process after {lost}", ok=False)
        return 1
    rows.close()
    return 0


def share(part: str) -> tuple[str, int, int]:
    """(op, which part, of how many) of OP or OP:NofM, where N counts from 1."""
    op, _, which = part.partition(":")
    number, _, count = which.partition("of")
    return op, int(number or 1) - 1, int(count or 1)


if __name__ == "__main__":
    sys.exit(main())
