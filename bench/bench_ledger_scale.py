"""A ledger of many small updates on one machine: open, list, verify, trace the last round and trace all of them.

    python bench/bench_ledger_scale.py --clients 1000 --rounds 100 [--folder FOLDER] [--json FILE]

Every client of every round gives adapters of rank 8 for the two traced layers of the last block of a small Llama
(random weights, width 48): one shard of about 9 kB each. `--folder` keeps the ledger; one that lies there is read.

Beside the seconds stands the peak of the process's memory up to there. The floor of verification is to open, read and
hash the same files in a plain loop; both are measured with the files in the page cache, and after they were evicted
from it ("cold": the data has to come from the disk, names and sizes may still be in memory). Nothing is reported
unless verify() finds all well and the scores of all clients add up to the change's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import protoken
from protoken.ledger import ClientUpdate, Ledger, LowRank
from protoken.ledger.files import FileLayer
from protoken.ledger.verification import verify
from protoken.models.architectures import architecture_of

T = TypeVar("T")
PROMPT = [5, 17, 42, 8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        model = small_model()
        if not (folder / "model.safetensors").exists():
            write(folder, model, arguments.clients, arguments.rounds, arguments.rank)
        found = measured(folder, model)
    found |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def small_model() -> LlamaForCausalLM:
    """Four blocks of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def write(folder: Path, model: LlamaForCausalLM, clients: int, rounds: int, rank: int) -> None:
    """A federation of random adapters, averaged; the last round's weights beside it."""
    ledger = Ledger.create(folder / "ledger", files=FileLayer(folder / "ledger", sync=False))
    names = [f"{layer}.weight" for layer in architecture_of(model).traced_layers(1, None)]
    weights = {name: model.get_parameter(name).detach().clone() for name in names}
    for _ in range(rounds):
        total = {name: weight.clone() for name, weight in weights.items()}
        with ledger.begin_round(weights, keep_residual="never") as writer:
            for client in range(clients):
                delta = {}
                for name, weight in weights.items():
                    a, b = torch.randn(rank, weight.shape[1]) * 0.05, torch.randn(weight.shape[0], rank) * 0.05
                    delta[name] = LowRank(a, b)
                    total[name].addmm_(b, a, alpha=1 / clients)
                writer.add(ClientUpdate(f"client-{client:06d}", 1 / clients, delta=delta, examples=100))
            writer.commit(total)
        weights = total
    save_file(weights, folder / "model.safetensors")


def measured(folder: Path, model: LlamaForCausalLM) -> dict[str, Any]:
    """Seconds and peak memory of each step, in the order in which they ran."""
    path = folder / "ledger"
    with torch.no_grad():
        for name, weight in load_file(folder / "model.safetensors").items():
            model.get_parameter(name).copy_(weight)
    found: dict[str, Any] = {}

    def timed(name: str, action: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found[name] = {"seconds": round(seconds, 4), "peak_bytes": peak}
        return result

    def trace(**more: Any) -> protoken.Trace:
        return protoken.trace(model, PROMPT, ledger=path, max_new_tokens=8, do_sample=False, **more)

    trace()
    ledger = timed("open", lambda: Ledger.open(path))
    timed("list", lambda: ledger.clients)
    timed("trace last", trace)
    every = timed("trace all", lambda: trace(rounds="all"))
    assert every.conservation_residual < 1e-3, every.conservation_residual
    files = sorted(path.glob("rounds/*/*.safetensors")) + sorted(path.glob("rounds/*/clients/*.safetensors"))
    floor(files)
    timed("floor", lambda: floor(files))
    report = timed("verify", lambda: verify(path))
    assert report.ok, report.problems[:3]
    evict(files)
    timed("floor, cold", lambda: floor(files))
    evict(files)
    assert timed("verify, cold", lambda: verify(path)).ok

    def ratio(state: str) -> float:
        return round(found[f"verify{state}"]["seconds"] / found[f"floor{state}"]["seconds"], 2)

    return found | {
        "clients": len(ledger.clients),
        "rounds": len(ledger.rounds),
        "shards": report.shards,
        "bytes": report.bytes,
        "verify_over_floor": ratio(""),
        "verify_over_floor_cold": ratio(", cold"),
    }


def floor(files: list[Path]) -> None:
    """Open, read and hash each file."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        hashlib.sha256(os.read(handle, os.fstat(handle).st_size)).digest()
        os.close(handle)


def evict(files: list[Path]) -> None:
    """Let go of the files' pages, once they are on the disk."""
    os.sync()
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    main()
