"""The `protoken` command: each command reads its arguments, calls one function and prints what it returns."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from protoken.cli.evaluate import app as evaluate_app
from protoken.cli.ledger import app as ledger_app
from protoken.cli.output import CLOSED_PIPE, DISK, give_up
from protoken.cli.records import app as records_app
from protoken.cli.records import output_file
from protoken.errors import ProtokenError
from protoken.report.encoding import take_any_encoding
from protoken.report.visible import visible

app = typer.Typer(
    name="protoken",
    help="Which client taught the federated language model what it just said?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(help="Measure on this machine; every figure comes with its spread.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(ledger_app, name="ledger")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(records_app, name="records")

JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=output_file, help="Also write every figure to this file.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the federation, pages and traces.")] = Path("out/demo"),
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of another base model.", show_default=False)
    ] = None,
    json: JsonFile = None,
) -> None:
    """Train a small real federation, two of six clients poisoned, and trace what the global model says."""
    from protoken.demo import run_demo

    run_demo(out, json_path=json, model=model, console=Console())


@app.command()
def trace(
    prompt: Annotated[str, typer.Argument(help="What to ask the model.")],
    model: Annotated[str, typer.Option(help="Folder or hub id of the global model.")],
    ledger: Annotated[Path, typer.Option(help="The federation's ledger.")],
    rounds: Annotated[str, typer.Option(help='"last", "all" or round numbers like 1,2,5.')] = "last",
    blocks: Annotated[
        int | None, typer.Option(help="Trace this many of the last blocks; the method's own choice if left out.")
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Trace these layers, by name or pattern (*); may be given again.")
    ] = None,
    way: Annotated[str, typer.Option(help="auto, local, forward or reverse.")] = "auto",
    granularity: Annotated[str, typer.Option(help="auto, sequence, token, layer or position.")] = "auto",
    objective: Annotated[str | None, typer.Option(help="log_prob, log_odds or logit.")] = None,
    method: Annotated[
        str, typer.Option(help="protoken, paper, aumann_shapley, shapley, ... (docs/methods.md).")
    ] = "protoken",
    nodes: Annotated[
        int | None, typer.Option(help="Gradients along the path of aumann_shapley; 1 is its midpoint.")
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="Sampled pairs of shapley and paired_shapley.")] = None,
    backend: Annotated[str, typer.Option(help="auto, cuda, triton, cpp or torch.")] = "auto",
    memory_limit: Annotated[str | None, typer.Option(help='What tracing may take beyond the model: "2GB".')] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The response's length at most.", show_default="64")
    ] = None,
    sample: Annotated[bool, typer.Option(help="Sample instead of greedy decoding.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    raw: Annotated[bool, typer.Option(help="Do not wrap the prompt in the chat template.")] = False,
    response: Annotated[
        str | None, typer.Option(help="Attribute this response, from a log, say, instead of generating one.")
    ] = None,
    lineage: Annotated[
        bool, typer.Option("--lineage", help="Ask who taught the answer over all rounds (Trace.lineage).")
    ] = False,
    history: Annotated[
        Path | None,
        typer.Option(callback=output_file, help="Follow the answer through the rounds; that page goes here."),
    ] = None,
    html: Annotated[Path | None, typer.Option(callback=output_file, help="Write the page here.")] = None,
    json: JsonFile = None,
) -> None:
    """Generate a response and show which client taught each token."""
    import protoken
    from protoken.evaluation.base_model import load_base
    from protoken.generation import check_seed
    from protoken.planning.options import Options

    if response is not None and (sample or max_new_tokens is not None):
        raise typer.BadParameter("is attributed as it stands, nothing is generated", param_hint="--response")
    chosen = (rounds, objective, method, blocks, pairs, layers or None, way, granularity)
    if lineage and chosen != ("last", None, "protoken", None, None, None, "auto", "auto"):
        raise typer.BadParameter(
            "chooses rounds, objective, method, pairs, and what is traced and how, itself", param_hint="--lineage"
        )
    generation: dict[str, Any] = {"do_sample": sample} if response is None else {}
    if max_new_tokens is not None:
        generation["max_new_tokens"] = max_new_tokens
    choices: dict[str, Any] = {
        "rounds": _rounds(rounds),
        "blocks": blocks,
        "layers": layers or None,
        "way": way,
        "granularity": granularity,
        "objective": objective,
        "method": method,
        "backend": backend,
        "nodes": None if lineage else nodes,
        "pairs": pairs,
        "memory_limit": memory_limit,
    }
    # What can be refused at once is refused before the model is loaded.
    Options(**choices)
    steps = 1 if nodes is None else nodes
    if lineage:
        Options(method="aumann_shapley", nodes=steps)
    check_seed(seed)
    opened = protoken.Ledger.open(ledger)
    base = load_base(model)
    result = protoken.trace(
        base.model,
        prompt,
        ledger=opened,
        tokenizer=base.tokenizer,
        response=response,
        chat=False if raw else None,
        seed=seed,
        **choices,
        **generation,
    )
    if lineage:
        result = result.lineage(nodes=steps)
    rounds_of_it = None
    # Files first, since whoever reads the output may stop before its end; and the output whatever became of them.
    try:
        if html is not None:
            result.to_html(html)
        if json is not None:
            result.save(json)
        if history is not None:
            rounds_of_it = result.history()
            rounds_of_it.to_html(history)
    finally:
        result.show()
        if rounds_of_it is not None:
            Console().print(rounds_of_it)


@app.command()
def env() -> None:
    """Versions, native modules, and which backend would serve each op here, with the reason."""
    from protoken.environment import show_environment

    show_environment(Console())


@app.command()
def models() -> None:
    """Model families in the table, and where each keeps its traced layers; others are tried by structure."""
    from rich.table import Table

    from protoken.models.families import list_models

    table = Table("family", "blocks", "out-projection", "MLP-final layer", "experts", box=None)
    for row in list_models():
        table.add_row(row.family, row.blocks, row.out_projection, row.mlp_final, "yes" if row.experts else "")
    Console().print(table)


@bench.command("overhead")
def bench_overhead(
    model: Annotated[str | None, typer.Option(help="Folder or hub id; the demo's base model if left out.")] = None,
    prompt_tokens: Annotated[list[int] | None, typer.Option(help="Lengths of the prompt.")] = None,
    new_tokens: Annotated[list[int] | None, typer.Option(help="Numbers of new tokens.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="Numbers of clients.")] = None,
    ways: Annotated[list[str] | None, typer.Option(help="local, streaming, forward, reverse; all if left out.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto is cuda if there.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    oracle: Annotated[bool, typer.Option(help="Time the published algorithm, too.")] = True,
    json: JsonFile = None,
) -> None:
    """Seconds and memory of plain generation, of tracing, and of the published algorithm, interleaved in one run."""
    from protoken.benchmarks.overhead import run_overhead
    from protoken.benchmarks.overhead_cases import WAYS

    run_overhead(
        Console(),
        model=model,
        prompt_tokens=prompt_tokens or [64],
        new_tokens=new_tokens or [32],
        clients=clients or [6],
        repeats=repeats,
        oracle=oracle,
        json_path=json,
        ways=ways or WAYS,
        device=device,
    )


@bench.command("kernels")
def bench_kernels(
    device: Annotated[str, typer.Option(help="cpu or cuda; auto is cuda if there.")] = "auto",
    models: Annotated[list[str] | None, typer.Option(help="Shapes of these models; all if left out.")] = None,
    ops: Annotated[list[str] | None, typer.Option(help="client_scores, client_scores_lowrank, client_totals.")] = None,
    formats: Annotated[list[str] | None, typer.Option(help="fp32, bf16, int8, fp8.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="1, 16, 128, 512 if left out.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="6, 55, and 1000, 10000 for low rank.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long each way of a row is repeated, about.")] = 0.6,
    json: JsonFile = None,
) -> None:
    """Every backend of the ops against torch, as shares of this machine's copy bandwidth.

    The large models' rows are long on a CPU; each option may be given several times to choose some of it.
    """
    from protoken.benchmarks.kernel_cases import DENSE_CLIENTS, FORMATS, LOWRANK_CLIENTS, TOKENS
    from protoken.benchmarks.kernels import run_kernels

    run_kernels(
        device,
        json,
        models=models,
        ops=ops,
        formats=formats or tuple(FORMATS),
        tokens=tokens or TOKENS,
        clients=clients or (*DENSE_CLIENTS, *LOWRANK_CLIENTS),
        seconds=seconds,
    )


def _rounds(text: str) -> Any:
    if text in ("last", "all"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter('"last", "all" or numbers like 1,2,5', param_hint="--rounds") from None


def main() -> None:
    """Entry point: our own errors, missing files and full disks are one line; all else is a bug with its traceback."""
    for stream in (sys.stdout, sys.stderr):
        take_any_encoding(stream)
    if os.environ.get("COLUMNS") == "0":  # of a terminal that does not know its width; nothing fits into none
        del os.environ["COLUMNS"]
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except ProtokenError as error:
        _fail(error, str(error))
    except BrokenPipeError:
        give_up(sys.stdout)
        sys.exit(CLOSED_PIPE)
    except OSError as error:
        if error.filename is None and error.errno not in DISK:
            raise
        give_up(sys.stdout if error.filename is None else None)
        _fail(error, f"{'output' if error.filename is None else error.filename}: {error.strerror}")
    except SystemExit as end:
        # typer's way to take a closed pipe.
        if isinstance(end.__context__, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        raise


def _fail(error: Exception, message: str) -> None:
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((type(error).__name__, "bold red"), " ", visible(message)), soft_wrap=True)
    sys.exit(2)
