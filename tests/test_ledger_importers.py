"""Importers against what transformers and peft really write, and against files that are not what they claim."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from ledger_cases import NAMES, WEIGHTS, contents, federation, parameters, small_ledger
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from protoken.errors import ArgumentError, LayerError, LedgerError, LedgerFormatError
from protoken.ledger import Ledger, LowRank
from protoken.ledger.checkpoints import load, load_adapter, load_through_model
from protoken.ledger.importers import import_folder, import_round, resolve_weights
from protoken.ledger.verification import verify

LAYERS = ["*.self_attn.o_proj.weight", "*.mlp.down_proj.weight"]


@pytest.fixture
def ledger(tmp_path):
    return small_ledger(tmp_path / "ledger", 0)


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def nudged(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    other = tiny(0)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """base, two clients and their mean, saved by save_pretrained: whole, sharded, hub layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    base = tiny(0)
    clients = {"a": nudged(base, 1), "b": nudged(base, 2)}
    mean = tiny(0)
    mean.load_state_dict({
        n: 0.25 * clients["a"].state_dict()[n] + 0.75 * clients["b"].state_dict()[n] for n in base.state_dict()
    })  # fmt: skip
    base.save_pretrained(folder / "base")
    clients["a"].save_pretrained(folder / "a", max_shard_size="8KB")
    assert len(list((folder / "a").glob("*.safetensors"))) > 2
    hub = folder / "models--org--b"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots/abc123").mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("abc123")
    clients["b"].save_pretrained(folder / "tmp")
    for file in (folder / "tmp").iterdir():
        shutil.move(file, hub / "blobs" / file.name)
        (hub / "snapshots/abc123" / file.name).symlink_to(f"../../blobs/{file.name}")
    (hub / "snapshots/older").mkdir()
    mean.save_pretrained(folder / "mean")
    return folder, base, clients, mean


def test_checkpoints_whole_sharded_and_from_the_hub(checkpoints, ledger):
    folder, base, clients, mean = checkpoints
    read = import_round(
        ledger,
        base=folder / "base",
        aggregate=folder / "mean",
        clients={"a": folder / "a", "b": folder / "models--org--b"},
        examples={"a": 10, "b": 30},
        parameters=LAYERS,
        max_relative_residual=1e-4,
    )
    assert sorted(read.parameters) == sorted(
        f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")
    )
    assert [(c.client, c.weight, c.examples) for c in read.clients] == [("a", 0.25, 10), ("b", 0.75, 30)]
    name = "model.layers.1.self_attn.o_proj.weight"
    for client, model in clients.items():
        expected = model.get_parameter(name).detach() - base.get_parameter(name).detach()
        assert torch.equal(read.delta(client, name), expected)
    assert torch.equal(read.change(name), (mean.get_parameter(name) - base.get_parameter(name)).detach())


def test_state_dicts_and_files_and_models_give_the_same_values(checkpoints, tmp_path):
    folder, base, clients, _ = checkpoints
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({n: t.contiguous() for n, t in base.state_dict().items()}, tmp_path / "base.safetensors")
    sources = [folder / "base", str(tmp_path / "base.safetensors"), base.state_dict(), dict(base.named_parameters())]
    for source in sources:
        assert torch.equal(load(source, [name])[name], base.get_parameter(name))
    assert torch.equal(load_through_model(folder / "base", [name])[name], base.get_parameter(name))
    assert set(load(folder / "a")) == set(clients["a"].state_dict())
    assert set(load(folder / "a", lambda n: "embed" in n)) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("prefix", ["model.", "module.", "base_model.model."])
def test_prefixes_of_the_file_are_mended(tmp_path, prefix):
    save_file({f"{prefix}layers.0.w": torch.ones(2)}, tmp_path / "carries.safetensors")
    save_file({"layers.0.w": torch.ones(2)}, tmp_path / "lacks.safetensors")
    assert list(load(tmp_path / "carries.safetensors", ["layers.0.w"])) == ["layers.0.w"]
    assert list(load(tmp_path / "lacks.safetensors", [f"{prefix}layers.0.w"])) == [f"{prefix}layers.0.w"]


# ---- PEFT --------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


