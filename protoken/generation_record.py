"""The arguments of a `generate` call as a trace keeps them, and from there to a call with the same ones.

A setting of GenerationConfig is kept as it was given, in JSON's types: numpy's and torch's numbers as Python's, ids as
lists, a configuration by the settings that it sets. Of what JSON has not (processors, criteria, functions, models) a
description is kept for the reader. Descriptions are never read back: what changes the answer and cannot be given again
is refused by name. A record may come from anybody's file: names and types are checked, and none of it is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoken.errors import ArgumentError, ProtokenWarning
from protoken.text import TENSOR_OF

_LONGEST_DESCRIPTION = 200  # characters
_REMEDY = "Ask without generate=True, which replays the trace's own response whatever it was generated with"
_DESCRIBED = f"{_REMEDY}; of a trace from an earlier version it is a description, which a new trace is not"

_NEGATIVE = frozenset(["negative_prompt_ids", "negative_prompt_attention_mask"])
# They say how fast, where to, or in what form; a trace's answer is one sequence, and starts from its prompt alone.
_OF_NO_ACCOUNT = frozenset(
    [
        *("inputs", "input_ids", "attention_mask", "past_key_values", "tokenizer", "streamer", "synced_gpus"),
        *("assistant_tokenizer", "num_return_sequences", "return_dict_in_generate", "output_attentions"),
        *("output_hidden_states", "output_scores", "output_logits", "compile_config", "disable_compile"),
        *("continuous_batching_config", "record_timestamps", "progress_bar", "persistent_manager", "warmup"),
    ]
)
# Code of the caller's, or of a repository's: a record has none of it. Next to each, what leaves the answer as it is.
_CODE: dict[str, tuple[object, ...]] = {
    "logits_processor": (None, []),
    "stopping_criteria": (None, []),
    "prefix_allowed_tokens_fn": (None,),
    "custom_generate": (None,),
    "trust_remote_code": (None, False),
    "constraints": (None,),
    "force_words_ids": (None,),
    "dola_layers": (None,),
    "penalty_alpha": (None, 0),
    "num_beam_groups": (None, 1),
}
# The types of settings; all that are not named are numbers or flags.
_WHOLE = frozenset(
    [
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "top_k", "max_cache_len"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "prefill_chunk_size", "prompt_lookup_num_tokens"),
        *("max_matching_ngram_size", "assistant_early_exit", "bos_token_id", "decoder_start_token_id"),
    ]
)
_IDS = frozenset(["eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id"])
_IDS |= {"suppress_tokens", "begin_suppress_tokens"}
_LISTS = frozenset(["bad_words_ids", "sequence_bias", "exponential_decay_length_penalty"])
_WORDS = frozenset(["cache_implementation", "num_assistant_tokens_schedule", "speculation_type"])
_OBJECTS = frozenset(["watermarking_config", "cache_config"])


@cache
def _settings() -> frozenset[str]:
    # transformers is not loaded before there is a model.
    from transformers import GenerationConfig

    return frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_")) - {"transformers_version"}


def is_setting(name: str) -> bool:
    """Whether it is one of GenerationConfig, and not an input of the model's."""
    return name in _settings()


def recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call in JSON's types, or described; of what is kept already, the same."""
    return {name: _kept(name, value) for name, value in arguments.items()}


def _kept(name: str, value: Any) -> Any:
    try:
        if name == "generation_config" and hasattr(value, "to_diff_dict"):
            # What somebody else put on it says nothing to `generate`.
            return {key: _plain(one) for key, one in value.to_diff_dict().items() if is_setting(key)}
        if name == "watermarking_config" and hasattr(value, "to_dict"):
            return _plain(value.to_dict())
        if isinstance(value, Tensor) and not is_setting(name) and name not in _NEGATIVE:
            return f"{TENSOR_OF}{tuple(value.shape)}"
        return _plain(value)
    except Exception:
        return _described(value)


def _plain(value: Any) -> Any:
    """The value in JSON's types. TypeError: it has none, or holds something that has none."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Tensor | np.ndarray | np.bool_):
        return _plain(value.tolist())
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Mapping) and all(isinstance(key, tuple) for key in value):
        # Biases by sequence of ids; transformers takes pairs as well.
        return [[list(map(_plain, key)), _plain(item)] for key, item in value.items()]
    raise TypeError(f"JSON has no {type(value).__name__}")


def _described(value: Any) -> str:
    """Its repr: of somebody else's class, whose repr may fail."""
    try:
        return repr(value)[:_LONGEST_DESCRIPTION]
    except Exception:
        return f"<{type(value).__name__}>"


