"""What a `Trace` promises: consistent numbers, parts that add up, a file that comes back equal."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results_cases import info, make

from protoken.errors import (
    ArgumentError,
    DtypeError,
    MissingDependencyError,
    NonFiniteError,
    ProtokenError,
    ShapeError,
    TraceFormatError,
)
from protoken.results import Trace
from protoken.results.export import from_dict, load, to_dict

# ---- reading -----------------------------------------------------------------------------------------


def test_clients_are_ranked_by_raw_score_with_ties_by_id() -> None:
    trace = make(["a", "b"], scores=[[1.0, 2.0, 1.0], [0.5, 1.0, 0.5]], client_ids=("z", "m", "a"))
    assert [(c.client, c.rank, c.score) for c in trace.clients] == [("m", 1, 3.0), ("a", 2, 1.5), ("z", 3, 1.5)]


def test_share_is_the_softmax_of_totals() -> None:
    trace = make(["a"], clients=2, scores=[[0.0, math.log(3.0)]])
    assert trace.shares == pytest.approx([0.25, 0.75], rel=1e-12)
    assert {c.client: c.share for c in trace.clients} == pytest.approx({"client_0": 0.25, "client_1": 0.75})


def test_share_survives_scores_far_beyond_the_range_of_exp() -> None:
    assert make(["a"], clients=2, scores=[[-5e4, 5e4]]).shares.tolist() == [0.0, 1.0]


def test_tokens_carry_scores_per_client_and_their_top_client() -> None:
    trace = make(["a", "b"], clients=2, scores=[[1.0, 2.0], [3.0, 3.0]])
    first, second = trace.tokens
    assert first.scores == {"client_0": 1.0, "client_1": 2.0}
    assert (first.top, second.top) == ("client_1", "client_0")
    assert first.objective == trace.objective_values[0]


def test_totals_only_trace_has_no_token_scores() -> None:
    trace = make(per_token=False)
    assert [(t.scores, t.top) for t in trace.tokens] == [(None, None)] * 5
    for ask in (lambda: trace.span(0, 1), trace.sentences, lambda: trace.find("INR"), trace.to_dataframe):
        with pytest.raises(ArgumentError, match="sequence totals only"):
            ask()


def test_conservation_residual_is_relative_to_the_larger_of_scores_and_change() -> None:
    trace = make(
        ["a"], clients=2, scores=[[2.0, -1.0]], token_residual=[0.5], residual=0.5, change=1.5, layer_totals=None
    )
    assert trace.conservation_residual == 0.5 / 3.0
    assert make([], scores=np.zeros((0, 3))).conservation_residual == 0.0


def test_unit_follows_the_objective() -> None:
    assert make().unit == "nats"
    assert make(info=info(objective="logit")).unit == "logit units"


def test_arrays_are_private_and_read_only() -> None:
    weights = np.full(3, 1 / 3)
    trace = make(weights=weights)
    weights[0] = 9.0
    assert trace.weights[0] == 1 / 3
    with pytest.raises(ValueError, match="read-only"):
        trace.totals[0] = 1.0


def test_text_leaves_special_tokens_out_and_response_keeps_them() -> None:
    trace = make(["Yes", ".", "<|im_end|>"])
    assert (trace.response, trace.text) == ("Yes.<|im_end|>", "Yes.")


def test_repr_is_one_short_line() -> None:
    assert "\n" not in repr(make())
    assert len(repr(make(["word "] * 5000))) < 160


def test_a_trace_pickles_for_worker_processes() -> None:
    assert pickle.loads(pickle.dumps(make())) == make()


def test_importing_results_needs_neither_torch_nor_transformers() -> None:
    # __init__ of the package may be lazy or not; the modules here must not add anything of their own.
    code = (
        "import sys, types, importlib.util as u\n"
        "package = types.ModuleType('protoken'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['protoken'] = package\n"
        "import protoken.results, protoken.results.export, protoken.report\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    import protoken.results as module

    folder = str(Path(module.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"totals": [1.0, 2.0]}, ShapeError, r"totals: expected \[K\]"),
        ({"token_scores": np.zeros((3, 5))}, ShapeError, r"token_scores: expected \[T, K\]"),
        ({"layer_totals": np.zeros((3, 3))}, ShapeError, r"layer_totals: expected \[L, K\]"),
        ({"weights": [0.5, float("nan"), 0.5]}, NonFiniteError, "weights"),
        ({"weights": "many"}, DtypeError, "weights"),
        ({"residual": float("inf")}, NonFiniteError, "residual"),
        ({"change": None}, DtypeError, "change"),
        ({"change": 100.0}, ArgumentError, "as its parts add up to"),
        ({"residual": 3.0}, ArgumentError, "as its parts add up to"),
        ({"totals": [9.0, -9.0, 0.0]}, ArgumentError, "as its parts add up to"),
        ({"client_ids": ("a", "a", "b")}, ArgumentError, "all different"),
        ({"client_ids": ()}, ArgumentError, "at least one"),
        ({"response": "something else"}, ArgumentError, "concatenated"),
        ({"token_residual": None}, ArgumentError, "token_residual"),
        ({"prompt": "lone \ud800"}, ArgumentError, "surrogate"),
        ({"prompt": b"bytes"}, DtypeError, "prompt"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_inconsistent_fields_are_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**changes)


def test_unknown_objective_is_refused() -> None:
    with pytest.raises(ArgumentError, match="objective: expected one of log_prob, log_odds, logit, got 'perplexity'"):
        info(objective="perplexity")


def test_generate_arguments_become_plain_notes() -> None:
    kept = info(generate_arguments={"a": (1, np.float32(0.5)), "b": math.inf, "c": object(), 3: None})
    assert kept.generate_arguments == {"a": [1, 0.5], "b": "inf", "c": "<builtins.object>", "3": None}


# ---- keeping -----------------------------------------------------------------------------------------

FINITE = st.floats(-1e12, 1e12) | st.sampled_from([0.0, -0.0, 5e-324, -2.2e-308, 0.1, 1 / 3])
WORDS = st.text(max_size=12)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    texts = draw(st.lists(WORDS, max_size=6))
    count, per_token = draw(st.integers(1, 4)), draw(st.booleans())
    rows = draw(st.lists(st.lists(FINITE, min_size=count, max_size=count), min_size=len(texts), max_size=len(texts)))
    scores = np.array(rows, dtype=float).reshape(len(texts), count)
    inside = np.array(draw(st.lists(FINITE, min_size=len(texts), max_size=len(texts))), dtype=float)
    layers = draw(st.lists(WORDS, max_size=3))
    return make(
        texts,
        count,
        scores=scores,
        per_token=per_token,
        prompt=draw(WORDS),
        prompt_ids=tuple(draw(st.lists(st.integers(0, 2**40), max_size=4))),
        client_ids=tuple(draw(st.lists(WORDS, min_size=count, max_size=count, unique=True))),
        token_residual=inside if per_token else None,
        residual=inside.sum(),
        change=scores.sum() + inside.sum(),
        layer_totals=np.array([draw(FINITE)] * len(layers) * count).reshape(len(layers), count),
        info=info(
            layers=tuple(layers),
            model=draw(WORDS),
            seed=draw(st.none() | st.integers()),
            seconds_trace=draw(FINITE),
            versions=draw(st.dictionaries(WORDS, WORDS, max_size=3)),
            generate_arguments=draw(
                st.dictionaries(WORDS, st.none() | st.booleans() | FINITE | WORDS | st.lists(FINITE), max_size=3)
            ),
        ),
    )


def bits(trace: Trace) -> list[bytes]:
    names = ("weights", "token_scores", "totals", "objective_values", "token_residual", "layer_totals")
    return [b"" if getattr(trace, n) is None else getattr(trace, n).tobytes() for n in names]


@settings(deadline=None)
@given(traces())
def test_saved_traces_load_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    trace.save(path)
    back = Trace.load(path)
    assert back == trace
    assert bits(back) == bits(trace)
    assert math.copysign(1, back.residual) == math.copysign(1, trace.residual)


@settings(deadline=None)
@given(traces())
def test_dictionary_survives_any_json_library(trace: Trace) -> None:
    assert from_dict(json.loads(json.dumps(trace.to_dict(), allow_nan=False))) == trace


def test_saving_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")
    make().save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    with pytest.raises(FileNotFoundError):
        make().save(tmp_path / "missing" / "trace.json")


def damaged(change: Any) -> str:
    data = to_dict(make())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "UTF-8 JSON"),
        ("[]", "a JSON object"),
        ("[" * 200_000, "UTF-8 JSON"),
        (b"\xff\xfe", "UTF-8 JSON"),
        ('{"a": 1, "a": 2}', "duplicate keys"),
        ('{"format": NaN}', "finite numbers, got NaN"),
        ('{"format": -Infinity}', "finite numbers, got -Infinity"),
        ('{"format": ' + "9" * 5000 + "}", "UTF-8 JSON"),
        (damaged(lambda d: d.update(format="other")), "format: expected protoken.trace"),
        (damaged(lambda d: d.update(schema=2)), "schema: expected 1, got 2"),
        (damaged(lambda d: d.update(schema=True)), "schema"),
        (damaged(lambda d: d.update(surprise=1)), "surprise"),
        (damaged(lambda d: d.pop("totals")), "totals"),
        (damaged(lambda d: d["info"].pop("way")), "way"),
        (damaged(lambda d: d["info"].update(objective=[])), "objective"),
        (damaged(lambda d: d["info"].update(seed=1.5)), "seed"),
        (damaged(lambda d: d["info"].update(versions={"a": 1})), "versions"),
        (damaged(lambda d: d["tokens"].append(3)), "tokens"),
        (damaged(lambda d: d["tokens"][0].update(id=True)), "tokens"),
        (damaged(lambda d: d["tokens"][0].update(text=None)), "token text"),
        (damaged(lambda d: d["weights"].append("1")), "weights"),
        (damaged(lambda d: d.update(token_scores=[[1.0]])), "token_scores"),
        (damaged(lambda d: d.update(token_scores={})), "token_scores"),
        (damaged(lambda d: d.update(change=True)), "change"),
        (damaged(lambda d: d["totals"].__setitem__(0, 10**400)), "trace"),
        (damaged(lambda d: None).replace('"residual": ', '"residual": 1e999, "x": '), "x"),
        (damaged(lambda d: d.update(residual=0.0, change=1.0)), "add up"),
        (damaged(lambda d: d.update(prompt="\ud800")), "surrogate"),
    ],
)
def test_files_that_are_no_trace_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TraceFormatError, match=message):
        Trace.load(path)


@settings(deadline=None)
@given(st.data())
def test_any_cut_or_flipped_byte_loads_or_is_refused_by_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(json.dumps(to_dict(make())).encode())
    place = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[place] ^= data.draw(st.integers(1, 255))
    else:
        del raw[place:]
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    path.write_bytes(raw)
    try:
        found = Trace.load(path)
    except TraceFormatError:
        return
    assert isinstance(found, Trace)


def test_oversized_files_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    make().save(path)
    with pytest.raises(TraceFormatError, match="at most 100 bytes"):
        load(path, max_bytes=100)
    assert load(path, max_bytes=path.stat().st_size) == make()


def test_named_pipes_and_folders_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceFormatError, match="a regular file"):
        Trace.load(tmp_path / "pipe")
    with pytest.raises((TraceFormatError, IsADirectoryError)):
        Trace.load(tmp_path)


def test_missing_file_is_the_usual_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "nothing.json")


def test_dataframe_is_long_form() -> None:
    pytest.importorskip("pandas")
    trace = make()
    frame = trace.to_dataframe()
    assert list(frame.columns) == ["index", "id", "token", "client", "score"]
    assert len(frame) == 15
    assert frame.groupby("client")["score"].sum().to_numpy() == pytest.approx(trace.totals)
    assert "".join(frame.drop_duplicates("index")["token"]) == trace.response


def test_dataframe_without_pandas_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'protoken\[pandas\]'") as caught:
        make().to_dataframe()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, ProtokenError)


def test_equality_sees_every_field() -> None:
    trace = make()
    assert trace == make()
    assert trace != make(seed=1)
    assert trace != replace(trace, prompt="other")
    assert trace != make(per_token=False)
    assert trace != "trace"
