"""What cannot be streamed, refused before anything runs: each with the way to get it all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from protoken.errors import ArgumentError, GenerationError
from protoken.generation import check_arguments
from protoken.models.twin import is_compiled

_LATER = "Use protoken.trace or protoken.tracing, which replay such a generation once it is complete"
_BATCH = "Use protoken.tracing for several, or one stream for each"

# Settings under which a token is not chosen by one pass over one row; the values that leave it so, and the remedy.
_MODES: dict[str, tuple[tuple[object, ...], str]] = {
    "num_beams": ((None, 1), _LATER),
    "num_return_sequences": ((None, 1), _BATCH),
    "prompt_lookup_num_tokens": ((None,), _LATER),
    "assistant_early_exit": ((None,), _LATER),
    "use_mtp": ((None, False), _LATER),
    "assistant_model": ((None,), _LATER),
    "guidance_scale": ((None, 1), _LATER),
    "negative_prompt_ids": ((None,), _LATER),
    "penalty_alpha": ((None, 0), "Sample, or decode greedily"),
    "dola_layers": ((None,), "Sample, or decode greedily"),
    "constraints": ((None,), "Sample, or decode greedily"),
    "force_words_ids": ((None,), "Sample, or decode greedily"),
    "custom_generate": ((None,), _LATER),
    "token_healing": ((None, False), "Heal the prompt first"),
}

# What `trace` takes and a stream has only one answer to.
_FIXED: dict[str, tuple[object, ...]] = {"blocks": (1, None), "way": ("local", "auto"), "method": ("protoken",)}


def checked_arguments(model: Any, prompt: object, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The generation arguments that are left for `generate`.

    Raises:
        GenerationError: several prompts, padding, or a mode of decoding that cannot be streamed.
        ArgumentError: another depth, way or method than a stream's, or prompts hidden among the arguments.
    """
    _refuse_several(prompt)
    _refuse_compiled(model)
    _refuse_modes(model, arguments)
    for name, values in _FIXED.items():
        if arguments.get(name, values[0]) not in values:
            raise ArgumentError(
                name,
                expected=f"{values[0]!r}, which is all that a stream has",
                got=arguments[name],
                remedy="Use protoken.trace, which answers when the response is complete",
            )
    mask = arguments.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise GenerationError("attention_mask", expected="a tensor of ones", got=f"a {type(mask).__name__}")
    if mask is not None and not bool(mask.all()):
        raise GenerationError(
            "attention_mask",
            expected="ones only: one prompt needs no padding",
            got=f"{int((mask == 0).sum())} zeros",
            remedy="Give the prompt's own tokens, or use protoken.tracing for padded batches",
        )
    left = {name: value for name, value in arguments.items() if name not in _FIXED}
    check_arguments(model, left)
    return left


def _refuse_several(prompt: object) -> None:
    rows = 1
    if isinstance(prompt, Tensor):
        rows = prompt.shape[0] if prompt.dim() > 1 else 1
    elif isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str | list | tuple | Tensor):
        rows = len(prompt)
    if rows > 1:
        raise GenerationError("prompt", expected="one prompt to stream", got=f"{rows} of them", remedy=_BATCH)


def _refuse_compiled(model: Any) -> None:
    if is_compiled(model):
        raise GenerationError(
            "model",
            expected="a model that runs as it is written, to watch while it computes",
            got="a compiled one, which passes hooks by",
            remedy="Use protoken.trace, which runs the finished response once more without the compilation",
        )


def _refuse_modes(model: Any, arguments: Mapping[str, Any]) -> None:
    config = arguments.get("generation_config")
    for name, (harmless, remedy) in _MODES.items():
        value = arguments.get(name)
        for source in (config, getattr(model, "generation_config", None)):
            # As transformers fills them in: the call's own, then its configuration's, then the model's.
            value = getattr(source, name, None) if value is None else value
        if not any(value is one or (type(value) in (int, float, bool) and value == one) for one in harmless):
            raise GenerationError(name, expected=f"{harmless[-1]} to stream", got=_shown(value), remedy=remedy)


def _shown(value: object) -> object:
    return value if isinstance(value, int | float | str) else type(value).__name__
