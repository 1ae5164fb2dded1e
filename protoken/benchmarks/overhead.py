"""`protoken bench overhead`: what tracing adds to generation, and what the published algorithm costs.

Plain `generate` and each way of tracing take turns in one run, so that a machine that slows down slows both. A ratio
is the median over rounds of the two times of the same round; spread is the interquartile range. The clients' updates
are read at a way's first trace, which is shown apart, and stay in memory, as in a service that traces all day. Peak
memory is that of a trace beyond plain generation.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from protoken.attachment import attach, detach
from protoken.benchmarks.measuring import device_of, peak_bytes, quartiles, seconds
from protoken.benchmarks.overhead_cases import WAYS, Case, cases, random_ledger
from protoken.errors import ArgumentError
from protoken.evaluation.base_model import load_base
from protoken.machine import machine
from protoken.models.architectures import architecture_of
from protoken.paths import write_text, write_whole
from protoken.trace import trace
from protoken.versions import versions

_KEY = ("model", "device", "way", "prompt_tokens", "new_tokens", "clients")


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
    ways: Sequence[str] = WAYS,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Time every combination and print a table; returns the rows. What was measured is kept, also when interrupted.

    Args:
        model: folder or hub id; the demo's base model if None.
        oracle: time the published algorithm, too.
        json_path: where to write {"rows": [...], "versions": ..., "machine": ...}, after every way anew. Rows of other
            settings that the file has from the same machine and versions are kept.
        ways: which of "local", "streaming", "forward", "reverse".
        device: "cpu", "cuda", or "auto": cuda if there.

    Raises:
        ArgumentError: an unknown way or device, a count below 1, or a file with figures of another machine.
    """
    where = device_of(device)
    for name, counts in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("clients", clients)):
        if any(count < 1 for count in counts):
            raise ArgumentError(name, expected="1 or more", got=min(counts))
    loaded = load_base(model).model.to(where)
    architecture = architecture_of(loaded)
    timed = cases(len(architecture.blocks), ways)
    kept = _kept_rows(json_path)
    common = {"model": model or "SmolLM2-135M-Instruct", "device": where.type}
    rows: list[dict[str, Any]] = []
    # Drawn between two timings only: a thread of its own would take its turns from those that are timed.
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        bar = progress.add_task("overhead", total=len(clients) * len(prompt_tokens) * len(new_tokens) * len(timed))

        def measured() -> None:
            _write(json_path, kept, rows)
            _advanced(progress, bar)

        try:
            for count in clients:
                with tempfile.TemporaryDirectory() as folder:
                    depth = max(case.blocks for case in timed)
                    attach(loaded, random_ledger(Path(folder) / "ledger", loaded, architecture, count, depth))
                    try:
                        for prompt, new in [(p, n) for p in prompt_tokens for n in new_tokens]:
                            setting = {**common, "prompt_tokens": prompt, "new_tokens": new, "clients": count}
                            _time_one(loaded, timed, setting, repeats, oracle, rows, measured)
                    finally:
                        detach(loaded)
        finally:
            if rows:
                _write(json_path, kept, rows)
                console.print(_table(rows))
    return rows


