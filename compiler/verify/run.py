"""Translation validation: is the student that was written the function that was asked for?

Each check holds one thing against another that was made in an independent way. One that fails fails the compile.
Logits are compared token by token, against what rounding makes of them (`comparison.py`).

Of the teacher, before anything is computed with it; one that fails refuses the teacher:

    teacher        the captured graph on the weights that were read  =  the model that transformers loads from its folder
    causality      the logits of earlier tokens do not depend on the last one

Of the student, once it is written:

    files          student/ holds the files that the compile wrote, byte for byte (once that compile has ended)
    coordinates    coordinates.safetensors, where there is one, has what the student keeps of the teacher's hidden states
    selection      plan.json keeps what scores.safetensors ranks highest
    weights        every element of every tensor in student/  =  the teacher's that plan.json keeps
    configuration  every key of config.json and generation_config.json is the teacher's, or the one that was planned
    widths         the widths asked for are those of the checkpoint, by its configuration and by its tensors
    reload         the rewritten graph on weights in memory  =  the Hugging Face model loaded fresh from student/
    masked         the teacher with everything dropped set to zero  =  the rewritten graph
    permutation    the teacher with every narrowed axis permuted  =  the teacher
    program        student.pt2 run by plain torch on student/'s weights  =  the Hugging Face model
    head           the description of the head in training.yaml yields the Hugging Face model's logits
    generation     a few steps with a cache  =  the same tokens without one, as far as the teacher can do it
    rotation       the teacher on the principal components of its residual stream, all kept  =  the teacher
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.graph.memory import release_heap
from minitron.compiler.verify.causality import causality
from minitron.compiler.verify.checks import Check, broken
from minitron.compiler.verify.configuration import configuration
from minitron.compiler.verify.coordinates import coordinates
from minitron.compiler.verify.files import files
from minitron.compiler.verify.generation import generation
from minitron.compiler.verify.head import head
from minitron.compiler.verify.hugging_face import NotRunnable
from minitron.compiler.verify.masked import masked
from minitron.compiler.verify.permutation import permutation
from minitron.compiler.verify.program import program
from minitron.compiler.verify.reload import reload
from minitron.compiler.verify.rotation import rotation
from minitron.compiler.verify.routes import Routes
from minitron.compiler.verify.selection import selection
from minitron.compiler.verify.subject import Original, Subject
from minitron.compiler.verify.teacher_model import teacher
from minitron.compiler.verify.teacher_routes import TeacherRoutes
from minitron.compiler.verify.token_ids import token_ids
from minitron.compiler.verify.weights import weights
from minitron.compiler.verify.widths import widths
from minitron.specs.atomic import write_text
from minitron.specs.progress import Progress

CHECKED = "checked.json"
"""The file that keeps the checks that passed while a compile is at it."""

TeacherCheck = Callable[[TeacherRoutes], Check | None]
StudentCheck = Callable[[Routes], Check | None]

TEACHER_CHECKS: tuple[TeacherCheck, ...] = (teacher, causality)
STUDENT_CHECKS: tuple[StudentCheck, ...] = (
    files, coordinates, selection, weights, configuration, widths, reload, masked, permutation, program, head, generation,
    rotation,
)  # fmt: skip
"""All checks, of a compile and of `minitron verify` alike, in their order. None: there is nothing of this kind to check."""


def run_teacher_checks(
    original: Original, progress: Progress, wanted: Sequence[TeacherCheck] = TEACHER_CHECKS
) -> list[Check]:
    """Runs the checks of a teacher, in order, on random tokens."""
    routes = TeacherRoutes(original, token_ids(original.teacher, None), progress.message)
    with progress.task("verify the teacher", len(wanted), "checks") as task:
        found = []
        for check in wanted:
            found.append(check(routes))
            release_heap()
            task.advance(1)
        return [one for one in found if one is not None]


def run_checks(
    subject: Subject,
    samples: torch.Tensor | None,
    progress: Progress,
    wanted: Sequence[StudentCheck] = STUDENT_CHECKS,
    kept: Path | None = None,
) -> list[Check]:
    """Runs the checks of a student in order, on tokens of the calibration samples where there are any. Those that passed
    stand in the file `kept`, and are not run again where the process was killed.

    Where the student does not load or run, `reload` says so, and what would look at its logits is left out.
    """
    routes = Routes(subject, token_ids(subject.teacher, samples), progress.message)
    with progress.task("verify", len(wanted), "checks") as task:
        return list(_each(wanted, routes, _Passed(kept), lambda: task.advance(1)))


class _Passed:
    """The checks that passed, by the names of their functions, in a file."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._found = path, dict[str, Any]()
        if path is not None and path.is_file():
            self._found = json.loads(path.read_text(encoding="utf-8"))

    def get(self, check: StudentCheck) -> Check | None:
        found = self._found.get(check.__name__)
        return None if found is None else Check(**found)

    def add(self, check: StudentCheck, found: Check) -> None:
        if self._path is not None and found.passed:
            self._found[check.__name__] = found.to_json()
            write_text(self._path, json.dumps(self._found))


def _each(wanted: Sequence[StudentCheck], routes: Routes, passed: _Passed, done: Callable[[], None]) -> Iterator[Check]:
    for check in wanted:
        if (known := passed.get(check)) is not None:
            yield known
            done()
            continue
        try:
            found = check(routes)
        except NotRunnable as error:
            found = broken("reload", error) if check is reload else None
        if found is not None:
            passed.add(check, found)
            yield found
        release_heap()
        done()
