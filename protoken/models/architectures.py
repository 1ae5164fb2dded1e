"""Where each model family keeps its decoder blocks, attention out-projection and MLP-final layer.

The one table of families. The blocks themselves are found by structure (the `ModuleList` of `model.get_decoder()`),
so a family needs a row only for the two names inside a block. A family without a row is tried by structure, too: the
layers that write a block's attention (or what mixes positions in its place: a convolution, a state-space model) and
its MLP back to the residual stream. Blocks that differ from the last one are each looked at for themselves. What
counts as a linear layer, experts kept as one parameter and adapters included, is said in layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ArgumentError, LayerError, ModelError
from .adapters import PEFT_PREFIX
from .layers import base_of, is_linear, is_tied, layer_of, linear_names
from .patching import refuse_parallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "Architecture", "Family", "ModelRow", "architecture_of", "is_linear", "list_models"]


@dataclass(frozen=True)
class Family:
    """Names of the two traced layers, relative to a block; `dense_final` where some blocks have no experts."""

    out_projection: str
    mlp_final: str
    dense_final: str | None = None


_O_PROJ_DOWN_PROJ = Family("self_attn.o_proj", "mlp.down_proj")
_O_PROJ_EXPERTS = Family("self_attn.o_proj", "mlp.experts.down_proj", "mlp.down_proj")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        [
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi3",
            "smollm3",
            "olmo2",
            "granite",
            "cohere",
            "stablelm",
        ],
        _O_PROJ_DOWN_PROJ,
    ),
    "gpt2": Family("attn.c_proj", "mlp.c_proj"),
    "gpt_bigcode": Family("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": Family("attention.dense", "mlp.dense_4h_to_h"),
    "phi": Family("self_attn.dense", "mlp.fc2"),
    "opt": Family("self_attn.out_proj", "fc2"),
    "falcon": Family("self_attention.dense", "mlp.dense_4h_to_h"),
    "bloom": Family("self_attention.dense", "mlp.dense_4h_to_h"),
    "gptj": Family("attn.out_proj", "mlp.fc_out"),
    "starcoder2": Family("self_attn.o_proj", "mlp.c_proj"),
    **dict.fromkeys(["mixtral", "qwen3_moe", "gpt_oss"], _O_PROJ_EXPERTS),
}

_BLOCKS = {
    **dict.fromkeys(FAMILIES, "model.layers"),
    **dict.fromkeys(["gpt2", "gpt_bigcode", "falcon", "bloom", "gptj"], "transformer.h"),
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


@dataclass(frozen=True)
class ModelRow:
    """One line of `protoken models`."""

    family: str
    blocks: str
    out_projection: str
    mlp_final: str
    experts: bool


def list_models() -> list[ModelRow]:
    """The families of the table, by name: where their blocks are, and the two layers traced in each."""
    return [
        ModelRow(name, _BLOCKS[name], family.out_projection, family.mlp_final, family.dense_final is not None)
        for name, family in sorted(FAMILIES.items())
    ]


@dataclass(frozen=True)
class Architecture:
    """What tracing needs to know about one model: its blocks in order, the family's two names, embeddings and head.

    `tied`: the head's weight is the embeddings': one tensor that acts twice, and is traced at both places or at none.
    `width`: of the residual stream, where the configuration says it.
    """

    family: str
    known: bool
    blocks_name: str
    blocks: tuple[nn.Module, ...]
    out_projection: str
    mlp_final: str
    head: nn.Module
    dense_final: str | None = None
    head_name: str = ""
    embeddings_name: str = ""
    tied: bool = False
    width: int | None = None

    def layer_name(self, block: int, relative: str) -> str:
        """Full module name of a layer inside block number `block` (0-based)."""
        return f"{self.blocks_name}.{block}.{relative}"

    def traced_layers(self, blocks: int, patterns: Sequence[str] | None = None) -> tuple[str, ...]:
        """Names of the layers to trace: those of the last `blocks` blocks, or the linear ones a pattern names.

        Args:
            blocks: how many blocks, counted from the last one; 1 <= blocks <= len(self.blocks).
            patterns: shell patterns against names relative to the block ("self_attn.*_proj") or full names. A pattern
                that names nothing inside the blocks is tried on the embeddings and the head ("lm_head").

        Raises:
            ArgumentError: `blocks` is out of range.
            LayerError: a pattern names no linear layer of these blocks.
        """
        if not 1 <= blocks <= len(self.blocks):
            raise ArgumentError("blocks", expected=f"1 to {len(self.blocks)} for this model", got=blocks)
        first = len(self.blocks) - blocks
        names = []
        for number in range(first, len(self.blocks)):
            names += self._in_block(number, patterns)
        if patterns is None:
            return tuple(names)
        outside = {name for pattern in patterns for name in self._outside(pattern, names)}
        if self.tied and outside:
            outside = {self.embeddings_name, self.head_name}
        ends = [name for name in (self.embeddings_name, self.head_name) if name in outside]
        return tuple([*ends[:1], *names, *ends[1:]] if len(ends) == 2 else [*names, *ends])

    def block_of(self, layer: str) -> int:
        """The number of the block that holds the layer of that full name; embeddings count as 0, the head as last."""
        if layer == self.embeddings_name:
            return 0
        if layer == self.head_name:
            return len(self.blocks) - 1
        return int(layer.removeprefix(self.blocks_name + ".").split(".", 1)[0])

    def linear_layers(self, block: int) -> list[str]:
        """Names, relative to the block, of all linear layers in it: routers, and experts' parameters, included."""
        return linear_names(self.blocks[block])

    def _in_block(self, number: int, patterns: Sequence[str] | None) -> list[str]:
        if patterns is None:
            relative = list(self.written_by(number))
        else:
            relative = [
                name
                for name in self.linear_layers(number)
                if any(_is_named(p, name, self.layer_name(number, name)) for p in patterns)
            ]
        return [self.layer_name(number, name) for name in relative]

    def final_of(self, number: int) -> str:
        """The block's MLP-final layer: some mixture-of-experts models have a plain MLP in some blocks."""
        return self.written_by(number)[1]

    def written_by(self, number: int) -> tuple[str, str]:
        """The block's out-projection and MLP-final layer, relative to it: the family's where it has them.

        Raises:
            ModelError: the block is made otherwise, and its structure does not tell either.
        """
        inside = self.linear_layers(number)
        finals = [name for name in (self.mlp_final, self.dense_final) if name in inside]
        if self.out_projection in inside and finals:
            return self.out_projection, str(finals[0])
        own = _by_structure(self.blocks[number], self.family, self.width)
        projection = self.out_projection if self.out_projection in inside else own.out_projection
        return projection, str(finals[0]) if finals else own.mlp_final

    def _outside(self, pattern: str, names: Sequence[str]) -> list[str]:
        """The embeddings or head that a pattern names, if it names nothing inside the blocks."""
        relative = [name.removeprefix(self.blocks_name + ".").split(".", 1)[1] for name in names]
        if _is_named(pattern, *relative, *names):
            return []
        found = [n for n in (self.embeddings_name, self.head_name) if n and _is_named(pattern, n)]
        if not found:
            inside = self.linear_layers(len(self.blocks) - 1)
            raise LayerError(
                "layers",
                expected=f"patterns over the linear layers {inside}, {self.embeddings_name} or {self.head_name}",
                got=pattern,
                remedy="Use a name or shell pattern of one of these, or trace more blocks",
            )
        return found


