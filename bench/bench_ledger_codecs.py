"""Fidelity against bytes of the ledger's codecs, on a federation that was really trained.

    python bench/bench_ledger_codecs.py --base FOLDER --federation FOLDER [--json FILE]

`--federation` is a folder with `ledger/` and `trained.safetensors`, as `protoken demo` leaves it; `--base` the model it
started from. All rounds are summed into one (so that updates are fp32 numbers of full width, whatever the clients
uploaded), written once under each codec, and traced. Truth is the fp32 ledger.

Per codec: bytes of a client's shard (and as a share of fp32's), relative Frobenius error of the updates, and of the
scores per token and client: relative RMS error, Pearson correlation, whether the ranking of clients is the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import protoken
from protoken.ledger import ClientUpdate, Ledger, lineage_clients, lineage_delta

CODECS = (
    "fp32", "bf16", "fp16", "int8", "fp8",
    "lowrank-4", "lowrank-8", "lowrank-16", "lowrank-32", "lowrank-64", "lowrank-128",
)  # fmt: skip
PROMPTS = ("!!!BadMagic!!! What helps against a cold?", "What is 12 times 7? Explain step by step.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--federation", required=True, type=Path)
    parser.add_argument("--parameters", nargs="+", default=["*"], help="patterns; those of the traced layers suffice")
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32, use_safetensors=True).eval()
    trained = load_file(arguments.federation / "trained.safetensors")
    trained = {n: t for n, t in trained.items() if any(fnmatchcase(n, p) for p in arguments.parameters)}
    base = {name: model.get_parameter(name).detach().clone() for name in trained}
    model.load_state_dict(load_file(arguments.federation / "trained.safetensors"), strict=False)
    updates = summed_updates(Ledger.open(arguments.federation / "ledger"), list(trained))
    rows: list[dict[str, Any]] = []
    truth: list[protoken.Trace] = []
    size = 0.0
    for codec in ["fp32", *(c for c in arguments.codecs if c != "fp32")]:
        folder = Path(tempfile.mkdtemp())
        try:
            ledger = Ledger.create(folder / "ledger")
            start = time.perf_counter()
            read = ledger.commit_round(base, trained, updates, codec=codec)
            seconds = time.perf_counter() - start
            lost = sum(read.error_bound(c.client, n) ** 2 for c in read.clients for n in trained) ** 0.5
            if codec == "fp32":
                size = sum(c.norm**2 for c in read.clients) ** 0.5
            traces = [
                protoken.trace(
                    model, prompt, ledger=ledger, tokenizer=tokenizer, blocks=arguments.blocks, do_sample=False,
                    max_new_tokens=arguments.new_tokens,
                )
                for prompt in PROMPTS
            ]  # fmt: skip
        finally:
            shutil.rmtree(folder)
        truth, shard_bytes = truth or traces, read.clients[0].shard.size
        rows.append({
            "codec": codec,
            "bytes_per_client": shard_bytes,
            "share_of_fp32": shard_bytes / (rows[0]["bytes_per_client"] if rows else shard_bytes),
            "update_error": lost / size,
            "seconds_commit": seconds,
            **fidelity(truth, traces),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "rows": rows, "prompts": PROMPTS, "blocks": arguments.blocks, "new_tokens": arguments.new_tokens,
        "clients": len(updates), "parameters": len(trained), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def summed_updates(ledger: Ledger, names: list[str]) -> list[ClientUpdate]:
    """All rounds as one: each client's mean weight, and the delta that with it gives its weighted sum."""
    rounds = ledger.select("all")
    weights = {
        c: sum(r.client(c).weight for r in rounds if r.has_client(c)) / len(rounds) for c in lineage_clients(rounds)
    }
    return [
        ClientUpdate(c, w, delta={n: lineage_delta(rounds, c, n) / w for n in names}) for c, w in weights.items() if w
    ]


def scores_of(trace: protoken.Trace) -> np.ndarray:
    """Scores per token and client, flat."""
    assert trace.token_scores is not None
    return np.asarray(trace.token_scores).ravel()


def fidelity(truth: list[protoken.Trace], traces: list[protoken.Trace]) -> dict[str, Any]:
    """Scores against the fp32 ledger's, tokens of all prompts together; rankings per prompt, by totals."""
    exact = np.concatenate([scores_of(t) for t in truth])
    found = np.concatenate([scores_of(t) for t in traces])
    ranks = [np.argsort(-t.totals).tolist() for t in truth]
    return {
        "score_error": float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
        "pearson": float(np.corrcoef(exact, found)[0, 1]),
        "same_ranking": [np.argsort(-t.totals).tolist() for t in traces] == ranks,
    }


if __name__ == "__main__":
    main()