def adapted(seed: int, **options):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"], **options})
    model = peft.get_peft_model(tiny(0), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def merged_change(model, name: str) -> torch.Tensor:
    """What peft itself adds to a weight when it merges."""
    before = tiny(0).get_parameter(name).detach()
    return model.merge_and_unload().get_parameter(name).detach() - before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 3, "layers.1.self_attn.o_proj": 5}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "o_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "modules_to_save", "embedding"],
)
def test_adapter_folder_gives_the_update_that_peft_merges(tmp_path, options):
    model = adapted(1, **options)
    model.save_pretrained(tmp_path / "adapter")
    found = load_adapter(tmp_path / "adapter")
    assert len(found) >= 3
    for name, value in found.items():
        if isinstance(value, LowRank):
            torch.testing.assert_close(value.dense(), merged_change(adapted(1, **options), name), rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(value, merged_lm_head(model))


def merged_lm_head(model) -> torch.Tensor:
    return next(p.detach() for n, p in model.named_parameters() if "modules_to_save" in n)


def test_adapter_of_a_conv1d_model_is_transposed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def model():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16))

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["mlp.c_proj"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model(), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    name = "transformer.h.0.mlp.c_proj.weight"
    value = load_adapter(tmp_path / "adapter")[name]
    expected = wrapped.merge_and_unload().get_parameter(name) - model().get_parameter(name)
    assert value.shape == (32, 8)
    torch.testing.assert_close(value.dense(), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", ["factors", "products"])
def test_rounds_of_adapters_conserve_however_the_server_averaged(ledger, tmp_path, average):
    """Averaged factors are recognised; so is a server that averaged products and kept them as wider factors."""
    models = {"a": adapted(1), "b": adapted(2)}
    for client, model in models.items():
        model.save_pretrained(tmp_path / client)
    start, mean = adapted(3), adapted(3)
    start.save_pretrained(tmp_path / "base")
    name = "model.layers.0.self_attn.o_proj.weight"
    if average == "factors":
        with torch.no_grad():
            for (n, p), (_, a), (_, b) in zip(
                mean.named_parameters(), models["a"].named_parameters(), models["b"].named_parameters(), strict=True
            ):
                if "lora_" in n:
                    p.copy_(0.5 * a + 0.5 * b)
        mean.save_pretrained(tmp_path / "mean")
        aggregate = tmp_path / "mean"
    else:
        from protoken.ledger.tensors import concatenate

        loaded = {c: load(tmp_path / c) for c in models}
        aggregate = {n: concatenate([(0.5, loaded["a"][n]), (0.5, loaded["b"][n])]) for n in loaded["a"]}
    read = import_round(
        ledger,
        base=tmp_path / "base",
        aggregate=aggregate,
        clients={c: tmp_path / c for c in models},
        max_relative_residual=1e-4,
    )
    assert read.layout("a", name) == "lora"
    assert verify(ledger.path, conservation=True).ok


def test_first_round_of_adapters_needs_no_base(ledger, tmp_path):
    adapted(1).save_pretrained(tmp_path / "a")
    read = import_round(ledger, base=None, aggregate=tmp_path / "a", clients={"a": tmp_path / "a"})
    assert max(read.relative_residual.values()) < 1e-5
    with pytest.raises(ArgumentError, match="the model before the round"):
        import_round(ledger, base=None, aggregate=parameters(0), clients={"a": parameters(1)})


def test_what_the_server_averaged_may_be_told_and_is_checked_where_it_is_not(ledger, tmp_path):
    """`lora="factors"` takes the caller's word; under "auto" a client of another rank cannot have been averaged so."""
    start, other, wide = adapted(1), adapted(2), adapted(3, r=6)
    for name, model in (("start", start), ("other", other), ("wide", wide)):
        model.save_pretrained(tmp_path / name)
    sources = {"base": tmp_path / "start", "aggregate": tmp_path / "other"}
    with pytest.raises(ArgumentError, match="lora: expected one of auto, factors, products, got 'sum'"):
        import_round(ledger, **sources, clients={"a": tmp_path / "other"}, lora="sum")
    told = import_round(ledger, **sources, clients={"a": tmp_path / "other"}, lora="factors")
    assert max(told.relative_residual.values()) < 1e-5
    found = import_round(ledger, **sources, clients={"a": tmp_path / "wide"}, allow_gap=True)
    assert found.factors("a", "model.layers.0.self_attn.o_proj.weight")[0].shape[0] == 10  # 6 of its own, 4 of the base
    assert min(found.relative_residual.values()) > 0.1


def test_adapters_of_before_alpha_patterns_have_one_alpha(tmp_path):
    adapted(1).save_pretrained(tmp_path / "adapter")
    place = tmp_path / "adapter/adapter_config.json"
    config = json.loads(place.read_text())
    del config["alpha_pattern"]
    place.write_text(json.dumps(config))
    assert {value.scale for value in load_adapter(tmp_path / "adapter").values()} == {8 / 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora: expected false, got true. Its update is not"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got 'IA3'"),
        ({"lora_alpha": "8"}, "lora_alpha: expected a number"),
    ],
)
def test_adapters_that_are_no_sum_of_factors_are_refused(tmp_path, change, message):
    adapted(1).save_pretrained(tmp_path / "adapter")
    place = tmp_path / "adapter/adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(ArgumentError, match=message):
        load(tmp_path / "adapter")


