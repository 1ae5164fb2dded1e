"""One call of the model's own `generate`, with the traced blocks' inputs recorded on the way.

Every returned sequence becomes one of its own, without padding: under causal attention and position ids that count
from the first real token, left padding changes nothing, so each is replayed alone and no neighbour can matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protoken.arguments import is_whole
from protoken.errors import ArgumentError, GenerationError
from protoken.generation_record import is_setting
from protoken.models.architectures import Architecture
from protoken.models.twin import is_compiled, uncompiled
from protoken.text import OF_TEXT, check_window
from protoken.ways.capture import Capture, capturing, run_whole
from protoken.ways.relevance import Response

DEFAULT_NEW_TOKENS = 64

# What `trace` cannot answer with one trace, and where to go instead.
_REFUSED = {
    "num_return_sequences": (1, "Trace one sequence per call, or call model.generate inside protoken.tracing"),
    "inputs_embeds": (None, "Give the prompt as text or token ids"),
    "input_ids": (None, "Give token ids as the prompt"),
    "inputs": (None, "Give token ids as the prompt"),
}


@dataclass
class Generated:
    """A finished response with what was recorded of it."""

    response: Response
    capture: Capture


def check_arguments(model: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse generation arguments that a single trace cannot answer.

    Raises:
        ArgumentError: a refused argument, with what to do instead.
        GenerationError: continuous batching.
    """
    refuse_paged(model, arguments)
    for name, (harmless, remedy) in _REFUSED.items():
        value = setting(model, arguments, name)
        if value is not None and (isinstance(value, Tensor) or value != harmless):
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise ArgumentError(name, expected=harmless or "nothing", got=got, remedy=remedy)
    for name in ("max_new_tokens", "max_length"):
        value = arguments.get(name)
        if value is not None and not is_whole(value):
            raise ArgumentError(name, expected="a whole number of tokens", got=value)


def check_seed(seed: object) -> None:
    """Refuse what torch's generators cannot be seeded with.

    Raises:
        ArgumentError: neither None nor a whole number from 0 to 2^64 - 1.
    """
    if seed is not None and not (is_whole(seed) and 0 <= int(seed) < 2**64):
        raise ArgumentError("seed", expected="None, or a whole number from 0 to 2^64 - 1", got=seed)