def _write(path: Path | None, kept: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> None:
    """The file's rows of other settings and the new ones."""
    if path is None:
        return
    fresh = {tuple(row[name] for name in _KEY) for row in rows}
    others = [row for row in kept if tuple(row[name] for name in _KEY) not in fresh]
    record = {"rows": [*others, *rows], "versions": versions(), "machine": machine()}
    # Whole or not at all: a run that is killed while it writes has rows of hours to lose.
    text = json.dumps(record, indent=2) + "\n"
    write_whole(str(path), lambda place: write_text(place, text))


def _advanced(progress: Progress, bar: TaskID) -> None:
    progress.advance(bar)
    progress.refresh()


def _kept_rows(path: Path | None) -> list[dict[str, Any]]:
    """The rows that a file has already, if they may stand beside new ones."""
    if path is None or not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unusable("of this benchmark", error) from error
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
        raise _unusable("of this benchmark", "something else")
    for name, own in (("machine", machine()), ("versions", versions())):
        if record.get(name) != own:
            raise _unusable(f"of this {name}", record.get(name))
    if not all(isinstance(row, dict) and set(_KEY) <= set(row) for row in record["rows"]):
        raise _unusable("of this benchmark", "rows of another")
    return list(record["rows"])


def _unusable(expected: str, got: object) -> ArgumentError:
    return ArgumentError(
        "json_path", expected=f"a new file, or one with figures {expected}", got=got, remedy="Name another file"
    )


def _time_one(
    model: Any,
    timed: Sequence[Case],
    setting: dict[str, Any],
    repeats: int,
    oracle: bool,
    rows: list[dict[str, Any]],
    measured: Callable[[], None],
) -> None:
    """Appends the rows of one prompt length, number of new tokens and number of clients; says so after each."""
    prompt, new = setting["prompt_tokens"], setting["new_tokens"]
    ids = torch.randint(3, model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    # The stop token is kept from coming out: every run must produce the same number of tokens.
    arguments: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

    def plain() -> object:
        row = torch.tensor([ids], device=model.device)
        return model.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **arguments)

    plain()
    for case in timed:
        rows.append({**setting, **_time_case(case, model, plain, case.runner(model, ids, **arguments), repeats)})
        measured()
    if oracle:
        # The oracle's own generation is not part of it: it is given what generate produced.
        results = [trace(model, ids, method="paper", **arguments).info for _ in range(min(repeats, 3))]
        _add_oracle(rows[-len(timed) :], [info.seconds_trace - info.seconds_generate for info in results])


def _time_case(
    case: Case, model: Any, plain: Callable[[], object], traced: Callable[[], object], repeats: int
) -> dict[str, Any]:
    device = torch.device(model.device)
    first = seconds(traced, device)
    pairs = [(seconds(plain, device), seconds(traced, device)) for _ in range(repeats)]
    peaks = [peak_bytes(run, device) for run in (plain, traced)]
    row: dict[str, Any] = {"way": case.name, "repeats": repeats, "seconds_first_trace": first}
    ratios = [b / a for a, b in pairs]
    for name, values in (
        ("seconds_generate", [a for a, _ in pairs]),
        ("seconds_trace", [b for _, b in pairs]),
        ("ratio_trace_to_generate", ratios),
    ):
        row[name], row[f"{name}_spread"] = statistics.median(values), quartiles(values)
    # Every row has every key: None where the published algorithm was not timed.
    row |= dict.fromkeys(_OF_ORACLE)
    row["bytes_generate_peak"] = peaks[0]
    row["bytes_trace_beyond"] = None if None in peaks else max(peaks[1] - peaks[0], 0)  # type: ignore[operator]
    return row


_OF_ORACLE = ("seconds_oracle", "seconds_oracle_spread", "ratio_oracle_to_trace", "ratio_oracle_to_generate")


def _add_oracle(rows: Sequence[dict[str, Any]], found: Sequence[float]) -> None:
    for row in rows:
        row["seconds_oracle"], row["seconds_oracle_spread"] = statistics.median(found), quartiles(found)
        row["ratio_oracle_to_trace"] = row["seconds_oracle"] / row["seconds_trace"]
        row["ratio_oracle_to_generate"] = row["seconds_oracle"] / row["seconds_generate"]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Seconds, medians; ratio with its quartiles; memory beyond generation", title_justify="left")
    names = ("way", "prompt", "new", "clients", "generate", "trace", "trace / generate", "MiB", "published")
    for column in names:
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        low, high = row["ratio_trace_to_generate_spread"]
        beyond, oracle = row["bytes_trace_beyond"], row.get("seconds_oracle")
        table.add_row(
            row["way"],
            str(row["prompt_tokens"]),
            str(row["new_tokens"]),
            str(row["clients"]),
            f"{row['seconds_generate']:.3f}",
            f"{row['seconds_trace']:.3f}",
            f"{row['ratio_trace_to_generate']:.3f} ({low:.3f} to {high:.3f})",
            "" if beyond is None else f"{beyond / 2**20:.0f}",
            "" if oracle is None else f"{oracle:.2f}",
        )
    return table
