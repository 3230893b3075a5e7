"""A tiny configuration of any family that transformers has, without knowing it: its own defaults, made small.

What a family's own table (`configs.EVERY`) says is taken where there is one. Elsewhere each key that names a width or a number
of parts is made small, by what it is called; lists over layers are cut to as many layers.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

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
}  # fmt: skip


def tiny(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model of `family`; `changes` replace keys. Whatever its class raises is raised."""
    if family in EVERY and not changes:
        return config_of(family)
    default = AutoConfig.for_model(family)
    return AutoConfig.for_model(family, **_small(default) | changes)


def _small(default: Any) -> dict[str, Any]:
    """The keys that are made small, under the names that the family has."""
    names = {new: old for old, new in default.attribute_map.items()}
    count = getattr(default, "num_hidden_layers", None)
    keys: dict[str, Any] = {}
    for key, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            keys[key] = {"model_type": value.model_type} | _small(value)
        elif isinstance(value, list) and isinstance(count, int) and len(value) == count and not key.startswith("_"):
            keys[key] = value[:LAYERS]
        elif key in SMALL or names.get(key) in SMALL:
            wanted = SMALL[key if key in SMALL else names[key]]
            if type(value) is int or (value is None and key.endswith("_token_id")):
                keys[key] = wanted
    return keys
