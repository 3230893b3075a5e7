"""Runs every check of a compile on the build as it was written, one function a check.

Logits of a few sequences are compared; each comparison takes two independent routes to one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from minitron.compiler.capture.models import stored_tensors
from minitron.compiler.emit.program import holds_custom
from minitron.compiler.emit.rewritten import RewrittenStudent
from minitron.compiler.emit.student import student_weights
from minitron.compiler.graph.executor import Executor, Settings
from minitron.compiler.graph.names import Fetch
from minitron.compiler.recovery.basis import rotated_reference
from minitron.compiler.recovery.rotated_weights import rotated_in
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.rotation import Rotation
from minitron.compiler.verify import checks
from minitron.compiler.verify.checks import Check
from minitron.compiler.verify.masked_reference import masked_reference
from minitron.compiler.weights.recipes import recipes
from minitron.compiler.weights.source import WeightSource
from minitron.specs.builds import STUDENT
from minitron.specs.errors import WorkError
from minitron.specs.progress import Progress

# The largest difference of logits, over the largest logit, that a rotation in float32 may make.
ROTATION_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Subject:
    """What is verified, and what it is held against.

    build          the folder that was written
    teacher        the analysed teacher; `source` has its parameters, `buffers` what its code computes in float32
    student        the student as it was rewritten; `model` is the one that its configuration describes, without weights
    config_widths  configuration key -> width that was asked for
    approximate    the first narrowed axis that masking does not equal, and why; None where all are exact
    settings       where graphs run
    rotation       what a rotation of the residual stream does to the parameters, where `source` is rotated
    """

    build: Path
    teacher: AnalysedTeacher
    source: WeightSource
    buffers: Mapping[str, torch.Tensor]
    student: RewrittenStudent
    model: torch.nn.Module
    config_widths: Mapping[str, int]
    approximate: str | None
    settings: Settings
    rotation: Rotation | None = None

    def held(self, name: str) -> torch.Tensor:
        """The teacher's parameter in the dtype that the spec loads it in."""
        return self.source.get(name).to(self.teacher.captured.stored_dtype(name))

    def masked(self, name: str) -> torch.Tensor:
        """The teacher's parameter with everything dropped at zero; a dropped layer's is zero altogether."""
        weight = self.held(name)
        recipe = self._by_source.get(name)
        return torch.zeros_like(weight) if recipe is None else recipe.mask(weight)

    def unrounded(self, name: str) -> torch.Tensor:
        """The student's parameter in float32, from what the teacher's is in its own dtype."""
        recipe = self.student.recipes[name]
        return recipe.make(self.held(recipe.source).to(self.settings.dtype))

    @cached_property
    def _by_source(self) -> Mapping[str, Any]:
        return {recipe.source: recipe for recipe in self.student.recipes.values()}


