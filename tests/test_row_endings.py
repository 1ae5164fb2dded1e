"""Where each row of a batch ends: at a stop string, at a criterion of the caller's, and never at what only looks so."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from character_tokenizer import character_tokenizer
from oracle import equals_oracle
from tiny_federation import TinyFederation, tiny_federation
from transformers import StoppingCriteria, StoppingCriteriaList

import protoken

PROMPTS = torch.tensor([[5, 17, 42, 8, 60, 33, 21], [0, 0, 0, 11, 9, 70, 3], [0, 0, 0, 0, 0, 90, 14]])
WIDTH, PAD, EOS = PROMPTS.shape[1], 0, 2


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"))


class RowByRow(StoppingCriteria):  # type: ignore[misc]
    """Row i ends after first + i tokens; how often it was asked is counted."""

    def __init__(self, first: int = 2) -> None:
        self.first, self.asked = first, 0

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
        self.asked += 1
        new = input_ids.shape[1] - WIDTH
        return torch.tensor([new >= self.first + row for row in range(input_ids.shape[0])])


def recorded(
    federation: TinyFederation,
    ids: torch.Tensor = PROMPTS,
    options: Mapping[str, Any] = MappingProxyType({}),
    **arguments: Any,
) -> tuple[torch.Tensor, protoken.Tape]:
    given = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "do_sample": False}
    given |= {"pad_token_id": PAD, "eos_token_id": EOS}
    with protoken.tracing(federation.model, ledger=federation.path, tokenizer=character_tokenizer(), **options) as tape:
        output = federation.model.generate(ids, **{**given, **arguments})
    return output, tape


def new_ids(trace: protoken.Trace) -> list[int]:
    return [token.id for token in trace.token_list]


def free(federation: TinyFederation, **arguments: Any) -> list[list[int]]:
    """What the rows would say without anything that stops them, EOS included."""
    output, _ = recorded(federation, eos_token_id=None, **arguments)
    return output[:, WIDTH:].tolist()


def up_to(tokens: list[int], stops: set[int]) -> list[int]:
    return tokens[: next((n for n, token in enumerate(tokens, 1) if token in stops), len(tokens))]


def stop_strings(federation: TinyFederation) -> tuple[list[str], set[int]]:
    """The third token of the first row as text: it ends that row, and not every other as early."""
    token = free(federation)[0][2]
    return [character_tokenizer().decode([token])], {token}


@pytest.mark.parametrize("blocks", [{}, {"blocks": 2}], ids=["local", "forward"])
def test_a_row_ends_with_its_stop_string(federation: TinyFederation, blocks: dict[str, int]) -> None:
    texts, stops = stop_strings(federation)
    expected = [up_to(row, stops) for row in free(federation)]
    assert len({len(row) for row in expected}) > 1, "some row goes on while another is padded"
    output, tape = recorded(federation, options=blocks, stop_strings=texts, tokenizer=character_tokenizer())
    assert output[0, -1] == PAD
    assert [new_ids(trace) for trace in tape] == expected
    for trace in tape:
        equals_oracle(federation.model, federation.ledger, trace)


def test_a_row_ends_where_a_criterion_of_the_callers_says_so(federation: TinyFederation) -> None:
    criterion = RowByRow()
    criteria = StoppingCriteriaList([criterion])
    output, tape = recorded(federation, stopping_criteria=criteria)
    assert [len(trace.token_list) for trace in tape] == [2, 3, 4]
    for row, trace in zip(output[:, WIDTH:].tolist(), tape, strict=True):
        assert new_ids(trace) == row[: len(trace.token_list)]
        equals_oracle(federation.model, federation.ledger, trace)
    assert list(criteria) == [criterion]
    assert type(criteria) is StoppingCriteriaList
    assert criterion.asked == 4, "once for each step"


def test_a_row_ends_there_also_where_nothing_is_padded(federation: TinyFederation) -> None:
    """Without a stop token transformers lets an ended row go on; alone it would have ended."""
    output, tape = recorded(federation, stopping_criteria=[RowByRow()], eos_token_id=None)
    assert PAD not in output[:, WIDTH:].tolist()[0]
    assert [len(trace.token_list) for trace in tape] == [2, 3, 4]


def test_copies_of_one_prompt_end_each_for_itself(federation: TinyFederation) -> None:
    arguments = {"do_sample": True, "num_return_sequences": 3, "stopping_criteria": [RowByRow()]}
    arguments["suppress_tokens"] = [EOS]
    _, tape = recorded(federation, PROMPTS[:2], **arguments)
    assert [len(trace.token_list) for trace in tape] == [2, 3, 4, 5, 6, 7]
    # The same tokens in every row: their number alone tells the rows apart.
    _, tape = recorded(federation, PROMPTS[:1], **{**arguments, "top_k": 1})
    assert [len(trace.token_list) for trace in tape] == [2, 3, 4]
    assert len({trace.token_list[0].id for trace in tape}) == 1


def test_padding_tokens_that_were_chosen_are_part_of_the_answer(federation: TinyFederation) -> None:
    def chosen(_row: int, ids: torch.Tensor) -> list[int]:
        # Every row chooses the padding token from its second token on.
        return [PAD] if len(ids) > WIDTH else list(range(3, 96))

    output, tape = recorded(federation, stopping_criteria=[RowByRow()], prefix_allowed_tokens_fn=chosen)
    assert output[:, WIDTH + 1 :].unique().tolist() == [PAD]
    assert [len(trace.token_list) for trace in tape] == [2, 3, 4]
    _, tape = recorded(federation, max_new_tokens=5, prefix_allowed_tokens_fn=chosen)
    assert [len(trace.token_list) for trace in tape] == [5, 5, 5]


@pytest.mark.parametrize("pad", [PAD, 7], ids=["padding is token 0", "padding is token 7"])
@pytest.mark.parametrize("eos", [None, EOS], ids=["no stop token", "stop token"])
def test_beams_end_with_their_stop_string(federation: TinyFederation, pad: int, eos: int | None) -> None:
    texts, _ = stop_strings(federation)
    texts += [character_tokenizer().decode([free(federation, num_beams=3)[1][4]])]
    arguments = {"num_beams": 3, "num_return_sequences": 3, "stop_strings": texts, "tokenizer": character_tokenizer()}
    output, tape = recorded(federation, eos_token_id=eos, pad_token_id=pad, **arguments)
    lengths = [len(trace.token_list) for trace in tape]
    assert len(set(lengths)) > 1
    assert max(lengths) == output.shape[1] - WIDTH
    for row, trace in zip(output[:, WIDTH:].tolist(), tape, strict=True):
        length = len(trace.token_list)
        assert new_ids(trace) == row[:length]
        assert len(set(row[length:])) <= 1, "what is left is filled up"
        ended = any(text in trace.response for text in texts) or new_ids(trace)[-1] == eos
        assert ended or length == output.shape[1] - WIDTH == 12
        equals_oracle(federation.model, federation.ledger, trace)


def test_draft_of_the_model_itself_does_not_end_its_answer(federation: TinyFederation) -> None:
    arguments = {"stopping_criteria": [RowByRow(first=6)], "assistant_model": federation.model, "eos_token_id": None}
    output, tape = recorded(federation, PROMPTS[:1], **arguments)
    assert new_ids(tape[0]) == output[0, WIDTH:].tolist()
    assert len(tape[0].token_list) >= 6


@pytest.mark.parametrize(
    "arguments",
    [{"max_time": 0.0}, {"max_length": WIDTH + 5, "max_new_tokens": None}, {}],
    ids=["time", "length", "stop token"],
)
def test_rows_that_end_together_are_kept_whole(federation: TinyFederation, arguments: dict[str, Any]) -> None:
    output, tape = recorded(federation, **arguments)
    for row, trace in zip(output[:, WIDTH:].tolist(), tape, strict=True):
        assert new_ids(trace) == up_to(row, {EOS})


def test_rows_of_a_loop_of_somebody_elses_are_kept_whole(federation: TinyFederation) -> None:
    """It asks no criterion, so nobody can say whether what ends its rows is padding."""

    def own(_model: object, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[9, 8, PAD]] * len(input_ids))], 1)

    _, tape = recorded(federation, custom_generate=own)
    assert [new_ids(trace) for trace in tape] == [[9, 8, PAD]] * 3


def test_criterion_may_answer_in_a_column(federation: TinyFederation) -> None:
    """[B, 1], as the docstring of transformers has it; for one row it takes that, too."""

    class Column(RowByRow):
        def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
            return super().__call__(input_ids, scores)[:, None]

    _, tape = recorded(federation, PROMPTS[:1], stopping_criteria=[Column()], eos_token_id=None)
    assert [len(trace.token_list) for trace in tape] == [2]


def test_criterion_that_fails_leaves_the_model_as_it_was(federation: TinyFederation) -> None:
    class Broken(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
            assert "_get_stopping_criteria" in federation.model.__dict__
            raise KeyboardInterrupt

    before = sorted(federation.model.__dict__)
    with pytest.raises(KeyboardInterrupt):
        recorded(federation, stopping_criteria=[Broken()])
    assert sorted(federation.model.__dict__) == before
