"""Tiny configurations of many families, by the key that AutoConfig knows them by.

Each has what tells its family apart, at sizes that no two widths share by accident where the family lets them differ.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from tests.models import COMMON, ROTARY
from tests.models import FAMILIES as FIRST

MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}

DENSE: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {"head_dim": 12},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_head": 4, "n_layer": 3},
    "cohere": {},
    "cohere2": {"head_dim": 12, "sliding_window": 8},
    "ctrl": {"dff": 40},
    "cwm": {"head_dim": 12, "sliding_window": 8},
    "diffllama": {},
    "doge": {"keep_window_size": 8},
    "ernie4_5": {"head_dim": 12},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 2},
    "falcon": {"ffn_hidden_size": 40},
    "gemma": {"head_dim": 12},
    "gemma3_text": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8},
    "glm": {"head_dim": 12},
    "glm4": {"head_dim": 12},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 8,
        "intermediate_size": 40,
    },
    "gptj": {"rotary_dim": 4},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "granite_swa": {"sliding_window": 8},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 12},
    "jais2": {"head_dim": 12},
    "ministral3": {"head_dim": 12},
    "nanochat": {},
    "nemotron": {"head_dim": 12},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 40},
    "persimmon": {},
    "phi": {},
    "seed_oss": {"head_dim": 12},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {"rope_parameters": ROTARY},
    "starcoder2": {},
    "vaultgemma": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8},
    "xglm": {"attention_heads": 4, "ffn_dim": 40},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "afmoe": EXPERTS | {"head_dim": 12, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 8,
                        "global_attn_every_n_layers": 2},
    "cohere2_moe": EXPERTS | {"head_dim": 12, "sliding_window": 8, "first_k_dense_replace": 1},
    "deepseek_v2": MLA | {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                          "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "glm4_moe_lite": MLA | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
                            "moe_intermediate_size": 24, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
                            "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "hy_v3": EXPERTS | {"head_dim": 12, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": MLA | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                          "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
              "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 12, "sliding_window": 8,
              "layer_types": ["full_attention"] * 3},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
    "flex_olmo": EXPERTS,
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 12,
                 "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 28},
    "llama4_text": {"num_local_experts": 4, "head_dim": 12, "intermediate_size_mlp": 44, "interleave_moe_layer_step": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12},
    "olmoe": EXPERTS,
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 28},
    "qwen3_moe": EXPERTS | {"head_dim": 12},
}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 8},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 40},
    "jamba": {"mamba_d_state": 8, "num_experts": 2, "attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 16},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16, "ssm_state_size": 8,
                   "head_dim": 12, "num_hidden_layers": None,
                   "layers_block_type": ["linear_attention", "mlp", "full_attention"]},
    "qwen3_5_text": DELTA | {"head_dim": 12},
    "qwen3_next": DELTA | {"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                           "shared_expert_intermediate_size": 28},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
}  # fmt: skip
# Families of less usual build: a factored embedding, a fused projection by groups, experts whose rows nothing counts, layers
# that share their weights, a decoder that is half of a pair.
UNUSUAL: dict[str, dict[str, Any]] = {
    "bart": {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "is_decoder": True,
             "is_encoder_decoder": False},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2}},
    "lfm2_moe": EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "minicpm3": MLA | {"num_key_value_heads": 4, "v_head_dim": 8, "dim_model_base": 16},
    "zamba": {"num_hidden_layers": 4, "num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_d_state": 8,
              "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zaya": EXPERTS | {"head_dim": 8, "num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
# Other builds of families that have a configuration above: name -> (model type, keys).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon (new decoder)": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 40}),
    "opt (factored embedding)": ("opt", {"hidden_size": 48, "word_embed_proj_dim": 24, "ffn_dim": 40}),
}
EVERY = {**FIRST, **DENSE, **MIXTURES, **HYBRIDS, **UNUSUAL, **{name: keys for name, (_, keys) in VARIANTS.items()}}


def config_of(family: str) -> Any:
    """The configuration of a family; what its configuration class has no key for is left out."""
    kind = VARIANTS[family][0] if family in VARIANTS else family
    known = AutoConfig.for_model(kind)
    keys = {key: value for key, value in COMMON.items() if hasattr(known, key) or key in known.attribute_map}
    keys |= EVERY[family]
    return AutoConfig.for_model(kind, **{key: value for key, value in keys.items() if value is not None})
