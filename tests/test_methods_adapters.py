"""Methods beyond first order over PEFT adapters: the recorded names are found, and what moves is what acts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

peft = pytest.importorskip("peft")

from test_adapters import adapted, average_factors, record_products, trace  # noqa: E402

from protoken.errors import ModelError  # noqa: E402

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
    found = trace(model, path, method=method, nodes=6)
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
