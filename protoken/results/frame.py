"""A trace as a table in long form: one score per row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from protoken.arguments import check_word
from protoken.errors import ArgumentError, MissingDependencyError
from protoken.results.checks import Array

if TYPE_CHECKING:
    from protoken.results.result import Trace


def to_dataframe(trace: Trace, granularity: str = "token") -> Any:
    """The scores of that granularity; see `Trace.to_dataframe`."""
    names, scores = _axes(trace, granularity)
    try:
        import pandas
    except ImportError as error:
        remedy = "Install it: pip install 'protoken[pandas]'"
        raise MissingDependencyError("to_dataframe", expected="pandas", remedy=remedy) from error
    columns: dict[str, Any] = {}
    for axis, (size, labels) in enumerate(zip(scores.shape, names, strict=True)):
        inner, outer = int(np.prod(scores.shape[axis + 1 :])), int(np.prod(scores.shape[:axis]))
        for name, values in labels.items():
            assert len(values) == size
            kind = np.int64 if name in ("index", "id", "position") else object
            columns[name] = np.tile(np.repeat(np.array(values, dtype=kind), inner), outer)
    return pandas.DataFrame({**columns, "score": scores.reshape(-1)})


def _axes(trace: Trace, granularity: str) -> tuple[list[dict[str, list[Any]]], Array]:
    """Per axis of the scores its columns, and the scores."""
    tokens = trace.token_list
    by_token: dict[str, list[Any]] = {
        "index": list(range(len(tokens))),
        "id": [token.id for token in tokens],
        "token": [token.text for token in tokens],
    }
    ids = [*trace.prompt_ids, *(token.id for token in tokens)]
    by_position: dict[str, list[Any]] = {"position": list(range(len(ids) - 1)), "id": ids[:-1]}
    by_client: dict[str, list[Any]] = {"client": list(trace.client_ids)}
    check_word("granularity", granularity, ("sequence", "token", "layer", "position"))
    known: dict[str, tuple[list[dict[str, list[Any]]], Array | None]] = {
        "sequence": ([by_client], trace.totals),
        "token": ([by_token, by_client], trace.token_scores),
        "layer": ([by_token, {"layer": list(trace.info.layers)}, by_client], trace.token_layer_scores),
        "position": ([by_position, by_client], trace.position_scores),
    }
    names, scores = known[granularity]
    if scores is None:
        there = ", ".join(name for name, (_, values) in known.items() if values is not None)
        there = "sequence totals only" if there == "sequence" else there
        raise ArgumentError(
            "to_dataframe",
            expected=f"{granularity} scores",
            got=f"a trace with {there}",
            remedy=f'Trace again with granularity="{granularity}"',
        )
    return names, scores
