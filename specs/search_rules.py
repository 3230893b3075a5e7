"""Checks what a search needs: something to choose among, a budget, text to judge on, and rungs that fit the training."""

from __future__ import annotations

from collections.abc import Iterator

from minitron.specs.blocks.choices import sizes
from minitron.specs.blocks.search import LIMITS
from minitron.specs.consistency import CONSTRAINTS, constraint, proposes_shapes
from minitron.specs.errors import Problem
from minitron.specs.halving import halving
from minitron.specs.spec import Spec
from minitron.specs.units import COUNT_UNITS, Span, format_quantity

__all__ = ["CONSTRAINTS", "searched_widths", "searches_shapes"]

SEVERAL = (tuple, Span)


def searched_widths(spec: Spec) -> list[str]:
    """Returns the keys of `student` that have a list or a range."""
    return [key for key, width in spec.student.targets() if isinstance(width, SEVERAL)]


def searches_shapes(spec: Spec) -> bool:
    """Checks whether candidates differ in shape: by lists and ranges, or because a budget is there and none is written."""
    return bool(searched_widths(spec)) or (spec.search is not None and spec.search.budget is not None)


def _searched_settings(spec: Spec) -> Iterator[tuple[str, str]]:
    """Yields the path of each setting of the training that has a list or a range, and what it is a list of."""
    if spec.distill is not None:
        if isinstance(spec.distill.optimizer.lr, SEVERAL):
            yield "distill.optimizer.lr", "learning rate"
        if isinstance(spec.distill.global_batch_size, SEVERAL):
            yield "distill.global_batch_size", "batch size"


@constraint("search")
def several_values_need_a_search(spec: Spec) -> Iterator[Problem]:
    """Requires a search if a value has several candidates."""
    if spec.search is not None:
        return
    widths = [(f"student.{key}", "width", getattr(spec.student, key)) for key in searched_widths(spec)]
    settings = [(path, what, _value(spec, path)) for path, what in _searched_settings(spec)]
    for path, what, value in (*widths, *settings):
        kind = "list" if isinstance(value, tuple) else "range"
        yield Problem(path, f"a {kind} of {what}s needs `search`", f"write one {what}, or add `search:`")


def _value(spec: Spec, path: str) -> object:
    assert spec.distill is not None
    return spec.distill.optimizer.lr if path.endswith("lr") else spec.distill.global_batch_size


@constraint("search", "student", "distill.optimizer.lr", "distill.global_batch_size")
def something_to_search(spec: Spec) -> Iterator[Problem]:
    """Requires several shapes, learning rates or batch sizes."""
    if spec.search is None:
        return
    if not searches_shapes(spec) and not list(_searched_settings(spec)):
        hint = "add `budget: {parameters: 4B}`, or a list such as `distill: {optimizer: {lr: [1e-4, 2e-4, 4e-4]}}`"
        yield Problem("search", "there is one shape and one learning rate, and nothing to choose among", hint)


@constraint("search", "student")
def some_budget(spec: Spec) -> Iterator[Problem]:
    """Requires a limit if shapes are searched, because without a limit the largest candidate would always win."""
    if spec.search is None:
        return
    known = ", ".join(f"`{limit}`" for limit in LIMITS)
    if spec.search.budget is None:
        if searched_widths(spec):
            message = "several shapes need a budget: without a limit the largest would always win"
            yield Problem("search", message, f"add `budget:` with one of {known}")
    elif all(getattr(spec.search.budget, limit) is None for limit in LIMITS):
        yield Problem("search.budget", "says no limit", f"add one of {known}")


@constraint("search", "evaluate")
def candidates_are_judged(spec: Spec) -> Iterator[Problem]:
    """Requires held-out text, on which candidates are compared."""
    if (
        spec.search is None
        or spec.distill is None
        or (spec.evaluate is not None and spec.evaluate.held_out is not None)
    ):
        return
    message = "candidates are judged on held-out text, which is missing"
    yield Problem("search", message, "add `evaluate: {held_out: {text: [valid.txt]}}`, or `held_out: {fraction: 1%}`")


@constraint(
    "search.rank",
    "search.candidates",
    "distill.tokens",
    "distill.sequence_length",
    "distill.global_batch_size",
)
def rungs_fit_the_training(spec: Spec) -> Iterator[Problem]:
    """Requires rungs that end before the training does, and a first one of at least a step."""
    search, distill = spec.search, spec.distill
    if search is None or distill is None:
        return
    batch, rank = max(sizes(distill.global_batch_size)) * distill.sequence_length, search.rank
    if rank.tokens >= distill.tokens:
        shown = [format_quantity(one, COUNT_UNITS) for one in (rank.tokens, distill.tokens)]
        message = f"the rungs are {shown[0]} tokens long, and the training that goes on from them is {shown[1]}"
        yield Problem("search.rank.tokens", message, f"write at most {max(1, distill.tokens // 2)}")
        return
    first, *_ = halving(max(2, search.candidates), rank.tokens, rank.rungs)
    if first.tokens < batch:
        needed = -(-batch * rank.tokens // first.tokens)
        size = format_quantity(first.tokens, COUNT_UNITS)
        message = f"the first of {rank.rungs} rungs has {size} tokens, less than one global batch, {batch} tokens"
        hint = "write fewer `rungs`, or a smaller `distill.global_batch_size`"
        if needed < distill.tokens:
            hint = f"write at least {needed}, or {hint.removeprefix('write ')}"
        yield Problem("search.rank.tokens", message, hint)


def _searches_depth(spec: Spec) -> bool:
    """Checks whether candidates may differ in their number of layers."""
    depth = spec.student.num_hidden_layers
    return isinstance(depth, SEVERAL) or (depth is None and spec.student.layers is None and proposes_shapes(spec))


@constraint("search", "student", "distill", "teacher_correction")
def candidates_share_a_teacher(spec: Spec) -> Iterator[Problem]:
    """Refuses what candidates cannot share: they learn from one pass of the teacher, each whole on its device."""
    if spec.search is None or spec.distill is None:
        return
    distill = spec.distill
    hidden = distill.loss.hidden_states
    if hidden is not None and not isinstance(hidden.pairs, str) and _searches_depth(spec):
        message = "the pairs name layers of one student, and candidates have other numbers of layers"
        yield Problem("distill.loss.hidden_states.pairs", message, "write all or last:last, or one `num_hidden_layers`")
    if distill.teacher_logits != "online":
        message = "candidates are trained beside the teacher itself, and `teacher_logits` are stored samples"
        yield Problem("distill.teacher_logits", message, "write online")
    if distill.phases:
        message = (
            "candidates are trained on sequences of one length in one batch size, and the winner goes on from there"
        )
        yield Problem("distill.phases", message, "leave them out, or search first and write the result as a spec")
    if distill.layout.cpu_offload:
        message = "candidates are trained whole on their device"
        yield Problem("distill.layout.cpu_offload", message, "write false")
    if spec.teacher_correction is not None and len(sizes(distill.global_batch_size)) > 1:
        message = "the teacher is corrected before the search, in batches of one size"
        yield Problem("distill.global_batch_size", message, "write one size, or leave `teacher_correction` out")
