"""Bootstrap, calibration, abstention and accounts: on traces with known truth, checked by simulation."""

from __future__ import annotations

import math
import sys
import tracemalloc
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import protoken
from protoken import confidence
from protoken.account import adjusted, sign_test
from protoken.confidence import Calibration, intervals, margin, resampled_totals, top_rates
from protoken.errors import ArgumentError
from protoken.results import Trace
from protoken.results.parts import Token, TraceInfo
from protoken.verdict import Abstention, evidence_of, leading

CLIENTS = ("a", "b", "c", "d")


def trace_of(scores: np.ndarray, *, clients: tuple[str, ...] = CLIENTS, method: str = "protoken", **extra) -> Trace:
    """A trace with these scores [T, K] and nothing left over."""
    scores = np.asarray(scores, dtype=float)
    count = len(scores)
    return Trace(
        prompt="p",
        prompt_ids=(1,),
        response="x" * count,
        token_list=tuple(Token(i, "x") for i in range(count)),
        client_ids=clients,
        weights=np.full(len(clients), 1 / len(clients)),
        token_scores=scores,
        totals=scores.sum(0),
        objective_values=np.zeros(count),
        token_residual=np.zeros(count),
        residual=0.0,
        change=float(scores.sum()),
        layer_totals=None,
        info=TraceInfo(method, "local", "log_prob", ("l",), (1,)),
        **extra,
    )


def totals_only(totals: list[float], **extra) -> Trace:
    trace = trace_of(np.array([totals]))
    return Trace(
        **{
            **{name: getattr(trace, name) for name in trace.__dataclass_fields__},
            "token_scores": None,
            "token_residual": None,
            **extra,
        }
    )


def noise(seed: int, tokens: int = 24, lead: float = 0.0) -> Trace:
    scores = np.random.default_rng(seed).normal(size=(tokens, 4))
    scores[:, 1] += lead
    return trace_of(scores)


# ---- bootstrap ---------------------------------------------------------------------------------------------


def test_intervals_cover_the_mean_about_as_often_as_they_say() -> None:
    covered = []
    for seed in range(200):
        found = intervals(noise(seed, tokens=60), draws=300, block=1)
        covered += [entry.low <= 0 <= entry.high for entry in found]
    assert 0.9 < np.mean(covered) < 0.98


def test_runs_of_tokens_widen_intervals_of_correlated_scores() -> None:
    steps = np.repeat(np.random.default_rng(0).normal(size=(12, 4)), 5, axis=0)
    trace = trace_of(steps)
    single, runs = (intervals(trace, block=block, draws=2000) for block in (1, 5))
    assert np.mean([r.high - r.low for r in runs]) > 1.5 * np.mean([s.high - s.low for s in single])


def test_a_clear_leader_leads_every_resample() -> None:
    clear, unclear = intervals(noise(0, lead=3.0)), intervals(noise(1))
    assert clear[1].top_probability == 1
    assert sum(entry.top_probability for entry in unclear) == pytest.approx(1)
    assert max(entry.top_probability for entry in unclear) < 1
    assert all(e.low <= e.total <= e.high for e in [*clear, *unclear])


def test_one_token_resamples_to_itself() -> None:
    found = intervals(trace_of([[1.0, 2.0, 0.0, 0.0]]))
    assert [(e.low, e.high) for e in found] == [(1, 1), (2, 2), (0, 0), (0, 0)]


@pytest.mark.parametrize(("tokens", "block"), [(1, None), (24, None), (24, 5), (7, 7), (200, None)])
def test_resampled_totals_are_sums_of_the_drawn_tokens(tokens: int, block: int | None) -> None:
    trace, draws = noise(3, tokens=tokens), 50
    found = resampled_totals(trace, draws, block, np.random.default_rng(8))
    length = block or max(1, round(tokens ** (1 / 3)))
    starts = np.random.default_rng(8).integers(0, tokens, size=(draws, math.ceil(tokens / length)))
    for total, runs in zip(found, starts, strict=True):
        drawn = [(start + step) % tokens for start in runs for step in range(length)][:tokens]
        assert np.allclose(total, trace.token_scores[drawn].sum(0), rtol=1e-12, atol=1e-12)