def test_adapter_with_a_missing_or_strange_factor_is_refused(tmp_path):
    adapted(1).save_pretrained(tmp_path / "adapter")
    place = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(place)
    key = next(k for k in tensors if "lora_A" in k)
    save_file({k: t for k, t in tensors.items() if k != key}, place)
    with pytest.raises(ArgumentError, match=r"matrices A \[r, I\] and B \[O, r\]"):
        load_adapter(tmp_path / "adapter")
    save_file({**tensors, key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)}, place)
    with pytest.raises(ArgumentError, match="plain LoRA factors"):
        load_adapter(tmp_path / "adapter")


# ---- a folder of rounds --------------------------------------------------------------------------------------------


def write_federation(folder: Path, rounds: int = 3) -> dict[str, torch.Tensor]:
    model = parameters(0)
    folder.mkdir()
    save_file(model, folder / "global.safetensors")
    for number in range(1, rounds + 1):
        states, mean = federation(model, number * 10)
        clients = folder / f"round-{number}/clients"
        clients.mkdir(parents=True)
        for client, state in states.items():
            save_file(state, clients / f"{client}.safetensors")
        save_file(mean, folder / f"round-{number}/global.safetensors")
        notes = {"weights": WEIGHTS, "metadata": {"number": number}}
        (folder / f"round-{number}/round.json").write_text(json.dumps(notes))
        model = mean
    return model


def test_folder_of_rounds_is_imported_and_an_interrupted_import_goes_on(ledger, tmp_path):
    last = write_federation(tmp_path / "federation", 3)
    shutil.move(tmp_path / "federation/round-3", tmp_path / "later")
    seen = []
    assert len(import_folder(ledger, tmp_path / "federation", progress=lambda i, n: seen.append((i, n)))) == 2
    assert seen == [(1, 2), (2, 2)]
    shutil.move(tmp_path / "later", tmp_path / "federation/round-3")
    assert [r.number for r in import_folder(ledger, tmp_path / "federation")] == [3]
    assert [r.metadata["number"] for r in ledger.select("all")] == [1, 2, 3]
    total = sum(r.change(NAMES[0]) for r in ledger.select("all"))
    torch.testing.assert_close(total, last[NAMES[0]] - parameters(0)[NAMES[0]], rtol=0, atol=1e-6)
    assert max(max(r.relative_residual.values()) for r in ledger.select("all")) < 1e-5


def test_files_that_file_browsers_leave_behind_are_no_clients(ledger, tmp_path):
    write_federation(tmp_path / "federation", 1)
    clients = tmp_path / "federation/round-1/clients"
    shutil.copytree(clients, tmp_path / "alone")
    (clients / "bob.safetensors").unlink()
    (clients / "bob").mkdir()
    shutil.copy(tmp_path / "alone/bob.safetensors", clients / "bob/weights.safetensors")
    for stray in (".DS_Store", "._alice.safetensors", "bob/._weights.safetensors"):
        (clients / stray).write_bytes(b"notes")
    (clients / ".ipynb_checkpoints").mkdir()
    (read,) = import_folder(ledger, tmp_path / "federation")
    assert {c.client for c in read.clients} == set(WEIGHTS)


