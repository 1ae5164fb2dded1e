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

_GPT = {
    "n_embd": 48,
    "n_inner": 80,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": 97,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FULL_HEADS = {**_COMMON, "num_key_value_heads": 4}
_GEMMA = {**_COMMON, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}
_FALCON = {**{k: v for k, v in _COMMON.items() if k != "intermediate_size"}, "ffn_hidden_size": 80}

# The families most tests run on: plain, with biases, with alternating sliding windows and post-norms, tied and narrow.
CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", _COMMON),
    "qwen2": ("qwen2", _COMMON),
    "gemma3": ("gemma3_text", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    # SmolLM2's shape in small: a Llama with tied embeddings, 3 query heads per key head and a wide vocabulary.
    "smollm": (
        "llama",
        {**_COMMON, "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8,
         "vocab_size": 257, "tie_word_embeddings": True, "rope_theta": 100000.0},
    ),
}  # fmt: skip

OTHER_FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "mistral": ("mistral", {**_COMMON, "sliding_window": 8}),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 12}),
    "gemma": ("gemma", {**_COMMON, "head_dim": 12}),
    "gemma2": ("gemma2", _GEMMA),
    "phi": ("phi", _FULL_HEADS),
    "phi3": ("phi3", _COMMON),
    "smollm3": ("smollm3", _COMMON),
    "gpt2": ("gpt2", _GPT),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "gpt_neox": ("gpt_neox", _FULL_HEADS),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "opt": ("opt", {**_COMMON, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "falcon": ("falcon", _FALCON),
    "falcon-alibi": ("falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}),
    "bloom": ("bloom", {"hidden_size": 48, "n_layer": 4, "n_head": 4, "vocab_size": 97, "bos_token_id": 1,
                        "eos_token_id": 2, "pad_token_id": 0}),
    "starcoder2": ("starcoder2", _COMMON),
    "olmo2": ("olmo2", _COMMON),
    "granite": ("granite", {**_COMMON, "logits_scaling": 3.0, "residual_multiplier": 0.7}),
    "cohere": ("cohere", _COMMON),
    "stablelm": ("stablelm", {**_COMMON, "partial_rotary_factor": 0.5}),
}  # fmt: skip


_MOE = {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("mixtral", _MOE),
    # Plain MLPs in blocks 0 and 2; weights of the chosen experts left unnormalised.
    "qwen3_moe": ("qwen3_moe", {**_COMMON, "head_dim": 12, "num_experts": 5, "num_experts_per_tok": 3,
                                "moe_intermediate_size": 32, "decoder_sparse_step": 2, "norm_topk_prob": False}),
    # Experts with biases whose weights lie as (in, out), clamped gates, attention sinks.
    "gpt_oss": ("gpt_oss", {**_MOE, "head_dim": 12, "sliding_window": 8,
                            "layer_types": ["sliding_attention", "full_attention"] * 2}),
    # A family without a row in the table: found by structure.
    "olmoe": ("olmoe", {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of that family in evaluation mode; the caller's generator state is left alone."""
    model_type, settings = {**CONFIGS, **OTHER_FAMILIES, **MIXTURES}[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **settings)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    # generate must run to the length asked for: a random model may emit its stop token at any time.
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()
