"""Round by round: when a response was learnt and from whom, against gradients at the models that really were."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_asked_again import PROMPT, ask, log_odds, new_ids
from test_report import HOSTILE
from test_trace_errors import fingerprint
from tiny_federation import CLIENTS, WEIGHTS, TinyFederation, tiny_federation
from tolerances import close

import protoken
from protoken.errors import ArgumentError, LayerError, LedgerMismatchError, ModelError, UnknownRoundError
from protoken.ledger import ClientUpdate, Ledger
from protoken.report.history import SHOWN, history_html


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"), rounds=3, dtype=torch.float64)


def model_after(federation: TinyFederation, number: float) -> dict[str, torch.Tensor]:
    """The moving parameters after that round: 0 the first model, 1.5 half-way through the second round."""
    found = {n: federation.model.get_parameter(n).detach().clone() for n in federation.ledger.round("last").parameters}
    for r in federation.ledger.rounds:
        share = min(max(r - number, 0.0), 1.0)
        for client, weight in zip(CLIENTS, WEIGHTS, strict=True):
            for name, delta in federation.ledger.round(r).deltas(client, list(found)):
                found[name] -= share * weight * delta
    return found


def value(federation: TinyFederation, weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    return log_odds(lambda x: torch.func.functional_call(federation.model, weights, x), ids)


def test_scores_are_gradients_at_the_midpoint_of_each_rounds_own_change(llama: TinyFederation) -> None:
    trace = ask(llama, max_new_tokens=5)
    before = fingerprint(llama.model)
    found = trace.history()
    assert fingerprint(llama.model) == before
    assert (found.rounds, found.client_ids, found.unit) == ((1, 2, 3), CLIENTS, "nats of log-odds")
    ids = [*PROMPT, *new_ids(trace)]
    for row, number in zip(found.scores, found.rounds, strict=True):
        leaves = {n: w.requires_grad_() for n, w in model_after(llama, number - 0.5).items()}
        gradient = dict(zip(leaves, torch.autograd.grad(value(llama, leaves, ids), list(leaves.values())), strict=True))
        expected = [
            weight * sum((gradient[n] * d).sum() for n, d in llama.ledger.round(number).deltas(client, list(leaves)))
            for client, weight in zip(CLIENTS, WEIGHTS, strict=True)
        ]
        # The ledger tells a round's change, which leads back to the models before, in single precision.
        close(torch.tensor(row), torch.stack(expected), torch.float32)


def test_values_are_those_of_the_models_that_were(llama: TinyFederation) -> None:
    trace = ask(llama, max_new_tokens=5)
    found = trace.history()
    ids = [*PROMPT, *new_ids(trace)]
    with torch.no_grad():
        expected = torch.stack([value(llama, model_after(llama, number), ids) for number in range(4)])
    close(torch.tensor(found.values.sum(axis=1)), expected, torch.float32)
    assert found.values.shape == (4, 5)
    np.testing.assert_array_equal(found.changes, np.diff(found.values.sum(axis=1)))


def test_scores_and_residuals_add_up_to_each_rounds_change(llama: TinyFederation) -> None:
    trace = ask(llama, max_new_tokens=5)
    rough, fine = trace.history(), trace.history(nodes=6)
    for found in (rough, fine):
        np.testing.assert_allclose(found.scores.sum(axis=1) + found.residuals, found.changes, rtol=1e-9, atol=1e-12)
    assert np.abs(fine.residuals).max() < 1e-4 * np.abs(fine.changes).max()
    assert np.abs(fine.residuals).max() < np.abs(rough.residuals).max()
    np.testing.assert_array_equal(fine.totals, fine.scores.sum(axis=0))


def test_one_round_is_its_path(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, dtype=torch.float64)
    trace = ask(federation, max_new_tokens=4)
    lineage = trace.lineage(rounds="last")
    found = trace.history()
    np.testing.assert_array_equal(found.scores, lineage.totals[None])
    assert found.changes[0] == pytest.approx(lineage.change, rel=1e-12)


@pytest.mark.parametrize("objective", ["log_prob", "logit"])
def test_other_objectives(llama: TinyFederation, objective: Any) -> None:
    trace = ask(llama, max_new_tokens=4)
    found = trace.history(objective=objective, since=3)
    lineage = trace.lineage(rounds="last", objective=objective)
    np.testing.assert_allclose(found.scores[0], lineage.totals, rtol=1e-12)
    np.testing.assert_allclose(found.values[-1], lineage.objective_values, rtol=1e-12)


def test_since_a_round_is_the_end_of_the_whole(llama: TinyFederation) -> None:
    trace = ask(llama, max_new_tokens=4)
    whole, late = trace.history(), trace.history(since=2)
    assert late.rounds == (2, 3)
    np.testing.assert_array_equal(late.scores, whole.scores[1:])
    np.testing.assert_array_equal(late.values, whole.values[1:])


def test_who_changed_nothing_or_was_not_there_scores_zero(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, rounds=1)
    names = list(federation.ledger.round("last").parameters)
    base = {n: federation.model.get_parameter(n).detach().clone() for n in names}
    delta = {n: torch.full_like(w, 1e-3) for n, w in base.items()}
    with torch.no_grad():
        for name in names:
            federation.model.get_parameter(name).add_(delta[name])
    after = {n: federation.model.get_parameter(n).detach().clone() for n in names}
    Ledger.open(federation.path).commit_round(base, after, [ClientUpdate("late", 1.0, delta=delta)])
    found = ask(federation, max_new_tokens=4).history()
    assert found.client_ids == ("ada", "bob", "cleo", "late", "null")
    assert found.scores[0, 3] == 0
    assert found.scores[0, 4] == 0
    np.testing.assert_array_equal(found.scores[1, [0, 1, 2, 4]], 0)
    assert found.scores[1, 3] != 0


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "falcon"])
def test_other_families_add_up(tmp_path: Path, family: str) -> None:
    federation = tiny_federation(tmp_path, family, rounds=2)
    found = ask(federation, max_new_tokens=4).history(nodes=6)
    np.testing.assert_allclose(found.residuals, 0, atol=5e-3 * np.abs(found.scores).sum())


def test_of_a_loaded_trace(llama: TinyFederation, tmp_path: Path) -> None:
    trace = ask(llama, max_new_tokens=4)
    trace.save(tmp_path / "trace.json")
    loaded = protoken.Trace.load(tmp_path / "trace.json")
    with pytest.raises(ModelError, match="gone"):
        loaded.history()
    again = loaded.history(model=llama.model, ledger=llama.path)
    np.testing.assert_array_equal(again.scores, trace.history().scores)


def test_what_cannot_be_followed_is_refused(llama: TinyFederation, tmp_path: Path) -> None:
    trace = ask(llama, max_new_tokens=4)
    before = fingerprint(llama.model)
    with pytest.raises(ArgumentError, match="from token 2 on"):
        trace.span(2, 4).history()
    with pytest.raises(UnknownRoundError):
        trace.history(since=9)
    with pytest.raises(ArgumentError, match="nodes"):
        trace.history(nodes=0)
    with pytest.raises(ArgumentError, match="objective"):
        trace.history(objective="loss")  # type: ignore[arg-type]
    with torch.inference_mode(), pytest.raises(ModelError, match="inference"):
        trace.history()
    other = tiny_federation(tmp_path, seed=5)
    with pytest.raises(LedgerMismatchError):
        trace.history(ledger=other.path)
    stranger = tiny_federation(tmp_path, "gpt2")
    with pytest.raises((LedgerMismatchError, LayerError)):
        trace.history(ledger=stranger.path)
    assert fingerprint(llama.model) == before


def test_in_jsons_types(llama: TinyFederation) -> None:
    found = ask(llama, max_new_tokens=4).history()
    read = json.loads(json.dumps(found.to_dict()))
    assert read["rounds"] == [1, 2, 3]
    np.testing.assert_array_equal(read["scores"], found.scores)
    np.testing.assert_array_equal(read["values"], found.values)
    assert (read["objective"], read["nodes"]) == ("log_odds", 1)


def made(scores: Any, clients: tuple[str, ...], tokens: tuple[str, ...] = ("yes",), prompt: str = "?") -> Any:
    """A history with these scores [R, K] that leave nothing over."""
    table = np.array(scores, dtype=np.float64)
    values = np.concatenate([[-3.0], -3.0 + table.sum(axis=1).cumsum()])[:, None].repeat(len(tokens), 1) / len(tokens)
    rounds = tuple(range(1, len(table) + 1))
    return protoken.History(rounds, clients, tokens, values, table, np.zeros(len(table)), "log_odds", 1, prompt)


def drawn(found: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(found)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_finding_in_words() -> None:
    found = made([[1.0, 0.5, -0.25], [4.0, 5.0, 0.0]], ("ada", "bob", "cleo"))
    for text in (drawn(found, 200), found.to_html()):
        assert (
            "Round 2 did most for this answer: +9.000 nats of log-odds; all rounds together changed it by +10.250."
            in text
        )
        assert "Of the clients, bob raised it most, by +5.500, then ada by +5.000." in text
    # The same words where the answer became less likely as a whole.
    fallen = drawn(made([[0.5, 1.0, 0.0], [-9.0, -8.0, 0.25]], ("ada", "bob", "cleo")), 200)
    assert (
        "Round 1 did most for this answer: +1.50 nats of log-odds; all rounds together changed it by -15.25" in fallen
    )
    assert "Of the clients, cleo raised it most, by +0.25" in fallen
    assert found.ranking == [("bob", 5.5), ("ada", 5.0), ("cleo", -0.25)]
    assert repr(found) == "History(2 rounds, 3 clients, top 'bob' +5.5 nats of log-odds)"
    against = made([[-1.0, -2.0]], ("ada", "bob"))
    assert "No round made this answer likelier." in drawn(against)
    assert "raised it most" not in against.to_html()


def test_a_table_of_six_clients_fits_a_terminal() -> None:
    found = made(np.linspace(-9.0, 58.0, 24).reshape(4, 6), tuple(f"client-{k}" for k in range(6)))
    lines = drawn(found).splitlines()
    (heading,) = [line for line in lines if "round" in line and "change" in line]
    assert all(f"client-{k}" in heading for k in range(6))
    assert any(line.lstrip().startswith("sum") for line in lines)


def test_many_clients_share_a_column() -> None:
    found = made(np.arange(60.0).reshape(3, 20), tuple(f"c{k:02}" for k in range(20)))
    page = found.to_html()
    assert f"{20 - SHOWN} others" in page
    assert "c19" in page
    assert "c00" not in page
    rest = found.totals[: 20 - SHOWN].sum()
    assert f"{rest:+.2f}" in page


def test_names_prompts_and_answers_are_harmless(tmp_path: Path) -> None:
    found = made(np.ones((2, len(HOSTILE))), tuple(HOSTILE), tuple(HOSTILE), "".join(HOSTILE))
    page = history_html(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "<script" not in page
    assert "<img" not in page
    assert "default-src 'none'" in page
    assert "\x1b" not in page
    framed = found._repr_html_()
    assert framed.startswith('<iframe sandbox="allow-scripts"')
    assert framed.count("<") == 2
    assert "\x1b[" not in drawn(found)
