"""`protoken evaluate`: the paper's experiments, resumable, one JSON and plots per run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from protoken.evaluation.experiments import EXPERIMENTS

app = typer.Typer(
    help="Reproduce the published experiments; a run that was killed goes on where it stood.", no_args_is_help=True
)


def _command(name: str) -> Callable[..., None]:
    def run(
        quick: Annotated[bool, typer.Option(help="One small configuration, within minutes.")] = False,
        out: Annotated[Path, typer.Option(help="Folder of the runs; this one's is below it.")] = Path("out/evaluate"),
        models: Annotated[
            str | None, typer.Option(help="Comma-separated: smollm2-135m, gemma3, llama, qwen2.", show_default=False)
        ] = None,
        domains: Annotated[
            str | None, typer.Option(help="Comma-separated: medical, finance, math, coding.", show_default=False)
        ] = None,
        corpus: Annotated[
            str | None,
            typer.Option(help="A JSONL file, a folder of <domain>.jsonl, or hub:<dataset>; ours if left out."),
        ] = None,
        samples: Annotated[int | None, typer.Option(min=1, help="Prompts a cell.", show_default=False)] = None,
        seed: Annotated[int, typer.Option(min=0)] = 0,
        cache: Annotated[
            Path | None, typer.Option(help="Base models and federations; <out>/cache if left out.", show_default=False)
        ] = None,
    ) -> None:
        from protoken.evaluation.harness import experiment_of, quick_settings, run_experiment
        from protoken.evaluation.report import show_cells

        console = Console()
        settings = quick_settings(name) if quick else experiment_of(name).DEFAULTS
        settings = replace(
            settings,
            models=_names(models) or settings.models,
            domains=_names(domains) or settings.domains,
            corpus=corpus,
            seed=seed,
            samples=samples or settings.samples,
        )
        cells = run_experiment(name, settings, out, cache=cache, console=console)
        show_cells(console, cells)
        console.print(f"{out / name / 'results.json'}", soft_wrap=True)

    run.__doc__ = EXPERIMENTS[name]
    return run


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


for _name in EXPERIMENTS:
    app.command(_name)(_command(_name))


@app.command("report")
def report(
    files: Annotated[list[Path], typer.Argument(help="results.json of one or several runs.")],
    into: Annotated[
        Path | None,
        typer.Option(help="A Markdown file or folder with a marked place for each run.", show_default=False),
    ] = None,
) -> None:
    """Markdown tables of finished runs, as in docs/results."""
    from protoken.evaluation.report import sections, write_into

    found = sections(files)
    if into is not None:
        write_into(into, found)
    else:
        typer.echo("\n".join(f"### {name}\n\n{text}" for name, text in found.items()))
