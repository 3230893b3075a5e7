"""Checks the constraints between the values of a spec.

A constraint is a function of the spec. It names the paths that it reads, and is skipped if one of their values was
already found wrong, so that no error is reported that only follows from another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from minitron.specs import training_consistency as training
from minitron.specs.blocks.benchmarks import benchmarks
from minitron.specs.blocks.choices import rates, sizes
from minitron.specs.blocks.distill import Distill
from minitron.specs.blocks.requirements import HELD_OUT_LOSS, RECOVERED
from minitron.specs.blocks.student import DEPTH
from minitron.specs.data import DataSource, Source, are_apart
from minitron.specs.errors import Problem
from minitron.specs.spec import Spec
from minitron.specs.suggest import did_you_mean
from minitron.specs.units import COUNT_UNITS, Span, format_quantity

Check: TypeAlias = Callable[[Spec], Iterator[Problem]]


@dataclass(frozen=True, slots=True)
class Constraint:
    """A check and the dotted paths that it reads."""

    reads: tuple[str, ...]
    check: Check


CONSTRAINTS: list[Constraint] = []


def constraint(*reads: str) -> Callable[[Check], Check]:
    """Registers a check that reads the values at `reads`."""

    def register(check: Check) -> Check:
        CONSTRAINTS.append(Constraint(reads, check))
        return check

    return register


@constraint("teacher")
def one_teacher(spec: Spec) -> Iterator[Problem]:
    """Requires that the teacher is either a model or the result of another spec."""
    teacher = spec.teacher
    if teacher.model is None and teacher.spec is None:
        yield Problem("teacher", "names no teacher", "add `model:` (a Hugging Face id or a folder) or `spec:`")
    if teacher.model is not None and teacher.spec is not None:
        yield Problem("teacher.spec", "`model` and `spec` both name the teacher", "keep one of them")
    if teacher.spec is not None and teacher.revision is not None:
        yield Problem("teacher.revision", "`revision` goes with `model`, not with `spec`", "leave it out")
    if teacher.spec is not None and teacher.tower is not None:
        yield Problem("teacher.tower", "`tower` goes with `model`: the result of a spec has one tower", "leave it out")


@constraint("student", "search")
def some_target(spec: Spec) -> Iterator[Problem]:
    """Requires that something becomes smaller; a search with a budget proposes what."""
    if spec.search is not None and spec.search.budget is not None:
        return
    if not list(spec.student.targets()) and spec.student.layers is None:
        example = 'such as `hidden_size: 4096`, `intermediate_size: "80%"` or `layers: {drop: [16, 17]}`'
        message = "says no target: the student would be the teacher"
        yield Problem("student", message, f"write at least one width, {example}")


@constraint("student.layers")
def drop_or_keep(spec: Spec) -> Iterator[Problem]:
    """Requires that layers are named either by `drop` or by `keep`, and once each."""
    layers = spec.student.layers
    if layers is None:
        return
    if (layers.drop is None) == (layers.keep is None):
        said = "says both `drop` and `keep`" if layers.drop is not None else "says neither `drop` nor `keep`"
        yield Problem("student.layers", said, "write one of them")
    for key, numbers in (("drop", layers.drop), ("keep", layers.keep)):
        if numbers is not None and len(set(numbers)) < len(numbers):
            twice = next(number for number in numbers if numbers.count(number) > 1)
            yield Problem(f"student.layers.{key}", f"layer {twice} stands in the list twice", "keep one of them")


@constraint("student.layers", f"student.{DEPTH}")
def depth_said_once(spec: Spec) -> Iterator[Problem]:
    """Refuses a depth beside named layers, because the named layers already determine the depth."""
    if spec.student.layers is not None and spec.student.num_hidden_layers is not None:
        message = "`layers` already says how many layers stay, and may say another number"
        yield Problem(
            f"student.{DEPTH}", message, "keep `layers` to name them, or `num_hidden_layers` to have them chosen"
        )


@constraint("student.num_attention_heads", "student.num_key_value_heads")
def groups_divide_heads(spec: Spec) -> Iterator[Problem]:
    """Requires that every key-value group serves the same number of query heads."""
    heads, groups = spec.student.num_attention_heads, spec.student.num_key_value_heads
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        fitting = max(number for number in range(1, groups + 1) if heads % number == 0) if heads < 10**4 else 1
        yield Problem(
            "student.num_key_value_heads",
            f"{groups} key-value groups cannot share {heads} query heads equally",
            f"write a divisor of {heads}, such as {fitting}",
        )


@constraint("search", "teacher_correction", "distill")
def training_has_data(spec: Spec) -> Iterator[Problem]:
    """Requires `distill` for a search and for teacher correction, because both train on its data."""
    for key in ("search", "teacher_correction"):
        if getattr(spec, key) is not None and spec.distill is None:
            yield Problem(key, f"`{key}` trains on the data of `distill`, which is missing", "add `distill:`")


def scores_need_data(spec: Spec) -> Iterator[Problem]:
    """Requires calibration data for scores, because scores come from activations. No constraint of the language: widths
    can be planned and priced without any data, and a compile asks."""
    named = spec.student.layers is not None
    scored = [key for key, _ in spec.student.targets() if not (key == DEPTH and named)]
    proposed = spec.search is not None and spec.search.budget is not None
    if (scored or proposed) and spec.importance.data is None:
        scored = scored or ["hidden_size"]
        what = "layers" if scored == [DEPTH] else f"part of `student.{scored[0]}`"
        example = "add `importance: {data: {text: [corpus/*.txt]}}`"
        yield Problem(
            "importance.data", f"is missing: which {what} to keep is decided by scores, and these need data", example
        )


def proposes_shapes(spec: Spec) -> bool:
    """Checks whether the compiler proposes values for all widths that the spec leaves open: a search has a budget, and no
    list or range of widths to choose from.
    """
    several = any(isinstance(width, tuple | Span) for _, width in spec.student.targets())
    return spec.search is not None and spec.search.budget is not None and not several


@constraint("importance.selection", "recovery", "student", "search")
def elimination_counts_on_a_refit(spec: Spec) -> Iterator[Problem]:
    """Requires a refit for elimination, which keeps the neurons and heads that are best after a refit, not the best without
    one. Experts are eliminated as they are."""
    narrowed = {key for key, _ in spec.student.targets()}
    alone = "num_experts" in narrowed and narrowed <= {"num_experts", "hidden_size", DEPTH}
    alone = alone and not proposes_shapes(spec)
    if spec.importance.selection == "greedy" and spec.recovery.refit == "none" and not alone:
        message = "greedy keeps what is best after a refit of the projections, and none is asked for"
        yield Problem("importance.selection", message, "write scores, or `recovery: {refit: least_squares}`")


@constraint("importance.depth")
def layers_are_dropped_one_way(spec: Spec) -> Iterator[Problem]:
    """Requires, for layers that are dropped one after the other, a metric of what is left, and no run of neighbours."""
    depth = spec.importance.depth
    if depth.greedy and depth.metric == "block_influence":
        message = "block influence describes a layer alone, not the model without it"
        yield Problem("importance.depth.greedy", message, "write `metric: loss` or `metric: logit_mse`, or false")
    if depth.greedy and depth.contiguous:
        message = "layers that are dropped one after the other need not be neighbours"
        yield Problem("importance.depth.greedy", message, "keep either `greedy` or `contiguous`")


@constraint("recovery")
def one_repair_of_heads(spec: Spec) -> Iterator[Problem]:
    """Refuses merged heads beside a refit, which fits each projection to what the teacher's yields and so undoes them."""
    if spec.recovery.merge_heads and spec.recovery.refit != "none":
        message = "`refit` fits the projections to what the teacher's yield, which undoes what is folded into them"
        yield Problem("recovery.merge_heads", message, "write false, or `refit: none`")


