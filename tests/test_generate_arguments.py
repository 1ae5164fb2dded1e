"""What `generate` can be told, and where: by argument, by a configuration of the call, or by the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import equals_oracle
from tiny_federation import TinyFederation, tiny_federation
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper

import protoken
from protoken import errors

PROMPT = [5, 17, 42, 8, 60, 33, 21]
BATCH = torch.tensor([PROMPT, [0, 0, 0, 11, 9, 70, 3]])
PADDED = (BATCH != 0).long()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def own_config(federation: TinyFederation) -> Iterator[GenerationConfig]:
    """The model's own generation configuration, put back afterwards."""
    kept = federation.model.generation_config
    federation.model.generation_config = GenerationConfig(**kept.to_dict())
    yield federation.model.generation_config
    federation.model.generation_config = kept


def trace(federation: TinyFederation, **arguments: Any) -> protoken.Trace:
    return protoken.trace(federation.model, PROMPT, ledger=federation.path, **arguments)


def recorded(federation: TinyFederation, ids: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, protoken.Tape]:
    with protoken.tracing(federation.model, ledger=federation.path) as tape:
        output = federation.model.generate(ids, **arguments)
    return output, tape


def test_several_sequences_asked_for_by_a_configuration_are_refused(
    federation: TinyFederation, own_config: GenerationConfig
) -> None:
    several = GenerationConfig(num_beams=3, num_return_sequences=2, max_new_tokens=4)
    with pytest.raises(errors.ArgumentError, match="num_return_sequences: expected 1, got 2"):
        trace(federation, generation_config=several)
    own_config.num_return_sequences, own_config.do_sample = 2, True
    with pytest.raises(errors.ArgumentError, match="num_return_sequences: expected 1, got 2"):
        trace(federation, max_new_tokens=4)
    assert len(trace(federation, max_new_tokens=4, num_return_sequences=1).token_list) == 4


def test_configuration_of_another_kind_is_refused(federation: TinyFederation) -> None:
    given: Any = {"generation_config": {"max_new_tokens": 3}}
    for call in (protoken.trace, protoken.stream, protoken.estimate):
        with pytest.raises(errors.ArgumentError, match=r"a transformers.GenerationConfig, got a dict"):
            call(federation.model, PROMPT, ledger=federation.path, **given)
    with pytest.raises(errors.ArgumentError, match=r"a transformers.GenerationConfig, got a dict"):
        recorded(federation, BATCH, **given)


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(1, 7), [[1] * 7], torch.tensor([[1, 1, 0, 1, 1, 1, 1]]), torch.ones(1, 9), torch.ones(1, 1, 7, 7)],
    ids=["nothing but padding", "list", "hole", "longer than the prompt", "four dimensions"],
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_mask_that_is_none_of_this_prompt_is_refused(federation: TinyFederation, mask: Any, blocks: int) -> None:
    with pytest.raises(errors.GenerationError, match="attention_mask: expected"):
        trace(federation, attention_mask=mask, max_new_tokens=3, blocks=blocks)
    with pytest.raises(errors.GenerationError, match="attention_mask: expected"):
        recorded(federation, BATCH[:1], attention_mask=mask, max_new_tokens=3)


def test_mask_that_is_no_tensor_is_refused_by_a_stream(federation: TinyFederation) -> None:
    with pytest.raises(errors.GenerationError, match="attention_mask: expected a tensor of ones, got a list"):
        protoken.stream(federation.model, PROMPT, ledger=federation.path, attention_mask=[[1] * 7])


@pytest.mark.parametrize("ids", [torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long)], ids=str)
def test_prompts_without_tokens_are_refused(federation: TinyFederation, ids: torch.Tensor) -> None:
    with pytest.raises(errors.GenerationError, match="at least one token in one prompt"):
        recorded(federation, ids, max_new_tokens=3)


def test_refused_tensor_is_named_by_its_shape(federation: TinyFederation) -> None:
    with pytest.raises(errors.ArgumentError, match=r"got a tensor of shape \(1, 7, 48\)") as raised:
        trace(federation, inputs_embeds=torch.randn(1, 7, 48))
    assert len(str(raised.value)) < 150


def test_stop_token_of_the_models_configuration_ends_a_row_under_a_configuration_of_the_call(
    federation: TinyFederation, own_config: GenerationConfig
) -> None:
    arguments: dict[str, Any] = {"attention_mask": PADDED, "do_sample": False}
    free = federation.model.generate(BATCH, max_new_tokens=8, **arguments)[:, 7:].tolist()
    stop = next(token for token in free[0][2:] if token not in free[1])
    own_config.eos_token_id = stop
    output, tape = recorded(federation, BATCH, generation_config=GenerationConfig(max_new_tokens=8), **arguments)
    assert output[0].tolist()[-1] == 0, "the row that stopped is padded up to the other"
    assert [token.id for token in tape[0].token_list] == free[0][: free[0].index(stop) + 1]
    assert [token.id for token in tape[1].token_list] == free[1]


