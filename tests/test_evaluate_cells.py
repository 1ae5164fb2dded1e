"""Cells and their schema: figures against hand-made scores, and nothing that is damaged is read."""

from __future__ import annotations

import json
import math

import pytest

from protoken.errors import ArgumentError, TraceFormatError
from protoken.evaluation.cells import KEYS, Cell, make_cell

WHAT = {"experiment": "backdoor", "model": "m", "domain": "math", "method": "protoken", "blocks": None, "round": 3}
ISSUED = (
    "experiment model domain method blocks round samples top1 top1_low top1_high chance auroc average_precision "
    "pearson_shapley pearson_loo residual seconds"
)


def test_every_key_of_the_schema_is_there_also_where_nothing_was_measured() -> None:
    assert tuple(ISSUED.split()) == KEYS
    record = make_cell([], [True, False], **WHAT).to_dict()
    assert set(record) == set(KEYS)
    assert record["samples"] == 0
    assert record["top1"] is None
    assert Cell.from_dict(json.loads(json.dumps(record))) == make_cell([], [True, False], **WHAT)


def test_figures_of_a_cell() -> None:
    scores = [[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]]
    shapley = [[6.0, 2.0, 0.0]]
    cell = make_cell(
        scores,
        [True, False, False],
        shapley=shapley,
        leave_one_out=[[-3.0, -1.0, 0.0]],
        residuals=[0.1, 0.3],
        seconds=[1.0, 3.0],
        extra={"rate": 0.5},
        **WHAT,
    )
    assert (cell.samples, cell.top1, cell.chance) == (2, 0.5, pytest.approx(1 / 3))
    assert cell.auroc == pytest.approx((1 + 0) / 2)
    assert cell.average_precision == pytest.approx((1 + 1 / 3) / 2)
    assert cell.pearson_shapley == pytest.approx(1)
    assert cell.pearson_loo == pytest.approx(-1)
    assert (cell.residual, cell.seconds) == (pytest.approx(0.2), 2.0)
    assert cell.extra["precision_at_poisoned"] == 0.5
    assert cell.extra["reference_samples"] == 1
    # Over all pairs at once: the responsible scores 3 and 0 against 1, 0, 2 and 1.
    assert cell.extra["auroc_pooled"] == pytest.approx((4 + 0.5) / 8)
    assert cell.to_dict()["rate"] == 0.5


def test_what_is_undefined_becomes_null_and_never_nan() -> None:
    cell = make_cell([[1.0, 2.0]], [True, True], residuals=[math.nan], **WHAT)
    record = cell.to_dict()
    assert record["auroc"] is None
    assert record["residual"] is None
    json.dumps(record, allow_nan=False)


def test_extra_figures_do_not_hide_a_cells_own() -> None:
    with pytest.raises(ArgumentError, match="extra"):
        Cell(samples=1, extra={"top1": 1.0}, **WHAT).to_dict()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"samples": "7"}, "samples"), ({"model": 3}, "model"), ({"top1": True}, "top1"), ({"round": 1.5}, "round")],
)
def test_a_cell_of_other_types_is_refused(change: dict[str, object], named: str) -> None:
    record = Cell(samples=1, **WHAT).to_dict() | change
    with pytest.raises(TraceFormatError, match=named):
        Cell.from_dict(record)
    del record[named]
    with pytest.raises(TraceFormatError, match=named):
        Cell.from_dict(record)


@pytest.mark.parametrize("record", [[], None, "cell", 3])
def test_what_is_no_object_is_refused(record: object) -> None:
    with pytest.raises(TraceFormatError):
        Cell.from_dict(record)
