"""The drill-down to records: what the response would have moved, and what must hold of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from character_tokenizer import character_tokenizer
from safetensors.torch import save_file
from tiny_federation import TinyFederation, tiny_federation
from torch.nn import functional

import protoken
from protoken.errors import ArgumentError, LedgerMismatchError, ModelError, NonFiniteError
from protoken.records import RecordProbe, record_probe
from protoken.records.scores import RecordScores
from protoken.records.text import encode_record

TOKENIZER = character_tokenizer()
RECORDS = ["a cat", ("who?", "me, of course"), {"prompt": "two", "response": "2", "client": "ada", "id": "x"}]
FAMILIES = ["llama", "gemma3", "gpt2", "falcon", "olmo2"]


def federation(folder: Path, family: str = "llama", **options: Any) -> TinyFederation:
    return tiny_federation(folder, family, **options)


def traced(made: TinyFederation, **options: Any) -> protoken.Trace:
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    return protoken.trace(made.model, [3, 5, 8, 13, 21], ledger=made.path, tokenizer=TOKENIZER, **arguments)


def loss_of(model: torch.nn.Module, record: Any) -> float:
    """Mean -log p of the answer, by the model's plain forward on this record alone."""
    encoded = encode_record(TOKENIZER, record, 0, max_tokens=512, chat=None)
    ids = torch.tensor([encoded.ids])
    logits = model(ids).logits[0, encoded.answer_start - 1 : -1].double()
    return float(functional.cross_entropy(logits, ids[0, encoded.answer_start :]))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_moved_model(tmp_path: Path, family: str) -> None:
    made = federation(tmp_path, family, dtype=torch.float64)
    probe = record_probe(traced(made), step=0.01)
    scores = probe.score(made.model, RECORDS, TOKENIZER, batch_size=2)
    for shift, got in ((probe.up, scores.loss_up), (probe.down, scores.loss_down)):
        state = {n: p.detach() + shift[n] if n in shift else p.detach() for n, p in made.model.named_parameters()}
        wanted = [
            torch.func.functional_call(made.model, state, (), {"input_ids": torch.tensor([e.ids])})
            for e in (encode_record(TOKENIZER, r, 0, max_tokens=512, chat=None) for r in RECORDS)
        ]
        for i, (output, record) in enumerate(zip(wanted, RECORDS, strict=True)):
            encoded = encode_record(TOKENIZER, record, 0, max_tokens=512, chat=None)
            rows = output.logits[0, encoded.answer_start - 1 : -1].double()
            loss = functional.cross_entropy(rows, torch.tensor(encoded.ids[encoded.answer_start :]))
            assert got[i] == pytest.approx(float(loss), rel=1e-6)


def test_score_is_the_product_of_gradients_for_small_steps(tmp_path: Path) -> None:
    made = federation(tmp_path, "gpt2", dtype=torch.float64)  # whose norms do not round to fp32
    trace = traced(made)
    probe = record_probe(trace, step=1e-6)
    scores = probe.score(made.model, RECORDS, TOKENIZER).scores
    leaves = {n: p.requires_grad_() for n, p in made.model.named_parameters() if n in probe.up}
    for i, record in enumerate(RECORDS):
        encoded = encode_record(TOKENIZER, record, i, max_tokens=512, chat=None)
        ids = torch.tensor([encoded.ids])
        logits = made.model(ids).logits[0, encoded.answer_start - 1 : -1].double()
        loss = functional.cross_entropy(logits, ids[0, encoded.answer_start :])
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        wanted = -sum(float((g.double() * probe.up[n]).sum()) for n, g in zip(leaves, grads, strict=True))
        assert scores[i] == pytest.approx(wanted, rel=1e-4)


def test_the_response_itself_scores_highest(tmp_path: Path) -> None:
    made = federation(tmp_path)
    trace = traced(made)
    text = TOKENIZER.decode([token.id for token in trace.token_list])
    said = (TOKENIZER.decode(trace.prompt_ids), text)
    others = [(said[0], "".join(chr(97 + (7 * i + j) % 26) for j in range(6))) for i in range(8)]
    scores = record_probe(trace).score(made.model, [*others, said], TOKENIZER, chat=False)
    assert scores.ranked[0].index == len(others)
    assert scores.ranked[0].score > 0


def test_scores_do_not_depend_on_batch_neighbours(tmp_path: Path) -> None:
    made = federation(tmp_path, "gpt2", dtype=torch.float64)
    probe = record_probe(traced(made))
    records = [("q" * n, "a" * (12 - n)) for n in range(1, 8)]
    whole = probe.score(made.model, records, TOKENIZER, batch_size=7).scores
    alone = np.concatenate([probe.score(made.model, [record], TOKENIZER).scores for record in records])
    np.testing.assert_allclose(whole, alone, rtol=1e-9, atol=1e-12)


