"""Where each model family keeps its decoder blocks, attention out-projection and MLP-final layer.

The one table of families. The blocks themselves are found by structure (the `ModuleList` of `model.get_decoder()`),
so a family needs a row only for the two names inside a block. A family without a row is tried by structure, too:
the last linear layer of the block's attention and the last one of its MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import ArgumentError, LayerError, ModelError


@dataclass(frozen=True)
class Family:
    """Names of the two traced layers, relative to a block."""

    out_projection: str
    mlp_final: str


_O_PROJ_DOWN_PROJ = Family("self_attn.o_proj", "mlp.down_proj")

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
}


@dataclass(frozen=True)
class Architecture:
    """What tracing needs to know about one model: its blocks in order and the family's two names."""

    family: str
    known: bool
    blocks_name: str
    blocks: tuple[nn.Module, ...]
    out_projection: str
    mlp_final: str
    head: nn.Module

    def layer_name(self, block: int, relative: str) -> str:
        """Full module name of a layer inside block number `block` (0-based)."""
        return f"{self.blocks_name}.{block}.{relative}"

    def traced_layers(self, blocks: int, patterns: Sequence[str] | None = None) -> tuple[str, ...]:
        """Names of the layers to trace: those of the last `blocks` blocks, or the linear ones a pattern names.

        Args:
            blocks: how many blocks, counted from the last one; 1 <= blocks <= len(self.blocks).
            patterns: shell patterns against names relative to the block ("self_attn.*_proj") or full names.

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
        if patterns is not None:
            self._check_patterns(patterns, names)
        return tuple(names)

    def block_of(self, layer: str) -> int:
        """The number of the block that holds the layer of that full name."""
        return int(layer.removeprefix(self.blocks_name + ".").split(".", 1)[0])

    def linear_layers(self, block: int) -> list[str]:
        """Names, relative to the block, of all linear layers in it."""
        return [name for name, module in self.blocks[block].named_modules() if is_linear(module)]

    def _in_block(self, number: int, patterns: Sequence[str] | None) -> list[str]:
        if patterns is None:
            relative = [self.out_projection, self.mlp_final]
        else:
            relative = [
                name
                for name in self.linear_layers(number)
                if any(fnmatchcase(name, p) or fnmatchcase(self.layer_name(number, name), p) for p in patterns)
            ]
        return [self.layer_name(number, name) for name in relative]

    def _check_patterns(self, patterns: Sequence[str], names: Sequence[str]) -> None:
        for pattern in patterns:
            relative = [name.removeprefix(self.blocks_name + ".").split(".", 1)[1] for name in names]
            if not any(fnmatchcase(n, pattern) for n in [*relative, *names]):
                raise LayerError(
                    "layers",
                    expected=f"patterns over the linear layers {self.linear_layers(len(self.blocks) - 1)}",
                    got=pattern,
                    remedy="Use a name or shell pattern of one of these, or trace more blocks",
                )


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x W^T (+ b): nn.Linear and its subclasses, GPT-2's Conv1D, a LoRA layer on one."""
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        base = module.base_layer
        return isinstance(base, nn.Module) and is_linear(base)
    return isinstance(module, nn.Linear | Conv1D)


def out_features(module: nn.Module) -> int:
    """O of a linear layer."""
    base = getattr(module, "base_layer", module)
    return int(getattr(base, "nf" if isinstance(base, Conv1D) else "out_features"))


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Find the blocks, the two traced layers and the head of a Hugging Face causal language model.

    Raises:
        ModelError: it is no decoder-only language model with a ModuleList of blocks and an output head.
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
    blocks = _find_blocks(decoder)
    blocks_name = next(name for name, module in model.named_modules() if module is blocks)
    family = decoder.config.model_type if hasattr(decoder, "config") else config.model_type
    known = FAMILIES.get(family)
    names = known or _by_structure(blocks[-1], family)
    for relative in (names.out_projection, names.mlp_final):
        if not is_linear(_descend(blocks[-1], relative)):
            raise ModelError(
                "model",
                expected=f"a linear layer at {blocks_name}.{len(blocks) - 1}.{relative}",
                got=type(_descend(blocks[-1], relative)).__name__,
                remedy="Trace chosen layers by name with layers=[...]",
            )
    return Architecture(
        family, known is not None, blocks_name, tuple(blocks), names.out_projection, names.mlp_final, head
    )


def _find_blocks(decoder: nn.Module) -> nn.ModuleList:
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(
            "model", expected="a ModuleList of decoder blocks", got=f"{type(decoder).__name__} without one"
        )
    return max(lists, key=len)


def _by_structure(block: nn.Module, family: str) -> Family:
    """The last linear layers back to the block's width: one under a child named like attention, one under the others."""
    linear = [name for name, module in block.named_modules() if is_linear(module)]
    attention = [name for name in linear if "attn" in name.split(".")[0] or "attention" in name.split(".")[0]]
    rest = [name for name in linear if name not in attention]
    width = out_features(block.get_submodule(rest[-1])) if rest else None
    attention = [name for name in attention if out_features(block.get_submodule(name)) == width]
    if not attention or not rest:
        raise ModelError(
            "model",
            expected=f"one of the families {sorted(FAMILIES)}, or a block with an attention and an MLP",
            got=f"family {family!r} with linear layers {linear}",
            remedy="Name the layers with layers=[...]",
        )
    return Family(attention[-1], rest[-1])


def _descend(block: nn.Module, relative: str) -> nn.Module:
    try:
        return block.get_submodule(relative)
    except AttributeError:
        raise ModelError(
            "model",
            expected=f"a layer {relative!r} in each block",
            got=f"a block with {[n for n, _ in block.named_children()]}",
            remedy="This version of transformers names it differently: pass layers=[...]",
        ) from None
