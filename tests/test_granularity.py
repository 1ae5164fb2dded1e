"""What a score is of: client, token, token and layer, position; every one equal to the published double loop."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import equals_oracle
from tiny_federation import CLIENTS, TinyFederation, tiny_federation
from tolerances import close

import protoken
from protoken import errors
from protoken.models.architectures import architecture_of
from protoken.planning.options import Options, bytes_of
from protoken.planning.plan import make_plan

PROMPT = [5, 17, 42, 8, 60, 33, 21]
# A plain one, one whose weights lie as (in, out), sliding windows with norms behind the projections, parallel blocks
# with flat rows, experts, and one that returns tuples.
FAMILIES = ("llama", "gpt2", "gemma3", "falcon", "opt", "mixtral", "bloom")
ASKED: dict[str, dict[str, Any]] = {
    "local, layer": {"granularity": "layer"},
    "local, sequence": {"granularity": "sequence"},
    "forward, layer": {"granularity": "layer", "way": "forward", "blocks": 3},
    "reverse, token": {"granularity": "token", "way": "reverse", "blocks": 3},
    "reverse, layer": {"granularity": "layer", "way": "reverse", "blocks": 3},
    "reverse, sequence": {"granularity": "sequence", "blocks": 3},
}


@pytest.fixture(scope="module", params=FAMILIES)
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"))


def run(federation: TinyFederation, **arguments: Any) -> protoken.Trace:
    arguments = {"max_new_tokens": 5, "do_sample": True, "seed": 3, **arguments}
    return protoken.trace(federation.model, PROMPT, ledger=federation.path, **arguments)


@pytest.mark.parametrize("asked", ASKED)
def test_every_granularity_equals_the_oracle(federation: TinyFederation, asked: str) -> None:
    trace = run(federation, **ASKED[asked])
    assert f"{trace.info.way}, {trace.info.granularity}" == asked
    assert (trace.token_scores is None) == (trace.info.granularity == "sequence")
    assert (trace.token_layer_scores is None) == (trace.info.granularity != "layer")
    equals_oracle(federation.model, federation.ledger, trace)
    assert trace.conservation_residual < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
def test_positions_equal_the_oracle(tmp_path: Path, family: str, objective: str) -> None:
    federation = tiny_federation(tmp_path, family)
    for chosen in ({"blocks": 3}, {"layers": ["self_attn.v_proj", "attn.c_attn"][family == "gpt2" :][:1]}):
        trace = run(federation, granularity="position", objective=objective, **chosen)
        assert trace.position_scores is not None
        assert trace.position_scores.shape == (len(PROMPT) - 1 + 5, len(CLIENTS))
        assert (abs(trace.position_scores[: len(PROMPT) - 1, 0]) > 0).all()
        equals_oracle(federation.model, federation.ledger, trace)
        close(torch.tensor(trace.position_scores.sum(0)), torch.tensor(trace.totals), torch.float64)


def test_positions_of_experts_add_up_to_the_totals(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, "mixtral")
    trace = run(federation, granularity="position", blocks=3)
    totals = run(federation, way="reverse", blocks=3)
    close(torch.tensor(trace.position_scores).sum(0), torch.tensor(totals.totals), torch.float32, factor=3)


@pytest.mark.parametrize("way", ["forward", "reverse"])
def test_embeddings_and_head_are_told_apart_too(tmp_path: Path, way: str) -> None:
    federation = tiny_federation(tmp_path, "llama", ends=True)
    layers = ["model.embed_tokens", "self_attn.o_proj", "lm_head"]
    trace = run(federation, granularity="layer", way=way, blocks=4, layers=layers)
    assert trace.info.layers[0] == "model.embed_tokens"
    equals_oracle(federation.model, federation.ledger, trace)
    if way == "reverse":
        by_position = run(federation, granularity="position", blocks=4, layers=layers)
        close(torch.tensor(by_position.totals), torch.tensor(trace.totals), torch.float32, factor=3)


def test_double_precision_is_kept(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, "gpt2", dtype=torch.float64)
    forward = run(federation, granularity="layer", way="forward", blocks=3)
    reverse = run(federation, granularity="layer", way="reverse", blocks=3)
    close(torch.tensor(reverse.token_layer_scores), torch.tensor(forward.token_layer_scores), torch.float64)


@pytest.mark.parametrize("granularity", ["sequence", "token", "layer", "position"])
def test_lineage_over_rounds_equals_the_oracle(tmp_path: Path, granularity: str) -> None:
    """Updates that are sums over rounds, scored at every granularity by the reverse way."""
    federation = tiny_federation(tmp_path, rounds=2)
    trace = run(federation, granularity=granularity, way="reverse", blocks=2, rounds="all")
    equals_oracle(federation.model, federation.ledger, trace)


def test_null_client_scores_exactly_zero_everywhere(llama: TinyFederation) -> None:
    null = CLIENTS.index("null")
    assert (run(llama, granularity="layer", way="reverse", blocks=2).token_layer_scores[..., null] == 0).all()
    assert (run(llama, granularity="position", blocks=2).position_scores[:, null] == 0).all()


def test_published_method_has_layers_too(llama: TinyFederation) -> None:
    trace = run(llama, method="paper", granularity="layer")
    assert trace.token_layer_scores.shape == (5, 2, len(CLIENTS))
    close(torch.tensor(trace.token_layer_scores.sum(1)), torch.tensor(trace.token_scores), torch.float64)
    assert run(llama, method="paper", granularity="sequence").token_scores is None


REFUSED: dict[str, dict[str, Any]] = {
    "positions forward": {"granularity": "position", "way": "forward", "blocks": 2},
    "positions local": {"granularity": "position", "way": "local"},
    "positions of layers that none sees": {"granularity": "position"},
    "totals forward": {"granularity": "sequence", "way": "forward", "blocks": 2},
    "positions published": {"granularity": "position", "method": "paper"},
    "layers of a game": {"granularity": "layer", "method": "shapley"},
    "tokens against the way": {"granularity": "token", "way": "reverse", "method": "aumann_shapley"},
    "a word": {"granularity": "word"},
    "nodes of the published": {"method": "paper", "nodes": 4},
    "nodes at one point": {"nodes": 1},
    "pairs of a path": {"method": "aumann_shapley", "pairs": 3},
    "a ceiling for a game": {"method": "leave_one_out", "memory_limit": "1GB"},
    "a ceiling for the published": {"method": "paper", "memory_limit": "1GB"},
}


@pytest.mark.parametrize("asked", REFUSED.values(), ids=REFUSED)
def test_what_is_not_offered_is_refused_with_the_reason(llama: TinyFederation, asked: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentError, match="expected"):
        make_plan(architecture_of(llama.model), Options(**asked))


def test_a_count_that_the_method_has_not_is_refused_by_name(llama: TinyFederation) -> None:
    with pytest.raises(errors.ArgumentError, match=r"^pairs: .*shapley and paired_shapley.*got 3"):
        protoken.trace(llama.model, [5, 6, 7], ledger=llama.path, method="leave_one_out", pairs=3)


def test_way_is_the_cheaper_one_and_says_why(llama: TinyFederation) -> None:
    few, many = run(llama, blocks=3, max_new_tokens=2), run(llama, blocks=3, max_new_tokens=30)
    assert (few.info.way, many.info.way) == ("reverse", "forward")
    for trace in (few, many):
        assert "least work" in trace.info.reason
        assert "forward" in trace.info.reason
        assert "reverse" in trace.info.reason
    assert run(llama).info.reason.startswith("exact here")
    assert run(llama, way="reverse").info.reason == "asked for"


def test_trace_with_every_granularity_is_saved_and_loaded(llama: TinyFederation, tmp_path: Path) -> None:
    for granularity in ("sequence", "token", "layer", "position"):
        trace = run(llama, granularity=granularity, blocks=2)
        trace.save(tmp_path / "trace.json")
        assert protoken.Trace.load(tmp_path / "trace.json") == trace
        page = trace.to_html()
        assert trace.info.reason in page
        assert ("Position by position" in page) == (granularity == "position")


def test_span_keeps_layers_apart(llama: TinyFederation) -> None:
    trace = run(llama, granularity="layer", blocks=2, way="reverse")
    part = trace.span(1, 3)
    assert (part.token_layer_scores == trace.token_layer_scores[1:3]).all()
    close(torch.tensor(part.layer_totals), torch.tensor(trace.token_layer_scores[1:3].sum(0)), torch.float64)


def test_tables_hold_one_score_per_row(llama: TinyFederation) -> None:
    pytest.importorskip("pandas")
    trace = run(llama, granularity="layer", blocks=2, way="reverse")
    frame = trace.to_dataframe("layer")
    assert list(frame.columns) == ["index", "id", "token", "layer", "client", "score"]
    assert len(frame) == 5 * 4 * len(CLIENTS)
    one = frame[(frame["index"] == 2) & (frame["layer"] == trace.info.layers[1]) & (frame["client"] == "cleo")]
    assert one["score"].item() == trace.token_layer_scores[2, 1, 2]
    by_position = run(llama, granularity="position", blocks=2).to_dataframe("position")
    assert by_position["id"].tolist()[:: len(CLIENTS)][: len(PROMPT)] == PROMPT
    assert trace.to_dataframe("sequence")["score"].tolist() == trace.totals.tolist()
    with pytest.raises(errors.ArgumentError, match='granularity="position"'):
        trace.to_dataframe("position")


@pytest.mark.parametrize("function", [protoken.trace, protoken.tracing, protoken.estimate], ids=lambda f: f.__name__)
def test_signatures_offer_the_same_choices(function: Any) -> None:
    given = inspect.signature(function).parameters
    for field in fields(Options):
        assert given[field.name].default == field.default, field.name
        assert given[field.name].kind is inspect.Parameter.KEYWORD_ONLY


def test_estimate_is_reached_from_trace_too() -> None:
    assert protoken.trace.estimate is protoken.estimate  # type: ignore[attr-defined]


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"2GB": 2 * 10**9, "512 MiB": 512 << 20, "1.5k": 1500, " 7 ": 7, "1tib": 1 << 40, 9: 9}
    assert {given: bytes_of(given) for given in sizes} == sizes
    for wrong in ("", "two", "1.2.3GB", "5XB", "-1", 0, -4, 1.5, True, "0"):
        with pytest.raises(errors.ArgumentError, match="2GB"):
            bytes_of(wrong)  # type: ignore[arg-type]
