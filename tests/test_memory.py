"""Ceilings change no score, estimates hold against counted bytes, and memory does not grow with the clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import live_bytes
from oracle import equals_oracle
from tiny_federation import TinyFederation, tiny_federation
from tiny_models import tiny_model
from tolerances import close

import protoken
from protoken import errors
from protoken.generation import Generated, generate
from protoken.models.patching import evaluation_mode
from protoken.planning import memory
from protoken.planning.options import Options
from protoken.results import Trace
from protoken.session import Session

PROMPT = [5, 17, 42, 8, 60, 33, 21]
ASKED: dict[str, dict[str, Any]] = {
    "local": {},
    "local layer": {"granularity": "layer"},
    "forward": {"way": "forward", "blocks": 3},
    "forward layer": {"way": "forward", "blocks": 3, "granularity": "layer"},
    "reverse": {"way": "reverse", "blocks": 3},
    "reverse token": {"way": "reverse", "blocks": 3, "granularity": "token"},
    "reverse layer": {"way": "reverse", "blocks": 3, "granularity": "layer"},
    "position": {"blocks": 3, "granularity": "position"},
}


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2"])
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param)


def run(federation: TinyFederation, **arguments: Any) -> protoken.Trace:
    arguments = {"max_new_tokens": 5, "do_sample": True, "seed": 3, **arguments}
    return protoken.trace(federation.model, PROMPT, ledger=federation.path, **arguments)


def same(found: Trace, expected: Trace) -> None:
    for name in ("token_scores", "layer_totals", "token_layer_scores", "position_scores"):
        got, wanted = getattr(found, name), getattr(expected, name)
        assert (got is None) == (wanted is None)
        if got is not None:
            close(torch.tensor(got), torch.tensor(wanted), torch.float32, factor=3)


@pytest.mark.parametrize("asked", ASKED)
def test_scores_do_not_depend_on_the_ceiling(federation: TinyFederation, asked: str) -> None:
    arguments = {"max_new_tokens": 5, **ASKED[asked]}
    free = run(federation, **arguments)
    told = protoken.estimate(federation.model, PROMPT, ledger=federation.path, **arguments)
    seen = set()
    for ceiling in (told.smallest, int(told.smallest * 1.2), (told.smallest + told.total) // 2, 1 << 40):
        trace = run(federation, memory_limit=ceiling, **arguments)
        assert trace.info.settings["memory_limit"] == ceiling
        seen.add(tuple(trace.info.settings["chunks"].items()))
        same(trace, free)
    assert len(seen) >= 3
    tightest = run(federation, memory_limit=told.smallest, **arguments)
    if asked == "position" and any(layer.endswith("experts.down_proj") for layer in tightest.info.layers):
        # The oracle has no positions for experts: theirs add up to totals, which it has.
        close(torch.tensor(tightest.position_scores.sum(0)), torch.tensor(tightest.totals), torch.float32)
        whole = run(federation, **arguments | {"granularity": "sequence"})
        close(torch.tensor(tightest.totals), torch.tensor(whole.totals), torch.float32)
        tightest = whole
    equals_oracle(federation.model, federation.ledger, tightest)


@pytest.mark.parametrize("asked", ["local", "forward", "reverse", "position"])
def test_ceiling_that_is_too_low_names_the_lowest(
    federation: TinyFederation, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = protoken.estimate(federation.model, PROMPT, ledger=federation.path, max_new_tokens=5, **ASKED[asked])
    with monkeypatch.context() as patch:
        patch.setattr(federation.model, "generate", lambda *_, **__: pytest.fail("generated before it was refused"))
        with pytest.raises(errors.ArgumentError, match=f"at least {told.smallest} bytes") as caught:
            run(federation, memory_limit=told.smallest - 1, **ASKED[asked])
    assert caught.value.argument == "memory_limit"
    with (
        protoken.tracing(federation.model, ledger=federation.path, memory_limit=1000, **ASKED[asked]) as tape,
        pytest.raises(errors.ArgumentError, match="memory_limit"),
    ):
        federation.model.generate(torch.tensor([PROMPT]), max_new_tokens=5)
    assert len(tape) == 0


def captured(session: Session, new: int) -> Generated:
    ids = torch.tensor([PROMPT])
    arguments = {"inputs": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
    _, (found,) = generate(
        session.model,
        session.own.architecture,
        arguments,
        call=session.model.generate,
        prompt=ids,
        attention_mask=None,
        first_block=session.plan.first_block,
        sequence=session.plan.needs_sequence,
    )
    return found


def peak(federation: TinyFederation, new: int, **asked: Any) -> int:
    """Most bytes of tensors alive while a finished response is attributed; what was captured is not among them."""
    session = Session.of(federation.model, federation.path, None, Options(**asked))
    with evaluation_mode(federation.model):
        found = captured(session, new)
        with live_bytes() as live:
            session.trace(found, 0.0, {})
    return live.peak


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
def test_estimate_holds_against_counted_bytes(federation: TinyFederation, asked: str, objective: str) -> None:
    arguments = {**ASKED[asked], "objective": objective}
    told = protoken.estimate(federation.model, PROMPT, ledger=federation.path, max_new_tokens=20, **arguments)
    counted = peak(federation, 20, **arguments)
    print(f"{asked} {objective}: estimated {told.total}, counted {counted}")
    assert counted <= told.total - told.parts["capture"]
    assert counted >= told.total / 6
    lowest = peak(federation, 20, memory_limit=told.smallest, **arguments)
    print(f"{asked} {objective}: smallest {told.smallest}, counted {lowest}")
    assert lowest <= told.smallest


def crowd(folder: Path, clients: int) -> TinyFederation:
    """Many clients, of which every one has its own bytes on disk; only the last two blocks are recorded."""
    model = tiny_model("llama")
    names = [f"model.layers.{b}.{n}.weight" for b in (2, 3) for n in ("self_attn.o_proj", "mlp.down_proj")]
    generator = torch.Generator().manual_seed(1)
    deltas = [
        {n: torch.randn(model.get_parameter(n).shape, generator=generator) * 0.02 for n in names}
        for _ in range(clients)
    ]
    base = {n: model.get_parameter(n).detach().clone() for n in names}
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).add_(sum(delta[name] for delta in deltas) / clients)  # type: ignore[arg-type]
    path = folder / f"of-{clients}"
    updates = [protoken.ClientUpdate(f"c{k}", 1 / clients, delta=delta) for k, delta in enumerate(deltas)]
    aggregate = {n: model.get_parameter(n).detach() for n in names}
    protoken.Ledger.create(path).commit_round(base, aggregate, updates)
    return TinyFederation(model, path)


WAYS: dict[str, dict[str, Any]] = {
    "local": {},
    "forward": {"way": "forward", "blocks": 2},
    "reverse": {"way": "reverse", "blocks": 2},
    "reverse token": {"way": "reverse", "blocks": 2, "granularity": "token"},
}


@pytest.fixture(scope="module")
def crowds(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyFederation, TinyFederation]:
    folder = tmp_path_factory.mktemp("crowds")
    return crowd(folder, 20), crowd(folder, 200)


@pytest.mark.parametrize("way", WAYS)
def test_memory_does_not_grow_with_the_clients(
    crowds: tuple[TinyFederation, TinyFederation], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank above KEPT is read in runs of clients: ten times the clients, the same bytes but for the result."""
    whole = [peak(federation, 4, **WAYS[way]) for federation in crowds]
    monkeypatch.setattr(memory, "KEPT", 0)
    monkeypatch.setattr(memory, "STREAMED", 120_000)
    few, many = (peak(federation, 4, **WAYS[way]) for federation in crowds)
    print(f"{way}: kept {whole}, streamed {few}, {many}")
    assert whole[1] > 4 * whole[0]
    result = 2 * 8 * 180 * 4 * 4
    assert many <= few + result
    assert many < whole[1] / 4


