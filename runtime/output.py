"""The distilled student as a Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from minitron.runtime.disk import writing
from minitron.runtime.models import LanguageModel, quiet
from minitron.specs.atomic import atomic_folder

_CARD = "README.md"
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
"""What else a model's folder may hold its weights in: they would not be the new ones."""


def write_model(
    student: LanguageModel,
    dtype: torch.dtype,
    source: Path,
    target: Path,
    name: str,
    report: Sequence[str],
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes `target` whole or not at all: weights in `dtype`, and what `source`, the pruned student, has beside
    its weights (tokenizer, generation settings). `report` is what the model card says about the training; `files`, by name,
    stand beside it or take its place."""
    with writing(str(target)), atomic_folder(target) as temporary:
        with quiet():
            student.module.to(dtype).save_pretrained(temporary)
        for file in source.iterdir():
            other_weights = ".safetensors" in file.name or file.suffix in _WEIGHTS
            if file.is_file() and not (temporary / file.name).exists() and not other_weights:
                shutil.copyfile(file, temporary / file.name)
        card = source / _CARD
        before = card.read_text(encoding="utf-8") if card.is_file() else ""
        texts = {_CARD: model_card(before, name, report)} | dict(files or {})
        for file_name, text in texts.items():
            (temporary / file_name).write_text(text, encoding="utf-8")


def model_card(before: str, name: str, report: Sequence[str]) -> str:
    """A card about the distilled model, with the front matter of the pruned student's card and that card's text
    below."""
    front, body = "", before
    if before.startswith("---\n") and "\n---\n" in before[4:]:
        front, body = before[4:].split("\n---\n", 1)
        front = f"---\n{front}\n---\n\n".replace("tags: [minitron, pruned]", "tags: [minitron, pruned, distilled]")
    body = "\n".join(line for line in body.splitlines() if not line.startswith("# ")).strip()
    text = f"{front}# {name} (pruned and distilled)\n\n" + "\n".join(report) + "\n"
    return text + (f"\n## The pruned student that it began as\n\n{body}\n" if body else "")
