"""The factory of tiny teachers, for all tests: random weights, a tokenizer trained on a text, the text itself.

Every weight is drawn anew after construction. Norm weights and biases that stand at ones and zeros, as a fresh model has
them, would hide a norm that is sliced wrongly and a bias that is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96
POSITIONS = 128
WORDS = (
    "the", "cat", "sat", "on", "a", "mat", "while", "two", "old", "dogs", "ran", "around", "an", "apple", "tree", "and",
    "seven", "birds", "sang", "in", "rain",
)  # fmt: skip
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PADDED = ("<pad>", "<s>", "</s>")  # the first ids of a tokenizer, with COMMON's numbers
FRAMED = ("<s>", "</s>")
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# What makes each family itself: the width of a head apart from hidden / heads, sliding windows that differ from layer to
# layer, tied embeddings, soft caps, fused projections, rotary embeddings of a part of the head, experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 12, "sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 12, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None, "rope_parameters": ROTARY},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# Mixtures of experts, in every form that a graph of one takes: router first or groups first, weights stored either way
# round, gate and up behind each other or interleaved, biases, a shared expert, dense layers between.
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 12, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16,
    },
    "gpt_oss": {"head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 16},
    "deepseek_v3": {
        "num_key_value_heads": 4, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
        "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    },
    "llama4_text": {
        "head_dim": 8, "intermediate_size": 24, "intermediate_size_mlp": 40, "num_local_experts": 6,
        "num_experts_per_tok": 2, "interleave_moe_layer_step": 2,
    },
}  # fmt: skip


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model of a family; `changes` replace keys, None leaves a key out."""
    keys = {
        key: value for key, value in (COMMON | (FAMILIES | MIXTURES)[family] | changes).items() if value is not None
    }
    return AutoConfig.for_model(family, **keys)


def random_model(config: Any, seed: int = 0) -> Any:
    """A model in fp32 with every parameter drawn, such that each matters to the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, value in model.state_dict().items():
            if "correction" in name:  # of a router's choice: learnt, though no parameter
                value.normal_(std=0.3)
    return model


def save_teacher(folder: Path, config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A whole checkpoint: weights, configuration, tokenizer, generation configuration."""
    model = random_model(config, seed).to(dtype)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size)
    return folder


def learnable_model(config: Any, seed: int = 0) -> Any:
    """A fresh model in fp32 whose matrices are sharper than the default initialisation has them, so that there is
    something to distil, and not so wild that a few steps would not get there."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


def save_tokenizer(
    folder: Path,
    vocabulary: int = VOCABULARY,
    *,
    special: Sequence[str] = PADDED,
    all_bytes: bool = False,
    puts_bos: bool = False,
    texts: Sequence[str] | None = None,
) -> None:
    """A byte-pair tokenizer trained on `texts`, whose first ids are the `special` tokens.

    all_bytes  knows every byte, and not only those of `texts`
    puts_bos   puts the beginning token in front of a text by itself
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if all_bytes else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or [text(200)], trainer)
    if puts_bos:
        begin = ("<s>", special.index("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    padding = {"pad_token": "<pad>"} if "<pad>" in special else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **padding)
    fast.save_pretrained(folder)


def text(lines: int, seed: int = 0) -> str:
    """Lines of words drawn at random, one document a line."""
    draws = torch.randint(0, len(WORDS), (lines, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    return "\n".join(" ".join(WORDS[draw] for draw in row) for row in draws) + "\n"


def learnable_text(lines: int, seed: int = 0) -> str:
    """Sentences with some structure to learn: each word follows from the two before it, mostly."""
    words = len(WORDS) - 1  # of a number that 3 does not divide, every word follows some pair
    draws = torch.randint(0, 10_000, (lines, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    out = []
    for row in draws:
        chosen = [row[0] % words, row[1] % words]
        for draw in row[2:]:
            chosen.append((chosen[-1] * 3 + chosen[-2] if draw % 10 else draw) % words)
        out.append(" ".join(WORDS[word] for word in chosen) + ".")
    return "\n".join(out)
