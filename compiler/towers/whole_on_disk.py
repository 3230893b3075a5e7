"""Writes a multimodal model whose language tower is the student; all other tensors keep their bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.compiler.teacher.folder_files import copy_file
from minitron.compiler.towers.files import Taken, write_taken
from minitron.compiler.towers.whole_config import Projector
from minitron.specs.atomic import atomic_folder
from minitron.specs.builds import CARD, CONFIG
from minitron.specs.errors import UsageError
from minitron.specs.model_config import DTYPE_KEYS, read_model_config
from minitron.specs.progress import Progress
from minitron.specs.weight_files import find_weight_files, read_headers

# Keys of a student's configuration that say how, and by which class, a folder of its own is read.
OF_THE_FOLDER = ("architectures", "transformers_version", "_name_or_path")
# Files of the whole model that the student has its own of; weight files come from both.
REPLACED = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def write_whole(
    checkpoint: Checkpoint, student: Path, target: Path, kept: Sequence[int], projector: Projector, progress: Progress
) -> None:
    """Writes `target` whole or not at all: the folder of `checkpoint` with `student` in the place of its language tower.

    `kept` are the channels of the residual stream that the student has. UsageError where a tensor of the student has no
    name in the whole model.
    """
    assert checkpoint.tower is not None
    stored, others = checkpoint.tower.stored, checkpoint.tower.others
    taken = {name: Taken(info, name) for name, info in others.items()}
    for name, dimension in projector.dimension.items():
        taken[name] = Taken(others[name], name, dimension, tuple(kept))
    for name, info in read_headers(find_weight_files(student)).items():
        if name not in stored:
            raise UsageError(
                f"{student}: {name} has no name in a {checkpoint.tower.config.model_type} model; compile again"
            )
        taken[stored[name]] = Taken(info, name)
    total = sum(one.info.nbytes for one in taken.values())
    with progress.task("write whole model", total, "B") as task, atomic_folder(target) as folder:
        write_taken(folder, taken, task.advance)
        document = whole_document(read_model_config(checkpoint.folder), read_model_config(student))
        (folder / CONFIG).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _copy_others(student, folder)
        _copy_others(checkpoint.folder, folder)


def whole_document(whole: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """The whole model's config.json with the student's as its text_config. A key that stands in both follows."""
    document, before = dict(whole), dict(whole["text_config"])
    document["text_config"] = {key: value for key, value in student.items() if key not in OF_THE_FOLDER}
    for key, value in student.items():
        follows = (key in before and document.get(key) == before[key]) or key in DTYPE_KEYS
        if key in document and key not in OF_THE_FOLDER and key != "model_type" and follows:
            document[key] = value
    return document


def _copy_others(source: Path, folder: Path) -> None:
    """Copies what lies in a checkpoint's folder beside configuration, weights and card, and is not there yet."""
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not path.is_file() or inside.name == CARD or path.name.endswith(REPLACED) or len(inside.parts) > 2:
            continue
        if not (folder / inside).exists():
            copy_file(path, source, folder)
