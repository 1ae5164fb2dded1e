"""What an attribution's bytes and work depend on: lengths, widths and the traced layers of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from protoken.banks.bank import LedgerBank
from protoken.models.architectures import Architecture
from protoken.models.layers import Layer, layer_of
from protoken.planning.plan import Plan, local_layers


@dataclass(frozen=True)
class LayerSize:
    """One traced layer. rows, columns: O and I of all slots of a position; numbers: of its whole weight."""

    rows: int
    columns: int
    numbers: int
    block: int
    client_bytes: int


@dataclass(frozen=True)
class Sizes:
    """One response to be attributed.

    Attributes:
        prompt, new_tokens: P and T; S = P - 1 + T positions enter the model.
        clients: K.
        near, deep: traced layers whose output reaches no other position, and the others.
        blocks: from the first traced one to the last.
        width, projected, vocabulary, heads: d, the out-projection's input width, V, attention heads.
        activations: numbers per position in one block: inputs and outputs of its linear layers, and the stream.
        weights: multiplications per position in one block.
        element, wide: bytes of the model's numbers, and of those it is accumulated in.
        plain_attention: scores of all pairs of positions are held, as they are in eager attention.
        gathered_head: the logit of one token is a row of the head, not the whole vocabulary.
    """

    prompt: int
    new_tokens: int
    clients: int
    near: tuple[LayerSize, ...]
    deep: tuple[LayerSize, ...]
    blocks: int
    width: int
    projected: int
    vocabulary: int
    heads: int
    activations: int
    weights: int
    element: int
    wide: int
    plain_attention: bool
    gathered_head: bool

    @property
    def positions(self) -> int:
        """S = P - 1 + T."""
        return self.prompt - 1 + self.new_tokens

    @property
    def layers(self) -> tuple[LayerSize, ...]:
        return (*self.deep, *self.near)


def sizes_of(
    model: nn.Module, architecture: Architecture, plan: Plan, bank: LedgerBank, prompt: int, new_tokens: int
) -> Sizes:
    """Read them off the model's last block, which stands for all of them, and the ledger's headers."""
    config: Any = model.config
    text = config.get_text_config()
    slots = int(getattr(text, "num_experts_per_tok", 0) or 1)
    last = len(architecture.blocks) - 1
    inside = [layer_of(model, architecture.layer_name(last, name)) for name in architecture.linear_layers(last)]
    projection = layer_of(model, architecture.layer_name(last, architecture.out_projection))
    numbers = sum((layer.rows + layer.columns) * _slots(layer, slots) for layer in inside)
    local = local_layers(architecture)

    def size(name: str) -> LayerSize:
        layer = layer_of(model, name)
        count, columns = _slots(layer, slots), 1 if layer.kind == "embedding" else layer.columns
        whole = layer.rows * layer.columns * (layer.experts or 1)
        held = bank.client_bytes(model, name)
        return LayerSize(layer.rows * count, columns * count, whole, architecture.block_of(name), held)

    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return Sizes(
        prompt=prompt,
        new_tokens=new_tokens,
        clients=len(bank.clients),
        near=tuple(size(name) for name in plan.layers if name in local),
        deep=tuple(size(name) for name in plan.layers if name not in local),
        blocks=last + 1 - plan.first_block,
        width=projection.rows,
        projected=projection.columns,
        vocabulary=int(text.vocab_size),
        heads=int(getattr(text, "num_attention_heads", 1)),
        activations=numbers + 8 * projection.rows,
        weights=sum(layer.rows * layer.columns * _slots(layer, slots) for layer in inside),
        element=parameter.element_size(),
        wide=max(4, parameter.element_size()),
        plain_attention=config._attn_implementation not in ("sdpa", "flash_attention_2", "flex_attention"),
        gathered_head=plan.objective == "logit" and type(architecture.head) is nn.Linear,
    )


def _slots(layer: Layer, slots: int) -> int:
    return 1 if layer.experts is None else slots
