"""Is the gradient of a half-precision model a gradient, or rounding? Measured once per model and choice of layers.

The last block's share of the first few tokens' scores is computed twice from the same recorded hidden states: as the
model computes, and with the block, the final norm and the head widened to fp32.

    noise = || s_half - s_fp32 || / || s_fp32 ||     over tokens and clients
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from protoken.banks.bank import Bank, BankInParts
from protoken.errors import ProtokenWarning
from protoken.generation import Generated
from protoken.models.architectures import Architecture, architecture_of
from protoken.models.patching import after, hooks
from protoken.models.structure import decoder_of
from protoken.models.twin import twin_of
from protoken.ways.capture import Capture
from protoken.ways.objective import Objective
from protoken.ways.projection import project_local
from protoken.ways.relevance import Response, local_relevance

HALVES = (torch.float16, torch.bfloat16)
TOKENS = 4
# Rounding the inputs of a sum alone costs about 2^-8; beyond a quarter, ranks of clients are no longer to be trusted.
NOISE_LIMIT = 0.25

_measured: MutableMapping[Tensor, set[tuple[object, ...]]] = WeakIdKeyDictionary()


def warn_of_noise(
    model: nn.Module,
    architecture: Architecture,
    generated: Generated,
    bank: Bank | BankInParts,
    layers: Sequence[str],
    objective: Objective,
) -> None:
    """Warn (`ProtokenWarning`) if half-precision scores of these last-block layers are mostly rounding.

    Does nothing for wider models, for offloaded weights, and where it was measured before.
    """
    key = (tuple(layers), objective)
    # A twin of the model is not the model, but has its parameters.
    known = _measured.setdefault(next(architecture.blocks[-1].parameters()), set())
    if not layers or key in known or generated.capture.hidden[0].dtype not in HALVES:
        return
    if any(p.is_meta for p in architecture.blocks[-1].parameters()):
        return
    known.add(key)
    noise = gradient_noise(model, architecture, generated, bank, layers, objective)
    if not noise <= NOISE_LIMIT:
        dtype = str(generated.capture.hidden[0].dtype).removeprefix("torch.")
        warnings.warn(
            f"scores in {dtype} differ by {noise:.0%} from the same replay in float32: the gradient of the {objective} "
            "objective is mostly rounding here. Load the model in float32, or in bfloat16 if it was float16",
            ProtokenWarning,
            stacklevel=4,
        )


def gradient_noise(
    model: nn.Module,
    architecture: Architecture,
    generated: Generated,
    bank: Bank | BankInParts,
    layers: Sequence[str],
    objective: Objective,
) -> float:
    """The noise of the formula above for the first tokens of a response; infinite if a half-precision score is."""
    response = generated.response
    count = min(TOKENS, response.new_tokens)
    few = Response(response.ids[:, : response.prompt_length + count], response.prompt_length)

    def scores(computing: nn.Module, parts: Architecture, capture: Capture) -> Tensor:
        found = local_relevance(computing, parts, capture, few, tuple(layers), objective, check=False)
        projected = project_local(found, bank, layers, "torch").tokens
        assert projected is not None
        return projected

    half = scores(model, architecture, generated.capture)
    twin: Any = twin_of(model)
    parts = architecture if twin is model else architecture_of(twin)
    with _widened(twin, parts):
        wide = scores(twin, parts, _wide(generated.capture))
    error = float((half - wide).norm() / wide.norm().clamp(min=1e-300))
    return error if half.isfinite().all() else float("inf")


def _wide(capture: Capture) -> Capture:
    return capture.mapped(lambda kept: [tensor.float() for tensor in kept])


@contextmanager
def _widened(model: Any, architecture: Architecture) -> Iterator[None]:
    """fp32 copies of all that stands behind the last block's entrance, and of what the embeddings give."""
    decoder: Any = decoder_of(model)
    embeddings = model.get_input_embeddings()
    behind = [child for child in decoder.children() if not isinstance(child, nn.ModuleList) and child is not embeddings]
    kept: list[tuple[dict[str, Any], str, Any]] = []

    def widen(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.float()

    try:
        for module in (m for top in (*behind, architecture.blocks[-1], architecture.head) for m in top.modules()):
            for place in (module._parameters, module._buffers):
                for name, value in list(place.items()):
                    if value is not None and value.dtype in HALVES:
                        kept.append((place, name, value))
                        wide = value.detach().float()
                        place[name] = nn.Parameter(wide, False) if isinstance(value, nn.Parameter) else wide
        with hooks(after(embeddings, widen)):
            yield
    finally:
        for place, name, value in kept:
            place[name] = value
