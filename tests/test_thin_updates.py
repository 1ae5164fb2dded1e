"""Updates in the ledger's own layouts, low-rank and quantised: exact, and what is scored is what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_cases import (
    CLIENTS,
    WAYS,
    WEIGHTS,
    commit,
    same,
    thin_updates,
    trace,
)
from oracle import equals_oracle
from tiny_models import tiny_model
from tolerances import close

from protoken.ledger import ClientUpdate, Ledger, LowRank


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_score_like_the_matrices_they_stand_for(tmp_path: Path, family: str, way: str) -> None:
    thin, full = tiny_model(family), tiny_model(family)
    updates = thin_updates(thin)
    a = trace(thin, commit(thin, tmp_path / "thin", updates), **WAYS[way])
    dense = [{name: factors.dense() for name, factors in update.items()} for update in updates]
    b = trace(full, commit(full, tmp_path / "full", dense), **WAYS[way])
    same(a, b)
    equals_oracle(thin, Ledger.open(tmp_path / "thin"), a)
    assert a.conservation_residual < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_factors_are_never_multiplied_out(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    path = commit(model, tmp_path / "ledger", thin_updates(model))
    expected = trace(model, path, **WAYS[way])

    def refuse(_: LowRank) -> torch.Tensor:
        raise AssertionError("materialised")

    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "dense", refuse)
        same(trace(model, path, **WAYS[way]), expected)


@pytest.mark.parametrize("way", WAYS)
def test_gauge_of_the_factors_does_not_matter(tmp_path: Path, way: str) -> None:
    """(c A, B / c) is the same update."""
    scores = []
    for factor in (1.0, 37.0):
        model = tiny_model("llama")
        updates = [
            {name: LowRank(u.a * factor, u.b / factor, u.scale) for name, u in update.items()}
            for update in thin_updates(model)
        ]
        found = trace(model, commit(model, tmp_path / f"ledger{factor}", updates), **WAYS[way])
        scores.append(torch.tensor(found.totals if found.token_scores is None else found.token_scores))
    assert (scores[0] - scores[1]).norm() <= 1e-6 * scores[0].norm()


@pytest.mark.parametrize("way", WAYS)
def test_clients_of_one_layer_may_lie_in_different_layouts(tmp_path: Path, way: str) -> None:
    mixed, full = tiny_model("llama"), tiny_model("llama")
    thin = thin_updates(mixed)
    dense = [{name: factors.dense() for name, factors in update.items()} for update in thin]
    a = trace(mixed, commit(mixed, tmp_path / "mixed", [thin[0], dense[1], thin[2]]), **WAYS[way])
    b = trace(full, commit(full, tmp_path / "full", dense), **WAYS[way])
    same(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("codec", ["int8", "fp8", "bf16", "lowrank-4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stored_numbers_are_what_is_scored(tmp_path: Path, family: str, codec: str, way: str) -> None:
    """What a codec loses is in the residual, as measured; what it kept is scored exactly."""
    model = tiny_model(family)
    dense = [{name: factors.dense() for name, factors in update.items()} for update in thin_updates(model)]
    path = commit(model, tmp_path / "ledger", dense, codec)
    found = trace(model, path, **WAYS[way])
    equals_oracle(model, Ledger.open(path), found)
    assert found.totals.sum() + found.residual == pytest.approx(found.change, rel=1e-9)


def test_factors_over_rounds_are_summed_as_factors(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = commit(model, tmp_path / "ledger", thin_updates(model))
    ledger = Ledger.open(path)
    second = thin_updates(model, seed=9)
    base = {name: model.get_parameter(name).detach().clone() for name in second[0]}
    with torch.no_grad():
        for name in base:
            model.get_parameter(name).add_(0.6 * second[0][name].dense() + 0.4 * second[1][name].dense())
    aggregate = {name: model.get_parameter(name).detach().clone() for name in base}
    rows = [ClientUpdate("ada", 0.6, delta=second[0]), ClientUpdate("bob", 0.4, delta=second[1])]
    ledger.commit_round(base, aggregate, rows)
    for way in WAYS.values():
        every = trace(model, path, rounds="all", **way)
        single = [trace(model, path, rounds=number, **way) for number in (1, 2)]
        for client, total in zip(every.client_ids, every.totals, strict=True):
            parts = [dict(zip(t.client_ids, t.totals, strict=True)).get(client, 0.0) for t in single]
            assert total == pytest.approx(sum(parts), rel=1e-4, abs=1e-6)
        assert every.conservation_residual < 1e-4


def test_client_with_a_missing_layer_is_left_out_and_stands_in_the_residual(tmp_path: Path) -> None:
    """The server had aggregated it: its effect is known only as what the others do not explain."""
    model = tiny_model("llama")
    updates = thin_updates(model)
    dense = [{name: factors.dense() for name, factors in update.items()} for update in updates]
    base = {name: model.get_parameter(name).detach().clone() for name in dense[0]}
    with torch.no_grad():
        for name in base:
            model.get_parameter(name).add_(sum(w * d[name] for w, d in zip(WEIGHTS, dense, strict=True)))
    aggregate = {name: model.get_parameter(name).detach().clone() for name in base}
    short = dict(dense[2])
    del short[next(iter(short))]
    with Ledger.create(tmp_path / "ledger").begin_round(base) as writer:
        for client, weight, delta in zip(CLIENTS, WEIGHTS, (dense[0], dense[1], short), strict=True):
            writer.add(ClientUpdate(client, weight, delta=delta), on_bad="quarantine")
        writer.commit(aggregate)
    whole = trace(model, commit(tiny_model("llama"), tmp_path / "whole", dense))
    for way in WAYS.values():
        found = trace(model, tmp_path / "ledger", **way)
        assert found.client_ids == ("ada", "bob")
        assert found.totals.sum() + found.residual == pytest.approx(found.change, rel=1e-9)
    found = trace(model, tmp_path / "ledger")
    close(torch.tensor(found.token_scores), torch.tensor(whole.token_scores[:, :2]), torch.float32)
    assert found.residual == pytest.approx(whole.totals[2], rel=1e-3)
