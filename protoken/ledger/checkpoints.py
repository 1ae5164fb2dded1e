"""Reading what federations leave behind: HF checkpoints, PEFT adapters, safetensors files; never a pickle.

Answers are keyed by in-memory parameter names. Checkpoint keys often lack or carry a prefix of their model class;
that is mended here. Where keys differ in more than a prefix (mixture-of-experts models since transformers 5), load
through the model itself: load_through_model().
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from protoken.arguments import listed
from protoken.errors import ArgumentError, LayerError, LedgerFormatError
from protoken.ledger import strictjson
from protoken.ledger.tensors import LowRank
from protoken.ledger.updates import Value
from protoken.paths import path_of

PREFIXES = ("", "model.", "transformer.", "base_model.model.", "module.", "model.language_model.", "gpt_neox.")
JSON_LIMIT = 32 << 20
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
Patterns = Sequence[str] | Callable[[str], bool] | None


def load(source: str | os.PathLike[str] | Mapping[str, Value], parameters: Patterns = None) -> dict[str, Value]:
    """Parameters of a model by in-memory name, from whatever holds them:

    a mapping (a state_dict); a .safetensors file; a checkpoint folder (model.safetensors, or sharded with an index);
    a hub folder (models--org--name with snapshots/); a PEFT adapter folder (matrices come as LowRank).

    ``parameters`` are names, patterns such as "*.o_proj.weight", or a function; None takes all floating tensors.
    """
    if isinstance(source, Mapping):
        found = {name: value for name, value in source.items() if isinstance(value, LowRank) or _floating(value)}
        return select(found, parameters, "state")
    path = Path(path_of("path", source))
    if os.path.isdir(path) and (path / "adapter_config.json").exists():
        return select(load_adapter(path), parameters, str(path))
    return _load_files(path, parameters)


def select(found: Mapping[str, Value], parameters: Patterns, what: str) -> dict[str, Value]:
    """The chosen ones. LayerError for a name or pattern that chooses nothing."""
    if parameters is None:
        return dict(found)
    if callable(parameters):
        return {name: value for name, value in found.items() if parameters(name)}
    names = _choose(list(found), parameters, what)
    return {name: found[key] for name, key in names.items()}


def load_through_model(path: str | os.PathLike[str], parameters: Patterns = None) -> dict[str, Value]:
    """The same through transformers' AutoModelForCausalLM: exact in-memory names for every family, at the price of
    holding the whole model. ArgumentError for what it cannot load without running code of the checkpoint's own.
    """
    from transformers import AutoModelForCausalLM

    path = path_of("path", path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype="auto", trust_remote_code=False)
    except Exception as error:  # it fails in any way it likes
        raise ArgumentError(
            "path", expected="a checkpoint folder that transformers can load", got=f"{path} ({error})"
        ) from error
    return select({n: p.detach() for n, p in model.named_parameters()}, parameters, str(path))


def load_adapter(path: str | os.PathLike[str]) -> dict[str, Value]:
    """A PEFT LoRA folder: target weights as LowRank (alpha / r, or alpha / sqrt(r) with rsLoRA), modules_to_save dense.

    ArgumentError for what is no sum of B A: DoRA, other PEFT types, LoRA on convolutions, LoRA biases.
    """
    folder = Path(path)
    config = _read_json(folder / "adapter_config.json")
    _require_plain_lora(config, folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    result: dict[str, Value] = {}
    for key, tensor in _read_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        match = re.fullmatch(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?", name)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in name:
            raise ArgumentError(str(folder), expected="plain LoRA factors", got=ascii(key)[:120])
        elif ".base_layer." not in name:  # peft also saves the frozen table below an adapted embedding
            result[name] = tensor
    for module, pair in pairs.items():
        result[f"{module}.weight"] = _factors(folder, module, pair, config)
    return dict(sorted(result.items()))


def _factors(folder: Path, module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    embedding = "embedding_A" in pair
    a, b = pair.get("embedding_A" if embedding else "A"), pair.get("embedding_B" if embedding else "B")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        shapes = {key: tuple(tensor.shape) for key, tensor in pair.items()}
        raise ArgumentError(f"{folder}: {module}", expected="matrices A [r, I] and B [O, r]", got=shapes)
    rank = a.shape[0]
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not rank:
        raise ArgumentError(f"{folder}: lora_alpha", expected="a number, and a rank above 0", got=(alpha, rank))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    # Conv1D and embeddings keep (in, out): their weight changes by (B A)^T = A^T B^T.
    if embedding or config.get("fan_in_fan_out"):
        return LowRank(b.T.contiguous(), a.T.contiguous(), scale)
    return LowRank(a, b, scale)


def _by_pattern(patterns: object, module: str, default: object) -> object:
    """PEFT's rule: the first pattern that matches the end of the module's name at a dot."""
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    return default


def _require_plain_lora(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ArgumentError(f"{folder}: peft_type", expected="LORA", got=ascii(config.get("peft_type"))[:40])
    for flag in ("use_dora", "lora_bias", "use_qalora"):
        if config.get(flag):
            raise ArgumentError(
                f"{folder}: {flag}",
                expected="false",
                got="true",
                remedy="Its update is not scale * B A: merge the adapter and import the merged checkpoint.",
            )


def _load_files(path: Path, parameters: Patterns) -> dict[str, Value]:
    places = _places(path)
    keys = list(places)
    if parameters is None:
        chosen = {key: key for key in keys}
    elif callable(parameters):
        chosen = {key: key for key in keys if parameters(key)}
    else:
        chosen = _choose(keys, parameters, str(path))
    by_file: dict[Path, dict[str, str]] = {}
    for name, key in chosen.items():
        by_file.setdefault(places[key], {})[key] = name
    result: dict[str, Value] = {}
    for file, wanted in by_file.items():
        for key, tensor in _read_file(file, list(wanted)).items():
            if _floating(tensor) or parameters is not None:
                result[wanted[key]] = tensor
    return dict(sorted(result.items()))


def _places(path: Path) -> dict[str, Path]:
    """Key -> file of a checkpoint folder or of one file."""
    if path.suffix in PICKLES:
        raise _pickle(path)
    if not os.path.exists(path):
        raise ArgumentError("path", expected="a safetensors file or checkpoint folder", got=ascii(str(path)))
    if path.is_file():
        return dict.fromkeys(_keys(path), path)
    if (path / "snapshots").is_dir():
        path = _snapshot(path)
    index = path / "model.safetensors.index.json"
    if index.exists():
        table = _read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(
            isinstance(f, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", f) for f in table.values()
        ):
            raise LedgerFormatError(str(index), expected="weight_map of keys to files beside it", got="something else")
        return {key: path / file for key, file in table.items()}
    for name in ("model.safetensors", "pytorch_model.safetensors"):
        if (path / name).exists():
            return dict.fromkeys(_keys(path / name), path / name)
    # macOS puts a ._model.safetensors beside model.safetensors where it cannot keep its notes elsewhere.
    files = sorted(path.glob("[!.]*.safetensors")) if path.is_dir() else []
    if len(files) == 1:
        return dict.fromkeys(_keys(files[0]), files[0])
    if path.is_dir() and any(file.suffix in PICKLES for file in path.iterdir()):
        raise _pickle(path)
    raise ArgumentError("path", expected="a safetensors file or checkpoint folder", got=ascii(str(path)))


def _snapshot(path: Path) -> Path:
    """Of a hub folder: the snapshot that refs/main names, or the only one."""
    snapshots = sorted(child for child in (path / "snapshots").iterdir() if child.is_dir())
    reference = path / "refs" / "main"
    if reference.is_file():
        name = reference.read_text("utf-8")[:200].strip()
        snapshots = [child for child in snapshots if child.name == name] or snapshots
    if len(snapshots) != 1:
        raise ArgumentError("path", expected="one snapshot", got=f"{len(snapshots)} in {str(path)!a}")
    return snapshots[0]


def _choose(keys: list[str], parameters: Sequence[str], what: str) -> dict[str, str]:
    """In-memory name -> key, for names and patterns; prefixes that files carry or lack are tried in turn."""
    expected = "a list of names or patterns"
    if isinstance(parameters, str):
        raise ArgumentError("parameters", expected=expected, got="one string")
    patterns = listed("parameters", parameters, expected)
    if not all(isinstance(wanted, str) for wanted in patterns):
        raise ArgumentError("parameters", expected=expected, got=repr(parameters))
    known, result = set(keys), {}
    for wanted in patterns:
        if any(c in wanted for c in "*?["):
            found = {key: key for key in keys if fnmatchcase(key, wanted)}
        else:
            candidates = [p + wanted for p in PREFIXES] + [wanted.removeprefix(p) for p in PREFIXES]
            match = next((key for key in candidates if key in known), None)
            found = {} if match is None else {wanted: match}
        if not found:
            raise LayerError(
                "parameters",
                expected=f"something in {ascii(what)[:120]}",
                got=ascii(wanted)[:120],
                remedy=f"There are {len(keys)} keys, e.g. {ascii(sorted(keys)[:2])[:160]}; if the family renames its"
                " parameters, use load_through_model().",
            )
        result.update(found)
    return result


def _read_file(path: Path, keys: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, copied out of its mapping."""
    if not path.exists() and path.with_suffix(".bin").exists():
        raise _pickle(path.with_suffix(".bin"))
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in (file.keys() if keys is None else keys)}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise LedgerFormatError(str(path), expected="a readable safetensors file", got=str(error)[:160]) from error


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise LedgerFormatError(str(path), expected="a readable safetensors file", got=str(error)[:160]) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = strictjson.load(file.read(JSON_LIMIT + 1), limit=JSON_LIMIT, what=str(path))
    except OSError as error:
        raise LedgerFormatError(str(path), expected="a readable file", got=error.strerror) from error
    if not isinstance(value, dict):
        raise LedgerFormatError(str(path), expected="a JSON object", got=type(value).__name__)
    return value


def _pickle(path: Path) -> LedgerFormatError:
    return LedgerFormatError(
        str(path),
        expected="safetensors",
        got="a pickle, which may run any code when read",
        remedy="Save it again with save_pretrained(..., safe_serialization=True) or safetensors.torch.save_file.",
    )


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
