"""`protoken bench overhead`: what tracing adds to generation, and what the published algorithm costs.

Plain `generate`, `trace` in each way and the oracle take turns in one run, so that a machine that slows down slows
all of them. A ratio is the median over rounds of the two times of the same round; spread is the interquartile range.
The clients' updates are random matrices written to a real ledger: their values do not change the cost.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..architectures import Architecture, architecture_of
from ..attachment import attach, detach
from ..evaluation.base_model import load_base
from ..ledger import ClientUpdate, Ledger
from ..trace import trace
from ..versions import versions


@dataclass(frozen=True)
class Case:
    """One way of tracing to be timed."""

    name: str
    arguments: dict[str, Any]


def cases(blocks: int) -> list[Case]:
    """What is timed: the local way with both objectives, tokens over four blocks, totals over up to all blocks."""
    some = min(4, blocks)
    return [
        Case("local, logit", {"objective": "logit"}),
        Case("local, log_prob", {"objective": "log_prob"}),
        Case(f"forward, log_prob, {some} blocks", {"blocks": some, "way": "forward"}),
        Case(f"reverse, log_prob, {some} blocks", {"blocks": some, "way": "reverse"}),
        Case(f"reverse, log_prob, {blocks} blocks", {"blocks": blocks, "way": "reverse"}),
    ]


def run_overhead(
    console: Console,
    *,
    model: str | None,
    prompt_tokens: Sequence[int],
    new_tokens: Sequence[int],
    clients: Sequence[int],
    repeats: int,
    oracle: bool,
    json_path: Path | None,
) -> list[dict[str, Any]]:
    """Time every combination, print a table, write JSON {"rows": [...], ...} if asked; returns the rows."""
    loaded = load_base(model).model
    name = model or "SmolLM2-135M-Instruct"
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        settings = [(p, n, k) for k in clients for p in prompt_tokens for n in new_tokens]
        bar = progress.add_task("overhead", total=len(settings) * repeats)
        for prompt, new, count in settings:
            with tempfile.TemporaryDirectory() as folder:
                architecture = architecture_of(loaded)
                ledger = random_ledger(Path(folder) / "ledger", loaded, architecture, count)
                attach(loaded, ledger)
                try:
                    rows += _time_one(
                        loaded, architecture, name, prompt, new, count, repeats, oracle,
                        lambda: progress.advance(bar),
                    )  # fmt: skip
                finally:
                    detach(loaded)
    console.print(_table(rows))
    if json_path is not None:
        record = {"rows": rows, "versions": versions(), "machine": machine()}
        json_path.write_text(json.dumps(record, indent=2) + "\n")
    return rows


def machine() -> dict[str, Any]:
    """What the figures depend on besides versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def random_ledger(path: Path, model: Any, architecture: Architecture, clients: int) -> Ledger:
    """A one-round ledger of random updates to every block's two traced layers, whose aggregate is the model itself."""
    names = [f"{layer}.weight" for layer in architecture.traced_layers(len(architecture.blocks))]
    aggregate = {name: model.get_parameter(name).detach() for name in names}
    generator = torch.Generator().manual_seed(0)
    common = {name: torch.randn(p.shape, generator=generator) * 1e-4 for name, p in aggregate.items()}
    base = {name: p - common[name] for name, p in aggregate.items()}
    # Clients differ by a factor only, and their factors average to one: quick to make, and the average is right.
    factors = [1 + (k - (clients - 1) / 2) / clients for k in range(clients)]
    with Ledger.create(path, model="benchmark").begin_round(base) as writer:
        for k, factor in enumerate(factors):
            writer.add(ClientUpdate(f"client-{k}", 1 / clients, delta={n: c * factor for n, c in common.items()}))
        writer.commit(aggregate)
    return Ledger.open(path)


def _time_one(
    model: Any,
    architecture: Architecture,
    name: str,
    prompt: int,
    new: int,
    clients: int,
    repeats: int,
    oracle: bool,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    ids = torch.randint(3, model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    # The stop token is kept from coming out: every run must produce the same number of tokens.
    arguments: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    timed = cases(len(architecture.blocks))

    def plain() -> object:
        row = torch.tensor([ids], device=model.device)
        return model.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **arguments)

    runs: dict[str, Callable[[], object]] = {"generate": plain}
    for case in timed:
        runs[case.name] = partial(trace, model, ids, **case.arguments, **arguments)
    seconds: dict[str, list[float]] = {key: [] for key in [*runs, "oracle"]}
    for run in runs.values():
        run()
    for index in range(repeats):
        for key, run in runs.items():
            seconds[key].append(_seconds(run))
        if oracle and index < 3:
            # The oracle's own generation is not part of it: it is given what generate produced.
            result = trace(model, ids, method="paper", **arguments)
            seconds["oracle"].append(result.info.seconds_trace - result.info.seconds_generate)
        advance()
    return [_row(name, case, prompt, new, clients, seconds) for case in timed]


def _row(
    model: str, case: Case, prompt: int, new: int, clients: int, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    plain, traced, oracle = seconds["generate"], seconds[case.name], seconds["oracle"]
    ratios = [b / a for a, b in zip(plain, traced, strict=True)]
    row: dict[str, Any] = {
        "model": model,
        "way": case.name,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "clients": clients,
        "repeats": len(plain),
        "seconds_generate": statistics.median(plain),
        "seconds_generate_spread": _spread(plain),
        "seconds_trace": statistics.median(traced),
        "seconds_trace_spread": _spread(traced),
        "ratio_trace_to_generate": statistics.median(ratios),
        "ratio_trace_to_generate_spread": _spread(ratios),
        "seconds_oracle": None,
        "ratio_oracle_to_trace": None,
    }
    if oracle:
        row["seconds_oracle"] = statistics.median(oracle)
        row["seconds_oracle_spread"] = _spread(oracle)
        row["ratio_oracle_to_trace"] = row["seconds_oracle"] / row["seconds_trace"]
        row["ratio_oracle_to_generate"] = row["seconds_oracle"] / row["seconds_generate"]
    return row


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _spread(values: Sequence[float]) -> list[float]:
    """First and third quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return [quartiles[0], quartiles[2]]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Seconds, medians; ratio with its quartiles", title_justify="left")
    for column in (
        "way",
        "prompt",
        "new",
        "clients",
        "generate",
        "trace",
        "trace / generate",
        "published",
        "published / trace",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        low, high = row["ratio_trace_to_generate_spread"]
        table.add_row(
            row["way"],
            str(row["prompt_tokens"]),
            str(row["new_tokens"]),
            str(row["clients"]),
            f"{row['seconds_generate']:.3f}",
            f"{row['seconds_trace']:.3f}",
            f"{row['ratio_trace_to_generate']:.3f} ({low:.3f} to {high:.3f})",
            f"{row['seconds_oracle']:.2f}" if row["seconds_oracle"] else "",
            f"{row['ratio_oracle_to_trace']:.1f}" if row["ratio_oracle_to_trace"] else "",
        )
    return table
