"""What a trace keeps of the arguments it was generated with, and an answer anew that is given the same ones."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from character_tokenizer import character_tokenizer
from tiny_federation import TinyFederation, tiny_federation
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TextStreamer
from transformers.generation import MaxTimeCriteria, TopKLogitsWarper, WatermarkingConfig

import protoken
from protoken.errors import ArgumentError, ProtokenWarning, UnknownClientError
from protoken.generation_record import recorded, replayed

PROMPT = [5, 17, 42, 8, 60, 33, 21]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> TinyFederation:
    return tiny_federation(tmp_path_factory.mktemp("federation"))


def ask(federation: TinyFederation, **arguments: Any) -> protoken.Trace:
    given = {"max_new_tokens": 12, **arguments}
    if "generation_config" in arguments:
        given.pop("max_new_tokens")
    return protoken.trace(federation.model, PROMPT, ledger=federation.path, tokenizer=character_tokenizer(), **given)


def anew(trace: protoken.Trace, **where: Any) -> list[int]:
    """The answer without the client who changed nothing, the others' weights as they were: the trace's own."""
    return list(trace.counterfactual("null", reaggregate=False, generate=True, **where).response_ids)


def new_ids(trace: protoken.Trace) -> list[int]:
    return [token.id for token in trace.token_list]


GIVEN: dict[str, tuple[dict[str, Any], Any]] = {
    "lists of ids": ({"bad_words_ids": [[i] for i in range(3, 80)]}, None),
    "ids": ({"suppress_tokens": list(range(3, 60))}, None),
    "tensor of ids": ({"suppress_tokens": torch.arange(3, 60)}, {"suppress_tokens": list(range(3, 60))}),
    "several stop tokens": ({"eos_token_id": list(range(3, 60))}, None),
    "tensor of stop tokens": ({"eos_token_id": torch.arange(3, 60)}, {"eos_token_id": list(range(3, 60))}),
    "stop strings": ({"stop_strings": list("abcdefghijklmnopqrst")}, None),
    "tuple of stop strings": (
        {"stop_strings": tuple("abcdefghijklmnopqrst")},
        {"stop_strings": list("abcdefghijklmnopqrst")},
    ),
    "cache by name": ({"cache_implementation": "static"}, None),
    "numpy integer": ({"max_new_tokens": np.int64(5)}, {"max_new_tokens": 5}),
    "numpy numbers": (
        {"do_sample": np.bool_(True), "temperature": np.float64(0.7), "top_k": 9, "seed": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 9},
    ),
    "bias by sequence": ({"sequence_bias": {(17,): 30.0}}, {"sequence_bias": [[[17], 30.0]]}),
    "decay": ({"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 9}, None),
    "configuration": (
        {"generation_config": GenerationConfig(max_new_tokens=5, do_sample=False, suppress_tokens=[*range(3, 60)])},
        {"generation_config": {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [*range(3, 60)]}},
    ),
    "beams": ({"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0, "eos_token_id": 9}, None),
    "watermark": ({"watermarking_config": WatermarkingConfig(bias=9.0), "do_sample": True, "seed": 3}, ...),
    "guidance": ({"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[9, 8, 7]])}, ...),
}


@pytest.mark.parametrize(("arguments", "kept"), GIVEN.values(), ids=GIVEN)
def test_answer_anew_is_given_the_traces_own_arguments(
    federation: TinyFederation, tmp_path: Path, arguments: dict[str, Any], kept: Any
) -> None:
    trace = ask(federation, **arguments)
    if kept is not ...:
        expected = {k: list(v) if isinstance(v, tuple) else v for k, v in (kept or arguments).items()}
        assert expected.items() <= trace.info.generate_arguments.items()
    plain = ask(federation, seed=arguments.get("seed"), do_sample=bool(arguments.get("do_sample", False)))
    assert new_ids(trace) != new_ids(plain) or "cache_implementation" in arguments, "the argument tells"
    assert anew(trace) == new_ids(trace)
    trace.save(tmp_path / "trace.json")
    loaded = protoken.Trace.load(tmp_path / "trace.json")
    assert loaded == trace
    where = {"model": federation.model, "ledger": federation.path, "tokenizer": character_tokenizer()}
    assert anew(loaded, **where) == new_ids(trace)


def test_record_of_a_record_is_the_same(federation: TinyFederation) -> None:
    for arguments, _ in GIVEN.values():
        given = {name: value for name, value in arguments.items() if name != "seed"}
        once = recorded(given)
        assert recorded(once) == once
    trace = ask(federation, **GIVEN["configuration"][0])
    assert trace.lineage().info.generate_arguments == trace.info.generate_arguments


def test_rows_of_a_batch_are_answered_anew_one_by_one(federation: TinyFederation) -> None:
    stops, prompts = torch.tensor([30, 40, 50]), torch.tensor([PROMPT, [0, 0, 0, 11, 9, 70, 3]])
    with protoken.tracing(federation.model, ledger=federation.path, tokenizer=character_tokenizer()) as tape:
        federation.model.generate(
            prompts, max_new_tokens=6, num_beams=2, num_return_sequences=2, eos_token_id=stops, pad_token_id=0
        )
    assert tape[0].info.generate_arguments["eos_token_id"] == [30, 40, 50]
    assert (anew(tape[0]), anew(tape[2])) == (new_ids(tape[0]), new_ids(tape[2]))


@pytest.mark.parametrize("own", [None, 5])
def test_an_answer_without_a_length_is_asked_for_anew_without_one(federation: TinyFederation, own: int | None) -> None:
    settings = federation.model.generation_config
    before = settings.max_new_tokens
    settings.max_new_tokens = own
    try:
        with protoken.tracing(federation.model, ledger=federation.path, tokenizer=character_tokenizer()) as tape:
            federation.model.generate(torch.tensor([PROMPT]), eos_token_id=-1, pad_token_id=0)
        assert len(new_ids(tape[0])) == (own or 20)  # transformers' own default
        assert anew(tape[0]) == new_ids(tape[0])
    finally:
        settings.max_new_tokens = before


def test_the_default_length_of_a_trace_is_in_its_record(federation: TinyFederation) -> None:
    trace = protoken.trace(federation.model, PROMPT, ledger=federation.path, tokenizer=character_tokenizer())
    assert trace.info.generate_arguments == {"max_new_tokens": 64}
    assert anew(trace) == new_ids(trace)
    logged = protoken.trace(federation.model, PROMPT, ledger=federation.path, response=new_ids(trace)[:3])
    assert logged.info.generate_arguments == {}
    assert anew(logged, tokenizer=character_tokenizer()) == new_ids(trace)


def test_configuration_of_a_continuous_batch_is_kept(federation: TinyFederation) -> None:
    configuration = pytest.importorskip("transformers.generation.configuration_utils")
    paged = configuration.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    own = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    with protoken.tracing(federation.model, ledger=federation.path) as tape:
        federation.model.generate_batch([PROMPT], own, continuous_batching_config=paged)
    assert tape[0].info.generate_arguments["generation_config"]["max_new_tokens"] == 4
    assert anew(tape[0]) == new_ids(tape[0])


def test_what_is_of_no_account_to_the_answer_is_left_out(federation: TinyFederation, capsys: Any) -> None:
    trace = ask(
        federation,
        streamer=TextStreamer(character_tokenizer()),
        past_key_values=DynamicCache(),
        return_dict_in_generate=True,
        output_scores=True,
        attention_mask=torch.ones(1, 7),
        logits_processor=LogitsProcessorList(),
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
    )
    capsys.readouterr()
    assert anew(trace) == new_ids(trace)
    assert capsys.readouterr().out == ""


REFUSED: dict[str, Any] = {
    "logits_processor": LogitsProcessorList([TopKLogitsWarper(3)]),
    "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(100.0)]),
    "prefix_allowed_tokens_fn": lambda *_: [7, 8],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_answer_and_is_not_kept_is_refused_by_name(federation: TinyFederation, name: str) -> None:
    trace = ask(federation, **{name: REFUSED[name]})
    with pytest.raises(ArgumentError, match=rf"^{name}: expected .*got .*without generate=True") as caught:
        trace.counterfactual("ada", generate=True)
    assert caught.value.argument == name
    assert trace.counterfactual("ada").response is None


def test_draft_model_is_left_out_with_a_warning(federation: TinyFederation) -> None:
    trace = ask(federation, assistant_model=federation.model)
    with pytest.warns(ProtokenWarning, match="assistant_model: left out") as caught:
        assert anew(trace) == new_ids(trace)
    assert caught[0].filename == __file__
    with pytest.raises(ArgumentError, match="assistant_model: expected no draft model that has a say"):
        replayed({"assistant_model": "LlamaForCausalLM(...)", "assistant_ensemble_weight": 0.5})


def test_stop_strings_of_a_loaded_trace_need_a_tokenizer(federation: TinyFederation) -> None:
    trace = protoken.trace(federation.model, PROMPT, ledger=federation.path, max_new_tokens=3)
    trace = replace(trace, info=replace(trace.info, generate_arguments={"max_new_tokens": 3, "stop_strings": "a"}))
    where = {"model": federation.model, "ledger": federation.path}
    with pytest.raises(ArgumentError, match=r"tokenizer: expected .*stop strings.*Pass tokenizer="):
        anew(trace, **where)
    assert anew(trace, tokenizer=character_tokenizer(), **where)


HOSTILE: dict[str, tuple[str, Any]] = {
    "list of an earlier version": ("bad_words_ids", "[[40], [41]]"),
    "stop tokens of an earlier version": ("eos_token_id", "[30, 40]"),
    "stop strings of an earlier version": ("stop_strings", "['a', 'e']"),
    "number of an earlier version": ("max_new_tokens", "np.int64(5)"),
    "configuration of an earlier version": ("generation_config", "GenerationConfig {\n  ..."),
    "code from a repository": ("custom_generate", "somebody/else"),
    "leave to run it": ("trust_remote_code", True),
    "mode that is code from a repository": ("penalty_alpha", 0.5),
    "unknown": ("no_such_setting", 3),
    "private": ("_eos_token_tensor", 3),
    "text for a number": ("temperature", "__import__('os')"),
    "object for a number": ("max_new_tokens", {"a": 1}),
    "fraction for a whole number": ("num_beams", 2.5),
    "truth for a whole number": ("top_k", True),
    "deep list": ("bad_words_ids", [[[[[[5]]]]]]),
    "texts for ids": ("suppress_tokens", ["a"]),
    "object for a text": ("stop_strings", {"a": 1}),
    "object of objects": ("watermarking_config", {"a": {"b": 1}}),
    "unknown configuration": ("generation_config", {"no_such_setting": 3}),
    "configuration in a configuration": ("generation_config", {"generation_config": {"top_k": 3}}),
    "code in a configuration": ("generation_config", {"penalty_alpha": 0.5}),
    "negative prompts of a batch": ("negative_prompt_ids", [[5], [6]]),
    "infinity": ("max_time", "inf"),
}


@pytest.mark.parametrize(("name", "value"), HOSTILE.values(), ids=HOSTILE)
def test_record_that_cannot_be_given_again_is_refused_by_name(
    federation: TinyFederation, tmp_path: Path, name: str, value: Any
) -> None:
    trace = ask(federation)
    trace = replace(trace, info=replace(trace.info, generate_arguments={"max_new_tokens": 3, name: value}))
    trace.save(tmp_path / "trace.json")
    loaded = protoken.Trace.load(tmp_path / "trace.json")
    assert loaded.info.generate_arguments[name] == value
    with pytest.raises(ArgumentError) as caught:
        anew(loaded, model=federation.model, ledger=federation.path)
    inside = next(iter(value)) if isinstance(value, dict) and name == "generation_config" else name
    assert caught.value.argument in (name, inside)
    assert loaded.counterfactual("ada", model=federation.model, ledger=federation.path).response is None


def test_settings_that_transformers_does_not_take_are_refused(federation: TinyFederation) -> None:
    with pytest.raises(ArgumentError, match="generate_arguments: expected settings that transformers takes"):
        replayed({"cache_implementation": "no such cache"})
    with pytest.raises(ArgumentError, match="generate_arguments: expected settings that transformers takes"):
        replayed({"watermarking_config": {"no_such_part": 1}})


def test_paged_cache_of_a_record_is_refused(federation: TinyFederation) -> None:
    trace = ask(federation)
    trace = replace(trace, info=replace(trace.info, generate_arguments={"cache_implementation": "paged"}))
    with warnings.catch_warnings(), pytest.raises(protoken.errors.ProtokenError, match="paged"):
        anew(trace, model=federation.model, ledger=federation.path)


def test_page_shows_the_beginning_of_a_long_list(federation: TinyFederation) -> None:
    page = ask(federation, bad_words_ids=[[i] for i in range(3, 90)]).to_html()
    assert "[3], [4], [5]" in page
    assert "[80], [81]" not in page


def test_a_client_whose_update_is_quarantined_is_refused_as_such(tmp_path: Path) -> None:
    made = tiny_federation(tmp_path)
    names = list(made.ledger.round(1).parameters)
    before = {name: made.model.get_parameter(name).detach().clone() for name in names}
    good = {name: torch.full_like(value, 1e-3) for name, value in before.items()}
    bad = {name: torch.full_like(value, float("nan")) for name, value in before.items()}
    with torch.no_grad():
        for name in names:
            made.model.get_parameter(name).add_(good[name])
    after = {name: made.model.get_parameter(name).detach().clone() for name in names}
    updates = [protoken.ClientUpdate("good", 1.0, delta=good), protoken.ClientUpdate("broken", 0.0, delta=bad)]
    made.ledger.commit_round(before, after, updates, on_bad="quarantine")
    trace = protoken.trace(made.model, PROMPT, ledger=made.path, max_new_tokens=3)
    with pytest.raises(UnknownClientError, match=r"^without: .*got \['broken'\].*quarantined"):
        trace.counterfactual("broken")
    with pytest.raises(UnknownClientError, match=r"^without: expected clients of rounds \[2\], got \['null'\]$"):
        trace.counterfactual("null")
