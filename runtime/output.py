"""The distilled student as a Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from minitron.runtime.disk import writing
from minitron.runtime.models import LanguageModel, quiet
from minitron.runtime.world import World
from minitron.specs.atomic import atomic_folder
from minitron.specs.builds import CARD, CONFIG
from minitron.specs.generation_settings import FILE as GENERATION
from minitron.specs.model_card import DISTILLED_TAGS, TAGS, UNDISTILLED
from minitron.specs.model_config import with_older_keys

_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
"""Other files that a model's folder may hold its weights in: they would be outdated."""

_TEMPLATES = "additional_chat_templates"
"""The one subfolder that belongs to a tokenizer."""

Weights = dict[str, Tensor]


def whole_weights(student: LanguageModel, dtype: torch.dtype, world: World) -> Weights:
    """Returns the student's tensors in `dtype`, by name. Where they are sharded, all ranks call this function: one
    tensor at a time is gathered, and the leader keeps it in host memory; the other ranks get an empty mapping. Converts
    the student itself to `dtype`: training is over.
    """
    module = student.module.to(dtype)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights: Weights = {}
    gathered: dict[int, Tensor] = {}  # tied weights stay one tensor
    for name, tensor in module.state_dict().items():
        parameter = parameters.get(name, tensor)
        if not isinstance(parameter, DTensor):
            weights[name] = tensor
        elif id(parameter) not in gathered:
            whole = parameter.full_tensor().detach()
            gathered[id(parameter)] = whole.cpu() if world.leads else whole.new_empty(0)
        if id(parameter) in gathered:
            weights[name] = gathered[id(parameter)]
    return weights if world.leads else {}


def write_model(
    student: LanguageModel,
    weights: Weights,
    source: Path,
    target: Path,
    name: str,
    report: Sequence[str],
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes `target` whole or not at all: the `weights`, and the files of `source`, the pruned student, other than its
    weights (tokenizer, generation settings). `report` is the model card's text about the training; `files`, by name,
    are added or replace files of the same name.
    """
    with writing(str(target)), atomic_folder(target) as temporary:
        with quiet():
            student.module.save_pretrained(temporary, state_dict=weights)
        _keep_older_keys(source / CONFIG, temporary / CONFIG)
        for file in [*source.iterdir(), *(source / _TEMPLATES).glob("*.jinja")]:
            place = temporary / file.relative_to(source)
            other_weights = ".safetensors" in file.name or file.suffix in _WEIGHTS
            # Its generation settings are the pruned student's own, not what transformers makes of them.
            if file.is_file() and not other_weights and (not place.exists() or file.name == GENERATION):
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)
        card = source / CARD
        before = card.read_text(encoding="utf-8") if card.is_file() else ""
        texts = {CARD: model_card(before, name, report)} | dict(files or {})
        for file_name, text in texts.items():
            (temporary / file_name).write_text(text, encoding="utf-8")


def _keep_older_keys(source: Path, written: Path) -> None:
    """Copies into a configuration the keys for older loaders of transformers that the source's configuration has."""
    before, now = (json.loads(path.read_text(encoding="utf-8-sig")) for path in (source, written))
    written.write_text(json.dumps(with_older_keys(now, before), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(before: str, name: str, report: Sequence[str]) -> str:
    """Returns a card about the distilled model, with the front matter of the pruned student's card and that card's text
    below.
    """
    front, body = "", before
    if before.startswith("---\n") and "\n---\n" in before[4:]:
        front, body = before[4:].split("\n---\n", 1)
        front = f"---\n{front}\n---\n\n".replace(TAGS, DISTILLED_TAGS)
    body = body.replace(UNDISTILLED, "")
    body = "\n".join(line for line in body.splitlines() if not line.startswith("# ")).strip()
    text = f"{front}# {name} (pruned and distilled)\n\n" + "\n".join(report) + "\n"
    return text + (f"\n## The pruned student that it began as\n\n{body}\n" if body else "")