def test_rounds_without_notes_weigh_every_client_the_same(ledger, tmp_path):
    write_federation(tmp_path / "federation", 1)
    (tmp_path / "federation/round-1/round.json").unlink()
    (read,) = import_folder(ledger, tmp_path / "federation")
    assert {c.client: c.weight for c in read.clients} == dict.fromkeys(WEIGHTS, 1 / 3)
    assert (read.rule, read.metadata) == ("fedavg", {})


def test_a_folder_of_adapters_may_begin_without_a_global_model(ledger, tmp_path):
    (tmp_path / "federation/round-1/clients").mkdir(parents=True)
    adapted(1).save_pretrained(tmp_path / "federation/round-1/clients/a")
    adapted(1).save_pretrained(tmp_path / "federation/round-1/global")
    (read,) = import_folder(ledger, tmp_path / "federation")
    assert max(read.relative_residual.values()) < 1e-5


BAD_NOTES = {
    "not json": "{",
    "a list": "[]",
    "unknown key": '{"wieghts": {}}',
    "text weight": '{"weights": {"alice": "1", "bob": 0, "carol": 0}}',
    "NaN weight": '{"weights": {"alice": NaN, "bob": 0, "carol": 1}}',
    "negative weight": '{"weights": {"alice": -1, "bob": 1, "carol": 1}}',
    "unknown client": '{"weights": {"alice": 0.5, "bob": 0.5, "dave": 0}}',
    "missing client": '{"weights": {"alice": 0.5, "bob": 0.5}}',
    "zero weights": '{"weights": {"alice": 0, "bob": 0, "carol": 0}}',
    "zero examples": '{"examples": {"alice": 0, "bob": 0, "carol": 0}}',
    "half examples": '{"examples": {"alice": 0.5, "bob": 1, "carol": 1}}',
    "metadata as text": '{"metadata": "x"}',
    "bad rule": '{"rule": "Fed Avg"}',
    "duplicate key": '{"weights": {"alice": 1, "alice": 0, "bob": 0, "carol": 0}}',
}


@pytest.mark.parametrize("notes", BAD_NOTES)
def test_bad_round_notes_are_typed_errors_and_leave_the_ledger_alone(ledger, tmp_path, notes):
    write_federation(tmp_path / "federation", 2)
    (tmp_path / "federation/round-2/round.json").write_text(BAD_NOTES[notes])
    with pytest.raises((LedgerError, ArgumentError)):
        import_folder(ledger, tmp_path / "federation")
    assert ledger.rounds == (1,)
    assert verify(ledger.path).ok


def damage_client(name: str, data: bytes):
    return lambda folder: (folder / f"round-2/clients/{name}").write_bytes(data)


BAD_FOLDERS = {
    "a pickle renamed": damage_client("bob.safetensors", pickle.dumps({"w": 1}) * 50),
    "an empty file": damage_client("bob.safetensors", b""),
    "a header bomb": damage_client("bob.safetensors", b"\xff" * 8 + b"x" * 100),
    "a torch file": lambda folder: torch.save({}, folder / "round-2/clients/dave.pt"),
    "a client name outside the charset": damage_client("b\u00f6b.safetensors", b""),
    "a gap": lambda folder: shutil.move(folder / "round-2", folder / "round-3"),
    "a client twice": lambda folder: (folder / "round-2/clients/bob").mkdir(),
    "no clients": lambda folder: shutil.rmtree(folder / "round-2/clients"),
    "no global": lambda folder: (folder / "round-2/global.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", BAD_FOLDERS)
def test_damaged_round_folder_is_a_typed_error_and_leaves_the_ledger_alone(ledger, tmp_path, damage):
    write_federation(tmp_path / "federation", 2)
    import_folder(ledger, shutil.copytree(tmp_path / "federation", tmp_path / "one", ignore=lambda *_: ["round-2"]))
    before = contents(ledger.path)
    BAD_FOLDERS[damage](tmp_path / "federation")
    with pytest.raises((LedgerError, ArgumentError)) as caught:
        import_folder(ledger, tmp_path / "federation")
    assert str(caught.value).isascii()
    assert contents(ledger.path) == before


def test_pickled_checkpoints_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "boom"),))

    for name in ("model.bin", "model.pt", "model.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(LedgerFormatError, match="a pickle, which may run any code when read"):
            load(tmp_path / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LedgerFormatError, match=r"safetensors\.torch\.save_file"):
        load(tmp_path / "folder")
    shutil.move(tmp_path / "folder/pytorch_model.bin", tmp_path / "folder/model.safetensors")
    with pytest.raises(LedgerFormatError, match="a readable safetensors file"):
        load(tmp_path / "folder")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 5])