def _is_named(pattern: str, *names: str) -> bool:
    """Whether the pattern names one of them, as PEFT calls it or as it was called before."""
    return any(fnmatchcase(n, pattern) or fnmatchcase(n.removeprefix(PEFT_PREFIX), pattern) for n in names)


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Find the blocks, the two traced layers and the head of a Hugging Face causal language model (or a PEFT one).

    Raises:
        ModelError: it is no decoder-only language model with a ModuleList of blocks and an output head, or one of its
            modules is wrapped by torch.compile.
    """
    refuse_parallel(model)
    config = getattr(model, "config", None)
    decoder = decoder_of(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if config is None or decoder is None or head is None:
        raise ModelError(
            "model",
            expected="a transformers causal language model (get_decoder() and get_output_embeddings())",
            got=type(model).__name__,
            remedy="Load it with AutoModelForCausalLM.from_pretrained",
        )
    _refuse_wrapped(model)
    _refuse_virtual_tokens(model)
    blocks = _find_blocks(decoder)
    names = {id(module): name for name, module in model.named_modules()}
    own: Any = getattr(decoder, "config", config)
    family, width = own.model_type, getattr(own, "hidden_size", None)
    known = FAMILIES.get(family)
    layers = known or _by_structure(blocks[-1], family, width)
    embeddings = model.get_input_embeddings()
    found = Architecture(
        family,
        known is not None,
        names[id(blocks)],
        tuple(blocks),
        layers.out_projection,
        layers.mlp_final,
        head,
        layers.dense_final,
        head_name=names.get(id(head), ""),
        embeddings_name=names.get(id(embeddings), "") if isinstance(base_of(embeddings), nn.Embedding) else "",
        tied=is_tied(model),
        width=width,
    )
    _check_final_layers(found)
    return found


def _refuse_virtual_tokens(model: nn.Module) -> None:
    for adapter, settings in getattr(model, "peft_config", {}).items():
        if getattr(settings, "is_prompt_learning", False):
            raise ModelError(
                "model",
                expected="an adapter that changes weights (LoRA)",
                got=f"adapter {adapter!r} of type {settings.peft_type}, which puts virtual tokens before the prompt",
                remedy="Trace the base model: model.get_base_model()",
            )


def _refuse_wrapped(model: nn.Module) -> None:
    """torch.compile(module) returns a wrapper, below which every parameter has another name than in the ledger."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "_modules", {}).get("_orig_mod"), nn.Module):
            raise ModelError(
                "model",
                expected="a model that was compiled in place, by module.compile()",
                got=f"torch.compile's wrapper around {name or 'the model'}",
                remedy=f"Use {name or 'model'}.compile(), or trace what it wraps: {name or 'model'}._orig_mod",
            )