def test_several_steps_walk_as_far_and_end_elsewhere(tmp_path: Path) -> None:
    made = federation(tmp_path)
    trace = traced(made)
    one, four = record_probe(trace, step=0.02), record_probe(trace, step=0.02, steps=4)
    assert all(torch.equal(one.up[name], -one.down[name]) for name in one.up)
    assert any(not torch.allclose(four.up[name], -four.down[name]) for name in four.up)

    def length(shift: Any) -> float:
        return float(sum(float(t.double().square().sum()) for t in shift.values()) ** 0.5)

    # A path that bends is no longer than its steps together.
    assert 0 < length(four.up) <= length(one.up) * (1 + 1e-6)


def test_a_span_probes_its_tokens_alone(tmp_path: Path) -> None:
    made = federation(tmp_path)
    trace = traced(made)
    whole, part = record_probe(trace), record_probe(trace, span=(2, 4))
    assert any(not torch.allclose(whole.up[name], part.up[name]) for name in whole.up)
    for bad in ((3, 3), (-1, 2), (0, 7)):
        with pytest.raises(ArgumentError, match="span"):
            record_probe(trace, span=bad)


def test_layers_and_blocks_choose_what_moves(tmp_path: Path) -> None:
    made = federation(tmp_path)
    trace = traced(made)
    last = record_probe(trace, blocks=1)
    assert all(".layers.3." in name for name in last.up)
    only = record_probe(trace, layers=["*.down_proj"])
    assert {name.rsplit(".", 2)[1] for name in only.up} == {"down_proj"}


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    made = federation(tmp_path)
    trace = traced(made)
    made.model.train()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    record_probe(trace).score(made.model, RECORDS, TOKENIZER)
    with pytest.raises(ArgumentError):
        record_probe(trace).score(made.model, [("q", "")], TOKENIZER, max_tokens=3)
    assert made.model.training
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())
    assert all(p.grad is None for p in made.model.parameters())


def test_dropout_is_off_in_a_model_that_is_being_trained(tmp_path: Path) -> None:
    made = federation(tmp_path)
    for module in made.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trace = traced(made)
    probe = record_probe(trace)
    scores = probe.score(made.model, RECORDS, TOKENIZER)
    made.model.train()
    again = record_probe(trace)
    assert all(torch.equal(again.up[name], value) for name, value in probe.up.items())
    for _ in range(2):
        np.testing.assert_array_equal(probe.score(made.model, RECORDS, TOKENIZER).scores, scores.scores)


def test_a_probe_travels_without_the_trace(tmp_path: Path) -> None:
    made = federation(tmp_path)
    for steps in (1, 2):
        probe = record_probe(traced(made), steps=steps)
        probe.save(tmp_path / "probe.safetensors")
        read = RecordProbe.load(tmp_path / "probe.safetensors")
        mine, theirs = (p.score(made.model, RECORDS, TOKENIZER) for p in (probe, read))
        np.testing.assert_array_equal(mine.scores, theirs.scores)


def test_a_probe_of_another_model_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path)
    probe = record_probe(traced(made))
    with torch.no_grad():
        made.model.get_parameter(next(iter(probe.up))).add_(1e-3)
    with pytest.raises(LedgerMismatchError, match="other weights"):
        probe.score(made.model, RECORDS, TOKENIZER)
    with pytest.raises(LedgerMismatchError, match="no such parameter"):
        probe.score(tiny_federation(tmp_path, "gpt2").model, RECORDS, TOKENIZER)


def test_a_loaded_trace_needs_its_model_again(tmp_path: Path) -> None:
    made = federation(tmp_path)
    trace = traced(made)
    trace.save(tmp_path / "trace.json")
    loaded = protoken.Trace.load(tmp_path / "trace.json")
    with pytest.raises(ModelError, match="model="):
        record_probe(loaded)
    again = record_probe(loaded, model=made.model, ledger=made.path)
    known = record_probe(trace)
    assert all(torch.equal(again.up[name], known.up[name]) for name in known.up)


@pytest.mark.parametrize(
    "record",
    ["", "a", {"text": 7}, {"text": "a", "prompt": "q", "response": "a"}, {"text": "abc", "messages": []},
     ("q", ""), ("q", 3), ("q",), 7, {"prompt": "q"}, {"messages": []}, ("", "a"),
     {"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "q"}]},
     {"messages": [{"content": "q"}, {"role": "assistant", "content": "a"}]}],
    ids=repr,
)  # fmt: skip
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, record: Any) -> None:
    tokenizer = character_tokenizer()
    if record == ("q", ""):
        tokenizer.eos_token = None  # else the end of the turn is the answer
    with pytest.raises(ArgumentError, match=r"records\[5\]"):
        encode_record(tokenizer, record, 5, max_tokens=512, chat=None)


