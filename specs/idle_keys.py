"""Keys that are written and change nothing beside the others: a user who wrote one counts on something that does not happen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from minitron.specs.blocks.distill import Distill
from minitron.specs.blocks.student import DEPTH
from minitron.specs.consistency import proposes_shapes
from minitron.specs.errors import Problem
from minitron.specs.fit_lengths import is_written
from minitron.specs.load import LoadedSpec
from minitron.specs.spec import Spec
from minitron.specs.units import Share, Span

Test: TypeAlias = Callable[[Spec], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """A key that is idle where `idle` holds, for this reason. A default that is written is no mistake."""

    path: str
    idle: Test
    reason: str


def idle_keys(loaded: LoadedSpec) -> Iterator[Problem]:
    """Yields a problem for each key that stands in the file, with another value than its default, and changes nothing."""
    spec = loaded.written or loaded.spec
    for rule in RULES:
        if is_written(loaded, rule.path) and not _is_default(spec, rule.path) and rule.idle(spec):
            yield Problem(rule.path, f"changes nothing here: {rule.reason}", "leave it out")


def _is_default(spec: Spec, path: str) -> bool:
    inside: Any = spec
    *above, key = path.split(".")
    for step in above:
        inside = getattr(inside, step)
        if inside is None:
            return True
    return bool(getattr(inside, key) == type(inside).model_fields[key].default)


def _narrows(spec: Spec) -> bool:
    return proposes_shapes(spec) or any(key != DEPTH for key, _ in spec.student.targets())


def _chooses_layers(spec: Spec) -> bool:
    named = spec.student.layers is not None
    return not named and (proposes_shapes(spec) or spec.student.num_hidden_layers is not None)


def _rounds(spec: Spec) -> bool:
    """Checks whether a width is a share, which is rounded to a multiple, or a range, which is walked through in multiples."""
    for _, width in spec.student.targets():
        values = width if isinstance(width, tuple) else (width,)
        if any(isinstance(value, Share | Span) for value in values):
            return True
    return False


def _of_distill(test: Callable[[Distill], bool]) -> Test:
    return lambda spec: spec.distill is not None and test(spec.distill)


def _without_held_out(spec: Spec) -> bool:
    return spec.evaluate is not None and spec.evaluate.held_out is None


_NO_MOMENTUM = "`adamw` has no momentum of its own, `betas` say it"
_NO_LOGITS = "the weight of the logit loss is 0"
_NO_HELD_OUT = "there is no `held_out` text"

RULES = (
    Rule(
        "teacher.compute", lambda spec: spec.distill is None, "without `distill` the teacher computes beside no student"
    ),
    Rule("student.multiple_of", lambda spec: not _rounds(spec), "no width is a share of the teacher's, or a range"),
    Rule("importance.width", lambda spec: not _narrows(spec), "no width is narrowed"),
    Rule("importance.depth", lambda spec: not _chooses_layers(spec), "no layers are chosen by scores"),
    Rule("recovery.refit", lambda spec: not _narrows(spec), "no width is narrowed"),
    Rule(
        "search.budget.tolerance",
        lambda spec: (
            spec.search is not None and spec.search.budget is not None and spec.search.budget.parameters is None
        ),
        "it is that of `parameters`, which no limit is written for",
    ),
    Rule(
        "teacher_correction.optimizer.momentum",
        lambda spec: spec.teacher_correction is not None and spec.teacher_correction.optimizer.name == "adamw",
        _NO_MOMENTUM,
    ),
    Rule("distill.optimizer.momentum", _of_distill(lambda distill: distill.optimizer.name == "adamw"), _NO_MOMENTUM),
    Rule("distill.loss.logits.divergence", _of_distill(lambda distill: not distill.loss.logits.weight), _NO_LOGITS),
    Rule("distill.loss.logits.temperature", _of_distill(lambda distill: not distill.loss.logits.weight), _NO_LOGITS),
    Rule(
        "distill.loss.hidden_states",
        _of_distill(lambda distill: distill.loss.hidden_states is not None and distill.loss.hidden_states.weight == 0),
        "its weight is 0",
    ),
    Rule(
        "distill.layout.teacher",
        # (`minitron capture` lays the teacher out in the same way.)
        _of_distill(lambda distill: not distill.needs_teacher and distill.teacher_logits == "online"),
        "no teacher runs beside the student",
    ),
    Rule(
        "evaluate.data_dir",
        lambda spec: spec.evaluate is not None and not spec.evaluate.suite,
        "`suite` names no benchmark",
    ),
    Rule(
        "evaluate.published",
        lambda spec: spec.evaluate is not None and not spec.evaluate.suite,
        "`suite` names no benchmark",
    ),
    Rule(
        "evaluate.continuation_tokens",
        lambda spec: _without_held_out(spec) and spec.evaluate is not None and spec.evaluate.prompt is None,
        "there is neither a `prompt` to continue nor `held_out` text, whose beginning is one",
    ),
    Rule("evaluate.max_tokens", _without_held_out, _NO_HELD_OUT),
    Rule(
        "evaluate.every_tokens",
        lambda spec: _without_held_out(spec) or spec.distill is None,
        "nothing is measured while a student is trained",
    ),
)
