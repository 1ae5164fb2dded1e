"""Responses that are there already: handed in by `response=`, and traces asked for their lineage."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from character_tokenizer import character_tokenizer
from test_trace_errors import fingerprint
from tiny_federation import CLIENTS, WEIGHTS, TinyFederation, tiny_federation
from tiny_models import CONFIGS
from tolerances import close

import protoken
from protoken.errors import ArgumentError, LedgerMismatchError, ModelError, PromptError
from protoken.methods.paper import paper_scores
from protoken.report.view import timing

PROMPT = [5, 17, 42, 8, 60, 33, 21]
UNLIKELY = [40, 3, 77, 12]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"), rounds=3, dtype=torch.float64)


def ask(federation: TinyFederation, **arguments: Any) -> protoken.Trace:
    return protoken.trace(federation.model, PROMPT, **{"ledger": federation.path, **arguments})


def new_ids(trace: protoken.Trace) -> list[int]:
    return [token.id for token in trace.token_list]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"blocks": 3, "way": "forward"},
        {"blocks": 3, "way": "reverse"},
        {"blocks": 2, "granularity": "position"},
        {"blocks": 2, "granularity": "layer"},
        {"method": "aumann_shapley", "rounds": "all"},
        {"method": "shapley"},
        {"method": "paper"},
    ],
    ids=str,
)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["list", "tensor"])
def test_its_own_response_handed_in_scores_as_it_did(
    llama: TinyFederation, arguments: dict[str, Any], as_tensor: bool
) -> None:
    made = ask(llama, max_new_tokens=6, do_sample=True, seed=3, **arguments)
    ids: Any = torch.tensor(new_ids(made)) if as_tensor else new_ids(made)
    again = ask(llama, response=ids, seed=3, **arguments)
    assert (again.info.forced, made.info.forced) == (True, False)
    assert (again.response, again.info.way, again.info.generate_arguments) == (made.response, made.info.way, {})
    for name in ("totals", "token_scores", "token_layer_scores", "position_scores", "objective_values"):
        one, other = getattr(again, name), getattr(made, name)
        assert (one is None) == (other is None)
        if one is not None:
            close(torch.tensor(one), torch.tensor(other), torch.float64)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_response_the_model_would_not_give_equals_the_oracle(tmp_path: Path, family: str) -> None:
    federation = tiny_federation(tmp_path, family)
    trace = ask(federation, response=UNLIKELY)
    record = federation.ledger.round("last")
    deltas = {n: [record.delta(c, f"{n}.weight") for c in CLIENTS] for n in trace.info.layers}
    scores, _ = paper_scores(federation.model, torch.tensor([[*PROMPT, *UNLIKELY]]), len(PROMPT), deltas, "log_prob")
    expected = (scores * torch.tensor(WEIGHTS, dtype=torch.float64)).sum(0)
    close(torch.tensor(trace.token_scores), expected, torch.float32)


def test_text_is_encoded_as_it_stands(tmp_path: Path) -> None:
    federation, tokenizer = tiny_federation(tmp_path, "smollm"), character_tokenizer()
    trace = protoken.trace(
        federation.model, "Why?", ledger=federation.path, tokenizer=tokenizer, response=" I am\nsorry."
    )
    assert trace.response == " I am\nsorry."
    assert new_ids(trace) == tokenizer(" I am\nsorry.", add_special_tokens=False)["input_ids"]
    assert trace.prompt == "u:Why?<eos>a:"
    assert len(trace.find("sorry")) == 1


def test_that_it_was_handed_in_is_kept_and_shown(llama: TinyFederation, tmp_path: Path) -> None:
    given, made = ask(llama, response=UNLIKELY), ask(llama, max_new_tokens=3)
    for trace in (given, given.lineage()):
        trace.save(tmp_path / "trace.json")
        assert protoken.Trace.load(tmp_path / "trace.json") == trace
        page = trace.to_html()
        assert "handed in, not generated" in page
        assert "nothing was generated" in page
        assert "to generate" not in page
        assert timing(trace).startswith("attributed in ")
    assert "handed in, not generated" not in made.to_html()
    assert not made.lineage().info.forced


BAD_RESPONSES: dict[str, tuple[Any, dict[str, Any], str, type[Exception]]] = {
    "empty ids": ([], {}, "response", PromptError),
    "empty text": ("", {"tokenizer": character_tokenizer()}, "response", PromptError),
    "text without tokenizer": ("sorry", {}, "tokenizer", PromptError),
    "id beyond the vocabulary": ([5, 9999], {}, "response", PromptError),
    "negative id": ([-1], {}, "response", PromptError),
    "fractions": ([1.5], {}, "response", PromptError),
    "a number": (7, {}, "response", PromptError),
    "two rows": (torch.ones(2, 3, dtype=torch.long), {}, "response", PromptError),
    "a float tensor": (torch.ones(3), {}, "response", PromptError),
    "longer than the window": ([5] * 200, {}, "prompt", PromptError),
    "beside a length": ([5], {"max_new_tokens": 4}, "max_new_tokens", ArgumentError),
    "beside sampling": ([5], {"do_sample": False}, "do_sample", ArgumentError),
    "under too low a ceiling": ([5] * 40, {"memory_limit": 10}, "memory_limit", ArgumentError),
}


@pytest.mark.parametrize(
    ("response", "arguments", "named", "expected"), BAD_RESPONSES.values(), ids=BAD_RESPONSES.keys()
)
def test_what_is_no_response_is_refused(
    llama: TinyFederation, response: Any, arguments: dict[str, Any], named: str, expected: type[Exception]
) -> None:
    before = fingerprint(llama.model)
    with pytest.raises(expected) as caught:
        ask(llama, response=response, **arguments)
    assert getattr(caught.value, "argument", None) == named
    assert fingerprint(llama.model) == before


def log_odds(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """sum_t log(p_t / (1 - p_t)) of the ids after PROMPT, as the formula reads."""
    logits = model(torch.tensor([ids])).logits[0, len(PROMPT) - 1 : -1]
    p = logits.softmax(-1)[torch.arange(len(ids) - len(PROMPT)), ids[len(PROMPT) :]]
    return (p.log() - (1 - p).log()).sum()


def at(federation: TinyFederation, share: float) -> dict[str, torch.Tensor]:
    """The parameters on the path from the first model to the last one, whose change is all clients' and no more."""
    rounds = [federation.ledger.round(number) for number in federation.ledger.rounds]
    return {
        n: federation.model.get_parameter(n).detach()
        - (1 - share) * sum(w * r.delta(c, n) for r in rounds for c, w in zip(CLIENTS, WEIGHTS, strict=True))
        for n in rounds[-1].parameters
    }


