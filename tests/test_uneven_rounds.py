"""Ledgers whose rounds are not alike: gaps, server optimisers, quarantine, nobody left, other parameters."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model
from torch import Tensor

import protoken
from protoken.errors import ArgumentError, LayerError, ProtokenWarning
from protoken.history import History
from protoken.ledger import ClientUpdate, Ledger
from protoken.ledger.rules import FedAdam, FedAvgM, shares

PROMPT, RESPONSE = [5, 6, 7], [9, 8, 7, 6, 5, 4]
WEIGHTS = {"a": 0.8, "b": 0.15, "c": 0.05}


class Federation:
    """A tiny model in double precision, and rounds of random updates to it."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_model("smollm", dtype=torch.float64)
        self.ledger = Ledger.create(folder / "ledger")
        self.generator = torch.Generator().manual_seed(1)
        self.names = [n for n, _ in self.model.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight"))]

    def now(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach().clone() for name in names or self.names}

    def like(self, base: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        return {n: (torch.randn(v.shape, generator=self.generator) * scale).double() for n, v in base.items()}

    def move(self, by: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in by.items():
                self.model.get_parameter(name).add_(value)

    def round(
        self,
        weights: Mapping[str, float] = WEIGHTS,
        *,
        bad: Sequence[str] = (),
        names: Sequence[str] | None = None,
        optimiser: Any = None,
        metadata: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        """A round of FedAvg; `bad` clients upload NaN, which the server left out of its sum."""
        base = self.now(names)
        updates = [ClientUpdate(client, weight, delta=self.like(base, 0.05)) for client, weight in weights.items()]
        good = [update for update in updates if update.client not in bad]
        given = optimiser.step(good, base) if optimiser is not None else updates
        applied = given if optimiser is not None else good
        self.move({n: sum(u.weight * u.delta[n].double() for u in applied) for n in base} if applied else {})
        sent = [
            ClientUpdate(u.client, u.weight, delta={n: v * float("nan") for n, v in base.items()})
            if u.client in bad
            else u
            for u in given
        ]
        rule = "fedavg" if optimiser is None else optimiser.rule
        self.ledger.commit_round(
            base, self.now(names), sent, rule=rule, metadata=metadata, on_bad="quarantine", **arguments
        )

    def log_prob(self) -> float:
        """Of the response under the model as it stands."""
        with torch.no_grad():
            logits = self.model(torch.tensor([PROMPT + RESPONSE])).logits[0, len(PROMPT) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(RESPONSE)[:, None]).sum())

    def ask(self, **arguments: Any) -> protoken.Trace:
        return protoken.trace(self.model, PROMPT, ledger=self.ledger, response=RESPONSE, **arguments)


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


def owed(trace: protoken.Trace, **arguments: Any) -> dict[str, float]:
    return {client: trace.counterfactual(client, **arguments).total for client in trace.client_ids}


def scores(trace: protoken.Trace) -> dict[str, float]:
    return dict(zip(trace.client_ids, trace.totals.tolist(), strict=True))


# ---- what the others gain ----------------------------------------------------------------------------------


def test_server_momentum_of_one_round_is_reaggregated_as_the_average_is(tmp_path: Path) -> None:
    """Without earlier momentum and at rate 1 the models are the same, and so is everything left out of them."""
    plain, momentum = Federation(tmp_path / "plain"), Federation(tmp_path / "momentum")
    plain.round()
    rule = FedAvgM(0.9, 1.0)
    momentum.round(optimiser=rule, metadata={"server": {**rule.settings(), "weights": WEIGHTS}})
    expected = owed(plain.ask())
    assert owed(momentum.ask()) == pytest.approx(expected, rel=1e-5)
    assert scores(momentum.ask(method="leave_one_out")) == pytest.approx(expected, rel=1e-5)
    assert owed(plain.ask(), reaggregate=False) != pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "metadata",
    [None, {"server": 1}, {"server": {"weights": 0}}, {"server": {"weights": {"a": "1"}}},
     {"server": {"weights": {"a": True}}}, {"server": {"weights": {"a": 0.0}}},
     {"server": {"weights": {"a": -1, "b": 2}}}],
    ids=str,
)  # fmt: skip
def test_shares_that_are_not_on_record_are_not_guessed(made: Federation, metadata: dict[str, Any] | None) -> None:
    made.round(optimiser=FedAdam(), metadata=metadata)
    assert shares(made.ledger.round(1)) is None
    trace = made.ask()
    with pytest.raises(ArgumentError, match=r"^reaggregate: expected False: round 1 \(fedadam\)"):
        trace.counterfactual("a")
    taken_out = made.ask(method="leave_one_out")
    assert taken_out.info.settings["reaggregate"] is False
    assert scores(taken_out) == pytest.approx(owed(trace, reaggregate=False), rel=1e-6)


def test_a_round_of_a_server_optimiser_may_record_the_weights_themselves(made: Federation) -> None:
    base = made.now()
    updates = [ClientUpdate(client, weight, delta=made.like(base, 0.05)) for client, weight in WEIGHTS.items()]
    made.move({n: sum(u.weight * u.delta[n] for u in updates) for n in base})
    made.ledger.commit_round(base, made.now(), updates, rule="fedavgm")
    assert shares(made.ledger.round(1)) == pytest.approx(WEIGHTS)
    assert scores(made.ask(method="leave_one_out")) == pytest.approx(owed(made.ask()), rel=1e-5)


@pytest.mark.parametrize("rule", ["krum", "custom"])  # fedavg refuses weights whose sum is not 1
def test_in_a_round_where_nobody_has_any_weight_nothing_is_gained(made: Federation, rule: str) -> None:
    made.round({"a": 0.5, "b": 0.5})
    expected = owed(made.ask())
    base = made.now()
    updates = [ClientUpdate(client, 0.0, delta=made.like(base, 0.05)) for client in "ab"]
    made.ledger.commit_round(base, base, updates, rule=rule)
    assert shares(made.ledger.round(2)) == {"a": 0.0, "b": 0.0}
    assert owed(made.ask()) == {"a": 0.0, "b": 0.0}
    both = made.ask(rounds="all", method="leave_one_out")
    assert owed(both) == pytest.approx(expected, rel=1e-6)
    assert scores(both) == pytest.approx(expected, rel=1e-6)
    assert both.info.settings["reaggregate"] is True


def test_who_is_absent_beside_a_quarantined_update_leaves_it_where_it_is(made: Federation) -> None:
    """z has no weight anywhere, so leaving it out as well changes nothing: b's refused update keeps its share."""
    made.round({"a": 0.5, "b": 0.5, "z": 0.0})
    made.round({"a": 0.2, "b": 0.1, "c": 0.7, "z": 0.0}, bad=["b"])
    trace = made.ask(rounds="all")
    assert trace.counterfactual(["b", "z"]).total == pytest.approx(trace.counterfactual("b").total, rel=1e-9)


@pytest.mark.parametrize("rounds", ["last", "all"])
def test_leaving_one_out_is_its_counterfactual_beside_a_quarantined_update(made: Federation, rounds: Any) -> None:
    made.round()
    made.round({"a": 0.2, "b": 0.1, "c": 0.7}, bad=["b"])
    trace = made.ask(rounds=rounds, method="leave_one_out")
    assert scores(trace) == pytest.approx(owed(trace), rel=1e-6)
    if rounds == "last":
        # c had 0.7 of the average: without it a's update counts 0.2 / (1 - 0.7).
        record, shift = made.ledger.round(2), {}
        for name in made.names:
            shift[name] = 0.2 * (1 / 0.3 - 1) * record.delta("a", name) - 0.7 * record.delta("c", name)
        before = trace.objective_values.sum()
        found = owed(trace)["c"]
        made.move(shift)
        assert found == pytest.approx(before - made.log_prob(), rel=1e-5)


# ---- gaps ----------------------------------------------------------------------------------------------------


def printed(found: protoken.Trace | History) -> str:
    file = io.StringIO()
    console = Console(file=file, width=200)
    found.show(console) if isinstance(found, protoken.Trace) else console.print(found)
    return file.getvalue()


def test_a_gap_of_another_federation_is_said_as_well(tmp_path: Path) -> None:
    """Python shows a warning of the same words from the same place once."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default", ProtokenWarning)
        for folder in ("one", "other"):
            made = Federation(tmp_path / folder)
            made.round()
            made.move(made.like(made.now(), 0.1))
            made.round(allow_gap=True)
            made.ask().history()
    assert [made.ledger.run[:8] in str(warning.message) for warning in said] == [False, True]


def test_a_gap_is_said_aloud_wherever_rounds_are_walked_over(made: Federation) -> None:
    made.round()
    made.move(made.like(made.now(), 0.1))
    made.round(allow_gap=True)
    made.round(allow_gap=True)  # allowed, and not made use of
    trace = made.ask()
    with pytest.warns(ProtokenWarning, match=r"round 2 of the ledger \(run \w{8}\) does not start"):
        history = trace.history()
    assert history.gaps == (2,)
    assert history.to_dict()["gaps"] == [2]
    with pytest.warns(ProtokenWarning, match=r"round 2 of the ledger \(run \w{8}\) does not start"):
        lineage = trace.lineage(nodes=None)
    assert lineage.info.settings["gaps"] == [2]
    for found in (history, lineage):
        assert "Round 2 does not start where the round before ended" in found.to_html()
        assert "Round 2 does not start where the round before ended" in printed(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProtokenWarning)
        after = trace.history(since=2)
        assert after.gaps == ()
        assert "does not start" not in after.to_html() + printed(after) + trace.to_html() + printed(trace)
        assert "gaps" not in made.ask(method="aumann_shapley", rounds=[2, 3]).info.settings
        assert "gaps" not in made.ask(method="aumann_shapley", rounds=[1, 3]).info.settings


# ---- other clients, other weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["protoken", "aumann_shapley"])
def test_weights_over_several_rounds_are_their_mean(made: Federation, method: Any) -> None:
    made.round()
    made.round({"a": 0.4, "d": 0.6})
    several = made.ask(method=method, rounds="all")
    assert dict(zip(several.client_ids, several.weights, strict=True)) == pytest.approx(
        {"a": 0.6, "b": 0.075, "c": 0.025, "d": 0.3}
    )
    assert {client.client: client.weight for client in several.clients}["d"] == pytest.approx(0.3)
    assert "mean weight" in printed(several)
    assert "Mean weight" in several.to_html()
    last = made.ask(method=method)
    assert dict(zip(last.client_ids, last.weights, strict=True)) == {"a": 0.4, "d": 0.6}
    assert "mean weight" not in printed(last)


# ---- nobody, and nothing in common -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["protoken", "paper", "aumann_shapley", "shapley", "paired_shapley", "leave_one_out", "update_norm"]
)
def test_a_round_without_a_usable_update_is_refused_as_such(made: Federation, method: Any) -> None:
    made.round()
    made.round({"a": 0.5, "b": 0.5}, bad=["a", "b"])
    for ask in (lambda: made.ask(method=method), lambda: made.ask(rounds="all").history(since=2)):
        with pytest.raises(ArgumentError, match=r"^rounds: .* whose 2 updates are all quarantined"):
            ask()
    over_all = made.ask(method=method, rounds="all")
    assert set(over_all.client_ids) == set(WEIGHTS)
    assert np.isfinite(over_all.totals).all()


def test_a_stream_over_such_a_round_is_refused_as_well(made: Federation) -> None:
    made.round({"a": 0.5, "b": 0.5}, bad=["a", "b"])
    with pytest.raises(ArgumentError, match="all quarantined"):
        protoken.stream(made.model, PROMPT, ledger=made.ledger, max_new_tokens=2)


def test_rounds_without_a_parameter_in_common_are_refused_as_such(made: Federation) -> None:
    made.round(names=made.names[:1])
    made.round(names=made.names[1:2])
    trace = made.ask(method="aumann_shapley")
    for ask in (trace.lineage, trace.history, lambda: made.ask(method="shapley", rounds="all")):
        with pytest.raises(LayerError, match=r"^rounds: .*none in \[1, 2\]: round 1 has"):
            ask()


# ---- weights of zero -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cosine", "tracefl"])
def test_the_direction_of_an_update_does_not_depend_on_its_weight(tmp_path: Path, method: Any) -> None:
    """As of clients that Krum did not choose. The same updates and model; only the weights on record differ."""
    found = []
    for folder, weights in (("some", (1.0, 0.25, 0.5)), ("none", (1.0, 0.0, 0.0))):
        made = Federation(tmp_path / folder)
        base = made.now()
        deltas = [made.like(base, 0.05) for _ in weights]
        made.move(deltas[0])
        updates = [ClientUpdate(c, weight, delta=d) for c, weight, d in zip("abc", weights, deltas, strict=True)]
        made.ledger.commit_round(base, made.now(), updates, rule="krum")
        found.append(made.ask(method=method).totals)
    assert (abs(found[0]) > 1e-3).all()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


# ---- parts of an answer ---------------------------------------------------------------------------------------


def test_the_beginning_of_an_answer_can_be_asked_again(made: Federation) -> None:
    made.round()
    part = made.ask().span(0, 2)
    assert part.lineage().response == part.response
    assert part.history().tokens == tuple(token.text for token in part.token_list)