@constraint("distill.optimizer.lr", "distill.optimizer.min_lr")
def distill_rate_falls(spec: Spec) -> Iterator[Problem]:
    """Requires that the learning rate ends no higher than it starts."""
    if spec.distill is not None:
        optimizer = spec.distill.optimizer
        yield from training.rate_falls(optimizer.at(min(rates(optimizer.lr))), "distill.optimizer")


@constraint("teacher_correction.optimizer.lr", "teacher_correction.optimizer.min_lr")
def correction_rate_falls(spec: Spec) -> Iterator[Problem]:
    """Requires that the learning rate ends no higher than it starts."""
    if spec.teacher_correction is not None:
        yield from training.rate_falls(spec.teacher_correction.optimizer, "teacher_correction.optimizer")


@constraint("distill.tokens", "distill.sequence_length", "distill.global_batch_size", "teacher_correction")
def enough_tokens(spec: Spec) -> Iterator[Problem]:
    """Requires that every training has at least one step."""
    if spec.distill is None:
        return
    sequences = max(sizes(spec.distill.global_batch_size))
    batch = sequences * spec.distill.sequence_length
    trainings = {
        "distill.tokens": spec.distill.tokens,
        "teacher_correction.tokens": spec.teacher_correction.tokens if spec.teacher_correction else batch,
    }
    for path, tokens in trainings.items():
        if tokens < batch:
            size = f"{sequences} x {spec.distill.sequence_length} = {batch}"
            message = f"{format_quantity(tokens, COUNT_UNITS)} tokens are less than one global batch, {size} tokens"
            yield Problem(path, message, f"write at least {batch}, or a smaller `distill.global_batch_size`")