def test_long_answers_and_many_clients_need_little_memory() -> None:
    """The drawn scores themselves, [draws, T, K], would be 6.6 GB."""
    scores = np.random.default_rng(0).normal(size=(2048, 400))
    trace = trace_of(scores, clients=tuple(f"c{k}" for k in range(400)))
    tracemalloc.start()
    intervals(trace)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6


def test_the_ranking_says_how_sure_it_is() -> None:
    for trace in (noise(1), noise(2, lead=5.0), noise(4, tokens=2)):
        sure = {entry.client: entry.top_probability for entry in intervals(trace)}
        assert {client.client: client.confidence for client in trace.clients} == sure
        assert sum(sure.values()) == pytest.approx(1)
    assert noise(2, lead=5.0).clients[0].confidence == 1.0
    sampled = totals_only([1.0, 0.9, -1.0, -2.0], standard_errors=[0.2, 0.2, 0.2, 0.2])
    assert 0.4 < sampled.clients[0].confidence < 0.9
    assert sampled.clients[3].confidence == 0.0
    # Nothing to resample: totals alone, or one token, which would be sure of anything.
    for trace in (totals_only([1.0, 0.5, 0.0, -1.0]), noise(4, tokens=1)):
        assert {client.confidence for client in trace.clients} == {None}


def test_confidence_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for trace in (noise(1), totals_only([1.0, 0.9, -1.0, -2.0], standard_errors=[0.2] * 4)):
        whole = top_rates(trace)
        monkeypatch.setattr(confidence, "_NUMBERS_AT_ONCE", 4 * 37)
        assert np.array_equal(top_rates(trace), whole)
        monkeypatch.undo()


def test_sampled_methods_use_their_standard_errors() -> None:
    trace = totals_only([1.0, 0.0, 0.0, 0.0], standard_errors=np.array([0.5, 0.0, 0.0, 0.0]))
    first, second, *_ = intervals(trace)
    assert first.low == pytest.approx(1 - 1.959964 * 0.5, abs=1e-5)
    assert (second.low, second.high) == (0, 0)
    assert first.top_probability == pytest.approx(0.977, abs=0.02)


def test_totals_alone_cannot_be_resampled() -> None:
    with pytest.raises(ArgumentError, match="totals only"):
        intervals(totals_only([1.0, 0.0, 0.0, 0.0]))


# ---- calibration -------------------------------------------------------------------------------------------


