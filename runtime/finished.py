"""The note that a training is finished: the identity of the training, and the files of the model that it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.runtime.checkpoint import UNREADABLE
from minitron.specs.atomic import write_text
from minitron.specs.builds import CONFIG
from minitron.specs.errors import UsageError
from minitron.specs.file_hashes import file_hash

FORMAT_VERSION = 2
_WEIGHTS = ".safetensors"
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Finished:
    """The content of the note: `identity` is what decided the training, `files` maps the name of each file of the model
    to its size and hash.
    """

    identity: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    def damage(self, model: Path) -> str | None:
        """Describes in a few words how the folder `model` is broken; None where it is intact. UsageError where somebody
        has put other weights of the same size there, which may be worth keeping.
        """
        changed = []
        for name, written in self.files.items():
            path = model / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["bytes"]:
                return f"{name} is not whole"
            if file_hash(path) != written["sha256"]:
                changed.append(path)
        if changed:
            raise UsageError(
                f"{changed[0]} is not the file that training wrote; move {model} away to have it written again from the last "
                "checkpoint"
            )
        return None


def read_finished(path: Path) -> Finished | None:
    """Reads the note in `path`; None where it is missing or cannot be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format_version"] != FORMAT_VERSION:
            return None
        files = {str(name): {"bytes": one["bytes"], "sha256": one["sha256"]} for name, one in document["model"].items()}
        return Finished(dict(document["identity"]), files) if files else None
    except UNREADABLE:
        return None


def write_finished(path: Path, identity: Mapping[str, Any], model: Path) -> None:
    """Writes the note about the model that lies in the folder `model`."""
    made_of = sorted(one for one in model.iterdir() if one.name == CONFIG or one.name.endswith((_WEIGHTS, _INDEX)))
    files = {one.name: {"bytes": one.stat().st_size, "sha256": file_hash(one)} for one in made_of}
    document = {"format_version": FORMAT_VERSION, "identity": dict(identity), "model": files}
    write_text(path, json.dumps(document, indent=1) + "\n")