@constraint("distill.phases", "distill.tokens", "distill.sequence_length", "distill.global_batch_size")
def phases_make_up_the_training(spec: Spec) -> Iterator[Problem]:
    """Requires that phases add up to the training, each with at least one step of a batch that is known."""
    if spec.distill is None:
        return
    if spec.distill.phases and len(sizes(spec.distill.global_batch_size)) > 1:
        message = "phases take what they leave out from `global_batch_size`, which names several"
        yield Problem("distill.phases", message, "write one size above them, or leave `phases` out")
    else:
        yield from training.phases_make_up_the_training(spec.distill.phases, spec.distill.tokens, "distill.phases")


@constraint("distill.phases", "distill.teacher_logits")
def phases_have_a_teacher(spec: Spec) -> Iterator[Problem]:
    """Requires the teacher itself for phases."""
    if spec.distill is not None:
        yield from training.phases_have_a_teacher(spec.distill.phases, spec.distill.teacher_logits, "distill.phases")


@constraint("distill.shuffle", "distill.sequence_length", "distill.phases")
def blocks_hold_sequences(spec: Spec) -> Iterator[Problem]:
    """Requires that the blocks of a shuffle hold the sequences of the training and of its phases."""
    if spec.distill is not None:
        lengths = [spec.distill.sequence_length, *(one.sequence_length or 0 for one in spec.distill.phases)]
        yield from training.blocks_hold_sequences(spec.distill.shuffle, lengths, "distill.shuffle")


@constraint("distill.loss")
def loss_is_whole(spec: Spec) -> Iterator[Problem]:
    """Requires a loss term, and a logit loss to scale a dynamic weight to."""
    if spec.distill is not None:
        yield from training.loss_is_whole(spec.distill.loss, "distill.loss")


@constraint("distill.teacher_logits", "distill.loss")
def samples_are_enough(spec: Spec) -> Iterator[Problem]:
    """Requires a loss that stored samples of the teacher's distribution suffice for."""
    if spec.distill is not None:
        yield from training.samples_are_enough(spec.distill.loss, spec.distill.teacher_logits, "distill.loss")


@constraint("distill.layout")
def offloading_needs_sharding(spec: Spec) -> Iterator[Problem]:
    """Requires sharding for weights that rest in host memory."""
    if spec.distill is not None:
        yield from training.offloading_needs_sharding(spec.distill.layout, "distill.layout")


@constraint("distill.layout", "distill.weights", "distill.optimizer.states", "distill.optimizer.name")
def offloading_is_of_plain_adamw(spec: Spec) -> Iterator[Problem]:
    """Requires AdamW in fp32 for what rests in host memory."""
    if (distill := spec.distill) is not None:
        at = "distill.layout"
        yield from training.offloading_is_of_plain_adamw(distill.layout, distill.weights, distill.optimizer, at)


@constraint("distill.loss.hidden_states")
def pairs_differ(spec: Spec) -> Iterator[Problem]:
    """Requires that no pair of layers is listed twice."""
    if spec.distill is not None:
        yield from training.pairs_differ(spec.distill.loss, "distill.loss")


@constraint("distill.data", "distill.tokens", "distill.phases")
def budgets_make_up_the_training(spec: Spec) -> Iterator[Problem]:
    """Requires that the tokens of a blend's parts add up to the tokens of the training, or of the phase."""
    if spec.distill is None:
        return
    sources = [("distill", spec.distill.data, spec.distill.tokens)]
    sources += [
        (f"distill.phases.{index}", phase.data, phase.tokens)
        for index, phase in enumerate(spec.distill.phases)
        if phase.data is not None
    ]
    for at, data, tokens in sources:
        parts = data.blend or ()
        budget = sum(part.tokens or 0 for part in parts)
        if parts and all(part.tokens is not None for part in parts) and budget != tokens:
            shown = [format_quantity(one, COUNT_UNITS) for one in (budget, tokens)]
            message = f"the parts' `tokens` make {shown[0]}, and `{at}.tokens` is {shown[1]}"
            yield Problem(f"{at}.data.blend", message, f"write `{at}.tokens: {budget}`, or other budgets")


