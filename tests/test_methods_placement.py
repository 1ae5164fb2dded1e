"""Where the nodes of the path integral go: known integrands, and a federation whose path is anything but even."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_federation import TinyFederation, tiny_federation

import protoken
from protoken.ledger import ClientUpdate, Ledger
from protoken.methods import aumann_shapley
from protoken.methods.placement import Nodes, gauss_legendre, placed
from protoken.methods.spline import Spline

PROMPT = [5, 17, 42, 8, 60, 33, 21]
Curve = Callable[[torch.Tensor], torch.Tensor]
ASKED: dict[str, Any] = {"method": "aumann_shapley", "rounds": "all", "max_new_tokens": 6, "do_sample": False}


def curve(f: Curve, nodes: int | None) -> tuple[Nodes, int]:
    """The rule for f_t [T] of a scalar position, and how often f was asked for between the ends."""
    asked = []

    def value(at: float) -> torch.Tensor:
        asked.append(at)
        return f(torch.tensor(at, dtype=torch.float64))

    ends = (f(torch.tensor(at, dtype=torch.float64)) for at in (0.0, 1.0))
    return placed(value, *ends, nodes), len(asked)


def integrated(f: Curve, rule: Nodes) -> torch.Tensor:
    """The rule applied to f_t', [T]."""
    total = torch.zeros(())
    for at, weight in zip(rule.positions, rule.weights, strict=True):
        total = total + weight * torch.autograd.functional.jacobian(f, torch.tensor(at, dtype=torch.float64))
    return total


def steps(*places: float, width: float = 0.03, sign: float = 1.0) -> Curve:
    """A token for each place, which it climbs steeply; every second one down where the sign is -1."""
    signs = torch.tensor([sign**n for n in range(len(places))], dtype=torch.float64)
    at = torch.tensor(places, dtype=torch.float64)
    return lambda a: 20 * signs * torch.sigmoid((a - at) / width)


def change(f: Curve) -> torch.Tensor:
    return f(torch.tensor(1.0, dtype=torch.float64)) - f(torch.tensor(0.0, dtype=torch.float64))


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_polynomials_are_integrated_exactly_by_the_plain_rule(nodes: int) -> None:
    def f(a: torch.Tensor) -> torch.Tensor:
        return torch.stack([a**n for n in range(1, min(2 * nodes, 5) + 1)])

    rule, _ = curve(f, nodes)
    assert (rule.positions, rule.weights, rule.pieces) == (*gauss_legendre(nodes), 1)
    torch.testing.assert_close(integrated(f, rule), change(f), rtol=0, atol=1e-12)


@pytest.mark.parametrize("nodes", [2, 3, 5, 8])
def test_any_rule_is_a_mean_over_the_path_and_exact_for_quadratics(nodes: int) -> None:
    rule, _ = curve(steps(0.2, 0.45), nodes)
    assert rule.pieces > 1
    assert len(rule.positions) == len(rule.weights) == nodes
    assert sum(rule.weights) == pytest.approx(1, abs=1e-12)
    assert min(rule.weights) > 0
    assert np.dot(rule.weights, rule.positions) == pytest.approx(0.5, abs=1e-12)
    assert rule.positions == sorted(rule.positions)
    assert 0 < rule.positions[0] <= rule.positions[-1] < 1


@pytest.mark.parametrize("places", [(0.1,), (0.25,), (0.3, 0.35), (0.2, 0.5), (0.12, 0.2, 0.3)])
def test_steep_climbs_get_the_nodes(places: tuple[float, ...]) -> None:
    f = steps(*places)
    rule, asked = curve(f, 8)
    assert 7 < rule.evaluations == asked <= 31
    missed = float((integrated(f, rule) - change(f)).sum() / change(f).sum())
    plain = float((integrated(f, Nodes(*gauss_legendre(8))) - change(f)).sum() / change(f).sum())
    assert abs(missed) < 0.01
    assert abs(plain) > 0.05


