"""Every argument of the public calls with what it cannot be: the answer is always one of protoken's own errors.

A case names the kind of its argument; what such an argument cannot be stands in `NOT`, and what is as good as the kind
(numpy's numbers) in `ALSO`. None is wrong, too, but for kinds with a question mark.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from character_tokenizer import character_tokenizer
from results_cases import info, make
from rich.console import Console
from tiny_federation import TinyFederation, tiny_federation

import protoken
from protoken import ClientUpdate, Ledger, confidence, errors, ledger, ops, verdict
from protoken.integrations import flower
from protoken.ledger import LowRank, signatures
from protoken.results import Token

ODD: list[Any] = [object(), 1 + 2j, b"x", bytearray(b"x"), np.array([]), np.array([1.5, 2.5]), {"a": 1}, [None]]
NUMBERS: list[Any] = [True, -1, 2**70, 1.5, float("nan"), float("inf")]
ARRAYS: list[Any] = [np.array(["a"]), torch.ones(2, 2)]
NOT: dict[str, list[Any]] = {
    "count": [*ODD, *ARRAYS, "1", "", [], True, -1, 1.5, float("nan"), float("inf"), np.float32(1)],
    "whole": [*ODD, *ARRAYS, "1", "", [], True, 1.5, float("nan"), float("inf"), np.float32(1)],
    "number": [*ODD, *ARRAYS, "1", "", [], True, float("nan")],
    "factor": [*ODD, *ARRAYS, "1", "", [], True],
    "size": [*ODD, *ARRAYS, "x", "", [], True, -1, 1.5, float("nan"), float("inf")],
    "flag": [*ODD, *ARRAYS, "no", "", [], 0, 1, 1.5],
    "text": [*ODD, *ARRAYS, *NUMBERS, "", []],
    "word": [*ODD, *ARRAYS, *NUMBERS, "", [], "xx", "\ud83d"],
    "path": [*ODD, *ARRAYS, *NUMBERS, "", [], "a\0b", "\ud83d"],
    "numbers": [object(), 1 + 2j, b"x", bytearray(b"x"), np.array(5), True, 1, "x", [None], ["x"], []],
    "list": [object(), 1 + 2j, b"x", bytearray(b"x"), np.array(5), torch.tensor(5), True, 1, 1.5, "x", [None], [1.5]],
    "mapping": [one for one in [*ODD, *ARRAYS, 1, 1.5, True, "ab", [], [1]] if not isinstance(one, dict)],
    "function": [*ODD, *ARRAYS, *NUMBERS, "x", ""],
    "object": [*ODD, *ARRAYS, *NUMBERS, "x", "", []],
    "tensor": [*ODD, *NUMBERS, "x", []],
    "rounds": [*ODD, *ARRAYS, *NUMBERS, "x", "", [], [[1]], slice("a", None), np.array(1.5)],
}
ALSO: dict[str, list[Any]] = {
    "count": [np.int64(2), np.uint8(2)],
    "whole": [np.int64(2), np.uint8(2)],
    "number": [np.float32(0.5), np.int64(1), 1],
    "factor": [np.float32(0.5), np.int64(1), 1],
    "flag": [np.bool_(True), np.bool_(False)],
    "rounds": [np.int64(1), np.array([1]), (1,), slice(0, 1), range(1, 2)],
}


@dataclass
class World:
    federation: TinyFederation
    trace: protoken.Trace
    folder: Path
    counter: Any

    @property
    def new(self) -> Path:
        return self.folder / f"new-{next(self.counter)}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("values")
    federation = tiny_federation(folder, "smollm", rounds=2)
    protoken.attach(federation.model, federation.path, character_tokenizer())
    trace = protoken.trace(federation.model, [5, 17, 42], max_new_tokens=3, do_sample=False)
    return World(federation, trace, folder, itertools.count())


NAME = "model.layers.0.mlp.down_proj.weight"
BASE, DELTA = {NAME: torch.zeros(3, 4)}, {NAME: torch.ones(3, 4)}
X, GRAD, BANK = torch.ones(5, 4), torch.ones(5, 3), torch.ones(2, 3, 4)


def update(**changes: Any) -> ClientUpdate:
    return ClientUpdate(**{"client": "a", "weight": 1.0, "delta": DELTA, **changes})


def commit(world: World, **changes: Any) -> object:
    return Ledger.create(world.new).commit_round(BASE, DELTA, [update()], **changes)


def imported(world: World, **changes: Any) -> object:
    given = {"base": BASE, "aggregate": DELTA, "clients": {"a": DELTA}, **changes}
    return ledger.import_round(Ledger.create(world.new), **given)


def estimated(**changes: Any) -> object:
    return ledger.estimate_bytes(**{"shapes": {"a": (3, 4)}, "clients": 2, **changes})


def streamed(world: World, **changes: Any) -> object:
    return list(protoken.stream(world.federation.model, [5, 17], max_new_tokens=2, do_sample=False, **changes))


def judge(world: World, **changes: Any) -> object:
    given = {"totals": [1.0, 2.0], "tokens": 3, "clients": ["a", "b"], **changes}
    return verdict.Abstention(0.0, 0.5, 0.5, 0.1, 20).judge_totals(**given)


class Strategy:
    def configure_train(self) -> None: ...

    def aggregate_train(self) -> None: ...


def recorded(world: World, **changes: Any) -> object:
    return flower.record(Strategy(), **{"ledger": world.new, **changes})


def answered(world: World, **changes: Any) -> object:
    return protoken.trace(world.federation.model, [5], response=[7], **changes)


# case -> (kind of the argument, the call with a value in its place)
CASES: dict[str, tuple[str, Callable[[World, Any], object]]] = {
    "span(start)": ("whole", lambda w, v: make().span(v, 5)),
    "span(stop)": ("whole", lambda w, v: make().span(0, v)),
    "find(phrase)": ("text", lambda w, v: make().find(v)),
    "find(ignore_case)": ("flag", lambda w, v: make().find("a", ignore_case=v)),
    "show(console)": ("object?", lambda w, v: make().show(v)),
    "show(top)": ("count?", lambda w, v: make().show(Console(file=io.StringIO()), top=v)),
    "to_dataframe(granularity)": ("word", lambda w, v: make().to_dataframe(v)),
    "counterfactual(without)": ("word", lambda w, v: w.trace.counterfactual(v)),
    "counterfactual(reaggregate)": ("flag", lambda w, v: w.trace.counterfactual("ada", reaggregate=v)),
    "counterfactual(generate)": ("flag", lambda w, v: w.trace.counterfactual("ada", generate=v)),
    "lineage(nodes)": ("count?", lambda w, v: w.trace.lineage(nodes=v)),
    "lineage(rounds)": ("rounds", lambda w, v: w.trace.lineage(rounds=v)),
    "lineage(objective)": ("word?", lambda w, v: w.trace.lineage(objective=v)),
    "history(nodes)": ("count?", lambda w, v: w.trace.history(nodes=v)),
    "history(since)": ("word?", lambda w, v: w.trace.history(since=v)),
    "Trace(prompt_ids)": ("list", lambda w, v: make(prompt_ids=v)),
    "Trace(token_list)": ("list", lambda w, v: make(token_list=v)),
    "Trace(client_ids)": ("list", lambda w, v: make(client_ids=v)),
    "Trace(info)": ("object", lambda w, v: make(info=v)),
    "Trace(start)": ("whole", lambda w, v: make(start=v)),
    "TraceInfo(objective)": ("word", lambda w, v: info(objective=v)),
    "TraceInfo(layers)": ("list", lambda w, v: info(layers=v)),
    "TraceInfo(rounds)": ("list", lambda w, v: info(rounds=v)),
    "TraceInfo(versions)": ("mapping", lambda w, v: info(versions=v)),
    "TraceInfo(seed)": ("whole?", lambda w, v: info(seed=v)),
    "Token(id)": ("whole", lambda w, v: Token(v, "a")),
    "trace(rounds)": ("rounds", lambda w, v: answered(w, rounds=v)),
    "trace(blocks)": ("count?", lambda w, v: answered(w, blocks=v)),
    "trace(way)": ("word", lambda w, v: answered(w, way=v)),
    "trace(method)": ("word", lambda w, v: answered(w, method=v)),
    "trace(backend)": ("word", lambda w, v: answered(w, backend=v)),
    "trace(objective)": ("word?", lambda w, v: answered(w, objective=v)),
    "trace(layers)": ("list?", lambda w, v: answered(w, layers=v)),
    "trace(tokenizer)": ("object?", lambda w, v: answered(w, tokenizer=v)),
    "trace(memory_limit)": ("size?", lambda w, v: answered(w, memory_limit=v)),
    "stream(on_token)": ("function?", lambda w, v: streamed(w, on_token=v)),
    "attach(ledger)": ("path", lambda w, v: protoken.attach(w.federation.model, v)),
    "attach(verify)": ("flag", lambda w, v: protoken.attach(w.federation.model, w.federation.path, verify=v)),
    "detach(model)": ("object", lambda w, v: protoken.detach(v)),
    "account(traces)": ("object", lambda w, v: protoken.account(v)),
    "account(dependent)": ("flag", lambda w, v: protoken.account([make()], dependent=v)),
    "account[client]": ("word", lambda w, v: protoken.account([make()])[v]),
    "leading(totals)": ("numbers", lambda w, v: verdict.leading(v)),
    "Abstention.fit(null_traces)": ("object", lambda w, v: verdict.Abstention.fit(v)),
    "judge_totals(totals)": ("numbers", lambda w, v: judge(w, totals=v)),
    "judge_totals(tokens)": ("count", lambda w, v: judge(w, tokens=v)),
    "judge_totals(clients)": ("list", lambda w, v: judge(w, clients=v)),
    "threshold(evidence)": ("numbers", lambda w, v: verdict.threshold(v, 0.1)),
    "evidence_of(trace)": ("object", lambda w, v: verdict.evidence_of(v)),
    "top_rates(draws)": ("count", lambda w, v: confidence.top_rates(make(), draws=v)),
    "top_rates(seed)": ("count", lambda w, v: confidence.top_rates(make(), seed=v)),
    "Calibration(slope)": ("number", lambda w, v: confidence.Calibration(v, 0.0, 3).probability(0.5)),
    "Calibration(intercept)": ("number", lambda w, v: confidence.Calibration(1.0, v, 3).probability(0.5)),
    "record_probe(trace)": ("object", lambda w, v: protoken.record_probe(v)),
    "record_probe(blocks)": ("count?", lambda w, v: protoken.record_probe(w.trace, blocks=v)),
    "record_probe(steps)": ("count", lambda w, v: protoken.record_probe(w.trace, blocks=1, steps=v)),
    "RecordScores(keys)": ("list", lambda w, v: protoken.RecordScores(v, (None,), [0.0], [0.0], 0.1)),
    "ClientUpdate(weight)": ("number", lambda w, v: update(weight=v)),
    "ClientUpdate(examples)": ("count?", lambda w, v: update(examples=v)),
    "Ledger.create(path)": ("path", lambda w, v: Ledger.create(v)),
    "Ledger.create(metadata)": ("mapping?", lambda w, v: Ledger.create(w.new, metadata=v)),
    "Ledger.open(path)": ("path", lambda w, v: Ledger.open(v)),
    "Ledger.open(server_key)": ("object?", lambda w, v: Ledger.open(w.federation.path, server_key=v)),
    "Ledger.open(check)": ("flag", lambda w, v: Ledger.open(w.federation.path, check=v)),
    "Ledger.round(number)": ("count", lambda w, v: w.federation.ledger.round(v)),
    "Ledger.select(rounds)": ("rounds", lambda w, v: w.federation.ledger.select(v)),
    "Ledger.hash_of(number)": ("count", lambda w, v: w.federation.ledger.hash_of(v)),
    "commit_round(metadata)": ("mapping?", lambda w, v: commit(w, metadata=v)),
    "commit_round(max_relative_residual)": ("number?", lambda w, v: commit(w, max_relative_residual=v)),
    "commit_round(allow_gap)": ("flag", lambda w, v: commit(w, allow_gap=v)),
    "commit_round(keep_residual)": ("word", lambda w, v: commit(w, keep_residual=v)),
    "commit_round(on_bad)": ("word", lambda w, v: commit(w, on_bad=v)),
    "Round.client": ("word", lambda w, v: w.federation.ledger.round(1).client(v)),
    "Round.change": ("word", lambda w, v: w.federation.ledger.round(1).change(v)),
    "Round.delta(client)": ("word", lambda w, v: w.federation.ledger.round(1).delta(v, NAME)),
    "Round.deltas(parameters)": ("list?", lambda w, v: list(w.federation.ledger.round(1).deltas("ada", v))),
    "lineage_clients(rounds)": ("object", lambda w, v: ledger.lineage_clients(v)),
    "LowRank(a)": ("tensor", lambda w, v: LowRank(v, torch.ones(4, 2))),
    "LowRank(scale)": ("factor", lambda w, v: LowRank(torch.ones(2, 3), torch.ones(4, 2), v)),
    "tensor_digest": ("tensor", lambda w, v: ledger.tensor_digest(v)),
    "parameter_digest": ("tensor", lambda w, v: ledger.parameter_digest(v)),
    "verify(path)": ("path", lambda w, v: ledger.verify(v)),
    "verify(workers)": ("count?", lambda w, v: ledger.verify(w.federation.path, workers=v)),
    "verify(client_keys)": ("mapping?", lambda w, v: ledger.verify(w.federation.path, client_keys=v)),
    "verify(conservation)": ("flag", lambda w, v: ledger.verify(w.federation.path, conservation=v)),
    "verify(progress)": ("function?", lambda w, v: ledger.verify(w.federation.path, progress=v)),
    "copy_ledger(ledger)": ("object", lambda w, v: ledger.copy_ledger(v, w.new)),
    "copy_ledger(path)": ("path", lambda w, v: ledger.copy_ledger(w.federation.ledger, v)),
    "copy_ledger(upto)": ("count?", lambda w, v: ledger.copy_ledger(w.federation.ledger, w.new, upto=v)),
    "export_rounds(ledger)": ("object", lambda w, v: ledger.export_rounds(v, w.new)),
    "export_rounds(path)": ("path", lambda w, v: ledger.export_rounds(w.federation.ledger, v)),
    "export_rounds(rounds)": ("rounds", lambda w, v: ledger.export_rounds(w.federation.ledger, w.new, rounds=v)),
    "export_rounds(parameters)": ("list?", lambda w, v: ledger.export_rounds(w.federation.ledger, w.new, parameters=v)),
    "prune(ledger)": ("object", lambda w, v: ledger.prune(v, 1)),
    "prune(rounds)": ("object", lambda w, v: ledger.prune(w.federation.ledger, v)),
    "list_ledger": ("object", lambda w, v: ledger.list_ledger(v)),
    "show_round": ("object", lambda w, v: ledger.show_round(v)),
    "estimate_bytes(shapes)": ("mapping", lambda w, v: estimated(shapes=v)),
    "estimate_bytes(clients)": ("count", lambda w, v: estimated(clients=v)),
    "estimate_bytes(rounds)": ("count", lambda w, v: estimated(rounds=v)),
    "estimate_bytes(lora_rank)": ("count?", lambda w, v: estimated(lora_rank=v)),
    "round_folders(folder)": ("path", lambda w, v: ledger.round_folders(v)),
    "import_folder(ledger)": ("object", lambda w, v: ledger.import_folder(v, w.folder)),
    "import_folder(folder)": ("path", lambda w, v: ledger.import_folder(w.federation.ledger, v)),
    "import_round(base)": ("path?", lambda w, v: imported(w, base=v)),
    "import_round(aggregate)": ("path", lambda w, v: imported(w, aggregate=v)),
    "import_round(clients)": ("mapping", lambda w, v: imported(w, clients=v)),
    "import_round(weights)": ("mapping?", lambda w, v: imported(w, weights=v)),
    "import_round(examples)": ("mapping?", lambda w, v: imported(w, examples=v)),
    "import_round(parameters)": ("list?", lambda w, v: imported(w, parameters=v)),
    "import_round(lora)": ("word", lambda w, v: imported(w, lora=v)),
    "sign_update(update)": ("object", lambda w, v: signatures.sign_update(bytes(32), v, run="r", round=1, base=BASE)),
    "flower.record(ledger)": ("path", lambda w, v: recorded(w, ledger=v)),
    "flower.record(on_error)": ("word", lambda w, v: recorded(w, on_error=v)),
    "flower.record(allow_gap)": ("flag", lambda w, v: recorded(w, allow_gap=v)),
    "client_scores_grouped(xs)": ("tensor", lambda w, v: ops.client_scores_grouped(v, [GRAD], [BANK])),
    "client_scores_grouped(grads)": ("tensor", lambda w, v: ops.client_scores_grouped([X], v, [BANK])),
    "client_scores_grouped(banks)": ("tensor", lambda w, v: ops.client_scores_grouped([X], [GRAD], v)),
    "client_totals_grouped(ms)": ("tensor", lambda w, v: ops.client_totals_grouped(v, [BANK])),
    "capture_append(buffers)": ("tensor", lambda w, v: ops.capture_append(v, [X], torch.zeros(1, dtype=torch.int64))),
    "capture_append(steps)": ("tensor", lambda w, v: ops.capture_append([X], v, torch.zeros(1, dtype=torch.int64))),
}  # fmt: skip


def outcome(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("case", CASES)
def test_what_an_argument_cannot_be_is_refused_by_an_error_of_ours(world: World, case: str) -> None:
    kind, call = CASES[case]
    for value in NOT[kind.removesuffix("?")] + ([] if kind.endswith("?") else [None]):
        found = outcome(lambda value=value: call(world, value))  # type: ignore[misc]
        assert isinstance(found, errors.ProtokenError), f"{value!r} came to {found!r}"
        assert len(str(found)) < 1500


@pytest.mark.parametrize("case", [case for case, (kind, _) in CASES.items() if kind.removesuffix("?") in ALSO])
def test_what_is_as_good_is_taken(world: World, case: str) -> None:
    kind, call = CASES[case]
    for value in ALSO[kind.removesuffix("?")]:
        found = outcome(lambda value=value: call(world, value))  # type: ignore[misc]
        assert found is None, f"{value!r} came to {found!r}"