@constraint("distill.data", "distill.phases", "evaluate.held_out")
def held_out_documents_can_be_chosen(spec: Spec) -> Iterator[Problem]:
    """Requires documents that are read one by one if held-out data is a share of the training data."""
    held_out = spec.evaluate.held_out if spec.evaluate is not None else None
    if held_out is None or held_out.fraction is None:
        return
    if spec.distill is None:
        yield Problem(
            "evaluate.held_out.fraction", "is a share of `distill.data`, which is missing", "name a source of documents"
        )
    elif held_out.fraction == 0:
        yield Problem("evaluate.held_out.fraction", "0% leaves no document to hold out", "write a share such as 1%")
    else:
        for part in (part for _, source in _learnt(spec.distill) for part in source.blend or [source]):
            if part.megatron is not None:
                message = "tokens of Megatron-LM are read as they lie, and no document of them can be left out"
                yield Problem("evaluate.held_out.fraction", message, "name other held-out documents")


@constraint("distill.data", "distill.phases", "evaluate.held_out")
def held_out_is_held_out(spec: Spec) -> Iterator[Problem]:
    """Refuses held-out data that is also trained on."""
    if spec.distill is None or spec.evaluate is None or spec.evaluate.held_out is None:
        return
    held_out = spec.evaluate.held_out
    for at, source in _learnt(spec.distill):
        pairs = itertools.product(source.blend or [source], held_out.blend or [held_out])
        shared = {origin for one, other in pairs if not are_apart(one, other) for origin in _shared(one, other)}
        if shared:
            message = f"{min(shared)} is trained on as well, under `{at}`"
            yield Problem("evaluate.held_out", message, "name documents that nothing is trained on")
            return


@constraint("evaluate.suite", "evaluate.require", "evaluate.held_out")
def requirements_are_measured(spec: Spec) -> Iterator[Problem]:
    """Requires that each required score is among the measured ones."""
    if spec.evaluate is None:
        return
    tasks = [one.task for one in benchmarks(spec.evaluate.suite)]
    known = [HELD_OUT_LOSS, RECOVERED, *tasks]
    for name in spec.evaluate.require:
        path = f"evaluate.require.{name}"
        if name not in known:
            meant = did_you_mean(name, known)
            yield Problem(path, "is not measured", f"{meant}write one of {', '.join(known)}, or add it to `suite`")
        elif name in (HELD_OUT_LOSS, RECOVERED) and spec.evaluate.held_out is None:
            yield Problem(path, "needs held-out text", "add `held_out: {text: [valid.txt]}` to `evaluate`")


@constraint("evaluate.suite")
def benchmarks_can_be_run(spec: Spec) -> Iterator[Problem]:
    """Requires that a suite lists each benchmark once, and that several answers to a question are sampled."""
    suite = () if spec.evaluate is None else benchmarks(spec.evaluate.suite)
    for index, one in enumerate(suite):
        if one.task in [before.task for before in suite[:index]]:
            yield Problem(f"evaluate.suite.{index}", f"`{one.task}` stands in the list twice", "keep one of them")
        if (one.samples or 1) > 1 and not one.temperature:
            message = f"without a temperature the {one.samples} answers would all be the same"
            yield Problem(f"evaluate.suite.{index}", message, "add `temperature: 0.2`, or leave `samples` out")


def _learnt(distill: Distill) -> list[tuple[str, DataSource]]:
    """Returns the sources that the student is trained on, each with its dotted path."""
    phases = enumerate(distill.phases)
    of_phases = [(f"distill.phases.{n}.data", phase.data) for n, phase in phases if phase.data is not None]
    return [("distill.data", distill.data), *of_phases]


def _shared(one: Source, other: Source) -> set[str]:
    """Returns the file patterns and splits that both sources read."""
    return {*_origins(one)} & {*_origins(other)}


def _origins(part: Source) -> Iterator[str]:
    """Yields each file pattern or split that a source reads, spelled so that equal ones compare equal."""
    if part.dataset is not None:
        subset = f" ({part.subset})" if part.subset else ""
        yield f"the split `{part.split}` of `{part.dataset}`{subset}"
    for pattern in (part.text or ()) + (part.jsonl or ()) + (part.parquet or ()) + (part.megatron or ()):
        yield f"`{pattern}`"