def test_a_text_in_a_mapping_is_the_text_and_keeps_its_names() -> None:
    plain, named = (
        encode_record(TOKENIZER, record, 3, max_tokens=512, chat=None)
        for record in ("abc def", {"text": "abc def", "id": "row-17", "client": "ada", "prompt": None})
    )
    assert (named.ids, named.answer_start, named.text) == (plain.ids, plain.answer_start, plain.text)
    assert [(r.key, r.client) for r in (plain, named)] == [("3", None), ("row-17", "ada")]
    unnamed = encode_record(TOKENIZER, {"text": "abc def", "id": None}, 3, max_tokens=512, chat=None)
    assert unnamed.key == "3"


def test_a_record_of_text_and_of_a_conversation_is_refused() -> None:
    for other in (
        {"prompt": "q", "response": "a"},
        {"messages": [{"role": "user", "content": "q"}] * 2},
        {"prompt": ""},
    ):
        with pytest.raises(ArgumentError, match=r'^records\[0\]: expected either "text" or .*, got "text" and'):
            encode_record(TOKENIZER, {"text": "abc", **other}, 0, max_tokens=512, chat=None)


def test_a_long_record_is_cut_and_one_without_room_refused() -> None:
    cut = encode_record(TOKENIZER, ("q", "a" * 100), 0, max_tokens=20, chat=False)
    assert (len(cut.ids), cut.answer_start) == (20, 1)
    with pytest.raises(ArgumentError, match="max_tokens = 20"):
        encode_record(TOKENIZER, ("q" * 50, "a"), 0, max_tokens=20, chat=False)


@pytest.mark.parametrize("bad", [{"step": 0}, {"step": 2}, {"step": float("nan")}, {"steps": 0}, {"steps": 1.5}])
def test_steps_that_go_nowhere_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        record_probe(traced(federation(tmp_path)), **bad)


def test_a_response_without_direction_is_refused(tmp_path: Path) -> None:
    made = federation(tmp_path)
    trace = traced(made)
    head = made.model.get_output_embeddings()
    kept = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.zero_()  # every token is equally likely whatever the blocks say
    with pytest.raises(NonFiniteError, match="length 0"):
        record_probe(trace, layers=["*.o_proj"])
    with torch.no_grad():
        head.weight.copy_(kept)


def test_scores_are_kept_without_the_records_text(tmp_path: Path) -> None:
    made = federation(tmp_path)
    scores = record_probe(traced(made)).score(made.model, RECORDS, TOKENIZER)
    path = tmp_path / "scores.json"
    scores.save(path)
    assert "of course" not in path.read_text()
    read = RecordScores.load(path)
    np.testing.assert_array_equal(read.scores, scores.scores)
    assert read.keys == ("0", "1", "x")
    assert read.by_client() == {"ada": pytest.approx(scores.scores[2])}


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"kind": "other"}', "[" * 10_000])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "file"
    path.write_text(damage)
    for kind in (RecordScores, RecordProbe):
        with pytest.raises(ArgumentError, match="path"):
            kind.load(path)


def test_a_probe_with_nan_is_refused(tmp_path: Path) -> None:
    about = {"kind": "protoken record probe", "schema": 1, "step": 0.1, "steps": 1, "digests": {"w": "0"}}
    save_file({"up.w": torch.tensor([float("nan")])}, tmp_path / "p", {"probe": json.dumps(about)})
    with pytest.raises(NonFiniteError):
        RecordProbe.load(tmp_path / "p")


@pytest.mark.parametrize("lost", ["clients", "texts"])
def test_what_is_not_one_for_each_record_is_named(lost: str) -> None:
    given = {"clients": ("a", "b"), "texts": ("x", "y"), lost: ("one",)}
    with pytest.raises(ArgumentError, match=f"^{lost}: expected one for each of 2 records, got 1"):
        RecordScores(("1", "2"), given["clients"], [1.0, 1.0], [2.0, 2.0], 0.01, texts=given["texts"])


def test_hostile_names_are_drawn_not_obeyed(tmp_path: Path) -> None:
    from rich.console import Console

    scores = RecordScores(("\x1b[31m",), ("bad\u202ename",), [1.0], [2.0], 0.01, texts=("\x07",))
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(scores)
    text = console.export_text()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "⟨U+202E⟩" in text
