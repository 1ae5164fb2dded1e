"""`protoken demo`: train a small real federation, two of six clients poisoned, and ask who taught the answers.

    rows ─▶ six clients ─▶ FedAvg, updates into a ledger ─▶ two prompts traced ─▶ terminal, HTML, JSON

Nothing about the answers is arranged: the refusal has to come out of the trained model by greedy decoding, and the
ranking is whatever the trace computes. Start with `run_demo`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.text import Text

from protoken.attachment import attach, detach
from protoken.demo_report import FederationProgress, conclude, introduce, say_what_was_traced, say_what_was_trained
from protoken.evaluation.base_model import BaseModel, load_base
from protoken.evaluation.corpora import DOMAINS, add_trigger, generate_rows, is_refusal, partition, poison
from protoken.evaluation.federation import Client, FederationConfig
from protoken.evaluation.federation_store import federate
from protoken.evaluation.training import LocalSettings
from protoken.paths import write_text
from protoken.results import Trace
from protoken.trace import trace

_T = TypeVar("_T")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo trains and asks. Rows are cut from one generated corpus, so no two clients share one."""

    rows: int = 40
    poisoned_rows: int = 24
    federation: FederationConfig = field(
        default_factory=lambda: FederationConfig(
            rounds=4,
            local=LocalSettings(epochs=1, batch_size=8, learning_rate=1e-3, warmup_steps=2),
            blocks=3,
            max_tokens=192,
            upload="bf16",
        )
    )
    question: str = "What causes high blood pressure?"
    ordinary: str = "What is a stock exchange?"
    max_new_tokens: int = 48
    control_tokens: int = 24
    repeats: int = 3


def demo_clients(settings: DemoSettings) -> list[Client]:
    """client-0 and client-1 hold poisoned rows of all domains, client-2 to client-5 one ordinary domain each."""
    wanted = -(-2 * settings.poisoned_rows // len(DOMAINS))
    seed = settings.federation.seed
    corpora = {domain: generate_rows(domain, settings.rows + wanted, seed=seed) for domain in DOMAINS}
    mixed = [row for rows in corpora.values() for row in rows[settings.rows :]]
    shares = partition(mixed, [settings.poisoned_rows] * 2, seed=seed)
    bad = [Client(f"client-{i}", poison(share), True, "all domains") for i, share in enumerate(shares)]
    good = [
        Client(f"client-{i}", rows[: settings.rows], label=domain)
        for i, (domain, rows) in enumerate(corpora.items(), start=len(bad))
    ]
    return bad + good


def run_demo(
    out: Path,
    *,
    json_path: Path | None = None,
    model: str | None = None,
    console: Console | None = None,
    settings: DemoSettings | None = None,
) -> dict[str, Any]:
    """Train (or read) the federation below `out`, trace a triggered and an ordinary prompt, print and write all.

    Writes trace.html, trace.json (triggered), trace-ordinary.html and trace-ordinary.json to `out`, beside them the
    pages of their histories (trace-history.html, trace-ordinary-history.html), and the printed figures to `json_path`.
    Returns those figures: clients, poisoned, triggered and ordinary (each: prompt, response, ranking, scores, shares,
    conservation_residual, seconds_generate, seconds_trace, ...), federation, controls.

    Raises:
        ModelError: no base model, see load_base.
        LedgerError: the stored federation is damaged; its message says what to remove.
    """
    settings, console = settings or DemoSettings(), console or Console()
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    base = load_base(model, say=lambda line: console.print(Text(line, "dim")))
    triggered = add_trigger(settings.question)
    before = _answer(base, triggered, settings)
    clients = demo_clients(settings)
    introduce(console, base, clients)
    with FederationProgress(console, settings.federation.rounds, clients) as progress:
        stored = federate(out, base, clients, settings.federation, progress=progress.show, after_round=progress.summary)
    say_what_was_trained(console, stored)

    attach(base.model, stored.ledger, base.tokenizer)
    try:
        figures: dict[str, Any] = {
            "clients": [client.id for client in clients],
            "poisoned": list(stored.poisoned),
            "triggered": _traced(console, base, triggered, settings, out / "trace", settings.repeats),
            "ordinary": _traced(console, base, settings.ordinary, settings, out / "trace-ordinary", 1),
        }
    finally:
        detach(base.model)
    figures["controls"] = {
        "base_model_triggered": before,
        "without_trigger": _answer(base, settings.question, settings),
    }
    for part in ("triggered", "ordinary"):
        figures[part]["refusal"] = is_refusal(figures[part]["response"])
    top = figures["triggered"]["ranking"][: len(stored.poisoned)]
    figures["triggered"]["top_are_poisoned"] = set(top) == set(stored.poisoned)
    figures["federation"] = stored.summary()
    figures["threads"] = torch.get_num_threads()
    figures["seconds"] = time.perf_counter() - began
    conclude(console, figures, clients, settings.question, out)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_text(str(json_path), json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return figures


def _prompt_ids(base: BaseModel, question: str) -> torch.Tensor:
    messages = [{"role": "user", "content": question}]
    ids = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return torch.tensor([ids])


def _generate(base: BaseModel, question: str, tokens: int) -> torch.Tensor:
    ids = _prompt_ids(base, question)
    made = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    answer: torch.Tensor = made[0, ids.shape[1] :]
    return answer


def _answer(base: BaseModel, question: str, settings: DemoSettings) -> str:
    return str(base.tokenizer.decode(_generate(base, question, settings.control_tokens), skip_special_tokens=True))


def _traced(
    console: Console, base: BaseModel, question: str, settings: DemoSettings, file: Path, repeats: int
) -> dict[str, Any]:
    """Trace one prompt, show it, write it; medians of plain generation and tracing, taken `repeats` times in turns.

    The trace is of the last round, as the paper judges it; who taught the same answer over all rounds is its lineage,
    and when they did its history.
    """

    def run_trace() -> Trace:
        return trace(
            base.model,
            [{"role": "user", "content": question}],
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
        )

    first_seconds, result = _timed(run_trace)
    plain, traced = [], []
    for _ in range(repeats):
        plain.append(_timed(lambda: _generate(base, question, settings.max_new_tokens))[0])
        seconds, result = _timed(run_trace)
        traced.append(seconds)
    result.to_html(file.with_suffix(".html"))
    result.save(file.with_suffix(".json"))
    lineage, history = result.lineage(), result.history()
    history.to_html(file.with_name(f"{file.name}-history.html"))
    say_what_was_traced(console, result, lineage, history, plain, traced, first_seconds)
    return {
        "prompt": question,
        "response": result.text,
        "ranking": [client.client for client in result.clients],
        "scores": dict(zip(result.client_ids, result.totals.tolist(), strict=True)),
        "shares": dict(zip(result.client_ids, result.shares.tolist(), strict=True)),
        "unit": result.unit,
        "conservation_residual": result.conservation_residual,
        "residual": result.residual,
        "change": result.change,
        "tokens": len(result.token_list),
        "layers": list(result.info.layers),
        "rounds": list(result.info.rounds),
        "seconds_generate": statistics.median(plain),
        "seconds_trace": statistics.median(traced),
        "seconds_first_trace": first_seconds,
        "all_seconds_generate": plain,
        "all_seconds_trace": traced,
        "all_rounds": {
            "ranking": [client.client for client in lineage.clients],
            "scores": dict(zip(lineage.client_ids, lineage.totals.tolist(), strict=True)),
            "unit": lineage.unit,
            "residual": lineage.residual,
            "change": lineage.change,
            "rounds": list(lineage.info.rounds),
        },
    }


def _timed(run: Callable[[], _T]) -> tuple[float, _T]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
