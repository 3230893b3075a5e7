"""Copies the files of a checkpoint's folder beside its weights into another checkpoint's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from minitron.compiler.teacher.tokenizer import check_inside, tokenizer_files
from minitron.specs.generation_settings import FILE as GENERATION
from minitron.specs.generation_settings import read_generation_settings


def copy_file(path: Path, source: Path, folder: Path) -> None:
    """Copies a file of the folder `source` to its place in `folder`. UsageError for a link that leads out of `source`."""
    check_inside(path, source)
    target = folder / path.relative_to(source)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies all files of the tokenizer."""
    for path in tokenizer_files(source):
        copy_file(path, source, folder)


def copy_tokenizer_and_settings(source: Path, folder: Path) -> None:
    """Copies the tokenizer, and the generation settings that have an effect."""
    copy_tokenizer(source, folder)
    check_inside(source / GENERATION, source)
    settings = read_generation_settings(source)
    if settings is not None:  # in place of the one that transformers makes up where it writes the model
        (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