class Routes:
    """The logits [B, S, V] that each route to the student's or the teacher's function gives for the same token ids."""

    def __init__(self, subject: Subject, ids: torch.Tensor) -> None:
        self.subject, self.ids = subject, ids
        self.model = checks.load_student(subject.build / STUDENT, subject.teacher.captured.attention)
        self.loaded = checks.logits_of(self.model, ids)
        """student/, loaded fresh by transformers."""

    def graph(self, graph_module: GraphModule, fetch: Fetch, buffers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A graph run layer by layer."""
        found: list[torch.Tensor] = []
        layer_of = self.subject.teacher.captured.layer_of
        executor = Executor(graph_module, layer_of, fetch, buffers, self.subject.settings)
        executor.run([self.ids], output=lambda logits, _: found.append(logits.float().cpu()))
        return found[0]

    @cached_property
    def rewritten(self) -> torch.Tensor:
        """The rewritten graph on weights that are made of the teacher's in memory."""
        subject = self.subject
        make = student_weights(subject.source, subject.student.recipes, subject.teacher.captured.stored_dtype)
        return self.graph(subject.student.graph_module, make, subject.student.buffers)


def widths(routes: Routes) -> Check:
    """The widths asked for are those of the checkpoint, by its configuration and by its tensors."""
    subject = routes.subject
    planned, got = (
        {name: tuple(value.shape) for name, value in stored_tensors(model).items()}
        for model in (subject.model, routes.model)
    )
    return checks.check_widths(subject.build / STUDENT, subject.config_widths, planned, got)


def reload(routes: Routes) -> Check:
    """The rewritten graph equals the model that transformers loads from student/."""
    detail = "rewritten graph against student/ loaded by transformers"
    return checks.compare("reload", routes.rewritten, routes.loaded, detail)


def masked(routes: Routes) -> Check:
    """The teacher with everything dropped set to zero equals the student, where that is mathematically so."""
    subject = routes.subject
    if subject.approximate is not None:
        return checks.skipped("masked", subject.approximate)
    teacher, student = subject.teacher, subject.student
    reference = masked_reference(teacher.captured.graph_module, teacher.table, student.narrowing)
    expected = routes.graph(reference, subject.masked, subject.buffers)
    pruned = routes.rewritten
    if student.repaired and teacher.captured.dtype != subject.settings.dtype:
        # Folded constants were rounded once more for student/: compared is what they are before that.
        pruned = routes.graph(student.graph_module, subject.unrounded, student.buffers)
    detail = "teacher with everything dropped set to zero against the rewritten graph"
    return checks.compare("masked", expected, pruned, detail)


def permutation(routes: Routes) -> Check:
    """The teacher with every narrowed axis permuted equals the teacher."""
    subject, captured = routes.subject, routes.subject.teacher.captured
    permuted = checks.permuted(subject.student.narrowing)
    made = recipes(captured, subject.teacher.table.parameters, permuted, range(captured.layer_count))
    whole = routes.graph(captured.graph_module, subject.held, subject.buffers)
    mixed = routes.graph(captured.graph_module, lambda name: made[name].make(subject.held(name)), subject.buffers)
    return checks.compare("permutation", mixed, whole, "teacher with its narrowed axes permuted against itself")


def program(routes: Routes) -> Check:
    """student.pt2, run by plain torch on student/'s weights, equals the Hugging Face model."""
    subject = routes.subject
    return checks.check_program(
        subject.build,
        routes.model,
        routes.ids,
        routes.loaded,
        subject.teacher.captured.dtype,
        streamed=subject.source.streamed,
        custom=holds_custom(subject.student.graph_module),
    )


def head(routes: Routes) -> Check:
    """The description of the head in training.yaml yields the Hugging Face model's logits."""
    return checks.check_head(routes.model, routes.subject.teacher.head, routes.ids, routes.loaded)


def rotation(routes: Routes) -> Check | None:
    """The teacher in its new basis, whole and with nothing fitted, is the teacher."""
    subject, captured = routes.subject, routes.subject.teacher.captured
    source = rotated_in(subject.source)
    if source is None:
        return None
    assert subject.rotation is not None
    graph_module, fetch = rotated_reference(captured.graph_module, subject.teacher.table, source, subject.rotation.tied)
    whole = routes.graph(captured.graph_module, source.unrotated.get, subject.buffers)
    turned = routes.graph(graph_module, fetch, subject.buffers)
    detail = "the teacher on its principal components, all of them kept, against itself"
    return checks.compare("rotation", turned, whole, detail, ROTATION_TOLERANCE)


CHECKS: tuple[Callable[[Routes], Check | None], ...] = (widths, reload, masked, permutation, program, head, rotation)


def run_checks(
    subject: Subject,
    samples: torch.Tensor | None,
    progress: Progress,
    wanted: Sequence[Callable[[Routes], Check | None]] = CHECKS,
) -> list[Check]:
    """Runs the checks in order; where the student does not load or run, `reload` says so and nothing else is tried."""
    config = subject.teacher.captured.config
    longest = getattr(config, "max_position_embeddings", None) or checks.SAMPLE[1]
    length = subject.teacher.captured.length or min(checks.SAMPLE[1], int(longest))
    ids = checks.sample_ids(config.vocab_size, length, samples)
    with progress.task("verify", len(wanted), "checks") as task:
        try:
            routes = Routes(subject, ids)
        except WorkError as error:
            only_config = checks.check_widths(subject.build / STUDENT, subject.config_widths, {}, {})
            return [only_config, checks.broken("reload", error)]
        return list(_each(wanted, routes, lambda: task.advance(1)))


def _each(
    wanted: Sequence[Callable[[Routes], Check | None]], routes: Routes, done: Callable[[], None]
) -> Iterator[Check]:
    for check in wanted:
        found = check(routes)
        if found is not None:  # None: nothing of this student is to be checked so
            yield found
        done()
