"""What must hold between the values of a spec.

A rule is a function of the spec; it names the parts that it reads, and is passed over when something in them was
already found wrong, so that no error is reported that only follows from another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from minitron.specs.blocks.student import DEPTH
from minitron.specs.blocks.training import Optimizer
from minitron.specs.data import DataSource
from minitron.specs.spec import Spec
from minitron.specs.units import COUNT_UNITS, format_quantity


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong at a dotted path; `hint` says what to write instead."""

    path: str
    message: str
    hint: str


Check: TypeAlias = Callable[[Spec], Iterator[Problem]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A check and the dotted paths that it reads."""

    reads: tuple[str, ...]
    check: Check


RULES: list[Rule] = []


def rule(*reads: str) -> Callable[[Check], Check]:
    """Registers a check of what stands at `reads`."""

    def register(check: Check) -> Check:
        RULES.append(Rule(reads, check))
        return check

    return register


@rule("teacher")
def one_teacher(spec: Spec) -> Iterator[Problem]:
    """The teacher is a model or another spec's result."""
    teacher = spec.teacher
    if teacher.model is None and teacher.spec is None:
        yield Problem("teacher", "names no teacher", "add `model:` (a Hugging Face id or a folder) or `spec:`")
    if teacher.model is not None and teacher.spec is not None:
        yield Problem("teacher.spec", "`model` and `spec` both name the teacher", "keep one of them")
    if teacher.spec is not None and teacher.revision is not None:
        yield Problem("teacher.revision", "`revision` goes with `model`, not with `spec`", "leave it out")


@rule("student")
def some_target(spec: Spec) -> Iterator[Problem]:
    """Something becomes smaller."""
    if not list(spec.student.targets()) and spec.student.layers is None:
        example = 'such as `hidden_size: 4096`, `intermediate_size: "80%"` or `layers: {drop: [16, 17]}`'
        message = "says no target: the student would be the teacher"
        yield Problem("student", message, f"write at least one width, {example}")


@rule("student.layers")
def drop_or_keep(spec: Spec) -> Iterator[Problem]:
    """Layers are named one way, and once each."""
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


@rule("student.layers", f"student.{DEPTH}")
def depth_said_once(spec: Spec) -> Iterator[Problem]:
    """Named layers already say how many there are."""
    if spec.student.layers is not None and spec.student.num_hidden_layers is not None:
        message = "`layers` already says how many layers stay, and may say another number"
        yield Problem(
            f"student.{DEPTH}", message, "keep `layers` to name them, or `num_hidden_layers` to have them chosen"
        )


@rule("student.num_attention_heads", "student.num_key_value_heads")
def groups_divide_heads(spec: Spec) -> Iterator[Problem]:
    """Every key-value group serves the same number of query heads."""
    heads, groups = spec.student.num_attention_heads, spec.student.num_key_value_heads
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        fitting = max(number for number in range(1, groups + 1) if heads % number == 0) if heads < 10**4 else 1
        yield Problem(
            "student.num_key_value_heads",
            f"{groups} key-value groups cannot share {heads} query heads equally",
            f"write a divisor of {heads}, such as {fitting}",
        )


@rule("search")
def lists_need_a_search(spec: Spec) -> Iterator[Problem]:
    """Several widths are candidates, and a search decides between them."""
    for key, width in spec.student.targets():
        if isinstance(width, tuple) and spec.search is None:
            yield Problem(f"student.{key}", "a list of widths needs `search`", "write one width, or add `search:`")


@rule("search")
def some_budget(spec: Spec) -> Iterator[Problem]:
    """A search without a limit would always pick the largest candidate."""
    limits = ("parameters", "memory", "flops_per_token", "kv_cache")
    if spec.search is not None and all(getattr(spec.search.budget, limit) is None for limit in limits):
        yield Problem("search.budget", "says no limit", "add one of " + ", ".join(f"`{limit}`" for limit in limits))


@rule("search", "teacher_correction", "distill")
def training_has_data(spec: Spec) -> Iterator[Problem]:
    """What trains before distillation trains on its data."""
    for key in ("search", "teacher_correction"):
        if getattr(spec, key) is not None and spec.distill is None:
            yield Problem(key, f"`{key}` trains on the data of `distill`, and there is none", "add `distill:`")


@rule("importance.data")
def scores_need_data(spec: Spec) -> Iterator[Problem]:
    """Scores come from activations, and these from data."""
    named = spec.student.layers is not None
    scored = [key for key, _ in spec.student.targets() if not (key == DEPTH and named)]
    if scored and spec.importance.data is None:
        what = "layers" if scored == [DEPTH] else f"part of `student.{scored[0]}`"
        example = "add `importance: {data: {text: [corpus/*.txt]}}`"
        yield Problem(
            "importance.data", f"is missing: which {what} to keep is decided by scores, and these need data", example
        )


@rule("distill.optimizer.lr", "distill.optimizer.min_lr")
def distill_rate_falls(spec: Spec) -> Iterator[Problem]:
    """The learning rate ends no higher than it starts."""
    if spec.distill is not None:
        yield from _rate_falls("distill.optimizer", spec.distill.optimizer)


@rule("teacher_correction.optimizer.lr", "teacher_correction.optimizer.min_lr")
def correction_rate_falls(spec: Spec) -> Iterator[Problem]:
    """The learning rate ends no higher than it starts."""
    if spec.teacher_correction is not None:
        yield from _rate_falls("teacher_correction.optimizer", spec.teacher_correction.optimizer)


def _rate_falls(path: str, optimizer: Optimizer) -> Iterator[Problem]:
    if optimizer.min_lr > optimizer.lr:
        message = f"{optimizer.min_lr:g} is higher than `lr`, {optimizer.lr:g}"
        yield Problem(f"{path}.min_lr", message, f"write at most {optimizer.lr:g}")


@rule("distill.tokens", "distill.sequence_length", "distill.global_batch_size", "teacher_correction", "search.rank")
def enough_tokens(spec: Spec) -> Iterator[Problem]:
    """Every training has at least one step."""
    if spec.distill is None:
        return
    batch = spec.distill.global_batch_size * spec.distill.sequence_length
    trainings = {
        "distill.tokens": spec.distill.tokens,
        "teacher_correction.tokens": spec.teacher_correction.tokens if spec.teacher_correction else batch,
        "search.rank.tokens": spec.search.rank.tokens if spec.search else batch,
    }
    for path, tokens in trainings.items():
        if tokens < batch:
            size = f"{spec.distill.global_batch_size} x {spec.distill.sequence_length} = {batch}"
            message = f"{format_quantity(tokens, COUNT_UNITS)} tokens are less than one global batch, {size} tokens"
            yield Problem(path, message, f"write at least {batch}, or a smaller `distill.global_batch_size`")


@rule("distill.global_batch_size", "distill.micro_batch_size")
def micro_batches_fill_the_batch(spec: Spec) -> Iterator[Problem]:
    """An optimizer step is a whole number of micro batches."""
    if spec.distill is None or spec.distill.micro_batch_size is None:
        return
    micro, whole = spec.distill.micro_batch_size, spec.distill.global_batch_size
    if whole % micro:
        message = f"{micro} does not divide `global_batch_size`, {whole}"
        yield Problem("distill.micro_batch_size", message, f"write a divisor of {whole}, or leave it out")


@rule("distill.loss")
def some_loss(spec: Spec) -> Iterator[Problem]:
    """Something is minimised."""
    if spec.distill is None:
        return
    loss = spec.distill.loss
    hidden = loss.hidden_states is not None and loss.hidden_states.weight != 0
    if not (loss.logits.weight or loss.cross_entropy or hidden):
        yield Problem("distill.loss", "every weight is 0: nothing would be learnt", "write `logits: {weight: 1.0}`")


@rule("distill.loss")
def dynamic_weight_has_a_scale(spec: Spec) -> Iterator[Problem]:
    """A dynamic weight is scaled to the logit loss, so there must be one."""
    if spec.distill is None or spec.distill.loss.hidden_states is None:
        return
    if spec.distill.loss.hidden_states.weight == "dynamic" and not spec.distill.loss.logits.weight:
        message = "`dynamic` is scaled to the logit loss, whose weight is 0"
        yield Problem("distill.loss.hidden_states.weight", message, "write a number, or give `logits` a weight")


@rule("distill.teacher_logits", "distill.loss")
def samples_are_no_teacher(spec: Spec) -> Iterator[Problem]:
    """Samples of the teacher's distribution give the forward KL, and nothing that needs all of it or the teacher itself."""
    if spec.distill is None or spec.distill.teacher_logits == "online":
        return
    loss = spec.distill.loss
    if loss.logits.divergence != "forward_kl":
        message = f"`{loss.logits.divergence}` needs the teacher's whole distribution, and `teacher_logits` are samples"
        yield Problem("distill.loss.logits.divergence", message, "write forward_kl, or `teacher_logits: online`")
    if loss.hidden_states is not None:
        message = "hidden states need the teacher itself, and `teacher_logits` are samples"
        yield Problem("distill.loss.hidden_states", message, "write null, or `teacher_logits: online`")


@rule("distill.loss.hidden_states")
def pairs_differ(spec: Spec) -> Iterator[Problem]:
    """A pair of layers counts once."""
    hidden = spec.distill.loss.hidden_states if spec.distill is not None else None
    if hidden is None or isinstance(hidden.pairs, str):
        return
    for index, pair in enumerate(hidden.pairs):
        if pair in hidden.pairs[:index]:
            path = f"distill.loss.hidden_states.pairs.{index}"
            yield Problem(path, f"[{pair[0]}, {pair[1]}] stands in the list twice", "keep one of them")


@rule("distill.data", "evaluate.held_out")
def held_out_is_held_out(spec: Spec) -> Iterator[Problem]:
    """What is trained on measures nothing."""
    if spec.distill is None or spec.evaluate is None or spec.evaluate.held_out is None:
        return
    shared = set(_origins(spec.distill.data)) & set(_origins(spec.evaluate.held_out))
    if shared:
        message = f"{sorted(shared)[0]} is trained on as well, under `distill.data`"
        yield Problem("evaluate.held_out", message, "name documents that nothing is trained on")


def _origins(source: DataSource) -> Iterator[str]:
    """Each file pattern or split that a source reads, spelled so that equal ones are equal."""
    for part in source.blend or [source]:
        if part.dataset is not None:
            subset = f" ({part.subset})" if part.subset else ""
            yield f"the split `{part.split}` of `{part.dataset}`{subset}"
        for pattern in (part.text or ()) + (part.jsonl or ()) + (part.parquet or ()):
            yield f"`{pattern}`"
