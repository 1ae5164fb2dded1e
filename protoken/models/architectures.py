"""What tracing needs to know of one model: its blocks, the layers that write to the residual stream, its head.

Families are in a table (families.py); one without a row is tried by structure (structure.py), and so is every block
that differs from the last one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from protoken.errors import ArgumentError, LayerError, ModelError
from protoken.models.adapters import PEFT_PREFIX
from protoken.models.families import FAMILIES
from protoken.models.layers import base_of, is_tied, layer_of, linear_names
from protoken.models.patching import refuse_parallel
from protoken.models.structure import by_structure, decoder_of, find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    mlp_final: str | None
    head: nn.Module
    dense_final: str | None = None
    head_name: str = ""
    embeddings_name: str = ""
    tied: bool = False
    width: int | None = None

    def is_of(self, model: nn.Module) -> bool:
        """Whether these are the model's blocks, in their order, and its head; any module may have been replaced."""
        ends: Any = model
        blocks = find_blocks(decoder_of(model) or model)
        same = len(blocks) == len(self.blocks) and all(map(operator.is_, blocks, self.blocks))
        return same and ends.get_output_embeddings() is self.head and is_tied(model) == self.tied

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
        return self.written_by(number)[-1]

    def written_by(self, number: int) -> tuple[str, ...]:
        """The block's out-projection and MLP-final layer, relative to it: the family's where it has them.

        One layer where the block mixes positions, or has an MLP, and nothing else.

        Raises:
            ModelError: the block is made otherwise, and its structure does not tell either.
        """
        inside = self.linear_layers(number)
        finals = [name for name in (self.mlp_final, self.dense_final) if name in inside]
        if self.out_projection in inside and (finals or self.mlp_final is None):
            return (self.out_projection, *finals[:1])
        own = by_structure(self.blocks[number], self.family, self.width)
        projection = self.out_projection if self.out_projection in inside else own.out_projection
        found = (projection, finals[0] if finals else own.mlp_final)
        return tuple(name for name in found if name is not None)

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
    blocks = find_blocks(decoder)
    names = {id(module): name for name, module in model.named_modules()}
    own: Any = getattr(decoder, "config", config)
    family, width = own.model_type, getattr(own, "hidden_size", None)
    known = FAMILIES.get(family)
    layers = known or by_structure(blocks[-1], family, width)
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
    finals = [name for name in (found.mlp_final, found.dense_final) if name is not None]
    written = [found.out_projection, *([name for name in finals if name in inside] or finals[:1])]
    missing = [name for name in written if name not in inside]
    if missing:
        raise ModelError(
            "model",
            expected=f"a linear layer at {found.layer_name(last, missing[0])} in a model of family {found.family!r}",
            got=f"a block with the linear layers {inside}",
            remedy="This version of transformers names it differently, or an adapter of another kind wraps it",
        )
    if layer_of(found.blocks[last], found.out_projection).kind == "experts":
        raise ModelError(
            "model",
            expected="a last block that mixes positions, or has an MLP that every token passes through",
            got=f"experts alone in the last block of family {found.family!r}",
            remedy="What chooses between them cannot be run apart; open an issue if you need it",
        )
