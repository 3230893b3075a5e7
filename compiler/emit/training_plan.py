"""Generates training.yaml: the training plan with every value resolved. The runtime reads it and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from minitron.compiler.estimate.model_costs import ModelCosts
from minitron.compiler.estimate.training_defaults import CHECKPOINTS, micro_batch, place_teacher
from minitron.compiler.roles.lm_head import Head
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.specs.data import DataSource
from minitron.specs.data_files import resolve
from minitron.specs.load import LoadedSpec
from minitron.specs.spec import Spec

FORMAT_VERSION = 1


# Of the nine benchmarks of the published table (arXiv 2407.14679, section 4), those that lm-eval has: XL-Sum it has not.
SUITES = {
    "minitron-9": ["arc_challenge", "gsm8k", "hellaswag", "humaneval", "mbpp", "mmlu", "truthfulqa_mc2", "winogrande"]
}


HEADER = """\
# The training plan that minitron generated from {spec}.
# Every value stands here and nothing is implied; it can be read, edited and run: minitron train {build}
"""


def training_plan(
    loaded: LoadedSpec,
    build: Path,
    checkpoint: Checkpoint,
    teacher_head: Head,
    student_head: Head,
    layers: str,
    fingerprint: str,
    teacher_costs: ModelCosts,
    student_costs: ModelCosts,
) -> dict[str, Any]:
    """The document. `layers` is the module list of the decoder layers, in both models; `fingerprint` identifies the
    pruned student that training starts from."""
    spec = loaded.spec
    distill, evaluate = spec.distill, spec.evaluate
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": spec.name,
        "fingerprint": fingerprint,
        "teacher": {
            # What came from the Hub is found there, or in its cache, on any other machine as well.
            "model": checkpoint.name if checkpoint.commit is not None else _relative(checkpoint.folder, build),
            "revision": checkpoint.commit,
            "dtype": spec.teacher.dtype,
            "head": teacher_head.to_yaml(),
            "layers": layers,
        },
        "student": {
            "model": "student",
            "dtype": spec.teacher.dtype,
            "head": student_head.to_yaml(),
            "layers": layers,
        },
        "tokenizer": "student",
        "output": "model",
        "work": "train",
    }
    if distill is not None:
        for side, costs in (("teacher", teacher_costs), ("student", student_costs)):
            document[side]["flops_per_token"] = costs.forward_flops_per_token(distill.sequence_length)
        every = distill.checkpoint.every_tokens or max(1, distill.tokens // CHECKPOINTS)
        document |= {
            "data": _source(loaded, distill.data, "distill.data"),
            "teacher_correction": _correction(spec),
            "teacher_logits": distill.teacher_logits
            if isinstance(distill.teacher_logits, str)
            else distill.teacher_logits.model_dump(mode="json"),
            "tokens": distill.tokens,
            "sequence_length": distill.sequence_length,
            "global_batch_size": distill.global_batch_size,
            "micro_batch_size": distill.micro_batch_size
            or micro_batch(distill.global_batch_size, distill.sequence_length),
            "optimizer": distill.optimizer.model_dump(mode="json"),
            "loss": distill.loss.model_dump(mode="json"),
            "seed": distill.seed,
            "compute_dtype": {"cpu": "float32", "cuda": "bfloat16"},
            "gradient_checkpointing": distill.gradient_checkpointing,
            "compile": distill.compile,
            "layout": {
                "student": distill.layout.student,
                "teacher": distill.layout.teacher or place_teacher(teacher_costs.weight_bytes),
                "cpu_offload": distill.layout.cpu_offload,
            },
            "checkpoint": {**distill.checkpoint.model_dump(mode="json"), "every_tokens": every},
        }
    held_out = None
    if evaluate is not None and evaluate.held_out is not None:
        held_out = {
            "data": _source(loaded, evaluate.held_out, "evaluate.held_out"),
            "max_tokens": evaluate.max_tokens,
            "every_tokens": evaluate.every_tokens or document.get("checkpoint", {}).get("every_tokens"),
        }
    document["held_out"] = held_out
    document["evaluate"] = {
        "suite": [] if evaluate is None else _suite(evaluate.suite),
        "data_dir": None
        if evaluate is None or evaluate.data_dir is None
        else str((loaded.folder / evaluate.data_dir).resolve()),
        "prompt": None if evaluate is None else evaluate.prompt,
        "continuation_tokens": 64 if evaluate is None else evaluate.continuation_tokens,
    }
    return document


def _correction(spec: Spec) -> dict[str, Any] | None:
    correction = spec.teacher_correction
    if correction is None or spec.distill is None:
        return None
    return {
        "tokens": correction.tokens,
        "optimizer": correction.optimizer.model_dump(mode="json"),
        "every_tokens": spec.distill.checkpoint.every_tokens or max(1, correction.tokens // CHECKPOINTS),
        "output": "teacher",
        "work": "train/teacher",
    }


def render(document: dict[str, Any], spec: Path, build: Path) -> str:
    """The file's text."""
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    return HEADER.format(spec=spec.name, build=build.absolute().name) + body


def _suite(suite: Any) -> list[str]:
    return list(SUITES[suite]) if isinstance(suite, str) else list(suite)


def _source(loaded: LoadedSpec, source: DataSource, at: str) -> dict[str, Any]:
    resolved = resolve(source, loaded.folder, at=at, error=loaded.error)
    return DataSource.model_validate(resolved.model_dump(mode="json")).model_dump(mode="json", exclude_none=True)


def _relative(folder: Path, build: Path) -> str:
    """Relative to the build folder, so that both can be moved together; absolute for what lies in a cache."""
    relative = os.path.relpath(folder, build)
    return relative if relative.count("..") <= 4 else str(folder)