def test_lineage_is_the_gradient_half_way_on_every_clients_updates(llama: TinyFederation) -> None:
    trace = ask(llama, max_new_tokens=5)
    before = fingerprint(llama.model)
    lineage = trace.lineage()
    assert fingerprint(llama.model) == before
    model, middle = llama.model, at(llama, 0.5)
    ids = [*PROMPT, *new_ids(trace)]
    leaves = {n: value.requires_grad_() for n, value in middle.items()}
    gradient = torch.autograd.grad(
        log_odds(lambda x: torch.func.functional_call(model, leaves, x), ids), list(leaves.values())
    )
    rounds = [llama.ledger.round(number) for number in llama.ledger.rounds]
    expected = []
    for client, weight in zip(CLIENTS, WEIGHTS, strict=True):
        moved = [sum(r.delta(client, n) * weight for r in rounds) for n in leaves]
        expected.append(sum(float((g * d).sum()) for g, d in zip(gradient, moved, strict=True)))
    # Updates are summed in single precision, whatever the model's own.
    close(torch.tensor(lineage.totals), torch.tensor(expected), torch.float32)
    assert (lineage.response, lineage.info.rounds) == (trace.response, (1, 2, 3))
    assert (lineage.info.method, lineage.info.objective) == ("aumann_shapley", "log_odds")


