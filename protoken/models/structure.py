"""A model's blocks, and the layers of a family without a row in the table, found by structure.

These are the layers that write a block's attention (or what mixes positions in its place: a convolution, a state-space
model) and its MLP back to the residual stream. A block that holds one of them alone writes once.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from protoken.errors import ModelError
from protoken.models.families import FAMILIES, Family
from protoken.models.layers import layer_of, linear_names

# How families call what mixes positions, and its layer that writes to the residual stream.
_MIXERS = ("attn", "attention", "mamba", "conv", "recurrent", "temporal")
# The only child with layers, whatever it does: Mamba and Nemotron-H have a block for each step.
_ALONE = "mixer"
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "output", "wo", "o_b_proj", "out", "o")


def decoder_of(model: Any) -> nn.Module | None:
    """What holds the blocks: some families call another part of the model their decoder, or the model itself."""
    named: nn.Module | None = model.get_decoder() if hasattr(model, "get_decoder") else None
    parts = (named, getattr(named, "model", None), getattr(model, "base_model", None))
    return next((part for part in parts if isinstance(part, nn.Module) and _block_lists(part)), named)


def _block_lists(decoder: nn.Module) -> list[nn.ModuleList]:
    found = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m)]
    # Lists of single layers belong to something else: Gemma 3n has one beside its blocks.
    return [m for m in found if any(True for _ in m[0].children())] or found


def find_blocks(decoder: nn.Module) -> nn.ModuleList:
    lists = _block_lists(decoder)
    if not lists:
        found = ", ".join(f"{name}: {type(child).__name__}" for name, child in decoder.named_children())
        raise ModelError(
            "model",
            expected=f"a ModuleList of decoder blocks in {type(decoder).__name__}",
            got=f"one that holds {found or 'nothing'}",
            remedy="protoken models lists the families that are known",
        )
    return max(lists, key=len)


def by_structure(block: nn.Module, family: str, width: int | None) -> Family:
    """The layers back to the block's width: of the child that mixes positions, and of what comes after it.

    Among several of that width in the attention (gates have it, too) the one that is called an output counts, and in
    a mixture the experts, not what all tokens share.
    """
    layers = {name: layer_of(block, name) for name in linear_names(block)}
    children = {name.split(".")[0] for name in layers}
    alone = children == {_ALONE}
    mixers = children if alone else {child for child in children if _mixes(child)}
    rest = [name for name in layers if name.split(".")[0] not in mixers and not _crosses(name)]
    if width is None and rest:
        width = layers[rest[-1]].rows
    inside, rest = (
        [name for name in names if layers[name].rows == width and layers[name].kind != "router"]
        for names in ([name for name in layers if name.split(".")[0] in mixers], rest)
    )
    if len(mixers) != 1 or not inside or not (rest or alone):
        raise ModelError(
            "model",
            expected=f"one of the families {sorted(FAMILIES)}, or blocks of one attention and an MLP",
            got=f"family {family!r} with linear layers {list(layers)} in a block",
            remedy="protoken models lists what is known; open an issue with this message for others",
        )
    outputs = [name for name in inside if name.split(".")[-1].lower() in _OUTPUTS]
    experts = [[name for name in names if layers[name].kind == "experts"] for names in (inside, rest)]
    return Family((outputs or experts[0] or inside)[-1], None if alone else (experts[1] or rest)[-1])


def _mixes(child: str) -> bool:
    return any(part in child for part in _MIXERS) and not _crosses(child)


def _crosses(name: str) -> bool:
    """Attention to an encoder, which a decoder on its own never runs."""
    return "cross" in name or name.startswith("encoder")