@pytest.mark.parametrize("pads", ["argument", "configuration of the call", "model", "stop token, too"])
def test_mask_guessed_from_padding_is_that_of_transformers(
    federation: TinyFederation, own_config: GenerationConfig, pads: str
) -> None:
    own_config.pad_token_id, arguments = None, {"max_new_tokens": 5, "do_sample": False}
    if pads == "argument":
        arguments["pad_token_id"] = 0
    elif pads == "configuration of the call":
        arguments = {"generation_config": GenerationConfig(pad_token_id=0, **arguments)}
    elif pads == "model":
        own_config.pad_token_id = 0
    else:
        arguments |= {"pad_token_id": 0, "eos_token_id": [0, 96]}
    expected = federation.model.generate(BATCH, **arguments)
    output, tape = recorded(federation, BATCH, **arguments)
    assert output.tolist() == expected.tolist()
    assert tape[1].prompt_ids == tuple(BATCH[1].tolist() if "stop" in pads else BATCH[1, 3:].tolist())
    for one in tape:
        equals_oracle(federation.model, federation.ledger, one)


def test_padding_tokens_on_the_right_are_refused_also_without_a_mask(federation: TinyFederation) -> None:
    with pytest.raises(errors.GenerationError, match=r"\[1, 1, 1, 1, 0, 0, 0\] in row 1.*pass attention_mask="):
        recorded(federation, torch.tensor([PROMPT, [5, 6, 7, 8, 0, 0, 0]]), max_new_tokens=3)
    _, tape = recorded(federation, torch.tensor([[5, 6, 0, 8]]), max_new_tokens=3, attention_mask=torch.ones(1, 4))
    equals_oracle(federation.model, federation.ledger, tape[0])


def test_model_that_drafts_for_itself_leaves_one_trace(federation: TinyFederation) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = federation.model.generate(BATCH[:1], **arguments)
    output, tape = recorded(federation, BATCH[:1], assistant_model=federation.model, **arguments)
    assert output.tolist() == expected.tolist()
    assert len(tape) == 1
    equals_oracle(federation.model, federation.ledger, tape[0])


def test_argument_whose_repr_fails_costs_no_trace(federation: TinyFederation) -> None:
    found = trace(federation, max_new_tokens=3, prefix_allowed_tokens_fn=lambda *_: [7, 8])
    assert "lambda" in found.info.generate_arguments["prefix_allowed_tokens_fn"]
    config = GenerationConfig(max_new_tokens=3)
    config.eos_token_id = torch.tensor([96])  # its repr is JSON, which has no tensors
    found = trace(federation, generation_config=config)
    assert found.info.generate_arguments["generation_config"] == {"max_new_tokens": 3, "eos_token_id": [96]}

    class Odd(LogitsProcessorList):  # type: ignore[misc]
        def __repr__(self) -> str:
            raise ValueError("nobody knows")

    found = trace(federation, max_new_tokens=3, logits_processor=Odd([TemperatureLogitsWarper(2.0)]))
    assert found.info.generate_arguments["logits_processor"] == "<Odd>"


@pytest.mark.parametrize("name", ["forced_eos_token_id", "eos_token_id"])
def test_ids_of_a_setting_are_text_and_no_picture(federation: TinyFederation, name: str) -> None:
    found = trace(federation, num_beams=2, max_new_tokens=4, **{name: torch.tensor([96])})
    assert found.info.generate_arguments[name] == [96]
    assert found.lineage().totals.shape == (4,)


def test_positions_of_the_callers_own_are_traced_only_where_they_were_recorded(federation: TinyFederation) -> None:
    positions = {"position_ids": torch.arange(3, 10)[None], "max_new_tokens": 4, "do_sample": False}
    _, tape = recorded(federation, BATCH[:1], **positions)
    equals_oracle(federation.model, federation.ledger, tape[0])  # rotary angles know distances alone
    with pytest.raises(errors.GenerationError, match=r"position_ids: expected token ids.*run once more"):
        recorded(federation, BATCH[:1], num_beams=2, **positions)


def test_answer_to_more_than_text_is_not_asked_again_as_if_it_were_text(federation: TinyFederation) -> None:
    positions: dict[str, Any] = {"position_ids": torch.arange(3, 10)[None], "max_new_tokens": 4, "do_sample": False}
    for method in ("paper", "aumann_shapley", "leave_one_out"):
        with pytest.raises(errors.GenerationError, match=r"position_ids: expected token ids.*run once more"):
            trace(federation, method=method, **positions)
    _, tape = recorded(federation, BATCH[:1], **positions)
    for found in (trace(federation, **positions), tape[0]):
        assert found.info.generate_arguments["position_ids"] == "tensor of shape (1, 7)"
        for ask in (found.lineage, lambda found=found: found.counterfactual(without="ada")):
            with pytest.raises(errors.ArgumentError, match="with position_ids beside them, which it does not hold"):
                ask()
    masked = trace(federation, attention_mask=torch.ones(1, 7), max_new_tokens=4, do_sample=False)
    assert masked.info.generate_arguments["attention_mask"] == "tensor of shape (1, 7)"
    assert masked.lineage().totals.shape == (4,)
