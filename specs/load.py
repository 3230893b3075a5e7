"""Loads a spec from a file: reads it, merges its base, applies overrides, validates, checks the constraints."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from minitron.specs import shape, source
from minitron.specs.builds import MODEL, PLAN, STUDENT, default_build
from minitron.specs.errors import SpecError, SpecInvalid, UsageError, located
from minitron.specs.extends import read_with_bases
from minitron.specs.inherit import inherit
from minitron.specs.overrides import apply_override
from minitron.specs.search_rules import CONSTRAINTS
from minitron.specs.shape import from_dotted
from minitron.specs.small_files import Unfit, read_small
from minitron.specs.spec import Spec
from minitron.specs.translate import Places, translate


@dataclass(frozen=True)
class LoadedSpec:
    """A valid spec, the file it was read from, and the place of each of its values."""

    spec: Spec
    path: Path
    """The spec's file, absolute."""
    overrides: tuple[str, ...]
    """The `--set` values, as given."""
    tree: source.Mapping = field(repr=False)
    """The values as written, with their places; bases and overrides taken in."""
    pins: Mapping[str, str] = field(default_factory=dict)
    """Dotted path -> the commit that a lock file puts there; taken into `spec`, and not into `resolved`."""
    written: Spec | None = None
    """The spec before pins and fitted values were taken in, where there are any."""
    fitted: Mapping[str, int] = field(default_factory=dict)
    """Dotted path -> the value that stands there in `spec` because of the teacher, and is not written."""

    @property
    def folder(self) -> Path:
        """Returns the folder that relative paths in the spec start at."""
        return self.path.parent

    @property
    def build(self) -> Path:
        """Returns the default build folder of the spec."""
        return default_build(self.path, self.spec.name)

    @property
    def result(self) -> Path:
        """Returns the folder of the model that the spec results in: the distilled student, or the pruned one if nothing is
        trained."""
        return self.build / (STUDENT if self.spec.distill is None else MODEL)

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """Returns the spec as JSON values, with every default written out."""
        return (self.written or self.spec).model_dump(mode="json")

    @cached_property
    def sha256(self) -> str:
        """Returns the hash of the resolved spec: equal for two files with the same meaning, however they are written."""
        canonical = json.dumps(self.resolved, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def pinned(self, pins: Mapping[str, str]) -> LoadedSpec:
        """Returns the spec with commits in place of branches and tags; the spec as requested, and its hash, stay the
        same."""
        if not pins:
            return self
        spec = self.spec
        for path, commit in pins.items():
            spec = _replaced(spec, from_dotted(path), commit)
        return replace(self, spec=spec, pins=dict(pins), written=self.written or self.spec)

    def error(self, path: str, message: str, hint: str = "") -> SpecError:
        """Returns an error at the place of the dotted `path`, or of its nearest parent if only a default stands there."""
        return Places(self.tree).error(path, message, hint)


class InvalidDraft(SpecInvalid):
    """The errors of a spec, and as `draft` the spec without the wrong values, so that the rest can be checked against
    the teacher in the same run."""

    def __init__(self, errors: Sequence[SpecError], draft: LoadedSpec) -> None:
        super().__init__(errors)
        self.draft = draft


def _replaced(value: Any, path: shape.Path, new: str) -> Any:
    """Returns a copy of a block, or of a list of blocks, with one value in it replaced."""
    if not path:
        return new
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        return (*value[:step], _replaced(value[step], rest, new), *value[step + 1 :])
    return value.model_copy(update={step: _replaced(getattr(value, step), rest, new)})


def load_spec(path: Path, overrides: Sequence[str] = ()) -> LoadedSpec:
    """Reads and checks a spec from the file and its bases only: no network, no data, no model.

    InvalidDraft (a SpecInvalid) with all errors of the file; UsageError if it cannot be read or an override leads
    nowhere.
    """
    tree, errors = read_with_bases(_read(path), str(path))
    if {"format_version", "axes"} <= tree.entries.keys():
        raise UsageError(f"{path}: is the plan of a build and not a spec; `minitron show {path.parent}` shows it")
    if {"format_version", "fingerprint"} <= tree.entries.keys():
        raise UsageError(
            f"{path}: is the training plan of a build and not a spec; `minitron train {path.parent}` carries it out"
        )
    for override in overrides:
        tree = apply_override(tree, override)
    tree = inherit(tree)
    # An empty block (`recovery:` with every line below commented out) is one that was left out.
    written = {key: source.plain(entry.node) for key, entry in tree.entries.items()}
    values = {"name": path.stem} | {key: value for key, value in written.items() if value is not None}
    spec, wrong = _check(tree, values)
    loaded = LoadedSpec(spec, path.absolute(), tuple(overrides), tree)
    if errors or wrong:
        raise InvalidDraft([*errors, *wrong], loaded)
    return loaded


def _read(path: Path) -> bytes:
    try:
        return read_small(path)
    except Unfit as error:
        raise UsageError(f"{path}: cannot be a spec: {error.strerror}") from None
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; `minitron init -o {path}` writes one to start from") from None
    except IsADirectoryError:
        if (path / PLAN).is_file():
            raise UsageError(f"{path}: is a build and not a spec; `minitron show {path}` shows it") from None
        raise UsageError(f"{path}: is a folder; name the spec file in it") from None
    except OSError as error:
        advice = "check its permissions" if isinstance(error, PermissionError) else "check the path"
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {advice}") from None


# What stands in for a required value that is missing or wrong, so that the rest of the spec is checked as well.
# Nothing is ever said about these values: constraints that read them are passed over.
STAND_INS: Mapping[str, Any] = {
    "name": "unnamed",
    "teacher": {},
    "student": {},
    "input": 1,
    "output": 1,
    "device": "h100",
    "data": {"text": "unnamed"},
    "tokens": 1,
    "sampled": 1,
    "block": 1,
    "task": "unnamed",
    "source": "unnamed",
    "scores": {},
}


def _check(tree: source.Mapping, values: dict[str, Any]) -> tuple[Spec, list[SpecError]]:
    """Returns the spec and all its errors; if there are errors, the wrong values have been removed from the spec.

    pydantic stops checking a model if one of its parts is wrong, and constraints need a whole spec. Wrong values are
    therefore removed and the rest is checked again until it is valid; errors that only follow from an earlier one are
    dropped.
    """
    errors: list[SpecError] = []
    broken: list[shape.Path] = []
    spec = _whole(tree, values, errors, broken)
    apart: list[str] = []
    for constraint in CONSTRAINTS:
        if not any(_touches(from_dotted(path), broken) for path in constraint.reads):
            problems = list(constraint.check(spec))
            errors += located(problems, Places(tree))
            # Widths that do not go together are each right and wrong: none of them is judged by itself.
            apart += [path for path in constraint.reads if problems and path.startswith("student.")]
            apart += [problem.path for problem in problems]
    for path in apart:
        _take_out(values, from_dotted(path))
    return (_whole(tree, values, [], broken) if apart else spec), errors


def _whole(tree: source.Mapping, values: dict[str, Any], errors: list[SpecError], broken: list[shape.Path]) -> Spec:
    """Returns the spec of the valid values in `values`; the rest is removed from it and added to `errors` and `broken`."""
    while True:
        try:
            return Spec.model_validate(values)
        except ValidationError as error:
            found = translate(error.errors(include_url=False), tree, Spec)
        errors += [one.error for one in found if one.error is not None and not _touches(one.path, broken)]
        broken += [one.path for one in found]
        progress = [_take_out(values, one.path) for one in found]
        assert any(progress), f"no stand-in for one of {broken}"


def _touches(path: shape.Path, broken: list[shape.Path]) -> bool:
    """Checks whether `path` lies above, at or below one of the broken ones."""
    return any(path[: len(other)] == other[: len(path)] for other in broken)


def _take_out(values: dict[str, Any], path: shape.Path) -> bool:
    """Deletes a wrong value, or gives a missing one its stand-in; returns whether there was anything to do.

    A wrong or missing value in a list deletes the whole list.
    """
    steps: list[tuple[dict[str, Any], str]] = []
    inside: Any = values
    for part in path:
        if not isinstance(inside, dict):
            break
        steps.append((inside, str(part)))
        inside = inside.get(str(part))
    holder, key = steps[-1]
    if key in holder:
        del holder[key]
        return True
    if len(steps) == len(path) and key in STAND_INS:
        holder[key] = copy.deepcopy(STAND_INS[key])
        return True
    return False
