"""The objectives themselves, and the log-odds in every way and method; test_trace.py and its like hold fp32."""

from __future__ import annotations

from itertools import combinations
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import normal
from oracle import oracle
from tiny_federation import CLIENTS, TinyFederation, tiny_federation
from tolerances import close

import protoken
from protoken.ways.objective import Objective, objective_values, pull_from_head

PROMPT = [5, 17, 42, 8, 60, 33, 21]
ODDS: dict[str, Any] = {"objective": "log_odds", "max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def double(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    folder = tmp_path_factory.mktemp("objectives")
    return tiny_federation(folder, request.param, rounds=2, dtype=torch.float64)


def values(logits: torch.Tensor, tokens: torch.Tensor, objective: str) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    found = objective_values(leaf, tokens, objective)  # type: ignore[arg-type]
    return found.detach(), torch.autograd.grad(found.sum(), leaf)[0]


def test_log_odds_are_the_log_probability_over_what_is_left() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    tokens = torch.tensor([0, 29, 7, 7, 12])
    p = logits.softmax(-1).gather(1, tokens[:, None])[:, 0]
    odds, slope = values(logits, tokens, "log_odds")
    _, plain = values(logits, tokens, "log_prob")
    torch.testing.assert_close(odds, (p / (1 - p)).log())
    torch.testing.assert_close(slope, plain / (1 - p)[:, None])


def test_log_odds_keep_their_digits_where_the_probability_rounds_to_one() -> None:
    logits = torch.tensor([[60.0, 3.0, -2.0, 1.0]])
    token = torch.tensor([0])
    assert float(logits.softmax(-1)[0, 0]) == 1
    value, slope = values(logits, token, "log_odds")
    exact, exact_slope = values(logits.double(), token, "log_odds")
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=1e-6, atol=0)
    assert slope[0, 0] == 1
    # The log-probability's own gradient is gone here.
    assert float(values(logits, token, "log_prob")[1].abs().max()) < 1e-20


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"way": "reverse"},
        {"way": "reverse", "blocks": 3},
        {"way": "forward", "blocks": 3},
        {"granularity": "layer", "blocks": 2},
        {"rounds": "all"},
    ],
    ids=lambda asked: "-".join(f"{k}={v}" for k, v in asked.items()) or "local",
)
def test_every_way_equals_the_oracle_in_double_precision(double: TinyFederation, asked: dict[str, Any]) -> None:
    trace = protoken.trace(double.model, PROMPT, ledger=double.path, **ODDS, **asked)
    expected = oracle(double.model, double.ledger, trace)
    assert trace.unit == "nats of log-odds"
    if trace.token_scores is not None:
        close(torch.tensor(trace.token_scores), expected.sum(0), torch.float64)
    if trace.layer_totals is not None:
        close(torch.tensor(trace.layer_totals), expected.sum(1), torch.float64)
    close(torch.tensor(trace.totals), expected.sum((0, 1)), torch.float64)


def test_streams_equal_the_oracle_in_double_precision(double: TinyFederation) -> None:
    stream = protoken.stream(double.model, PROMPT, ledger=double.path, **ODDS)
    assert len(list(stream)) == 6
    expected = oracle(double.model, double.ledger, stream.trace)
    close(torch.tensor(stream.trace.token_scores), expected.sum(0), torch.float64)


def log_odds(federation: TinyFederation, trace: protoken.Trace, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """Of the response's tokens with these weights, the plain way."""
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    with torch.no_grad():
        own = {**dict(federation.model.named_parameters()), **weights}
        logits = torch.func.functional_call(federation.model, own, (ids[:, :-1],)).logits[
            0, len(trace.prompt_ids) - 1 :
        ]
    p = logits.double().softmax(-1).gather(1, ids[0, len(trace.prompt_ids) :, None])[:, 0]
    return (p.log() - (1 - p).log()).numpy()


def test_exact_values_and_the_path_are_about_the_log_odds(double: TinyFederation) -> None:
    arguments = {"ledger": double.path, "rounds": "last", **ODDS}
    exact = protoken.trace(double.model, PROMPT, method="shapley", **arguments)
    record = double.ledger.round("last")
    start = {n: double.model.get_parameter(n).detach() - record.change(n) for n in record.parameters}
    v = {}
    for size in range(len(CLIENTS) + 1):
        for members in combinations(CLIENTS, size):
            weights = {n: value.clone() for n, value in start.items()}
            for client in record.clients:
                if client.client in members:
                    for n, delta in record.deltas(client.client, list(weights)):
                        weights[n] += client.weight * delta
            v[frozenset(members)] = log_odds(double, exact, weights)
    for k, client in enumerate(CLIENTS):
        others = [s for s in v if client not in s]
        share = [factorial(len(s)) * factorial(len(CLIENTS) - 1 - len(s)) / factorial(len(CLIENTS)) for s in others]
        expected = sum(w * (v[s | {client}] - v[s]) for w, s in zip(share, others, strict=True))
        np.testing.assert_allclose(exact.token_scores[:, k], expected, atol=1e-6)
    path = protoken.trace(double.model, PROMPT, method="aumann_shapley", nodes=8, **arguments)
    tokens = protoken.trace(double.model, PROMPT, method="aumann_shapley", nodes=8, way="forward", **arguments)
    np.testing.assert_allclose(tokens.totals, path.totals, atol=1e-9 * np.abs(tokens.token_scores).sum())
    assert path.change == pytest.approx(exact.change, abs=1e-6)
    # OPT is piecewise linear in places: its path has kinks.
    assert abs(path.residual) < 0.01 * np.abs(exact.token_scores).sum()


def test_what_is_saved_knows_its_objective(double: TinyFederation, tmp_path: Path) -> None:
    trace = protoken.trace(double.model, PROMPT, ledger=double.path, **ODDS)
    trace.save(tmp_path / "trace.json")
    again = protoken.Trace.load(tmp_path / "trace.json")
    assert (again.info.objective, again.unit) == ("log_odds", "nats of log-odds")
    trace.to_html(tmp_path / "trace.html")
    assert "log-odds of each generated token, in nats of log-odds" in (tmp_path / "trace.html").read_text()
    found = trace.counterfactual(without=CLIENTS[0])
    assert found.unit == "nats of log-odds"
    np.testing.assert_allclose(found.before, trace.objective_values, atol=1e-9)


@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
@pytest.mark.parametrize("gap", [0.0, 10.0, 60.0, 90.0, 200.0])
def test_value_and_gradient_at_a_plain_heads_input(objective: Objective, gap: float) -> None:
    """Also of a token so unlikely that its probability is 0 in fp32, and of one that is as good as certain."""
    weight, logits = normal(97, 48, seed=5), normal(1, 97, seed=3)
    logits[0, 7] += gap
    for token in (7, 9):
        value, upstream = pull_from_head(weight, logits, torch.tensor([token]), objective)
        exact = logits.double().requires_grad_()
        expected = objective_values(exact, torch.tensor([token]), objective)
        (slope,) = torch.autograd.grad(expected, exact)
        close(value, expected, torch.float32)
        # 1 - p is rounded in fp32: what is left of a certain token's slope is known to that much only.
        difference = (upstream.double() - slope[0] @ weight.double()).norm()
        assert difference <= 1e-6 * weight.double().norm(dim=1).max() + 1e-5 * (slope[0] @ weight.double()).norm()