def refuse_paged(model: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse a paged cache, under which `generate` hands its prompts on to `generate_batch`.

    Raises:
        GenerationError: it was asked for.
        ArgumentError: `generation_config` is none.
    """
    if setting(model, arguments, "cache_implementation") == "paged":
        raise GenerationError(
            "cache_implementation",
            expected="a cache of one call",
            got="paged, which is continuous batching",
            remedy="Call model.generate_batch(...) inside protoken.tracing",
        )


def setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """What `generate` will use, as it fills it in: the call's own, then its configuration's, then the model's.

    Raises:
        ArgumentError: the call's `generation_config` is none.
    """
    from transformers import GenerationConfig

    config = arguments.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise ArgumentError(
            "generation_config",
            expected="a transformers.GenerationConfig",
            got=f"a {type(config).__name__}",
            remedy="Give its entries as arguments of their own, or GenerationConfig(**entries)",
        )
    if name in arguments:
        return arguments[name]
    found = (getattr(source, name, None) for source in (config, getattr(model, "generation_config", None)))
    return next((value for value in found if value is not None), None)


def with_length(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with `DEFAULT_NEW_TOKENS` where neither they nor their configuration bound the response."""
    return (
        dict(arguments) if any(map(_bound, _given(arguments))) else {**arguments, "max_new_tokens": DEFAULT_NEW_TOKENS}
    )


def complete_arguments(
    model: Any, arguments: Mapping[str, Any], prompt_length: int, tokenizer: Any = None
) -> dict[str, Any]:
    """Add a padding token where the model has none, and a tokenizer for stop strings; check the length if there is one.

    Raises:
        ArgumentError: no room for a single new token.
        PromptError: prompt and new tokens together are more than the model's window.
    """
    complete = dict(arguments)
    config = arguments.get("generation_config")
    bounded = next(filter(_bound, _given(arguments)), None)
    if bounded is not None:
        new_tokens = _new_tokens(bounded, prompt_length)
        if new_tokens < 1:
            name = "max_new_tokens" if bounded.get("max_new_tokens") is not None else "max_length"
            raise ArgumentError(
                name,
                expected=f"room for at least one token after the prompt's {prompt_length}",
                got=bounded[name],
                remedy="There is nothing to attribute without one",
            )
        check_window(model, prompt_length, new_tokens)
    if "pad_token_id" not in complete and config is None and model.generation_config.pad_token_id is None:
        # One sequence needs no padding; without an id transformers warns on every call.
        stop = model.generation_config.eos_token_id
        complete["pad_token_id"] = stop[0] if isinstance(stop, list) else stop
    if tokenizer is not None and setting(model, complete, "stop_strings"):
        complete.setdefault("tokenizer", tokenizer)
    return complete


def bound_of(model: Any, arguments: Mapping[str, Any], prompt_length: int) -> int:
    """The most new tokens that such a call can bring."""
    for source in (*_given(arguments), vars(model.generation_config)):
        if _bound(source):
            return _new_tokens(source, prompt_length)
    return DEFAULT_NEW_TOKENS


def _given(arguments: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Where a call may say its length: its arguments first, then its configuration."""
    config = arguments.get("generation_config")
    return (arguments,) if config is None else (arguments, vars(config))


def _bound(source: Mapping[str, Any]) -> bool:
    return source.get("max_new_tokens") is not None or source.get("max_length") is not None


def _new_tokens(source: Mapping[str, Any], prompt_length: int) -> int:
    if source.get("max_new_tokens") is not None:
        return int(source["max_new_tokens"])
    return max(int(source["max_length"]) - prompt_length, 0)


def generate(
    model: Any,
    architecture: Architecture,
    arguments: dict[str, Any],
    *,
    call: Callable[..., Any],
    prompt: Tensor,
    attention_mask: Tensor | None,
    first_block: int,
    sequence: bool,
    seed: int | None = None,
) -> tuple[Any, list[Generated]]:
    """Generate once, at full speed; return what the call returned, and every sequence with its capture.

    Args:
        arguments: what `call` is called with, prompt and mask included.
        call: the model's own `generate`.
        prompt: the same prompt ids [B, P] and mask, left-padded where prompts differ in length.
        first_block: number of the first traced block.
        sequence: record the first traced block's input at all positions, for the reverse and forward ways.
        seed: seed torch's generators for this generation only; the global state is put back.

    Raises:
        GenerationError: the result is not sequences that start with the prompts, or the padding is on the right.
    """
    # It is transformers', which is not loaded before there is a model.
    from protoken.endings import watched

    padding = _left_padding(prompt, attention_mask)
    capture: Capture | None = None
    beams = (setting(model, arguments, "num_beams") or 1) > 1
    with ExitStack() as stack, seeded(seed, prompt.device), watched(model, beams=beams) as endings:
        if not is_compiled(model):
            capture = stack.enter_context(capturing(architecture, first_block, sequence=sequence))
        output = call(**arguments)
    sequences = _sequences(output, prompt)
    copies = sequences.shape[0] // prompt.shape[0]
    stops = stop_tokens(setting(model, arguments, "eos_token_id"))
    width = prompt.shape[1]
    new_tokens, rows = sequences.shape[1] - width, prompt.shape[0]
    live = capture if copies == 1 and capture and capture.is_plain_decoding(width, new_tokens, rows) else None
    found = []
    for row, (ids, end) in enumerate(zip(sequences, endings.of(sequences), strict=True)):
        skip = padding[row // copies]
        end = width + _length(ids[width:end].tolist(), stops)
        response = Response(ids[None, skip:end], width - skip)
        # Beams, drafts, guidance, chunks: what the hooks saw is not this sequence in order; in a compiled model they
        # would see nothing. Run it once more.
        if live is None:
            check_ids_are_all(arguments)
        own = live.row(row, skip) if live else teacher_forced(model, architecture, response, first_block, sequence)
        found.append(Generated(response, own))
    return output, found


def beyond_text(arguments: Mapping[str, Any]) -> list[str]:
    """The names of a call's pictures, sounds or positions: tensors that its text does not come to."""
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor) and name not in OF_TEXT]
    return [name for name in tensors if not is_setting(name)]


