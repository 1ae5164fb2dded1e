"""Methods beyond first order over PEFT adapters: the recorded names are found, and what moves is what acts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft")

from adapter_cases import (  # noqa: E402
    PROMPT,
    adapted,
    average_factors,
    idle,
    record_products,
    trace,
    with_another,
)
from tiny_models import tiny_model  # noqa: E402

import protoken  # noqa: E402
from protoken.errors import LedgerMismatchError, ModelError  # noqa: E402

RECORDS = {
    "factors": average_factors,
    "factors-short": lambda model, path: average_factors(model, path, short=True),
    "products": record_products,
}


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("method", ["aumann_shapley", "shapley", "paired_shapley", "leave_one_out", "cosine"])
def test_games_over_adapters(tmp_path: Path, record: str, method: str) -> None:
    model = adapted()
    path = RECORDS[record](model, tmp_path / "ledger")
    found = trace(model, path, method=method, nodes=6 if method == "aumann_shapley" else None)
    assert np.abs(found.totals).max() > 1e-3
    if method not in ("leave_one_out", "cosine"):
        assert abs(found.residual) < 0.01 * np.abs(found.totals).sum()
        first = trace(model, path, blocks=4, way="reverse", layers=["*.o_proj", "*.down_proj", "*.v_proj"])
        assert np.corrcoef(found.totals, first.totals)[0, 1] > 0.5


def test_short_and_long_names_are_the_same_game(tmp_path: Path) -> None:
    totals = []
    for short in (False, True):
        model = adapted()
        path = average_factors(model, tmp_path / f"ledger{short}", short=short)
        totals.append(trace(model, path, method="shapley").totals)
    np.testing.assert_array_equal(totals[0], totals[1])


def test_factors_that_are_merged_cannot_move(tmp_path: Path) -> None:
    model = adapted()
    path = average_factors(model, tmp_path / "ledger")
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        trace(model, path, method="shapley")


IDLE = {"switched": "while 'house' is active", "disabled": "disabled", "merged": "merged"}


@pytest.mark.parametrize("before", ["leave_one_out", None], ids=["updates read", "freshly attached"])
@pytest.mark.parametrize("how", IDLE)
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_factors_that_do_not_act_cannot_move(tmp_path: Path, how: str, before: Any, verify: bool) -> None:
    model = adapted()
    path = average_factors(model, tmp_path / "ledger", rounds=2)
    made = trace(model, path)
    protoken.attach(with_another(model), path, verify=verify)
    if before is not None:
        protoken.trace(model, PROMPT, max_new_tokens=2, method=before)
    again = {"model": model}
    asked: list[Callable[[], Any]] = [
        *(
            partial(protoken.trace, model, PROMPT, max_new_tokens=2, method=method)
            for method in ("leave_one_out", "shapley", "paired_shapley", "aumann_shapley", "cosine")
        ),
        partial(made.counterfactual, "ada", **again),
        partial(made.lineage, **again),
        partial(made.history, **again),
    ]
    with idle(model, how):
        for ask in asked:
            with pytest.raises(ModelError, match=rf"an adapter that acts.*{IDLE[how]}"):
                ask()
    assert made.counterfactual("ada", **again).total != 0
    protoken.detach(model)


def test_short_names_are_those_of_the_adapter_that_is_active(tmp_path: Path) -> None:
    """As PEFT saves them, names leave open whose factors they are: what is found follows the model."""
    model = adapted()
    path = average_factors(model, tmp_path / "ledger", short=True)
    protoken.attach(with_another(model), path)
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "method": "leave_one_out"}
    model.set_adapter("house")
    with pytest.raises(LedgerMismatchError):
        protoken.trace(model, PROMPT, **settings)
    model.set_adapter("default")
    assert protoken.trace(model, PROMPT, **settings).totals.any()
    model.set_adapter("house")
    with pytest.raises(LedgerMismatchError):
        protoken.trace(model, PROMPT, **settings)
    protoken.detach(model)


def test_recorded_factors_without_peft_are_a_mismatch(tmp_path: Path) -> None:
    """A transformers model has `active_adapters`, too, which refuses to answer before one was loaded."""
    path = average_factors(adapted(), tmp_path / "ledger")
    with pytest.raises(LedgerMismatchError, match="without it"):
        trace(tiny_model("llama"), path, method="shapley")


@pytest.mark.parametrize("record", RECORDS)
def test_history_over_adapters(tmp_path: Path, record: str) -> None:
    model = adapted()
    path = RECORDS[record](model, tmp_path / "ledger")
    found = trace(model, path).history(nodes=6, objective="log_prob", ledger=path)
    expected = trace(model, path, method="aumann_shapley", nodes=6)
    assert found.client_ids == tuple(sorted(expected.client_ids))
    by_name = dict(zip(expected.client_ids, expected.totals, strict=True))
    np.testing.assert_allclose(found.totals, [by_name[client] for client in found.client_ids], rtol=1e-6)
    assert found.changes.sum() == pytest.approx(expected.change, rel=1e-6)
