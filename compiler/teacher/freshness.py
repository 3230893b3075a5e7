"""Compares a build folder with its spec: what of it is not what the spec compiles to now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from minitron.compiler.teacher.provenance import observe, with_result
from minitron.specs.builds import PLAN, STUDENT, TRAINING, VERIFICATION, read_document
from minitron.specs.errors import MinitronError
from minitron.specs.file_hashes import first_difference
from minitron.specs.hand_edits import Edit, hand_edits, in_short
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import changes, in_words

# The blocks of a spec that decide how the student is trained and measured, and not what it is.
AFTER_THE_STUDENT = ("distill", "teacher_correction", "evaluate")


@dataclass(frozen=True)
class Staleness:
    """The difference between a build and its spec.

    reason    in words, as `{build} is ...`
    student   the student has to be compiled again, and not its training plan alone
    changed   the spec or its inputs changed; False where only training.yaml was edited
    edits     the values of training.yaml that were edited by hand
    """

    reason: str
    student: bool = True
    changed: bool = True
    edits: tuple[Edit, ...] = ()


def staleness(build: Path, loaded: LoadedSpec) -> Staleness | None:
    """Finds out what of a build is not what its spec compiles to now; None where it is, and verified."""
    plan = read_document(build / PLAN)
    if plan is None:
        return Staleness("not compiled yet")
    edits = hand_edits(build, plan)
    unfinished, blocks, other = _unfinished(build), _changed_blocks(plan, loaded), _changed_input(plan, loaded)
    # The student stays where nothing that decides it changed, whatever else did.
    later = unfinished is None and (other is None or not other.student)
    if blocks and all(block in AFTER_THE_STUDENT for block in blocks):
        only = " and ".join(f"`{block}`" for block in blocks)
        reason = f"compiled from another version of the spec, which differs in {only} only"
        return Staleness(reason, student=not later, edits=edits)
    if blocks:
        return Staleness("compiled from another version of the spec", edits=edits)
    if other is not None:
        return replace(other, student=not later, edits=edits)
    if unfinished is not None:
        return Staleness(unfinished, edits=edits)
    if edits:
        return Staleness(f"edited by hand: {TRAINING} has {in_short(edits)}", False, False, edits)
    if not _is_generated(build, plan):
        return Staleness("not compiled to its end", student=False)
    return None


def why_stale(build: Path, loaded: LoadedSpec) -> str | None:
    """Explains why a build folder is not what a spec compiles to now, as `{build} is ...`; None where it is, and
    verified."""
    found = staleness(build, loaded)
    return None if found is None else found.reason


def _is_generated(build: Path, plan: Mapping[str, Any]) -> bool:
    """Checks whether training.yaml is the one of plan.json: a process may have been killed between the two."""
    generated = plan.get("training")
    try:
        return not isinstance(generated, dict) or yaml.safe_load((build / TRAINING).read_bytes()) == generated
    except (OSError, yaml.YAMLError):
        return False


def _changed_blocks(plan: Mapping[str, Any], loaded: LoadedSpec) -> list[str]:
    """Returns the first keys of the spec that changed since the compile."""
    spec = plan.get("spec") or {}
    if spec.get("sha256") == loaded.sha256:
        return []
    before, now = spec.get("resolved") or {}, loaded.resolved
    return [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)] or ["spec"]


def _changed_input(plan: Mapping[str, Any], loaded: LoadedSpec) -> Staleness | None:
    """Finds an input that changed since the compile, first of all one that decides the student."""
    inputs = plan.get("inputs")
    if not isinstance(inputs, dict):
        return None
    try:
        now = with_result(loaded, observe(loaded))
    except MinitronError:
        return None  # what is not there (any more) is for the plan to say
    found = None
    for path, before, after in changes(inputs, now):
        later = path[0] == "data" and path[1].partition(".")[0] in AFTER_THE_STUDENT
        words = in_words(before, after).replace("locked at", "built from")
        one = Staleness(f"compiled from other inputs: {' '.join(path)} {words}", student=not later)
        if one.student:
            return one
        found = found or one
    return found


def _unfinished(build: Path) -> str | None:
    """Explains why a build was not compiled to its end, or is no longer whole; None where it is."""
    verification = read_document(build / VERIFICATION)
    if verification is None:
        return "not compiled to its end"
    if verification.get("passed") is not True:
        return "compiled, and its verification did not pass"
    student = verification.get("student")
    changed = first_difference(build / STUDENT, student) if isinstance(student, dict) else "its files are not recorded"
    return None if changed is None else f"compiled, and its student is not what was verified: {changed}"
