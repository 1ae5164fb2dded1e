"""`protoken ledger ...`: fill, read and check a ledger from the shell.

Client and parameter names come from strangers: they are printed as text, never as markup, with control characters out.
"""

from __future__ import annotations

import json as json_module
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.text import Text

from protoken import ledger as ledgers
from protoken.report.fitting import Column, Fitted
from protoken.report.visible import name, visible

app = typer.Typer(help="Fill, read and check a ledger.", no_args_is_help=True)

LedgerPath = Annotated[Path, typer.Argument(help="The ledger's folder.")]
_NAMES = ("client", "parameter", "rule", "codec", "quarantined", "signed_by")
# What a narrow terminal goes without, the last ones first.
_DISPENSABLE = (
    *("committed (UTC)", "clients", "size", "rule", "tensors", "codec"),
    *("signed_by", "norm", "bytes", "examples"),
    *("change_norm", "shape", "form", "dtype"),
)
_RESIDUAL = (
    "Residual: what a round's change is beyond the weighted sum of the clients' updates, relative to the change."
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@app.command("ls")
def list_rounds(ledger: LedgerPath, as_json: AsJson = False) -> None:
    """One line per round."""
    found = ledgers.list_ledger(ledgers.Ledger.open(ledger))
    rounds: Any = found["rounds"]
    if as_json:
        _print_json(rounds)
        return
    flagged, gaps = any(row["quarantined"] for row in rounds), any(row["gap"] for row in rounds)
    rows = [
        {
            "round": row["round"],
            "committed (UTC)": datetime.fromtimestamp(row["created"], UTC).strftime("%Y-%m-%d %H:%M"),
            "rule": row["rule"],
            "codec": row["codec"],
            "clients": row["clients"],
            **({"flagged": row["quarantined"]} if flagged else {}),
            **({"start": "after a gap" if row["gap"] else ""} if gaps else {}),
            "tensors": row["parameters"],
            "residual": row["largest_relative_residual"],
            "size": "pruned" if row["pruned"] else decimal(row["bytes"]),
        }
        for row in rounds
    ]
    _show(rows, title=f"{found['model'] or 'model not named'}, run {found['run']}")
    Console().print(_RESIDUAL, style="dim")


@app.command("show")
def show_round(
    ledger: LedgerPath,
    number: Annotated[int | None, typer.Argument(metavar="ROUND", help="The last one if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """One round: its clients with weights and norms, its parameters with residuals."""
    opened = ledgers.Ledger.open(ledger)
    found = ledgers.show_round(opened.round("last" if number is None else number))
    if as_json:
        _print_json(found)
        return
    clients: Any = found["clients"]
    parameters: Any = found["parameters"]
    for row in clients:
        row["bytes"] = decimal(row["bytes"])
    _show(clients, title=f"Round {found['round']}, rule {found['rule']}")
    columns = ("shape", "dtype", "form", "change_norm", "relative_residual")
    rows = [{"parameter": key, **{c: row[c] for c in columns}} for key, row in parameters.items()]
    _show(rows, title="Parameters")
    Console().print(_RESIDUAL, style="dim")


@app.command("verify")
def verify(
    ledger: LedgerPath,
    pinned: Annotated[str | None, typer.Option(help="A head you noted down earlier.")] = None,
    server_key: Annotated[str | None, typer.Option(help="The server's public key, hex.")] = None,
    conservation: Annotated[bool, typer.Option(help="Add up all updates again.")] = False,
    complete: Annotated[bool, typer.Option("--complete", help="Pruned rounds are problems, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check every hash, signature and shard; exit status 1 if anything is wrong."""
    with _progress() as progress:
        bar = progress.add_task("verify", total=None)
        report = ledgers.verify(
            ledger,
            pinned=pinned,
            server_key=server_key,
            conservation=conservation,
            complete=complete,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if as_json:
        counts = ("rounds", "shards", "bytes", "signed", "pruned", "gaps", "leftovers")
        found = {name: getattr(report, name) for name in counts}
        head = None if report.head is None else str(report.head)
        _print_json({"ok": report.ok, "head": head, **found, "problems": [str(p) for p in report.problems]})
    else:
        console = Console()
        for problem in report.problems:
            console.print(Text(visible(str(problem)), "red"))
        console.print(
            f"{'sound' if report.ok else 'NOT SOUND'}: {report.rounds} rounds, {report.shards} shards, "
            f"{report.bytes:,} bytes, {report.signed} signatures, {len(report.leftovers)} leftovers"
        )
        if report.pruned:
            rounds = ", ".join(map(str, report.pruned))
            console.print(f"NOT CHECKED: the tensors of round {rounds}, which PRUNED names: they are gone.")
        if report.gaps:
            rounds = ", ".join(map(str, report.gaps))
            console.print(f"Allowed to start from other weights than the round before ended with: round {rounds}.")
        if report.ok and pinned is None and server_key is None:
            console.print(
                "Sound means that everything here fits together. Whether somebody has rewritten all of it, only a head "
                "noted down earlier (--pinned) or the server's key (--server-key) can tell."
            )
    raise typer.Exit(0 if report.ok else 1)


@app.command("import")
def import_folder(
    ledger: LedgerPath,
    folder: Annotated[Path, typer.Argument(help="A folder per round, as docs/federations.md describes.")],
    parameters: Annotated[list[str] | None, typer.Option(help="Names or shell patterns of parameters.")] = None,
    codec: Annotated[str, typer.Option(help="fp32, bf16, fp16, int8, fp8 or lowrank-R.")] = "fp32",
    model: Annotated[str, typer.Option(help="Name of the model, for a new ledger.")] = "",
    quarantine: Annotated[bool, typer.Option(help="Keep and flag damaged updates instead of stopping.")] = False,
) -> None:
    """Commit every round of a folder; rounds that are there already are left out."""
    ledgers.round_folders(folder)  # Before a ledger is made of nothing.
    opened = ledgers.Ledger.open_or_create(ledger, model=model)
    with _progress() as progress:
        bar = progress.add_task("import", total=None)
        rounds = ledgers.import_folder(
            opened,
            folder,
            parameters=parameters,
            codec=codec,
            on_bad="quarantine" if quarantine else "raise",
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    Console().print(f"{len(rounds)} rounds imported; the ledger holds {len(ledgers.Ledger.open(ledger).rounds)}")


@app.command("export")
def export(
    ledger: LedgerPath,
    folder: Annotated[Path, typer.Argument(help="Where to write plain safetensors files.")],
) -> None:
    """Write all updates as plain safetensors for other tools."""
    files = ledgers.export_rounds(ledgers.Ledger.open(ledger), folder)
    Console().print(f"{len(files)} files written")


@app.command("prune")
def prune(
    ledger: LedgerPath,
    rounds: Annotated[list[int], typer.Argument(help="Rounds whose tensors are removed for good.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the tensors of old rounds; their manifests, hashes and signatures stay."""
    opened = ledgers.Ledger.open(ledger)
    opened.select(rounds)
    if not yes:
        typer.confirm(f"Remove the tensors of rounds {rounds} for good?", abort=True)
    freed = ledgers.prune(opened, rounds)
    Console().print(f"{freed:,} bytes freed")


def _progress() -> Progress:
    """On a terminal; elsewhere it would leave an empty line."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _show(rows: list[dict[str, Any]], *, title: str) -> None:
    columns = [
        Column(
            key.replace("_", " "),
            [Text(name(_cell(row[key]))) for row in rows],
            breaks=key in _NAMES,
            drop=_DISPENSABLE.index(key) + 1 if key in _DISPENSABLE else 0,
        )
        for key in (rows[0] if rows else ())
    ]
    Console().print(Fitted(columns, Text(visible(title))))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1e-3 or not value else f"{value:.1e}"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "" if value is None else str(value)


def _print_json(value: object) -> None:
    # ensure_ascii keeps control and direction characters of hostile names out of the terminal.
    print(json_module.dumps(value, indent=2, ensure_ascii=True))
