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

# bitsandbytes' 4-bit kernels for AVX512-BF16 take rows in 32s and columns in 64s.
IN_64S: dict[str, tuple[str, dict[str, object]]] = {
    "llama-64": ("llama", {**_COMMON, "hidden_size": 64, "intermediate_size": 128}),
}

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

_MLA = {
    **_FULL_HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
}
_LINEAR_HEADS = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
_STATES = {**{k: v for k, v in _COMMON.items() if "head" not in k}, "state_size": 8}
_SPARSE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Families without a row in the table, each made otherwise than those with one.
BY_STRUCTURE: dict[str, tuple[str, dict[str, object]]] = {
    # A gate that is widened before it is applied and groups its experts; some shared by all tokens; block 0 without.
    "deepseek_v3": ("deepseek_v3", {**_MLA, **_SPARSE, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2,
                                    "topk_group": 1, "first_k_dense_replace": 1}),
    # A gate of one row in front of the shared expert.
    "qwen2_moe": ("qwen2_moe", {**_COMMON, **_SPARSE, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    # A gate that is an nn.Linear and returns more than a product.
    "phimoe": ("phimoe", {**_MOE, "router_jitter_noise": 10.0}),
    # A gate of the residual's width behind the attention's output.
    "afmoe": ("afmoe", {**_COMMON, **_SPARSE, "head_dim": 12, "sliding_window": 8, "num_experts": 4,
                        "num_shared_experts": 1, "num_dense_layers": 1}),
    # Convolutions, state spaces and linear attention in the attention's place, under other names, in the last block.
    "lfm2": ("lfm2", {**_COMMON, "layer_types": ["full_attention", "conv"] * 2}),
    "bamba": ("bamba", {**_COMMON, **_MAMBA, "attn_layer_indices": [0, 2]}),
    "qwen3_next": ("qwen3_next", {**_COMMON, **_SPARSE, **_LINEAR_HEADS, "head_dim": 12, "num_experts": 4,
                                  "shared_expert_intermediate_size": 32,
                                  "layer_types": ["linear_attention", "full_attention"] * 2}),
    # The model calls itself its decoder; experts that are no layers of their own.
    "llama4": ("llama4_text", {**_MOE, "head_dim": 12, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 2}),
    # An attention to an encoder that is not there; its forward does not know which logits are wanted.
    "bart": ("bart", {"d_model": 48, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 80,
                      "vocab_size": 97, "max_position_embeddings": 128, "is_decoder": True,
                      "is_encoder_decoder": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
                      "forced_eos_token_id": None, "decoder_start_token_id": 1}),
    # Blocks that mix positions and do nothing else: they write once.
    "mamba": ("mamba", {**_STATES, "intermediate_size": 96, "time_step_rank": 4}),
    "falcon_mamba": ("falcon_mamba", {**_STATES, "intermediate_size": 96, "time_step_rank": 4}),
    "mamba2": ("mamba2", {**_STATES, "num_heads": 8, "head_dim": 12, "n_groups": 1, "chunk_size": 8}),
    # A block for each step: state space, MLP, attention, MLP.
    "nemotron_h": ("nemotron_h", {**_COMMON, "head_dim": 12, "hybrid_override_pattern": "M-*-", "mamba_num_heads": 8,
                                  "mamba_head_dim": 12, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8}),
    # What it calls its decoder is the head.
    "modernbert-decoder": ("modernbert-decoder", _COMMON),
}  # fmt: skip


def tiny_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of that family in evaluation mode; the caller's generator state is left alone."""
    model_type, settings = {**CONFIGS, **IN_64S, **OTHER_FAMILIES, **MIXTURES, **BY_STRUCTURE}[name]
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
