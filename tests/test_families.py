"""Every family of the table: all ways against the oracle, and left-padded batches against single prompts."""

from __future__ import annotations

import pytest
import torch
from tiny_federation import CLIENTS, WEIGHTS, TinyFederation, tiny_federation
from tiny_models import OTHER_FAMILIES
from tolerances import close
from transformers.pytorch_utils import Conv1D

import protoken
from protoken.methods.paper import paper_scores
from protoken.models.architectures import architecture_of
from protoken.models.families import FAMILIES

PROMPTS = [[5, 17, 42, 8, 60, 33, 21], [11, 9], [70, 3, 88, 14]]


@pytest.fixture(scope="module", params=tuple(OTHER_FAMILIES))
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"), request.param)


def oracle(federation: TinyFederation, trace: protoken.Trace) -> torch.Tensor:
    """[T, K] by the published double loop."""
    record, model = federation.ledger.round("last"), federation.model
    deltas = {}
    for layer in trace.info.layers:
        transposed = isinstance(model.get_submodule(layer), Conv1D)
        deltas[layer] = [record.delta(client, f"{layer}.weight") for client in CLIENTS]
        deltas[layer] = [delta.T if transposed else delta for delta in deltas[layer]]
    ids = torch.tensor([[*trace.prompt_ids, *(token.id for token in trace.token_list)]])
    scores, _ = paper_scores(model, ids, len(trace.prompt_ids), deltas, trace.info.objective)
    return scores.sum(0) * torch.tensor(WEIGHTS, dtype=torch.float64)


@pytest.mark.parametrize("objective", ["log_prob", "log_odds", "logit"])
def test_all_ways_equal_the_oracle(federation: TinyFederation, objective: str) -> None:
    arguments = {"max_new_tokens": 6, "do_sample": True, "seed": 2, "objective": objective}
    for choice in ({}, {"blocks": 3}, {"blocks": 3, "way": "reverse"}):
        trace = protoken.trace(federation.model, PROMPTS[0], ledger=federation.path, **arguments, **choice)
        expected = oracle(federation, trace)
        if trace.token_scores is not None:
            close(torch.tensor(trace.token_scores), expected, torch.float32)
        else:
            error = (torch.tensor(trace.totals) - expected.sum(0)).norm()
            assert error < 1e-5 * expected.norm()
        assert trace.conservation_residual < 1e-4


def test_left_padded_batch_equals_each_prompt_alone(federation: TinyFederation) -> None:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    with protoken.tracing(federation.model, ledger=federation.path, blocks=2) as tape:
        federation.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    for traced, prompt in zip(tape, PROMPTS, strict=True):
        alone = protoken.trace(
            federation.model, prompt, ledger=federation.path, blocks=2, max_new_tokens=5, do_sample=False
        )
        assert [t.id for t in traced.token_list] == [t.id for t in alone.token_list]
        close(torch.tensor(traced.token_scores), torch.tensor(alone.token_scores), torch.float32, factor=3)


def test_family_has_a_row_in_the_table(federation: TinyFederation) -> None:
    found = architecture_of(federation.model)
    assert found.known
    assert found.family in FAMILIES


def test_family_without_a_row_is_found_by_structure(
    federation: TinyFederation, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = architecture_of(federation.model)
    monkeypatch.delitem(FAMILIES, expected.family)
    found = architecture_of(federation.model)
    assert not found.known
    assert (found.out_projection, found.mlp_final) == (expected.out_projection, expected.mlp_final)