def test_margin_runs_from_a_tie_to_a_single_scorer() -> None:
    assert margin(totals_only([1.0, 1.0, 0.0, -2.0])) == 0
    assert margin(totals_only([5.0, 0.0, 0.0, 0.0])) == 1
    assert margin(totals_only([3.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)


def test_calibration_finds_the_curve_that_made_the_data() -> None:
    generator = np.random.default_rng(0)
    x = generator.random(6000)
    truth = 1 / (1 + np.exp(-(5 * x - 1)))
    found = Calibration.fit(x, generator.random(6000) < truth)
    assert found.slope == pytest.approx(5, abs=0.5)
    assert found.intercept == pytest.approx(-1, abs=0.2)
    assert max(abs(found.probability(v) - t) for v, t in zip(x[:50], truth[:50], strict=True)) < 0.03


def test_a_perfect_sample_does_not_claim_certainty() -> None:
    found = Calibration.fit(np.linspace(0, 1, 20), np.ones(20, dtype=bool))
    assert 0.9 < found.probability(1.0) < 1
    separated = Calibration.fit(np.linspace(0, 1, 20), np.linspace(0, 1, 20) > 0.5)
    assert 0.8 < separated.probability(1.0) < 1
    assert 0 < separated.probability(0.0) < 0.2


def test_more_lead_never_means_less_confidence() -> None:
    found = Calibration.fit(np.linspace(0, 1, 30), np.linspace(0, 1, 30) < 0.5)
    assert found.slope == 0
    assert found.probability(0.1) == found.probability(0.9) == pytest.approx(0.5, abs=0.02)


def test_calibration_wants_samples() -> None:
    with pytest.raises(ArgumentError, match="10 or more"):
        Calibration.fit([0.1, 0.2], [True, False])


# ---- abstention --------------------------------------------------------------------------------------------


def test_false_alarms_stay_below_the_rate_asked_for() -> None:
    """Averaged over fits, fresh unrelated answers exceed the threshold at most at the rate: the conformal promise."""
    alarms = []
    for fit in range(16):
        rule = Abstention.fit([noise(1000 * fit + i) for i in range(99)], false_alarm=0.05)
        alarms += [evidence_of(noise(10**6 + 1000 * fit + i)) > rule.evidence for i in range(60)]
    assert np.mean(alarms) < 0.05 + 2 * math.sqrt(0.05 * 0.95 / 960) + 0.005


def test_the_documented_names_need_one_import() -> None:
    assert (protoken.verdict.leading, protoken.confidence.intervals) == (leading, intervals)


def test_verdicts() -> None:
    rule = Abstention.fit([noise(i) for i in range(99)], false_alarm=0.01)
    assert rule.judge(noise(500, lead=3.0)).client == "b"
    assert rule.judge(noise(501)).kind == "mostly pretraining"
    noisy = np.random.default_rng(1).normal(size=(24, 4))
    twins = rule.judge(trace_of(noisy + np.array([3, 3, 0, 0])))
    assert (twins.kind, set(twins.clients), twins.client in ("a", "b")) == ("client", {"a", "b"}, True)
    for totals in ([3, 3, 3, 0], [3, 3, 3, 3], [4, 3, 2, 1]):
        verdict = rule.judge(trace_of(noisy * 2 + np.array(totals)))
        assert (verdict.kind, verdict.clients, verdict.client) == ("no client stands out", (), None)
    assert rule.judge(trace_of(np.zeros((0, 4)))).kind == "mostly pretraining"
    assert rule.judge(totals_only([9.0, 0.0, 0.0, 0.0])).client == "a"
    assert rule.judge(totals_only([9.0, 8.5, 1.0, -4.0])).clients == ("a", "b")
    assert rule.judge(totals_only([9.0, 6.0, 3.0, -4.0])).kind == "no client stands out"
    alone = trace_of(np.full((5, 1), 2.0), clients=("a",))
    assert rule.judge(alone).clients == ("a",)


@pytest.mark.parametrize(
    ("totals", "who", "gap"),
    [
        ([1.0, 3.0, 2.8, 0.2], (1, 2), 1.8 / 3),
        ([0.0, -1.0, 5.0, -9.0], (2,), 1.0),
        ([3.0, 2.0, 1.0, 0.0], (0,), 1 / 3),
        ([2.0, 2.0, 2.0, 2.0], (0, 1, 2, 3), 1.0),
        ([2.0, 1.9, 1.8, -50.0], (0, 1, 2), 0.9),
        ([-1.0, -2.0, -3.0, 0.0], (), 0.0),
        ([4.0], (0,), 1.0),
    ],
    ids=str,
)
def test_who_leads_stands_above_the_widest_gap(totals: list[float], who: tuple[int, ...], gap: float) -> None:
    found, width = leading(np.array(totals))
    assert found == who
    assert width == pytest.approx(gap)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=12), st.randoms())
def test_who_leads_depends_neither_on_scale_nor_on_order(totals: list[float], random: Random) -> None:
    found, width = leading(np.array(totals))
    assert 0 <= width <= 1
    assert leading(2.0 * np.array(totals)) == (found, width)
    order = list(range(len(totals)))
    random.shuffle(order)
    again, _ = leading(np.array([totals[k] for k in order]))
    assert sorted(totals[order[k]] for k in again) == sorted(totals[k] for k in found)


def test_answers_are_judged_by_a_threshold_of_their_own_kind() -> None:
    judge = Abstention.fit([noise(seed) for seed in range(20)], false_alarm=0.1).judge
    assert judge(noise(30, lead=5.0)).client == "b"
    other = trace_of(noise(30, lead=5.0).token_scores, method="paired_shapley")
    with pytest.raises(ArgumentError, match="fitted on, protoken in nats, got paired_shapley in nats"):
        judge(other)
    with pytest.raises(ArgumentError, match="one method and unit"):
        Abstention.fit([other] * 10 + [noise(1)] * 10, false_alarm=0.1)


