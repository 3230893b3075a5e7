"""Reads training.yaml, whose schema is defined in `specs/training_plan.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from minitron.specs import source
from minitron.specs.builds import TRAINING
from minitron.specs.data import DataSource
from minitron.specs.data_files import resolve
from minitron.specs.errors import SpecError, SpecInvalid, UsageError, located
from minitron.specs.small_files import read_small
from minitron.specs.training_plan import TRAINING_KEYS, EvaluationPlan, TrainingPlan, problems
from minitron.specs.translate import Places, translate


@dataclass(frozen=True)
class LoadedPlan:
    """A valid training.yaml, with the line of each of its values."""

    plan: EvaluationPlan
    path: Path
    tree: source.Node = field(repr=False)
    places: Mapping[str, str] = field(default_factory=dict)
    """The first keys of `plan` that have another place in the file, for a plan that was made from another one."""

    @property
    def folder(self) -> Path:
        """Returns the folder that relative paths in the plan start from."""
        return self.path.parent

    def error(self, path: str, message: str, hint: str = "") -> SpecError:
        """Makes an error at the place of the dotted `path`."""
        first, dot, rest = path.partition(".")
        path = self.places.get(first, first) + dot + rest
        return Places(self.tree).error(path, message, hint)

    def training(self) -> TrainingPlan:
        """Returns the plan of a build that trains. UsageError where there is nothing to train."""
        if not isinstance(self.plan, TrainingPlan):
            raise UsageError(
                f"{self.path} says nothing about training: the build was compiled from a spec without `distill`; "
                "add that block to the spec and compile again"
            )
        return self.plan

    def data(self, at: str, data: DataSource) -> DataSource:
        """Returns the source under the key `at`, its files found. Refused for files that do not exist."""
        return resolve(data, self.folder, at=at)


def read_training_plan(build: Path) -> LoadedPlan:
    """Reads BUILD/training.yaml. UsageError where the file does not exist, SpecInvalid with everything that is wrong in
    it.
    """
    path = build / TRAINING
    if not build.is_dir():
        raise UsageError(f"{build}: there is no such build folder; `minitron compile SPEC -o {build}` makes one")
    try:
        content = read_small(path)
    except FileNotFoundError:
        raise UsageError(f"{build} has no {TRAINING}; `minitron compile SPEC -o {build}` writes it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    tree, errors = source.read_bytes(content, str(path))
    if errors:
        raise SpecInvalid(errors)
    values = source.plain(tree)
    if not isinstance(values, dict):
        raise SpecInvalid([tree.place.error("", "is not a mapping", "write `key: value` lines, or compile again")])
    kind = TrainingPlan if TRAINING_KEYS & values.keys() else EvaluationPlan
    try:
        plan = kind.model_validate(values)
    except ValidationError as error:
        found = translate(error.errors(include_url=False), tree, kind)
        raise SpecInvalid([one.error for one in found if one.error is not None]) from None
    loaded = LoadedPlan(plan, path.absolute(), tree)
    if isinstance(plan, TrainingPlan) and (wrong := located(problems(plan), loaded)):
        raise SpecInvalid(wrong)
    return loaded
