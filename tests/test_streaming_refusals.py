"""`stream`: what it does not do is refused at once, with a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stream_cases import GREEDY, streamed
from test_trace_errors import BAD_CALLS, failing, fingerprint
from tiny_federation import TinyFederation, tiny_federation
from transformers import LogitsProcessor, LogitsProcessorList

from protoken import errors

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("llama"))


UNSTREAMABLE: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "an assistant": {"assistant_model": object()},
    "guidance": {"guidance_scale": 1.5},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "custom decoding": {"custom_generate": failing},
    "paged cache": {"cache_implementation": "paged"},
    "padding": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])},
}


@pytest.mark.parametrize("arguments", UNSTREAMABLE.values(), ids=UNSTREAMABLE.keys())
def test_what_cannot_stream_is_refused_at_once_with_a_remedy(llama: TinyFederation, arguments: dict[str, Any]) -> None:
    before = fingerprint(llama.model)
    with pytest.raises(errors.GenerationError) as caught:
        streamed(llama, max_new_tokens=3, **arguments)
    assert caught.value.remedy
    assert fingerprint(llama.model) == before


def test_modes_of_a_generation_config_are_seen(llama: TinyFederation) -> None:
    config = llama.model.generation_config
    config.num_beams = 2
    try:
        with pytest.raises(errors.GenerationError, match="num_beams"):
            streamed(llama, **GREEDY)
        assert len(list(streamed(llama, num_beams=1, **GREEDY))) == 6
    finally:
        config.num_beams = None


@pytest.mark.parametrize("prompt", [torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]], ["one", "two"]])
def test_several_prompts_are_refused(llama: TinyFederation, prompt: Any) -> None:
    with pytest.raises(errors.GenerationError, match=r"one prompt.*tracing"):
        streamed(llama, prompt, **GREEDY)


@pytest.mark.parametrize("arguments", [{"blocks": 2}, {"way": "reverse"}, {"method": "paper"}])
def test_other_depths_and_methods_point_to_trace(llama: TinyFederation, arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.ArgumentError, match=r"protoken\.trace"):
        streamed(llama, **arguments)
    assert len(list(streamed(llama, blocks=1, way="local", method="protoken", **GREEDY))) == 6


def test_layer_that_talks_to_other_positions_is_refused(llama: TinyFederation) -> None:
    with pytest.raises(errors.ArgumentError, match="way"):
        streamed(llama, layers=["self_attn.v_proj"])


def _same_as_trace() -> list[str]:
    own = {"blocks", "way", "method", "num_beams"}
    # A stream of several texts has a remedy of its own: see test_several_prompts_are_refused.
    return [name for name, (_, given, _) in BAD_CALLS.items() if not own & set(given) and name != "several texts"]


@pytest.mark.parametrize("name", _same_as_trace())
def test_bad_calls_are_refused_as_by_trace(llama: TinyFederation, name: str) -> None:
    expected, arguments, prompt = BAD_CALLS[name]
    before = fingerprint(llama.model)
    with pytest.raises(expected):
        streamed(llama, prompt, **{"max_new_tokens": 4, **arguments})
    assert fingerprint(llama.model) == before


def test_inference_mode_is_refused(llama: TinyFederation) -> None:
    with torch.inference_mode(), pytest.raises(errors.ModelError, match="inference"):
        streamed(llama, **GREEDY)


def test_processor_that_runs_the_model_is_noticed(llama: TinyFederation) -> None:
    class Again(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            llama.model(input_ids[:, -1:])
            return scores

    before = fingerprint(llama.model)
    with pytest.raises(errors.GenerationError, match="passes"):
        list(streamed(llama, logits_processor=LogitsProcessorList([Again()]), **GREEDY))
    assert fingerprint(llama.model) == before