def _check_final_layers(found: Architecture) -> None:
    """ModelError unless the last block has both layers where the table, or its structure, says."""
    last = len(found.blocks) - 1
    inside = found.linear_layers(last)
    finals = (found.mlp_final, found.dense_final)
    for relative in (found.out_projection, next((name for name in finals if name in inside), found.mlp_final)):
        if relative not in inside:
            raise ModelError(
                "model",
                expected=f"a linear layer at {found.layer_name(last, relative)} in a model of family {found.family!r}",
                got=f"a block with the linear layers {inside}",
                remedy="This version of transformers names it differently, or an adapter of another kind wraps it",
            )


def decoder_of(model: Any) -> nn.Module | None:
    """What holds the blocks: some families call another part of the model their decoder, or the model itself."""
    named: nn.Module | None = model.get_decoder() if hasattr(model, "get_decoder") else None
    parts = (named, getattr(named, "model", None), getattr(model, "base_model", None))
    return next((part for part in parts if isinstance(part, nn.Module) and _block_lists(part)), named)


def _block_lists(decoder: nn.Module) -> list[nn.ModuleList]:
    found = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m)]
    # Lists of single layers belong to something else: Gemma 3n has one beside its blocks.
    return [m for m in found if any(True for _ in m[0].children())] or found


def _find_blocks(decoder: nn.Module) -> nn.ModuleList:
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


def _by_structure(block: nn.Module, family: str, width: int | None) -> Family:
    """The layers back to the block's width: of the child that mixes positions, and of what comes after it.

    Among several of that width in the attention (gates have it, too) the one that is called an output counts, and in
    a mixture the experts, not what all tokens share.
    """
    layers = {name: layer_of(block, name) for name in linear_names(block)}
    mixers = {name.split(".")[0] for name in layers if _mixes(name.split(".")[0])}
    rest = [name for name in layers if name.split(".")[0] not in mixers and not _crosses(name)]
    if width is None and rest:
        width = layers[rest[-1]].rows
    inside = [name for name in layers if name.split(".")[0] in mixers and layers[name].rows == width]
    rest = [name for name in rest if layers[name].rows == width and layers[name].kind != "router"]
    if len(mixers) != 1 or not inside or not rest:
        raise ModelError(
            "model",
            expected=f"one of the families {sorted(FAMILIES)}, or blocks of one attention and an MLP",
            got=f"family {family!r} with linear layers {list(layers)} in a block",
            remedy="protoken models lists what is known; open an issue with this message for others",
        )
    outputs = [name for name in inside if name.split(".")[-1].lower() in _OUTPUTS]
    experts = [name for name in rest if layers[name].kind == "experts"]
    return Family((outputs or inside)[-1], (experts or rest)[-1])


# How families call what mixes positions, and its layer that writes to the residual stream.
_MIXERS = ("attn", "attention", "mamba", "conv", "recurrent", "temporal")
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "output", "wo", "o_b_proj", "out", "o")


def _mixes(child: str) -> bool:
    return any(part in child for part in _MIXERS) and not _crosses(child)


def _crosses(name: str) -> bool:
    """Attention to an encoder, which a decoder on its own never runs."""
    return "cross" in name or name.startswith("encoder")