def test_checkpoint_index_cannot_lead_out_of_its_folder(tmp_path, file):
    save_file({"w": torch.ones(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(LedgerFormatError, match="files beside it"):
        load(tmp_path / "model")


def test_files_that_cannot_be_read_are_format_errors(tmp_path):
    for name, data in (("bomb.safetensors", b"\xff" * 8), ("empty.safetensors", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LedgerFormatError, match="a readable safetensors file"):
            load(tmp_path / name)
    model = tmp_path / "model"
    model.mkdir()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "part.safetensors"}}))
    with pytest.raises(LedgerFormatError, match="a readable safetensors file"):
        load(model)  # the part is missing
    (model / "part.bin").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(LedgerFormatError, match="a pickle, which may run any code when read"):
        load(model)
    index.write_text("[]")
    with pytest.raises(LedgerFormatError, match="a JSON object, got list"):
        load(model)
    index.unlink()
    index.mkdir()
    with pytest.raises(LedgerFormatError, match="a readable file, got Is a directory"):
        load(model)


def test_a_hub_folder_has_one_snapshot_or_says_which(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"snapshots/{name}").mkdir(parents=True)
        # The only file of the folder counts, whatever it is called.
        save_file({name: torch.ones(1)}, tmp_path / f"snapshots/{name}/weights-{name}.safetensors")
    with pytest.raises(ArgumentError, match="one snapshot, got 2"):
        load(tmp_path)
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs/main").write_text("two\n")
    assert set(load(tmp_path)) == {"two"}
    shutil.rmtree(tmp_path / "refs")
    shutil.rmtree(tmp_path / "snapshots/two")
    assert set(load(tmp_path)) == {"one"}


def test_a_function_chooses_parameters_of_any_source():
    state = {"a.weight": torch.ones(1), "b.weight": torch.ones(1), "steps": torch.ones(1, dtype=torch.int64)}
    assert set(load(state, lambda name: name.startswith("a"))) == {"a.weight"}


def test_names_that_choose_nothing_are_errors(tmp_path):
    save_file({"model.a": torch.ones(1), "steps": torch.ones(1, dtype=torch.int64)}, tmp_path / "m.safetensors")
    assert set(load(tmp_path / "m.safetensors")) == {"model.a"}
    for wanted in (["b"], ["*.x"]):
        with pytest.raises(LayerError, match="load_through_model"):
            load(tmp_path / "m.safetensors", wanted)
    with pytest.raises(ArgumentError, match="a list of names or patterns, got one string"):
        load(tmp_path / "m.safetensors", "a")
    with pytest.raises(ArgumentError, match="a safetensors file or checkpoint folder"):
        load(tmp_path / "nothing")


def test_weights_come_from_weights_examples_or_equality():
    assert resolve_weights(["a", "b"], None, None) == {"a": 0.5, "b": 0.5}
    assert resolve_weights(["a", "b"], None, {"a": 1, "b": 3}) == {"a": 0.25, "b": 0.75}
    assert resolve_weights(["a", "b"], {"a": 0.9, "b": 0.1}, {"a": 1, "b": 3}) == {"a": 0.9, "b": 0.1}
    with pytest.raises(ArgumentError, match="one for each of the 2 clients"):
        resolve_weights(["a", "b"], {"a": 1.0}, None)


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="a folder that is there"):
        import_folder(Ledger.create(tmp_path / "ledger"), tmp_path / "none")