def test_a_rate_needs_enough_answers() -> None:
    traces = [noise(i) for i in range(98)]
    with pytest.raises(ArgumentError, match="99"):
        Abstention.fit(traces, false_alarm=0.01)
    assert Abstention.fit([*traces, noise(98)], false_alarm=0.01).samples == 99


# ---- accounts ----------------------------------------------------------------------------------------------


def test_totals_add_up_and_the_teacher_stands_out() -> None:
    traces = [noise(i, lead=0.6) for i in range(30)]
    book = protoken.account(traces)
    assert book.flagged == ("b",)
    assert book.clients[0].client == "b"
    for entry in book.clients:
        assert entry.total == pytest.approx(sum(t.totals[CLIENTS.index(entry.client)] for t in traces))
        assert entry.low <= entry.total <= entry.high
        assert entry.mean == pytest.approx(entry.total / 30)
        assert entry.p_value <= entry.q_value
    assert (book.responses, book.method, book.unit) == (30, "protoken", "nats")


@pytest.mark.parametrize("dependent", [True, False])
def test_false_discoveries_are_controlled(dependent: bool) -> None:
    """No client differs: in at most `rate` of the books may anybody be flagged."""
    wrong = [
        bool(
            protoken.account(
                [noise(100 * i + j, tokens=4) for j in range(10)], rate=0.1, draws=1, dependent=dependent
            ).flagged
        )
        for i in range(80)
    ]
    assert np.mean(wrong) <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / 80)


def test_clients_may_come_and_go() -> None:
    first = trace_of([[1.0, 0.0, 0.0, 0.0]] * 3)
    second = trace_of([[2.0, 0.0]] * 3, clients=("a", "e"))
    book = protoken.account([first, second])
    assert {e.client: e.responses for e in book.clients} == {"a": 2, "b": 1, "c": 1, "d": 1, "e": 1}
    assert book["a"].total == 9


def test_accounts_in_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = [noise(i, lead=0.1) for i in range(15)]
    whole = protoken.account(traces)
    assert 1 / 2001 < min(entry.p_value for entry in whole.clients) < 0.5
    monkeypatch.setattr(sys.modules["protoken.account"], "_NUMBERS_AT_ONCE", 15 * 37)
    assert protoken.account(traces) == whole


def test_accounts_of_many_responses_need_little_memory() -> None:
    """All signs or all draws at once would be 320 MB each."""
    scores = np.random.default_rng(0).normal(size=(20_000, 2))
    traces = [trace_of(row[None], clients=("a", "b")) for row in scores]
    tracemalloc.start()
    protoken.account(traces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_accounts_do_not_depend_on_the_order_of_responses() -> None:
    traces = [noise(i, lead=0.3) for i in range(8)]
    a, b = protoken.account(traces), protoken.account(traces[::-1])
    assert [(e.client, e.p_value) for e in a.clients] == [(e.client, e.p_value) for e in b.clients]
    np.testing.assert_allclose([e.total for e in a.clients], [e.total for e in b.clients])


def test_what_cannot_be_added_up_is_refused() -> None:
    with pytest.raises(ArgumentError, match="method"):
        protoken.account([noise(0), trace_of(np.ones((2, 4)), method="shapley")])
    with pytest.raises(ArgumentError, match="traces"):
        protoken.account([])
    with pytest.raises(ArgumentError, match="rate"):
        protoken.account([noise(0)], rate=0)


def test_sign_test_is_exact_for_few() -> None:
    generator = np.random.default_rng(0)
    assert sign_test(np.ones(3), 1, generator) == 1 / 8
    assert sign_test(np.array([1.0, 1.0, -1.0]), 1, generator) == 4 / 8
    assert sign_test(np.zeros(5), 1, generator) == 1
    assert sign_test(np.ones(40), 999, generator) == pytest.approx(1 / 1000)


def test_adjusted_p_values() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.5])
    np.testing.assert_allclose(adjusted(p, dependent=False), [0.04, 0.16 / 3, 0.16 / 3, 0.5])
    np.testing.assert_allclose(adjusted(p), np.minimum(np.array([0.04, 0.16 / 3, 0.16 / 3, 0.5]) * 25 / 12, 1))
