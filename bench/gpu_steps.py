"""What bench/gpu.py's steps run on the device: `python gpu_steps.py ACTION[:PART] ROWS_FILE`.

Each finding is one JSON line in ROWS_FILE, written at once. Actions: cuda:OP, triton:OP (gpu_checks.py: an op in every
format and odd shape against fp64, NaN-poisoned outputs, 100 equal runs, client order), graph:BACKEND (gpu_graph.py:
capture and replay), trace (gpu_trace.py: the package itself), sanitize (gpu_checks.py: a small run for
compute-sanitizer), bench:GROUP (gpu_bench.py: correctness of the very operands first, then timings).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from gpu_bench import bench
from gpu_checks import check, sanitize
from gpu_device import DRY_RUN, Rows, alive, synchronize
from gpu_graph import graph
from gpu_trace import traces


def main() -> int:
    name, path = sys.argv[1], Path(sys.argv[2])
    action, _, part = name.partition(":")
    seconds = float(os.environ["PROTOKEN_GPU_UNTIL"]) - time.time() - 4  # to end before it is ended
    rows = Rows(path, seconds, patience=None if DRY_RUN or action == "sanitize" else 60.0)
    torch.backends.cuda.matmul.allow_tf32 = False
    {
        "cuda": lambda: check(rows, "cuda", part),
        "triton": lambda: check(rows, "triton", part),
        "graph": lambda: graph(rows, part),
        "trace": lambda: traces(rows),
        "sanitize": lambda: sanitize(rows),
        "bench": lambda: bench(rows, part),
    }[action]()
    if not alive():
        rows.add(case=f"{name}: the device no longer answers this process", ok=False)
        return 1
    synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
