"""What bench/gpu.py's steps run on the device: `python gpu_steps.py ACTION ROWS_FILE SECONDS`.

Each finding is one JSON line in ROWS_FILE, written at once. Actions: cuda, triton (gpu_checks.py: every op, format
and odd shape against fp64, NaN-poisoned outputs, 100 equal runs, client order), graph (gpu_graph.py: capture and
replay), sanitize (gpu_checks.py: a small run for compute-sanitizer), bench (gpu_bench.py: correctness of the very
operands first, then timings).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from gpu_bench import bench
from gpu_checks import check, sanitize
from gpu_device import Rows, synchronize
from gpu_graph import graph


def main() -> int:
    action, path, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    rows = Rows(path, seconds)
    torch.backends.cuda.matmul.allow_tf32 = False
    {
        "cuda": lambda: check(rows, "cuda"),
        "triton": lambda: check(rows, "triton"),
        "graph": lambda: graph(rows),
        "sanitize": lambda: sanitize(rows),
        "bench": lambda: bench(rows),
    }[action]()
    synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
