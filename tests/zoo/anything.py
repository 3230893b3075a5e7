"""A tiny configuration of any family that transformers has, without knowing it: its own defaults, made small.

What a family's own table (`configs.EVERY`) says is taken where there is one. Elsewhere each key that names a width or a number
of parts is made small, by what it is called; lists over layers are cut to as many layers, such that each kind of layer is
among them. `OWN` are the keys of single families whose names say nothing to others.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from minitron.compiler.capture.models import layer_count
from tests.models import VOCABULARY
from tests.zoo.configs import EVERY, config_of

LAYERS = 4
SMALL: dict[str, int] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "intermediate_size": 40, "ffn_dim": 40,
    "decoder_ffn_dim": 40, "encoder_ffn_dim": 40, "ffn_hidden_size": 40, "n_inner": 40, "dff": 40, "d_ff": 40,
    "num_hidden_layers": LAYERS, "num_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_layers": LAYERS, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128, "max_target_positions": 128,
    "word_embed_proj_dim": 32, "embedding_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 24, "moe_topk": 2, "top_k": 2,
    "shared_expert_intermediate_size": 24, "expert_ffn_hidden_size": 24, "n_shared_experts": 1, "num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "qk_head_dim": 12, "v_head_dim": 12, "o_lora_rank": 16, "sliding_window": 8, "attention_window_size": 8, "window_size": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16, "chunk_size": 16,
    "state_size": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 6, "linear_value_head_dim": 10, "rotary_dim": 4, "lru_width": 32,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0, "global_head_dim": 8,
    "attention_hidden_size": 32, "first_k_dense_replace": 1, "num_dense_layers": 1, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "mamba_dt_rank": 4, "time_step_rank": 4, "expand": 2, "n_groups": 2, "intermediate_size_mlp": 40,
    "rotary_pct": 1, "index_topk": 8, "index_n_heads": 4, "index_head_dim": 8, "decoder_start_token_id": 1, "sep_token_id": 2,
    "num_decoder_layers": LAYERS, "num_encoder_layers": LAYERS, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "d_inner": 40, "dim_ff": 40, "dim_head": 8, "dense_intermediate_size": 40, "shared_intermediate_size": 24,
    "shared_experts_intermediate_size": 24, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
    "linear_num_heads": 4, "linear_head_dim": 8, "sliding_window_size": 8, "block_size": 16, "zero_expert_num": 2,
    "laurel_rank": 8, "image_size": 32, "patch_size": 16, "num_mel_bins": 8,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32},
            "encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0}, "sliding_attention": None}},
    "cpmant": {"prompt_types": 4, "prompt_length": 2, "position_bias_num_buckets": 16},
    "gemma3n_text": {"intermediate_size": [40] * LAYERS, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "hrm_text": {"num_layers_per_stack": 1},
    "inkling_text": {"unpadded_vocab_size": 90, "rel_extent": 16, "d_rel": 8},
    "inkling2_text": {"unpadded_vocab_size": 90, "rel_extent": 16, "d_rel": 8, "n_layers_per_attn_res_block": 2},
    "minimax_m3_vl_text": {"index_block_size": 8, "index_topk_blocks": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4,
        "hc_count": 2, "hc_lowrank": 8, "ple_embed_dim": 32, "ngram_vocab_size_base": 64,
    },
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (8, 24), "attention_head_size": 8, "feed_forward_size": 40,
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4, "hash_seed": 0},
    "rembert": {"input_embedding_size": 24, "output_embedding_size": 48},
    "roc_bert": {"pronunciation_embed_dim": 24, "pronunciation_vocab_size": 20, "shape_embed_dim": 16,
                 "shape_vocab_size": 20},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64, "attention_head_dim": 16,
               "num_key_value_heads": 4, "adapter_rank": 8},
}  # fmt: skip


def tiny(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model of `family`; `changes` replace keys. Whatever its class raises is raised."""
    if family in EVERY and not changes:
        return config_of(family)
    default = AutoConfig.for_model(family)
    return AutoConfig.for_model(family, **_merged(_small(default), OWN.get(family, {}) | changes))


def layers_of(config: Any) -> int:
    """The number of layers of a model, or of its language tower; one where its configuration says no number."""
    text = config.get_text_config(decoder=True)
    return next(
        (layer_count(one) for one in (config, text) if isinstance(getattr(one, "num_hidden_layers", None), int)), 1
    )


def _small(default: Any) -> dict[str, Any]:
    """The keys that are made small, under the names that the family has."""
    names = {new: old for old, new in default.attribute_map.items()}
    count = getattr(default, "num_hidden_layers", None)
    keys: dict[str, Any] = {}
    for key, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            keys[key] = {"model_type": value.model_type} | _small(value)
        elif isinstance(value, list) and isinstance(count, int) and len(value) == count and not key.startswith("_"):
            keys[key] = _every_kind(value)
        elif key in SMALL or names.get(key) in SMALL:
            wanted = SMALL[key if key in SMALL else names[key]]
            if type(value) is int or (value is None and (key.endswith("_token_id") or key == "head_dim")):
                keys[key] = wanted
    said = vars(default)
    if said.get("kv_lora_rank") is not None:
        if said.get("num_key_value_heads") == said.get("num_attention_heads"):
            keys["num_key_value_heads"] = keys["num_attention_heads"]
        if said.get("head_dim") == said.get("qk_rope_head_dim"):
            keys["head_dim"] = keys["qk_rope_head_dim"]  # what the rotary embedding reads
    if said.get("is_decoder") is False and not said.get("is_encoder_decoder"):
        keys["is_decoder"] = True  # an encoder's class is a language model of this key alone
    return keys


def _every_kind(entries: list[Any]) -> list[Any]:
    """The first entries of a list over layers, the last of them replaced by kinds that would be missing."""
    first = entries[:LAYERS]
    missing = [one for number, one in enumerate(entries) if one not in first and one not in entries[:number]]
    return [*first[: LAYERS - len(missing[: LAYERS - 1])], *missing[: LAYERS - 1]]


def _merged(keys: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `keys`, also within the parts of a configuration."""
    inner = {
        key: _merged(keys[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(keys.get(key), dict) and "model_type" in keys[key]
    }
    return keys | changes | inner