def replayed(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which `generate` is called once more, out of what `recorded` kept of a call, or a file.

    Raises:
        ArgumentError: an argument that changes the answer cannot be given again, has another type than its name asks
            for, or is not known.

    Warns:
        ProtokenWarning: a draft model is left out. The answer has the model's own distribution without it.
    """
    found, own = _split(kept), kept.get("generation_config")
    if own is not None:
        if not isinstance(own, Mapping):
            raise ArgumentError("generation_config", expected="its settings", got=own, remedy=_DESCRIBED)
        found["generation_config"] = _configuration(_split(own, inside=True))
    settings = {name: value for name, value in found.items() if is_setting(name)}
    # Also where the call had no configuration: it says which values transformers does not take, and makes objects.
    built = _configuration(settings)
    found |= {name: getattr(built, name) for name in settings.keys() & _OBJECTS}
    _leave_draft_model_out(kept, found)
    return found


def _split(kept: Mapping[str, Any], *, inside: bool = False) -> dict[str, Any]:
    """What is given again, checked; what is of no account is left out."""
    found: dict[str, Any] = {}
    for name, value in kept.items():
        if name in _OF_NO_ACCOUNT or (not inside and name in ("generation_config", "assistant_model")):
            continue
        if name in _CODE:
            _refuse_code(name, value)
        elif name in _NEGATIVE and not inside:
            found |= {name: _row(name, value)} if value is not None else {}
        elif not is_setting(name):
            _refuse_unknown(name, value)
        else:
            found[name] = _checked(name, value)
    return found


def _refuse_code(name: str, value: Any) -> None:
    if value not in _CODE[name]:
        expected = "nothing that only the call itself had, to answer anew"
        raise ArgumentError(name, expected=expected, got=value, remedy=_REMEDY)


def _refuse_unknown(name: str, value: Any) -> None:
    if value is not None:
        expected = "a setting of transformers' GenerationConfig, to answer anew"
        raise ArgumentError(name, expected=expected, got=value, remedy=_REMEDY)


def _checked(name: str, value: Any) -> Any:
    """A setting, if it is of its type."""
    expected, right = _type_of(name, value)
    if value is None or right:
        return value
    raise ArgumentError(name, expected=f"{expected}, to answer anew", got=repr(value), remedy=_DESCRIBED)


def _type_of(name: str, value: Any) -> tuple[str, bool]:
    if name in _WHOLE:
        return "a whole number", type(value) is int
    if name in _IDS:
        return "an id or a list of them", type(value) is int or _all(value, int)
    if name in _LISTS:
        return "a list of numbers, or of lists of them", isinstance(value, list) and _holds_numbers(value)
    if name == "stop_strings":
        return "a text or a list of them", _is_text(value) or _all(value, str)
    if name in _WORDS:
        return "a word", isinstance(value, str)
    if name in _OBJECTS:
        values = list(value.values()) if isinstance(value, Mapping) else None
        return "a table of values", _all(values, str, bool, int, float, type(None))
    if name == "early_stopping":
        return 'true, false or "never"', isinstance(value, bool) or value == "never"
    return "a number", isinstance(value, bool | int | float)


def _all(value: object, *types: type) -> bool:
    return isinstance(value, list) and all(type(item) in types for item in value)


def _holds_numbers(value: list[Any], depth: int = 3) -> bool:
    """Lists in lists, as deep as a bias by sequence goes."""
    inner = [item for item in value if isinstance(item, list)]
    rest = all(type(item) in (int, float) for item in value if not isinstance(item, list))
    return rest and (not inner or (depth > 1 and all(_holds_numbers(item, depth - 1) for item in inner)))


def _is_text(value: object) -> bool:
    """A text, unless it reads as a list of them: earlier versions kept a list's repr."""
    return isinstance(value, str) and not value.startswith(("['", '["', "('", '("'))


def _row(name: str, value: Any) -> Tensor:
    """The negative prompt, or its mask, of one row. Of a batch's several, nobody knows which was the trace's own."""
    rows = value if isinstance(value, list) else []
    if len(rows) != 1 or not _all(rows[0], int) or not rows[0]:
        got = f"{len(rows)} rows" if len(rows) > 1 else repr(value)
        raise ArgumentError(name, expected="ids of one prompt, to answer anew", got=got, remedy=_REMEDY)
    return torch.tensor(rows)


def _configuration(settings: Mapping[str, Any]) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig(**settings)
    except (TypeError, ValueError) as error:
        expected = "settings that transformers takes, to answer anew"
        raise ArgumentError("generate_arguments", expected=expected, got=error, remedy=_REMEDY) from error


def _leave_draft_model_out(kept: Mapping[str, Any], found: dict[str, Any]) -> None:
    if kept.get("assistant_model") is None:
        return
    config = found.get("generation_config")
    if found.get("assistant_ensemble_weight", getattr(config, "assistant_ensemble_weight", None)) is not None:
        expected = "no draft model that has a say in the answer, to answer anew"
        raise ArgumentError("assistant_model", expected=expected, got=kept["assistant_model"], remedy=_REMEDY)
    found.pop("speculation_type", None)
    warnings.warn(
        "assistant_model: left out of the answer without the clients; the model is slower alone, and where it samples "
        "it draws other tokens from the same distribution",
        ProtokenWarning,
        stacklevel=5,
    )
