"""Where the result of a spec is: its build folder, and in it the model that another spec may take as its teacher."""

from __future__ import annotations

from pathlib import Path

from minitron.specs.load import LoadedSpec

STUDENT = "student"
MODEL = "model"
PLAN = "plan.json"
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
