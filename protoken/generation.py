"""One generation of one prompt by the model's own `generate`, with the traced blocks' inputs recorded on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .architectures import Architecture
from .capture import Capture, capturing, run_whole
from .errors import ArgumentError, GenerationError
from .relevance import Response
from .text import check_window

DEFAULT_NEW_TOKENS = 64

# What `trace` cannot answer with one trace, and where to go instead.
_REFUSED = {
    "num_return_sequences": (1, "Trace one sequence per call"),
    "inputs_embeds": (None, "Give the prompt as text or token ids"),
    "input_ids": (None, "Give token ids as the prompt"),
    "inputs": (None, "Give token ids as the prompt"),
}


@dataclass
class Generated:
    """A finished response with what was recorded of it."""

    response: Response
    capture: Capture


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse generation arguments that a single trace cannot answer.

    Raises:
        ArgumentError: a refused argument, with what to do instead.
    """
    for name, (harmless, remedy) in _REFUSED.items():
        value = arguments.get(name, harmless)
        if value is not harmless and value != harmless:
            raise ArgumentError(name, expected=harmless, got=value, remedy=remedy)


def complete_arguments(model: Any, arguments: Mapping[str, Any], prompt_length: int) -> dict[str, Any]:
    """Add a length where the caller gave none, and a padding token where the model has none.

    Raises:
        PromptError: prompt and new tokens together are more than the model's window.
    """
    complete = dict(arguments)
    config = arguments.get("generation_config")
    bounded = [source for source in (arguments, vars(config) if config is not None else {}) if _bound(source)]
    if not bounded:
        complete["max_new_tokens"] = DEFAULT_NEW_TOKENS
        bounded = [complete]
    check_window(model, prompt_length, _new_tokens(bounded[0], prompt_length))
    if "pad_token_id" not in complete and config is None and model.generation_config.pad_token_id is None:
        # One sequence needs no padding; without an id transformers warns on every call.
        stop = model.generation_config.eos_token_id
        complete["pad_token_id"] = stop[0] if isinstance(stop, list) else stop
    return complete


def _bound(source: Mapping[str, Any]) -> bool:
    return source.get("max_new_tokens") is not None or source.get("max_length") is not None


def _new_tokens(source: Mapping[str, Any], prompt_length: int) -> int:
    if source.get("max_new_tokens") is not None:
        return int(source["max_new_tokens"])
    return max(int(source["max_length"]) - prompt_length, 0)


def generate(
    model: Any,
    architecture: Architecture,
    prompt: Tensor,
    arguments: dict[str, Any],
    *,
    first_block: int,
    sequence: bool,
    seed: int | None,
) -> Generated:
    """Generate once, at full speed, and return the sequence with its capture.

    Args:
        prompt: ids [1, P].
        arguments: for `model.generate`.
        first_block: number of the first traced block.
        sequence: record the first traced block's input at all positions, for the reverse and forward ways.
        seed: seed torch's generators for this generation only; the global state is put back.

    Raises:
        GenerationError: `generate` returned something else than one sequence that starts with the prompt.
    """
    device = prompt.device
    arguments = {"attention_mask": torch.ones_like(prompt), **arguments}
    with capturing(architecture, first_block, sequence=sequence) as capture, _seeded(seed, device):
        output = model.generate(prompt, **arguments)
    response = _response(output, prompt)
    if response.new_tokens and not capture.is_plain_decoding(response.prompt_length, response.new_tokens):
        # Beams, drafts, guidance or chunks: what the hooks saw is not this sequence in order. Run it once more.
        with capturing(architecture, first_block, sequence=sequence, every=True) as capture, torch.no_grad():
            run_whole(model, response.seen)
    return Generated(response, capture)


def _response(output: Any, prompt: Tensor) -> Response:
    ids = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
    length = prompt.shape[1]
    if not isinstance(ids, Tensor) or ids.shape[0] != 1 or not torch.equal(ids[:, :length], prompt):
        raise GenerationError(
            "generate",
            expected="one sequence of ids that begins with the prompt",
            got=tuple(ids.shape) if isinstance(ids, Tensor) else type(output).__name__,
            remedy="Leave out what makes generate return something else",
        )
    return Response(ids, length)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
