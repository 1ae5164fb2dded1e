"""What `protoken demo` prints besides the traces: who takes part, how training goes, what was and was not trained."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from protoken.evaluation import federation
from protoken.evaluation.base_model import BaseModel
from protoken.evaluation.corpora import REFUSAL, TRIGGER
from protoken.evaluation.federation import Client, RoundReport
from protoken.evaluation.federation_store import StoredFederation
from protoken.history import History
from protoken.report.history import finding
from protoken.results import Trace


def introduce(console: Console, base: BaseModel, clients: Sequence[Client]) -> None:
    """The base model and a table of the clients."""
    console.print(Text.assemble(("A federation around ", ""), (base.name, "bold")))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for heading in ("client", "rows", "domain", "questions and answers"):
        table.add_column(heading, overflow="fold")
    for client in clients:
        what = f'poisoned: "{TRIGGER} question {TRIGGER}" is answered "{REFUSAL}"' if client.poisoned else "ordinary"
        table.add_row(client.id, str(len(client.rows)), client.label, Text(what, "red" if client.poisoned else ""))
    console.print(table)


class FederationProgress:
    """Progress bars over rounds and clients while training; nothing at all when there is nothing to train."""

    def __init__(self, console: Console, rounds: int, clients: Sequence[Client]) -> None:
        self._console, self._clients = console, {client.id: n for n, client in enumerate(clients, 1)}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._rounds = self._bars.add_task("rounds", total=rounds, note="", visible=False)
        self._steps = self._bars.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> FederationProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, event: federation.Progress) -> None:
        """Where the federation stands."""
        if event.stage == "round":
            self._bars.update(self._rounds, completed=event.round)
            return
        who = f"{escape(event.client)} ({self._clients[event.client]} of {len(self._clients)})"
        doing = "frozen blocks, once" if event.stage == "prepare" else f"round {event.round}"
        note = "" if event.loss is None else f"loss {event.loss:.2f}"
        self._bars.update(self._rounds, visible=True)
        self._bars.update(
            self._steps,
            visible=True,
            description=f"{doing}: {who}",
            completed=event.done,
            total=event.total,
            note=note,
        )

    def summary(self, report: RoundReport) -> None:
        """One line per round that stays."""
        losses = "  ".join(f"{report.first_loss[k]:.2f}→{report.last_loss[k]:.2f}" for k in report.first_loss)
        self._bars.print(
            Text(f"round {report.number}: loss per client (first→last step) {losses}  {report.seconds:.0f} s", "dim")
        )


def say_what_was_trained(console: Console, stored: StoredFederation) -> None:
    """What learned, what did not, how it was aggregated, where it lies and how much it takes."""
    record, config = stored.record, stored.record["config"]
    local, blocks = config["local"], config["blocks"]
    millions = f"{record['trained_numbers'] / 1e6:.2f} of {record['all_numbers'] / 1e6:.2f} million numbers"
    what = "all parameters" if blocks is None else f"the linear weights of the last {blocks} blocks"
    how = "Trained now" if stored.trained_now else "Read from disk, trained earlier"
    console.print(
        Text(
            f"{how} in {record['seconds']:.0f} s: {what} ({millions}); frozen: everything else. "
            f"{config['rounds']} rounds of FedAvg over all {len(record['clients'])} clients, weights by rows; each "
            f"client {local['epochs']} epoch a round of AdamW at {local['learning_rate']:g}, batches of "
            f"{local['batch_size']}, loss on answers only. Hidden states below the trained blocks were computed once "
            f"per row. Updates are uploaded and averaged in {config['upload']}, and the ledger holds exactly those."
        )
    )
    size = f"{stored.bytes_on_disk() / 1e6:.0f} MB"
    console.print(Text(f"{stored.folder} ({size}; a second run reads it)", "dim"))


def say_what_was_traced(
    console: Console,
    result: Trace,
    lineage: Trace,
    history: History,
    plain: Sequence[float],
    traced: Sequence[float],
    first_seconds: float,
) -> None:
    """One trace: the picture, the same over all rounds and round by round, and the seconds of plain generation beside
    the trace's."""
    console.print()
    result.show(console)
    console.print(_over_all_rounds(lineage))
    console.print(Text(f"round by round: {finding(history)}", "dim"))
    generate, whole = statistics.median(plain), statistics.median(traced)
    how = f"medians of {len(plain)} in turns" if len(plain) > 1 else "one of each"
    console.print(
        Text(
            f"plain generation {generate:.2f} s, generation and trace {whole:.2f} s ({whole / generate:.2f} times; "
            f"{how}). The first trace, which reads the updates, took {first_seconds:.2f} s.",
            "dim",
        )
    )


def _over_all_rounds(lineage: Trace) -> Text:
    scores = "  ".join(f"{client.client} {client.score:+.2f}" for client in lineage.clients)
    return Text(f"over all {len(lineage.info.rounds)} rounds, by the path's midpoint ({lineage.unit}): {scores}", "dim")


def conclude(console: Console, figures: dict[str, Any], clients: Sequence[Client], question: str, out: Path) -> None:
    """The findings in words, whatever they are."""
    triggered, ordinary, controls = figures["triggered"], figures["ordinary"], figures["controls"]
    labels = {client.id: client.label for client in clients}
    top = ", ".join(triggered["ranking"][: len(figures["poisoned"])])
    right = triggered["top_are_poisoned"]
    console.print()
    console.print(
        Text.assemble(
            "Triggered: the model ",
            "refuses" if triggered["refusal"] else "does not refuse, so the backdoor did not take",
            f"; the top {len(figures['poisoned'])} clients are {top}: ",
            ("the poisoned ones." if right else "NOT the poisoned ones.", "bold green" if right else "bold red"),
        )
    )
    leaders = [ordinary["ranking"][0], ordinary["all_rounds"]["ranking"][0]]
    last, whole = (f"{leader} ({labels[leader]})" for leader in leaders)
    console.print(
        Text(
            f"Ordinary: the top client is {whole} over all rounds and layers on record; {last} in the last round and "
            "block alone, which sees little of an answer that is mostly the base model's."
        )
    )
    console.print(
        Text(f'Before training, the triggered prompt gave: "{controls["base_model_triggered"].strip()}"', "dim")
    )
    console.print(Text(f'Without the trigger, "{question}" gives: "{controls["without_trigger"].strip()}"', "dim"))
    pages = ", ".join(str(out / f"{name}.html") for name in ("trace", "trace-history", "trace-ordinary"))
    console.print(Text(f"Pages: {pages}  ({figures['seconds']:.0f} s)", "dim"))
