"""Where each model family keeps its decoder blocks, and the layers that write a block's work to the residual stream.

The blocks themselves are found by structure (structure.py), so a family needs a row only for the two names inside a
block. What counts as a linear layer, experts kept as one parameter and adapters included, is said in layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names of the two traced layers, relative to a block; `dense_final` where some blocks have no experts.

    `mlp_final` is None where a block mixes positions and does nothing else: it writes once.
    """

    out_projection: str
    mlp_final: str | None
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
        ModelRow(name, _BLOCKS[name], family.out_projection, family.mlp_final or "", family.dense_final is not None)
        for name, family in sorted(FAMILIES.items())
    ]