def test_lineage_by_the_whole_path_adds_up_to_what_the_federation_changed(llama: TinyFederation) -> None:
    trace = ask(llama, max_new_tokens=5)
    ids = [*PROMPT, *new_ids(trace)]
    with torch.no_grad():
        ends = [
            float(log_odds(lambda x, w=at(llama, s): torch.func.functional_call(llama.model, w, x), ids))
            for s in (0.0, 1.0)
        ]
    whole = trace.lineage(nodes=None)
    assert whole.change == pytest.approx(ends[1] - ends[0], rel=2e-6)
    assert whole.totals.sum() + whole.residual == pytest.approx(whole.change, rel=1e-9)
    assert abs(whole.residual) < 1e-3 * abs(whole.change)
    per_token = trace.lineage(nodes=None, granularity="token")
    np.testing.assert_allclose(per_token.token_scores.sum(0), whole.totals, rtol=1e-6)


def test_lineage_of_a_loaded_trace_needs_its_model(llama: TinyFederation, tmp_path: Path) -> None:
    trace = ask(llama, max_new_tokens=4)
    trace.save(tmp_path / "trace.json")
    loaded = protoken.Trace.load(tmp_path / "trace.json")
    with pytest.raises(ModelError, match="gone"):
        loaded.lineage()
    again = loaded.lineage(model=llama.model, ledger=llama.path)
    np.testing.assert_array_equal(again.totals, trace.lineage().totals)


def test_a_trace_travels_to_another_process_as_into_a_file(llama: TinyFederation) -> None:
    trace = protoken.trace(llama.model, PROMPT, ledger=llama.path, max_new_tokens=3)
    there = pickle.loads(pickle.dumps(trace))
    assert there == trace
    with pytest.raises(ModelError, match="Pass model= and ledger="):
        there.lineage()
    np.testing.assert_array_equal(copy.deepcopy(trace).lineage().totals, trace.lineage().totals)


def test_the_rest_of_an_answer_has_no_lineage_of_its_own(llama: TinyFederation) -> None:
    trace = ask(llama, max_new_tokens=6)
    where = {"model": llama.model, "ledger": llama.path}
    rest, begin = trace.span(2, 6), trace.span(0, 2)
    for refused in (
        lambda: rest.lineage(**where),
        lambda: rest.counterfactual("ada", **where),
        lambda: protoken.record_probe(rest, **where),
    ):
        with pytest.raises(ArgumentError, match="from token 2 on"):
            refused()
    np.testing.assert_allclose(
        begin.counterfactual("ada", **where).after, trace.counterfactual("ada").after[:2], rtol=1e-9
    )


def test_lineage_of_an_attached_model_reads_its_ledger_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from protoken import attachment

    federation = tiny_federation(tmp_path, rounds=2)
    protoken.attach(federation.model, federation.path)
    read = []
    own = attachment.read_updates
    monkeypatch.setattr(attachment, "read_updates", lambda *given: read.append(given) or own(*given))
    trace = protoken.trace(federation.model, PROMPT, max_new_tokens=3)
    first = trace.lineage()
    np.testing.assert_array_equal(trace.lineage().totals, first.totals)
    assert len(read) == 1
    protoken.detach(federation.model)
    np.testing.assert_array_equal(trace.lineage().totals, first.totals)


def test_traces_keep_neither_updates_nor_checks_of_weights_that_are_others_now(tmp_path: Path) -> None:
    federation = tiny_federation(tmp_path, rounds=2)
    protoken.attach(federation.model, federation.path)
    trace = protoken.trace(federation.model, PROMPT, max_new_tokens=3)
    trace.lineage()
    kept = weakref.ref(attachment_of(federation.model))
    protoken.detach(federation.model)
    gc.collect()
    assert kept() is None
    with torch.no_grad():
        next(iter(federation.model.model.layers[0].parameters())).add_(1.0)
    with pytest.raises(LedgerMismatchError):
        trace.lineage()


def attachment_of(model: torch.nn.Module) -> Any:
    from protoken.attachment import attachment_of as own

    return own(model)