@pytest.mark.parametrize(("place", "width"), [(0.01, 0.003), (0.004, 0.01), (0.99, 0.003), (0.51, 0.01)])
def test_a_climb_that_even_steps_cannot_follow_is_followed(place: float, width: float) -> None:
    """Late in training an answer moves within the first hundredth of the way."""

    def f(a: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.sigmoid((a - place) / width), a**2])

    rule, asked = curve(f, 8)
    assert rule.evaluations == asked <= 31
    assert float((integrated(f, rule) - change(f)).abs().sum() / change(f).sum()) < 0.01


def test_tokens_that_cancel_in_the_sum_are_followed_each() -> None:
    """One climbs and one falls at the same place: their sum never moves, and says nothing about either."""
    f = steps(0.3, 0.3, sign=-1.0)
    rule, _ = curve(f, 8)
    assert float(change(f).sum()) == pytest.approx(0)
    assert float((integrated(f, rule) - change(f)).abs().max()) < 0.01 * 20
    assert float((integrated(f, Nodes(*gauss_legendre(8))) - change(f)).abs().max()) > 0.05 * 20


def test_even_paths_are_looked_at_a_few_times_only() -> None:
    rule, asked = curve(lambda a: torch.stack([a.exp(), (a + 1).log(), a.sin()]), 4)
    assert (rule.pieces, rule.evaluations, asked) == (1, 7, 7)


@pytest.mark.parametrize(
    ("f", "fewest", "most"),
    [
        (lambda a: torch.stack([a**n for n in range(1, 5)]), 2, 2),
        (lambda a: torch.stack([(3 * a).exp(), (a + 1).log(), (2 * a).sin()]), 2, 4),
        (steps(0.4, width=0.1), 4, 7),
        (steps(0.2, 0.5), 8, 8),
    ],
)
def test_as_many_nodes_as_the_path_asks_for(f: Curve, fewest: int, most: int) -> None:
    rule, _ = curve(f, None)
    assert fewest <= len(rule.positions) <= most
    assert float((integrated(f, rule) - change(f)).abs().sum() / change(f).abs().sum()) < 0.01
    if len(rule.positions) < 8:
        fewer, _ = curve(f, max(1, len(rule.positions) - 1))
        assert len(rule.positions) == 2 or float((integrated(f, fewer) - change(f)).abs().sum()) > 0.002


@pytest.mark.parametrize("nodes", [1, 33])
def test_one_node_and_very_many_are_the_plain_rule(nodes: int) -> None:
    rule, asked = curve(steps(0.2), nodes)
    assert (rule.positions, rule.weights, asked) == (*gauss_legendre(nodes), 0)


def test_what_does_not_move_or_is_no_number_gets_the_plain_rule() -> None:
    for f in (lambda a: torch.zeros(3) * a, lambda a: torch.tensor([1.0, torch.inf]) * a):
        assert curve(f, 4)[0].positions == gauss_legendre(4)[0]


def test_rounding_decides_nothing() -> None:
    f = steps(0.2, 0.31, 0.45, width=0.03)
    generator = torch.Generator().manual_seed(0)
    expected, _ = curve(f, 8)
    for _ in range(20):
        noise = 1e-6 * torch.randn(3, generator=generator, dtype=torch.float64)
        assert curve(lambda a, noise=noise: f(a) + noise * torch.cos(1e4 * a), 8)[0] == expected


# ---- the spline it looks through -----------------------------------------------------------------------

KNOTS = [0.0, 1 / 64, 1 / 32, 0.125, 0.5, 0.625, 1.0]


def test_a_cubic_is_its_own_spline_at_uneven_knots() -> None:
    cubic = np.polynomial.Polynomial([0.3, -2.0, 1.5, 4.0])
    at = np.linspace(0, 1, 41)
    spline = Spline(KNOTS)
    np.testing.assert_allclose(spline.values(at) @ cubic(np.array(KNOTS)), cubic(at), atol=1e-12)
    np.testing.assert_allclose(spline.slopes(at) @ cubic(np.array(KNOTS)), cubic.deriv()(at), atol=1e-11)


def test_a_spline_goes_through_its_values_and_its_slope_is_the_values_slope() -> None:
    rows = np.random.default_rng(0).normal(size=(len(KNOTS), 3))
    spline = Spline(KNOTS)
    np.testing.assert_allclose(spline.values(np.array(KNOTS)) @ rows, rows, atol=1e-12)
    inside = (np.array(KNOTS)[1:] + np.array(KNOTS)[:-1]) / 2
    step = 1e-6
    numeric = (spline.values(inside + step) - spline.values(inside - step)) @ rows / (2 * step)
    np.testing.assert_allclose(spline.slopes(inside) @ rows, numeric, rtol=1e-6, atol=1e-6)


