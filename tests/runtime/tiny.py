"""A build folder as the compiler would leave it, made of tiny random models, real text and a tokenizer trained on it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

from minitron.runtime.metrics import iter_metrics
from minitron.specs.file_hashes import folder_hashes

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "two",
    "dogs",
    "ran",
    "around",
    "an",
    "old",
    "tree",
    "and",
    "seven",
    "birds",
    "sang",
    "of",
    "rain",
]


def text(lines: int, seed: int) -> str:
    """Sentences with some structure to learn: each word follows from the two before it, mostly."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 10_000, (lines, 12), generator=generator).tolist()
    out = []
    for row in draws:
        words = [row[0] % len(WORDS), row[1] % len(WORDS)]
        for draw in row[2:]:
            words.append((words[-1] * 3 + words[-2] if draw % 10 else draw) % len(WORDS))
        out.append(" ".join(WORDS[word] for word in words) + ".")
    return "\n".join(out)


def save_tokenizer(folder: Path, *, bos: bool, vocabulary: int = 300) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(200, seed=1)], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def llama(hidden: int = 16, *, vocabulary: int = 320, tied: bool = False, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        **more,
    )


def gemma2(hidden: int = 16, *, vocabulary: int = 320) -> Gemma2Config:
    """Tied embeddings and a soft-cap on the logits."""
    return Gemma2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=256,
        final_logit_softcapping=3.0,
        bos_token_id=0,
        eos_token_id=1,
    )


def save_model(config: Any, folder: Path, *, seed: int, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # sharper than the default initialisation, so that there is something to distil
                parameter.mul_(6.0)
    model.to(dtype).save_pretrained(folder)


HEAD: dict[str, Any] = {
    "backbone": "model",
    "module": "lm_head",
    "weight": "lm_head.weight",
    "bias": None,
    "scale": 1.0,
    "softcap": None,
}


def plan(**changes: Any) -> dict[str, Any]:
    """The document of a training.yaml. `changes` replace values at dotted keys, dots written as two underscores."""
    document: dict[str, Any] = {
        "format_version": 1,
        "name": "tiny",
        "fingerprint": "0123",
        "teacher": {
            "model": "../teacher",
            "revision": None,
            "dtype": "float32",
            "head": copy.deepcopy(HEAD),
            "layers": "model.layers",
        },
        "student": {"model": "student", "dtype": "float32", "head": copy.deepcopy(HEAD), "layers": "model.layers"},
        "tokenizer": "student",
        "output": "model",
        "work": "train",
        "data": {"text": ["../train.txt"], "document": "line"},
        "teacher_logits": "online",
        "tokens": 16 * 4 * 12,
        "sequence_length": 16,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "optimizer": {"name": "adamw", "lr": 3e-3, "min_lr": 1e-5, "warmup_steps": 2, "schedule": "cosine"},
        "loss": {"logits": {"divergence": "forward_kl"}, "hidden_states": None, "cross_entropy": 0.0},
        "seed": 0,
        "compute_dtype": {"cpu": "float32", "cuda": "bfloat16"},
        "gradient_checkpointing": False,
        "compile": False,
        "layout": {"student": "sharded", "teacher": "replicated", "cpu_offload": False},
        "checkpoint": {"every_tokens": 16 * 4 * 4, "keep_last": 2},
        "held_out": {"data": {"text": ["../valid.txt"]}, "max_tokens": 300, "every_tokens": 16 * 4 * 6},
        "evaluate": {"suite": [], "data_dir": None, "prompt": None, "continuation_tokens": 8},
    }
    for key, value in changes.items():
        *above, last = key.split("__")
        inside = document
        for part in above:
            inside = inside[part]
        inside[last] = value
    return document


def write_plan(build: Path, **changes: Any) -> None:
    (build / "training.yaml").write_text(yaml.safe_dump(plan(**changes), sort_keys=False), encoding="utf-8")


def verify(build: Path) -> None:
    """Writes verification.json, as a compile whose checks pass would, for student/ as it lies there."""
    document = {"format_version": 1, "passed": True, "checks": [], "student": folder_hashes(build / "student")}
    (build / "verification.json").write_text(json.dumps(document), encoding="utf-8")


def make_build(root: Path, teacher: Any = None, student: Any = None, *, bos: bool = True, **changes: Any) -> Path:
    """Teacher, pruned student, texts and training.yaml under `root`; the build folder is `root/build`."""
    build = root / "build"
    save_model(teacher or llama(24), root / "teacher", seed=1)
    save_model(student or llama(16), build / "student", seed=2)
    save_tokenizer(build / "student", bos=bos)
    for file in (build / "student").glob("tokenizer*"):
        shutil.copy(file, root / "teacher")
    (root / "train.txt").write_text(text(120, seed=3), encoding="utf-8")
    (root / "valid.txt").write_text(text(30, seed=4), encoding="utf-8")
    write_plan(build, **changes)
    verify(build)
    return build


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl."""
    return list(iter_metrics(path))


CLOCKED = ("tokens_per_second", "memory_bytes", "mfu")


def without_speed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """metrics.jsonl without what the machine decides."""
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]
