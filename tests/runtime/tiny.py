"""A build folder as the compiler would leave it, made of tiny random models, real text and a tokenizer trained on it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from minitron.runtime.metrics import iter_metrics
from minitron.specs.file_hashes import folder_hashes
from minitron.specs.training_plan import FORMAT_VERSION, HeadPlan, ModelPlan, TeacherPlan, TrainingPlan, to_document
from tests import models
from tests.models import learnable_text as text

# Ids as a tokenizer with `<s>` and `</s>` alone has them; no padding token, whose embedding would not be trained.
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def save_tokenizer(folder: Path, *, bos: bool, vocabulary: int = 300) -> None:
    """A tokenizer of every byte that begins a text with BOS, or does not."""
    models.save_tokenizer(
        folder, vocabulary, special=models.FRAMED, all_bytes=True, puts_bos=bos, texts=[text(200, seed=1)]
    )


def llama(hidden: int = 16, *, vocabulary: int = 320, tied: bool = False, **more: Any) -> Any:
    shape = SHAPE | {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    return models.tiny_config("llama", **shape | {"head_dim": None, "tie_word_embeddings": tied} | more)


def gemma2(hidden: int = 16, *, vocabulary: int = 320) -> Any:
    """Tied embeddings and a soft-cap on the logits."""
    shape = SHAPE | {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": None, "final_logit_softcapping": 3.0}
    return models.tiny_config("gemma2", **shape | own)


def save_model(config: Any, folder: Path, *, seed: int, dtype: torch.dtype = torch.float32) -> None:
    models.learnable_model(config, seed).to(dtype).save_pretrained(folder)


HEAD = HeadPlan(
    backbone="model", module="lm_head", weight="lm_head.weight", bias=None, scale=1.0, softcap=None
).model_dump()


@cache
def _plan() -> TrainingPlan:
    head = HeadPlan(**HEAD)
    return TrainingPlan(
        format_version=FORMAT_VERSION,
        name="tiny",
        fingerprint="0123",
        teacher=TeacherPlan(model="../teacher", dtype="float32", head=head, layers="model.layers"),
        student=ModelPlan(model="student", dtype="float32", head=head, layers="model.layers"),
        tokenizer="student",
        output="model",
        work="train",
        data={"text": ["../train.txt"], "document": "line"},
        teacher_logits="online",
        tokens=16 * 4 * 12,
        sequence_length=16,
        global_batch_size=4,
        micro_batch_size=2,
        optimizer={"lr": 3e-3, "min_lr": 1e-5, "warmup_steps": 2},
        loss={"logits": {"divergence": "forward_kl"}},
        seed=0,
        compute_dtype={"cpu": "float32", "cuda": "bfloat16"},
        gradient_checkpointing=False,
        compile=False,
        layout={"student": "sharded", "teacher": "replicated", "cpu_offload": False},
        checkpoint={"every_tokens": 16 * 4 * 4, "keep_last": 2},
        held_out={"data": {"text": ["../valid.txt"]}, "max_tokens": 300, "every_tokens": 16 * 4 * 6},
        evaluate={"suite": [], "data_dir": None, "prompt": None, "continuation_tokens": 8},
    )


def plan(**changes: Any) -> dict[str, Any]:
    """The document of a training.yaml. `changes` replace values at dotted keys, dots written as two underscores; what
    they make of it may be wrong."""
    document = copy.deepcopy(to_document(_plan()))
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


CLOCKED = ("tokens_per_second", "data_seconds", "seconds_left", "memory_bytes", "mfu")


def without_speed(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """metrics.jsonl without what the machine decides."""
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]


Result = tuple[list[dict[str, Any]], bytes]


def result(build: Path) -> Result:
    """Every line of the metrics but for the clock, and the bytes of the final weights."""
    lines = without_speed(read_metrics(build / "train" / "metrics.jsonl"))
    return lines, (build / "model" / "model.safetensors").read_bytes()