# ---- a federation --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    """Updates as large as the weights: log-probabilities jump along the path."""
    return tiny_federation(tmp_path_factory.mktemp("rough"), "llama", rounds=2, scale=0.1)


def test_a_rough_path_is_complete_within_a_per_cent(rough: TinyFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = protoken.trace(rough.model, PROMPT, ledger=rough.path, **ASKED)
    assert trace.info.settings["nodes"] == trace.info.settings["gradients"] == 8
    assert trace.info.settings["pieces"] > 1
    assert 2 + 7 < trace.info.settings["evaluations"] <= 2 + 31
    assert abs(trace.residual) < 0.01 * abs(trace.change)
    exact = protoken.trace(rough.model, PROMPT, ledger=rough.path, nodes=64, **ASKED)
    error = np.linalg.norm(trace.totals - exact.totals)
    assert error < 0.02 * np.linalg.norm(exact.totals)
    monkeypatch.setattr(aumann_shapley, "placed", lambda _value, _start, _end, _nodes: Nodes(*gauss_legendre(8)))
    plain = protoken.trace(rough.model, PROMPT, ledger=rough.path, **ASKED)
    assert plain.change == trace.change
    assert abs(plain.residual) > 0.02 * abs(plain.change)
    assert np.linalg.norm(plain.totals - exact.totals) > 1.5 * error


def test_forward_way_has_the_same_nodes(rough: TinyFederation) -> None:
    reverse = protoken.trace(rough.model, PROMPT, ledger=rough.path, **ASKED)
    forward = protoken.trace(rough.model, PROMPT, ledger=rough.path, way="forward", **ASKED)
    assert forward.info.settings == reverse.info.settings
    np.testing.assert_allclose(forward.totals, reverse.totals, atol=1e-5 * np.abs(forward.token_scores).sum())


def split(folder: Path, parts: bool) -> protoken.Trace:
    """Two clients, and one who does nothing; the first as one or as two parts with a third and two thirds."""
    federation = tiny_federation(
        folder / "of", "llama", clients=("a", "b", "null"), weights=(0.5, 0.3, 0.2), scale=0.15
    )
    record = federation.ledger.round("last")
    deltas = {client: dict(record.deltas(client, list(record.parameters))) for client in ("a", "b", "null")}
    extra = {n: torch.randn(d.shape, generator=torch.Generator().manual_seed(9)) * 0.1 for n, d in deltas["a"].items()}
    clients = {
        "a": (0.5, deltas["a"]),
        "a1": (0.5 / 3, {n: d + 2 * extra[n] for n, d in deltas["a"].items()}),
        "a2": (1 / 3, {n: d - extra[n] for n, d in deltas["a"].items()}),
        "b": (0.3, deltas["b"]),
        "null": (0.2, deltas["null"]),
    }
    ledger = Ledger.create(folder / "ledger")
    end = {n: federation.model.get_parameter(n).detach() for n in record.parameters}
    chosen = ("a1", "a2", "b", "null") if parts else ("a", "b", "null")
    updates = [ClientUpdate(client, clients[client][0], delta=clients[client][1]) for client in chosen]
    ledger.commit_round({n: value - record.change(n) for n, value in end.items()}, end, updates)
    return protoken.trace(federation.model, PROMPT, ledger=ledger, **{**ASKED, "rounds": "last"}, nodes=8)


def test_axioms_hold_on_placed_nodes(tmp_path: Path) -> None:
    whole, parts = split(tmp_path / "whole", False), split(tmp_path / "parts", True)
    assert whole.info.settings == parts.info.settings
    assert whole.info.settings["pieces"] > 1
    size = np.abs(whole.totals).sum()
    assert whole.totals[2] == parts.totals[3] == 0
    assert abs(whole.totals[0] - parts.totals[:2].sum()) < 2e-6 * size
    assert abs(whole.totals[1] - parts.totals[2]) < 1e-6 * size