def check_ids_are_all(arguments: Mapping[str, Any]) -> None:
    """Refuse to run a sequence once more without the pictures, sounds or positions that it was generated from.

    Raises:
        GenerationError: the call has such.
    """
    others = beyond_text(arguments)
    if others:
        raise GenerationError(
            others[0],
            expected="token ids and their mask alone, where a generation must be run once more",
            got=f"a tensor of shape {tuple(arguments[others[0]].shape)}",
            remedy="The default method records what runs, as long as it decodes greedily or by sampling, "
            "one sequence per prompt",
        )


def teacher_forced(
    model: Any, architecture: Architecture, response: Response, first_block: int, sequence: bool
) -> Capture:
    """The capture of a finished response, by one pass over it."""
    model, architecture = uncompiled(model, architecture)
    with capturing(architecture, first_block, sequence=sequence, every=True) as capture, torch.no_grad():
        if response.new_tokens:
            run_whole(model, response.seen)
    return capture


def _sequences(output: Any, prompt: Tensor) -> Tensor:
    ids = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
    rows, width = prompt.shape
    if isinstance(ids, Tensor) and ids.shape[0] % rows == 0 and ids.shape[1] >= width:
        copies = ids.shape[0] // rows
        if torch.equal(ids[:, :width], prompt.repeat_interleave(copies, 0)):
            return ids
    raise GenerationError(
        "generate",
        expected="sequences of ids that begin with the prompts",
        got=tuple(ids.shape) if isinstance(ids, Tensor) else type(output).__name__,
        remedy="Leave out what makes generate return something else",
    )


def _left_padding(prompt: Tensor, attention_mask: Tensor | None) -> list[int]:
    """Padding positions before each row's prompt."""
    if attention_mask is None:
        return [0] * prompt.shape[0]
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != prompt.shape:
        tensor = isinstance(attention_mask, Tensor)
        raise GenerationError(
            "attention_mask",
            expected=f"a tensor of shape {tuple(prompt.shape)}, like the prompt's",
            got=f"shape {tuple(attention_mask.shape)}" if tensor else f"a {type(attention_mask).__name__}",
        )
    mask = attention_mask.bool()
    padding = (~mask).sum(1)
    expected = torch.arange(mask.shape[1], device=mask.device)[None] >= padding[:, None]
    if not torch.equal(mask, expected) or bool((padding == mask.shape[1]).any()):
        row = int(((mask != expected).any(1) | (padding == mask.shape[1])).nonzero()[0])
        raise GenerationError(
            "attention_mask",
            expected="ones after zeros on the left only, and one at least",
            got=f"{mask[row].int().tolist()[:16]} in row {row}",
            remedy='Pad on the left: tokenizer.padding_side = "left". Without a mask, padding tokens are masked '
            "wherever they stand: pass attention_mask= if they are meant",
        )
    return [int(count) for count in padding]


def stop_tokens(value: Any) -> set[int]:
    """The ids of `eos_token_id`, which may be None, one, several or a tensor."""
    if value is None:
        return set()
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    return set(value) if isinstance(value, list | tuple) else {int(value)}


def _length(new_ids: list[int], stops: set[int]) -> int:
    """Tokens up to and including the first stop token; what follows it in a batch is padding.

    The stopping criteria know of it, too, where `generate` is transformers' own.
    """
    return next((n for n, token in enumerate(new_ids, start=1) if token in stops), len(new_ids))


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