@pytest.mark.parametrize("way", WAYS)
def test_many_clients_under_a_ceiling_score_the_same(crowds: tuple[TinyFederation, TinyFederation], way: str) -> None:
    many = crowds[1]
    told = protoken.estimate(many.model, PROMPT, ledger=many.path, max_new_tokens=4, **WAYS[way])
    limit = told.smallest * 2
    arguments = {**WAYS[way], "max_new_tokens": 4}
    assert limit < told.parts["bank"]
    same(run(many, memory_limit=limit, **arguments), run(many, **arguments))
    assert peak(many, 4, memory_limit=limit, **WAYS[way]) <= limit


def test_left_padded_batch_under_a_ceiling(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    ids = torch.tensor([PROMPT, [0, 0, 0, 0, 11, 9, 3]])
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
    tapes = []
    for limit in (None, "900KB"):
        with protoken.tracing(federation.model, ledger=federation.path, blocks=2, memory_limit=limit) as tape:
            federation.model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        tapes.append(tape)
    for free, bound in zip(*tapes, strict=True):
        same(bound, free)


def test_estimate_is_of_the_trace_that_would_follow(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path)
    arguments = {"ledger": federation.path, "blocks": 3, "max_new_tokens": 9, "granularity": "layer"}
    told = protoken.estimate(federation.model, PROMPT, **arguments)
    trace = protoken.trace(federation.model, PROMPT, **arguments)
    assert (told.way, told.granularity, told.reason) == (trace.info.way, "layer", trace.info.reason)
    assert (told.new_tokens, told.prompt_tokens, told.clients, told.layers) == (9, 7, 4, 6)
    assert set(told.work) == {"forward", "reverse"}
    assert min(told.work, key=lambda way: told.work[way]) == told.way
    assert "memory_limit may be as low as" in str(told)
    # The method is what is wrong, before the choices that it has none of.
    for other in ({"granularity": "auto"}, {"granularity": "layer"}, {"ledger": None}):
        with pytest.raises(errors.ArgumentError, match=r'^method: expected "protoken"'):
            protoken.estimate(federation.model, PROMPT, method="shapley", **{**arguments, **other})
