"""Tiny random models of real families, made in milliseconds; weights are large enough that nothing is near zero."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", _COMMON),
    "qwen2": ("qwen2", _COMMON),
    "gemma3": (
        "gemma3_text",
        {**_COMMON, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    # SmolLM2's shape in small: a Llama with tied embeddings, 3 query heads per key head and a wide vocabulary.
    "smollm": (
        "llama",
        {**_COMMON, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8,
         "vocab_size": 257, "tie_word_embeddings": True, "rope_theta": 100000.0},
    ),
}  # fmt: skip


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of that family in evaluation mode; the caller's generator state is left alone."""
    model_type, settings = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    # generate must run to the length asked for: a random model may emit its stop token at any time.
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()
