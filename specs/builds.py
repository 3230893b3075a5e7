"""Build folders: where that of a spec is, what they hold, and which model another spec may take as its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron.specs.errors import WorkError
from minitron.specs.load import LoadedSpec

STUDENT = "student"
MODEL = "model"
PLAN = "plan.json"
VERIFICATION = "verification.json"
# What the runtime leaves when a training is complete, in the build folder.
FINISHED = Path("train") / "finished.json"


def default_build(spec_file: Path, name: str) -> Path:
    """Where a spec is built when nobody says otherwise: `builds/NAME` beside the spec."""
    return spec_file.parent / "builds" / name


def build_of(loaded: LoadedSpec) -> Path:
    """The same, of a spec that was read."""
    return default_build(loaded.path, loaded.spec.name)


def result_of(loaded: LoadedSpec) -> Path:
    """The model that a spec comes to: the distilled student, or the pruned one where nothing is trained."""
    return build_of(loaded) / (STUDENT if loaded.spec.distill is None else MODEL)


def read_document(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None where there is no such file, WorkError where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkError(f"{path}: not a JSON document ({error}); remove it and compile again") from error
    if not isinstance(content, dict):
        raise WorkError(f"{path}: not a JSON object; remove it and compile again")
    return content
