"""Writes the language tower of a multimodal model as a checkpoint of its own, which all later steps take for the teacher."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

from minitron.compiler.capture.models import quiet
from minitron.compiler.teacher.checkpoint import Checkpoint, read_checkpoint
from minitron.compiler.teacher.folder_files import copy_file, copy_tokenizer_and_settings
from minitron.compiler.towers.files import Taken, write_taken
from minitron.specs.atomic import atomic_folder
from minitron.specs.builds import CARD, CONFIG, read_document
from minitron.specs.file_hashes import file_hash, first_difference, folder_hashes
from minitron.specs.progress import Progress

NOTE = "made-from.json"


def tower_on_disk(checkpoint: Checkpoint, target: Path, progress: Progress) -> Checkpoint:
    """The checkpoint of the tower in `target`, which is written unless it was made from these very files and is whole.

    Raises WorkError where a file cannot be read.
    """
    assert checkpoint.tower is not None
    stored = checkpoint.tower.stored
    made_from = _made_from(checkpoint)
    if not _is_made(target, made_from):
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        with progress.task("write tower", total, "B") as task, atomic_folder(target) as folder:
            taken = {name: Taken(info, stored[name]) for name, info in checkpoint.tensors.items()}
            write_taken(folder, taken, task.advance)
            config = copy.deepcopy(checkpoint.config)
            config.architectures = [_causal_class(config)]
            with quiet():
                config.save_pretrained(folder)
            copy_tokenizer_and_settings(checkpoint.folder, folder)
            if (card := checkpoint.folder / CARD).is_file():  # its front matter has the licence
                copy_file(card, checkpoint.folder, folder)
            note = {"made_from": made_from, "files": folder_hashes(folder)}
            (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    return replace(
        read_checkpoint(checkpoint.name, target, weights=True), commit=checkpoint.commit, tower=checkpoint.tower
    )


def _made_from(checkpoint: Checkpoint) -> dict[str, str]:
    """The hashes of the files that a tower is made from."""
    files = {checkpoint.folder / CONFIG, *(info.file for info in checkpoint.tensors.values())}
    return {path.name: file_hash(path) for path in sorted(files)}


def _is_made(target: Path, made_from: dict[str, str]) -> bool:
    note = read_document(target / NOTE)
    return note is not None and note["made_from"] == made_from and first_difference(target, note["files"]) is None


def _causal_class(config: object) -> str:
    from transformers import AutoModelForCausalLM

    return str(AutoModelForCausalLM._model_mapping[type(config)].__name__)
