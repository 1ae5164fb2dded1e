"""A real federation of tiny models: an ordinary step, a true average, and a ledger that holds what was averaged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from character_tokenizer import character_tokenizer
from tiny_models import CONFIGS, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from protoken.errors import ArgumentError, LedgerFormatError, LedgerMismatchError, NonFiniteError, PromptError
from protoken.evaluation.base_model import BaseModel, weights_digest
from protoken.evaluation.corpora import ChatRow, generate_rows, poison
from protoken.evaluation.federation import Client, FederationConfig, Progress, RoundReport, train_federation
from protoken.evaluation.federation_store import federate, fingerprint
from protoken.evaluation.training import Example, LocalSettings, LocalTrainer, encode_rows, trainable_parameters
from protoken.ledger import Ledger

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = tuple(CONFIGS)
SETTINGS = LocalSettings(epochs=1, batch_size=3, learning_rate=5e-3, warmup_steps=2)
TINY = FederationConfig(rounds=2, local=SETTINGS, blocks=2, max_tokens=100, seed=7)


def rows(count: int, domain: str = "math") -> list[ChatRow]:
    short = [row for row in generate_rows(domain, 400) if len(row.question) + len(row.answer) < 60]
    return short[:count]


def clients(count: int = 3, each: int = 4) -> list[Client]:
    made = rows(count * each)
    return [Client(f"c{i}", made[i * each : (i + 1) * each], label="math") for i in range(count)]


def examples(count: int) -> list[Example]:
    return encode_rows(character_tokenizer(), rows(count), max_tokens=100)


def values(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


# ---- rows to tokens ----------------------------------------------------------------------------------------


def test_the_loss_covers_the_answer_and_its_end_and_nothing_else() -> None:
    tokenizer = character_tokenizer()
    (example,) = encode_rows(tokenizer, [ChatRow.of("2 + 2?", "4.")])
    assert tokenizer.decode(example.ids[: example.answer_start]) == "u:2 + 2?<eos>a:"
    assert tokenizer.decode(example.ids[example.answer_start :]) == "4.<eos>"


def test_long_answers_are_cut_and_long_prompts_refused_or_dropped() -> None:
    tokenizer = character_tokenizer()
    long_answer, long_question = ChatRow.of("q", "a" * 50), ChatRow.of("q" * 50, "a")
    assert len(encode_rows(tokenizer, [long_answer], max_tokens=20)[0].ids) == 20
    with pytest.raises(PromptError, match="max_tokens = 20"):
        encode_rows(tokenizer, [long_question], max_tokens=20)
    assert encode_rows(tokenizer, [long_question, long_answer], max_tokens=20, drop_long=True) == encode_rows(
        tokenizer, [long_answer], max_tokens=20
    )


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="chat template"):
        encode_rows(tokenizer, rows(1))


# ---- local training ----------------------------------------------------------------------------------------


def plain_loss(model: PreTrainedModel, batch: list[Example]) -> Tensor:
    """Mean over all answer tokens of -log p, one unpadded forward of the whole model per example."""
    terms = []
    for example in batch:
        ids = torch.tensor([example.ids])
        log_p = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
        terms += [-log_p[p - 1, example.ids[p]] for p in range(example.answer_start, len(example.ids))]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [1, 3, None])
def test_loss_and_gradient_are_those_of_the_whole_model(family: str, blocks: int | None) -> None:
    model = tiny_model(family)
    batch = examples(5)
    names = trainable_parameters(model, blocks)
    parameters = [model.get_parameter(name) for name in names]
    expected = torch.autograd.grad(plain_loss(model, batch), parameters)
    trainer = LocalTrainer(model, names)
    assert trainer.first_block == (0 if blocks is None else 4 - blocks)
    loss = trainer.loss(batch)
    torch.testing.assert_close(loss, plain_loss(model, batch), rtol=1e-5, atol=1e-6)
    for name, got, wanted in zip(names, torch.autograd.grad(loss, parameters), expected, strict=True):
        assert (got - wanted).norm() <= 2e-4 * wanted.norm() + 1e-7, name


def test_remembered_hidden_states_change_no_update() -> None:
    deltas = []
    for cache in (True, False):
        model = tiny_model("llama")
        trainer = LocalTrainer(model, trainable_parameters(model, 2), cache_boundary=cache)
        before = values(model)
        trainer.train(examples(7), SETTINGS, seed=3)
        deltas.append({name: parameter - before[name] for name, parameter in trainer.parameters.items()})
    for name, delta in deltas[0].items():
        assert (delta - deltas[1][name]).norm() <= 1e-3 * delta.norm(), name


def test_training_lowers_the_loss_and_moves_only_what_was_named() -> None:
    model = tiny_model("smollm")
    names = trainable_parameters(model, 2)
    assert len(names) == 14
    before = values(model)
    losses = LocalTrainer(model, names).train(
        examples(6), LocalSettings(epochs=12, batch_size=3, learning_rate=5e-3, warmup_steps=2), seed=0
    )
    assert len(losses) == 24
    assert losses[-1] < 0.6 * losses[0]
    after = values(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(names)


def test_the_model_is_left_as_it_was_found_also_after_an_error() -> None:
    model = tiny_model("llama")
    model.get_parameter("lm_head.weight").requires_grad_(False)
    model.model.layers[0].train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    trainer = LocalTrainer(model, trainable_parameters(model, 1))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    trainer.train(examples(2), SETTINGS, seed=0)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(examples(4), SETTINGS, seed=0, step=fail)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    for _, module in model.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_of_every_linear_layer_in_the_last_blocks_learn() -> None:
    names = trainable_parameters(tiny_model("llama"), 1)
    assert set(names) == {
        *(f"model.layers.3.self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"model.layers.3.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }
    with pytest.raises(ArgumentError, match="blocks: expected 1 to 4"):
        trainable_parameters(tiny_model("llama"), 5)
    with pytest.raises(ArgumentError, match="parameters"):
        LocalTrainer(tiny_model("llama"), ["no.such.weight"])


# ---- federated averaging -----------------------------------------------------------------------------------


def test_the_global_model_is_the_weighted_mean_of_what_clients_train_alone(tmp_path: Path) -> None:
    made = rows(9)
    parts = [Client("a", made[:2]), Client("b", made[2:5]), Client("c", made[5:])]
    one_round = dataclasses.replace(TINY, rounds=1)
    model = tiny_model("llama")
    start = values(model)
    train_federation(model, character_tokenizer(), parts, one_round)

    expected = {name: torch.zeros_like(start[name], dtype=torch.float64) for name in trainable_parameters(model, 2)}
    for client in parts:
        alone = tiny_model("llama")
        # Alone the client has all the weight; its seed is its own, so it trains as it does among others.
        train_federation(alone, character_tokenizer(), [client], one_round)
        for name in expected:
            change = alone.get_parameter(name).detach().double() - start[name].double()
            expected[name] += len(client.rows) / 9 * change
    for name, change in expected.items():
        got = model.get_parameter(name).detach().double() - start[name].double()
        assert change.norm() > 0
        assert (got - change).norm() <= 1e-5 * change.norm(), name


@pytest.mark.parametrize("upload", ["fp32", "bf16", "fp16"])
def test_the_ledger_holds_exactly_what_was_averaged(tmp_path: Path, upload: str) -> None:
    model = tiny_model("llama")
    start = values(model)
    ledger = Ledger.create(tmp_path / "ledger")
    config = dataclasses.replace(TINY, upload=upload)
    reports = train_federation(model, character_tokenizer(), clients(), config, ledger=ledger)
    ledger = Ledger.open(tmp_path / "ledger")
    assert ledger.rounds == (1, 2)
    assert ledger.clients == ("c0", "c1", "c2")
    names = set(trainable_parameters(model, 2))
    for name in names:
        total = start[name]
        for number in ledger.rounds:
            record = ledger.round(number)
            assert set(record.parameters) == names
            assert record.relative_residual[name] < 1e-5
            summed = sum(c.weight * record.delta(c.client, name).double() for c in record.clients)
            assert (summed - record.change(name).double()).norm() < 1e-5 * record.change(name).norm()
            total = total + record.change(name)
        torch.testing.assert_close(total, model.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)
    for report in reports:
        assert report.weights == {"c0": 1 / 3, "c1": 1 / 3, "c2": 1 / 3}


def test_the_same_seed_gives_the_same_federation_and_another_seed_another() -> None:
    finals = []
    for seed in (7, 7, 8):
        model = tiny_model("llama")
        train_federation(model, character_tokenizer(), clients(), dataclasses.replace(TINY, seed=seed))
        finals.append(values(model))
    assert_same(finals[1], finals[0])
    name = trainable_parameters(tiny_model("llama"), 1)[0]
    assert not torch.equal(finals[2][name], finals[0][name])


def test_partial_participation_draws_that_many_and_weighs_them_to_one(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger")
    config = dataclasses.replace(TINY, rounds=4, participants=2)
    reports = train_federation(tiny_model("llama"), character_tokenizer(), clients(5, 2), config, ledger=ledger)
    drawn = [tuple(report.weights) for report in reports]
    assert all(len(ids) == 2 and sum(r.weights.values()) == 1 for ids, r in zip(drawn, reports, strict=True))
    assert len(set(drawn)) > 1
    recorded = [tuple(c.client for c in ledger.round(n).clients) for n in ledger.rounds]
    assert recorded == drawn


@dataclass(frozen=True)
class Zero:
    """A client that answers with no change at all."""

    def __call__(self, delta: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in delta.items()}


@dataclass(frozen=True)
class Scaled:
    """A client that multiplies its update."""

    factor: float

    def __call__(self, delta: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        return {name: tensor * self.factor for name, tensor in delta.items()}


def test_an_altered_update_is_what_is_averaged_and_recorded(tmp_path: Path) -> None:
    made = clients(2)
    made[1] = dataclasses.replace(made[1], alter=Zero())
    model = tiny_model("llama")
    ledger = Ledger.create(tmp_path / "ledger")
    train_federation(model, character_tokenizer(), made, dataclasses.replace(TINY, rounds=1), ledger=ledger)
    record = ledger.round(1)
    for name in record.parameters:
        assert not record.delta("c1", name).any()
        torch.testing.assert_close(record.change(name), 0.5 * record.delta("c0", name), rtol=1e-4, atol=1e-7)


def test_progress_names_every_stage_and_reports_come_while_the_model_holds_the_round() -> None:
    events: list[Progress] = []
    held: list[tuple[RoundReport, str]] = []
    model = tiny_model("llama")
    train_federation(
        model,
        character_tokenizer(),
        clients(2),
        TINY,
        progress=events.append,
        after_round=lambda report: held.append((report, weights_digest(model))),
    )
    assert [(e.round, e.client) for e in events if e.stage == "prepare"] == [(0, "c0"), (0, "c1")]
    trained = [(e.round, e.client, e.done, e.total) for e in events if e.stage == "train"]
    assert trained == [(r, c, step, 2) for r in (1, 2) for c in ("c0", "c1") for step in (1, 2)]
    assert [e.round for e in events if e.stage == "round"] == [1, 2]
    assert all(e.loss is not None and e.loss > 0 for e in events if e.stage == "train")
    assert [report.number for report, _ in held] == [1, 2]
    assert held[0][1] != held[1][1] == weights_digest(model)


def test_a_diverging_client_stops_the_round_and_leaves_the_last_one(tmp_path: Path) -> None:
    made = clients(2)
    made[1] = dataclasses.replace(made[1], alter=Scaled(float("inf")))
    model = tiny_model("llama")
    start = values(model)
    ledger = Ledger.create(tmp_path / "ledger")
    with pytest.raises(NonFiniteError, match="update of c1 in round 1"):
        train_federation(model, character_tokenizer(), made, TINY, ledger=ledger)
    assert_same(values(model), start)
    assert Ledger.open(tmp_path / "ledger").rounds == ()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"participants": 4}, "participants: expected 1 to 3"),
        ({"rounds": 0}, "at least one round"),
        ({"upload": "int3"}, "upload: expected one of fp32, bf16, fp16"),
        ({"local": LocalSettings(batch_size=0)}, "one row a batch"),
    ],
)
def test_bad_settings_are_told(change: dict[str, object], named: str) -> None:
    config = dataclasses.replace(TINY, **change)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=named):
        train_federation(tiny_model("llama"), character_tokenizer(), clients(), config)


def test_bad_clients_are_told() -> None:
    for bad in ([], [Client("a", rows(2)), Client("a", rows(2))], [Client("a", [])]):
        with pytest.raises(ArgumentError, match="clients"):
            train_federation(tiny_model("llama"), character_tokenizer(), bad, TINY)


# ---- on disk -----------------------------------------------------------------------------------------------


def base(seed: int = 0) -> BaseModel:
    model = tiny_model("llama", seed=seed)
    return BaseModel(model, character_tokenizer(), "tiny", weights_digest(model))


def test_a_second_run_reads_the_same_weights_instead_of_training(tmp_path: Path) -> None:
    first = base()
    made = federate(tmp_path, first, clients(), TINY)
    assert made.trained_now
    second = base()
    trained: list[Progress] = []
    read = federate(tmp_path, second, clients(), TINY, progress=trained.append)
    assert not read.trained_now
    assert trained == []
    assert read.record == json.loads((made.folder / "federation.json").read_text())
    assert_same(values(second.model), values(first.model))
    assert [path.name for path in tmp_path.iterdir()] == [made.folder.name]
    assert read.bytes_on_disk() > 0


def test_the_fingerprint_follows_everything_that_decides_the_outcome() -> None:
    here, parts = base(), clients()
    changed = [
        fingerprint(base(seed=1), parts, TINY),
        fingerprint(here, parts[:2], TINY),
        fingerprint(here, parts[::-1], TINY),
        fingerprint(here, [dataclasses.replace(parts[0], rows=poison(parts[0].rows)), *parts[1:]], TINY),
        fingerprint(here, [dataclasses.replace(parts[0], alter=Scaled(2)), *parts[1:]], TINY),
        fingerprint(here, [dataclasses.replace(parts[0], alter=Scaled(3)), *parts[1:]], TINY),
        fingerprint(here, parts, dataclasses.replace(TINY, seed=8)),
        fingerprint(here, parts, dataclasses.replace(TINY, local=LocalSettings(learning_rate=1e-3))),
    ]
    assert len({fingerprint(here, parts, TINY), *changed}) == 1 + len(changed)
    assert fingerprint(base(), clients(), TINY) == fingerprint(here, parts, TINY)
    with pytest.raises(ArgumentError, match="alter of c0"):
        fingerprint(here, [dataclasses.replace(parts[0], alter=lambda delta, number: delta)], TINY)


def test_a_failed_training_leaves_nothing_behind(tmp_path: Path) -> None:
    made = [dataclasses.replace(clients(1)[0], alter=Scaled(float("nan")))]
    with pytest.raises(NonFiniteError):
        federate(tmp_path, base(), made, TINY)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    made = federate(tmp_path, base(), clients(), TINY)
    other = federate(tmp_path / "other", base(), clients(), dataclasses.replace(TINY, seed=8))
    weights = made.folder / "trained.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes((other.folder / "trained.safetensors").read_bytes())
    with pytest.raises(LedgerMismatchError, match=r"Remove .* to train it again"):
        federate(tmp_path, base(), clients(), TINY)
    weights.write_bytes(kept[:100])
    with pytest.raises(LedgerFormatError, match="a stored federation"):
        federate(tmp_path, base(), clients(), TINY)
    weights.write_bytes(kept)
    (made.folder / "federation.json").write_text("{}")
    with pytest.raises(LedgerMismatchError, match="fingerprint"):
        federate(tmp_path, base(), clients(), TINY)
