"""Build folders: where that of a spec is, every file that one holds, and which model another spec may take as its teacher.

BUILD/
    plan.json, verification.json, scores.safetensors, training.yaml, results.json, report.html
    measurements.json               what was measured, by what it depends on: nothing is measured twice
    student/, student.pt2           the pruned student
    coordinates.safetensors         what the student keeps of the teacher's hidden states, where training compares them
    tower/                          the teacher, where it is the language tower of a multimodal model
    whole/                          that model with the student as its language tower (`minitron export --whole`)
    teacher/                        the corrected teacher
    teacher_logits/                 stored samples of the teacher's distribution
    search/                         a search's candidates, while they are in it, and their ranking
    train/                          metrics, checkpoints, tokenized data and the lock of a training
    model/                          the distilled student
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron.specs.errors import WorkError

# What a compile writes.
PLAN = "plan.json"
SCORES = "scores.safetensors"
# What lies in it beside scores, by the first part of a tensor's name.
COVARIANCE, EXPERT_TOKENS, EXPERT_OUTPUTS = "covariance", "expert_tokens", "expert_outputs"
PARTIAL_SCORES = "scores.partial.safetensors"
PARTIAL_STREAMS = "scores.partial.streams"  # a folder
PARTIAL_ROUNDS = "scores.rounds.safetensors"
STUDENT = "student"
PROGRAM = "student.pt2"
TRAINING = "training.yaml"
VERIFICATION = "verification.json"
COORDINATES = "coordinates.safetensors"
TOWER = "tower"
WHOLE = "whole"

# The hidden, temporary folders (`specs.atomic.temporary_path`) in which a compile writes everything first, and the values
# that a refit has found, by a compile and by `minitron verify`; a command that is interrupted leaves them to the next. The
# candidates of a search are in that of SEARCH until all are there.
STAGED, REFITTED, REFITTED_AGAIN = "compile", "refit", "verify"

COMPILED = (
    PLAN, SCORES, PARTIAL_SCORES, PARTIAL_STREAMS, PARTIAL_ROUNDS, STUDENT, PROGRAM, TRAINING, VERIFICATION,
    COORDINATES, TOWER,
)  # fmt: skip

# What training and evaluation write; training.yaml may name other folders than WORK, MODEL, TEACHER and CORRECTION_WORK.
WORK = "train"
MODEL = "model"
TEACHER = "teacher"
CORRECTION_WORK = Path(WORK) / TEACHER
LOGITS = "teacher_logits"
RESULTS = "results.json"
MEASUREMENTS = "measurements.json"
REPORT = "report.html"

# In the folder of a search; each candidate that is still in it has a folder with its number.
SEARCH = "search"
SEARCH_PLAN = "search.json"
TOKENIZER = "tokenizer"
RANKING = "ranking.json"

# In the folder of a training.
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
MLFLOW = "mlruns"
TRACKERS = "trackers.json"
CHECKPOINTS = "checkpoints"
DATA_CACHE = "data"
FINISHED = "finished.json"

# In the folder of a checkpoint.
CHECKPOINT_STATE = "state.json"

# In the folder of a corrected teacher.
CORRECTION = "correction.json"

# In the folder of any model.
CONFIG = "config.json"
CARD = "README.md"


def default_build(spec_file: Path, name: str) -> Path:
    """Returns the default build folder of a spec: `builds/NAME` beside the spec."""
    return spec_file.parent / "builds" / name


def finished_note(build: Path) -> Path:
    """Returns the path of the file that marks the training of a build as complete."""
    return build / WORK / FINISHED


def metrics_file(build: Path) -> Path:
    """Returns the path of the metrics of each step of a build's training."""
    return build / WORK / METRICS


def correction_metrics_file(build: Path) -> Path:
    """Returns the path of the metrics of the teacher correction, if the spec asks for one."""
    return build / CORRECTION_WORK / METRICS


def begun_identity(build: Path) -> dict[str, Any] | None:
    """Returns what decided the training that has begun in a build, as the runtime noted it; None where none has got
    as far as its first checkpoint."""
    checkpoints = sorted((build / WORK / CHECKPOINTS).glob(f"step-*/{CHECKPOINT_STATE}"), reverse=True)
    for path in (finished_note(build), *checkpoints):
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["identity"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def read_document(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in `path`; None if the file does not exist, WorkError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkError(f"{path}: not a JSON document ({error}); remove it and compile again") from error
    if not isinstance(content, dict):
        raise WorkError(f"{path}: not a JSON object; remove it and compile again")
    return content
