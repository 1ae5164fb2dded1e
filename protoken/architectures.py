"""Where each model family keeps its decoder blocks, attention out-projection and MLP-final layer.

The one table of families. The blocks themselves are found by structure (the `ModuleList` of `model.get_decoder()`),
so a family needs a row only for the two names inside a block. A family without a row is tried by structure, too:
the last linear layer of the block's attention and the last one of its MLP. What counts as a linear layer, experts kept
as one parameter and adapters included, is said in layers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from .adapters import PEFT_PREFIX
from .errors import ArgumentError, LayerError, ModelError
from .layers import base_of, is_linear, is_tied, layer_of, linear_names

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
            relative = [self.out_projection, self.final_of(number)]
        else:
            relative = [
                name
                for name in self.linear_layers(number)
                if any(_is_named(p, name, self.layer_name(number, name)) for p in patterns)
            ]
        return [self.layer_name(number, name) for name in relative]

    def final_of(self, number: int) -> str:
        """The block's MLP-final layer: some mixture-of-experts models have a plain MLP in some blocks."""
        if self.dense_final is not None and self.mlp_final not in self.linear_layers(number):
            return self.dense_final
        return self.mlp_final

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
    config = getattr(model, "config", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
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
    family = decoder.config.model_type if hasattr(decoder, "config") else config.model_type
    known = FAMILIES.get(family)
    layers = known or _by_structure(blocks[-1], family)
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
    for relative in (found.out_projection, found.final_of(last)):
        if relative not in inside:
            raise ModelError(
                "model",
                expected=f"a linear layer at {found.layer_name(last, relative)} in a model of family {found.family!r}",
                got=f"a block with the linear layers {inside}",
                remedy="This version of transformers names it differently, or an adapter of another kind wraps it",
            )


def _find_blocks(decoder: nn.Module) -> nn.ModuleList:
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        found = ", ".join(f"{name}: {type(child).__name__}" for name, child in decoder.named_children())
        raise ModelError(
            "model",
            expected=f"a ModuleList of decoder blocks in {type(decoder).__name__}",
            got=f"one that holds {found or 'nothing'}",
            remedy="protoken models lists the families that are known",
        )
    return max(lists, key=len)


def _by_structure(block: nn.Module, family: str) -> Family:
    """The last linear layers back to the block's width: one under a child named like attention, one elsewhere."""
    layers = {name: layer_of(block, name) for name in linear_names(block)}
    attention = [n for n in layers if "attn" in n.split(".")[0] or "attention" in n.split(".")[0]]
    rest = [name for name in layers if name not in attention and layers[name].kind != "router"]
    width = layers[rest[-1]].rows if rest else None
    attention = [name for name in attention if layers[name].rows == width]
    if not attention or not rest:
        raise ModelError(
            "model",
            expected=f"one of the families {sorted(FAMILIES)}, or a block with an attention and an MLP",
            got=f"family {family!r} with linear layers {list(layers)}",
            remedy="protoken models lists what is known; open an issue with this message for others",
        )
    return Family(attention[-1], rest[-1])
