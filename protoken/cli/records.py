"""`protoken records ...`: from a trace to the training records behind it, without the records leaving their holder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from protoken.errors import ArgumentError

if TYPE_CHECKING:
    from protoken.records.text import PlacedRecord

app = typer.Typer(help="Drill down from a response to training records.", no_args_is_help=True)


def output_file(path: Path | None) -> Path | None:
    """Make the folder of a file to come, or refuse the place before the work is done and not after it."""
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{path.parent}: {error.strerror}") from error
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file")
    if str(path) == "-":
        raise typer.BadParameter("- would be a file of that name; /dev/stdout is the standard output")
    return path


Model = Annotated[str, typer.Option(help="Folder or hub id of the global model.")]


@app.command("probe")
def make_probe(
    trace: Annotated[Path, typer.Argument(help="A trace, as written by `protoken trace --json`.")],
    model: Model,
    ledger: Annotated[Path, typer.Option(help="The federation's ledger.")],
    out: Annotated[Path, typer.Option(callback=output_file, help="Where the probe goes: the file to send to clients.")],
    span: Annotated[
        tuple[int, int] | None,
        typer.Option(help="First token and the one after the last; the whole response if left out."),
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Probe the last so many blocks only.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps in either direction.")] = 1,
) -> None:
    """At the server: how the weights would move along and against this response."""
    import protoken
    from protoken.evaluation.base_model import load_base

    loaded = protoken.Trace.load(trace)
    base = load_base(model)
    probe = protoken.record_probe(
        loaded, span=span, blocks=blocks, steps=steps, model=base.model, ledger=ledger, tokenizer=base.tokenizer
    )
    probe.save(out)
    Console().print(f"{len(probe.up)} parameters moved by {probe.step:g} of their length, in {out}", markup=False)


@app.command("score")
def score_records(
    probe: Annotated[Path, typer.Argument(help="The probe's file.")],
    records: Annotated[Path, typer.Argument(help="JSON lines: text, prompt and response, or messages.")],
    model: Model,
    out: Annotated[Path, typer.Option(callback=output_file, help="Where scores and ids go; never the records' text.")],
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer records are cut.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
) -> None:
    """At the client: which of its own records move with the response."""
    from protoken.evaluation.base_model import load_base
    from protoken.records import RecordProbe

    opened, rows = RecordProbe.load(probe), read_records(records)
    base = load_base(model)
    scores = opened.score(base.model, rows, base.tokenizer, max_tokens=max_tokens, batch_size=batch_size)
    scores.save(out)
    Console().print(scores)


def read_records(path: Path) -> list[PlacedRecord]:
    """One record per line, a JSON string or an object as `records.text.Record` says, placed by the file's line.

    Raises:
        ArgumentError: not a readable file, one without records, or a line that is no JSON.
    """
    from protoken.records.text import PlacedRecord

    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("records", expected="a readable UTF-8 JSONL file", got=f"{path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ArgumentError(f"{path}:{number}", expected="a JSON string or object", got=str(error)) from error
            rows.append(PlacedRecord(row, f"{path}:{number}"))
    if not rows:
        raise ArgumentError("records", expected="at least one record, one per line", got=f"{path}, which has none")
    return rows
