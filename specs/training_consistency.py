"""Checks the constraints between the values of a training, in the spec and in training.yaml alike.

Each check takes the block and the dotted path `at` of that block in its file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from minitron.specs.blocks.distill import HiddenStateLoss, Layout, Loss, SampledLogits, ShuffledBlocks
from minitron.specs.blocks.training import Optimizer
from minitron.specs.errors import Problem
from minitron.specs.units import COUNT_UNITS, format_quantity


class Phase(Protocol):
    """The numbers of a phase, in the spec and in training.yaml."""

    @property
    def tokens(self) -> int: ...

    @property
    def sequence_length(self) -> int | None: ...

    @property
    def global_batch_size(self) -> int | None: ...


def rate_falls(optimizer: Optimizer, at: str) -> Iterator[Problem]:
    """Requires that the learning rate ends no higher than it starts."""
    if optimizer.min_lr > optimizer.lr:
        message = f"{optimizer.min_lr:g} is higher than `lr`, {optimizer.lr:g}"
        yield Problem(f"{at}.min_lr", message, f"write at most {optimizer.lr:g}")


def loss_is_whole(loss: Loss, at: str) -> Iterator[Problem]:
    """Requires a loss term; a dynamic weight, which is scaled to the logit loss, requires that loss."""
    hidden = loss.hidden_states
    if not (loss.logits.weight or loss.cross_entropy or (hidden is not None and hidden.weight)):
        yield Problem(at, "every weight is 0: nothing would be learnt", "write `logits: {weight: 1.0}`")
    if hidden is not None and hidden.weight == "dynamic" and not loss.logits.weight:
        message = "`dynamic` is scaled to the logit loss, whose weight is 0"
        yield Problem(f"{at}.hidden_states.weight", message, "write a number, or give `logits` a weight")


def pairs_differ(loss: Loss, at: str) -> Iterator[Problem]:
    """Requires that no pair of layers is listed twice."""
    if loss.hidden_states is None or isinstance(loss.hidden_states.pairs, str):
        return
    for index, pair in enumerate(pairs := loss.hidden_states.pairs):
        if pair in pairs[:index]:
            path = f"{at}.hidden_states.pairs.{index}"
            yield Problem(path, f"[{pair[0]}, {pair[1]}] stands in the list twice", "keep one of them")


def samples_are_enough(loss: Loss, teacher_logits: str | SampledLogits, at: str) -> Iterator[Problem]:
    """Requires, for stored samples of the teacher's distribution, the forward KL and no term that needs the whole
    distribution or the teacher itself."""
    if teacher_logits == "online":
        return
    if loss.logits.divergence != "forward_kl":
        message = f"`{loss.logits.divergence}` needs the teacher's whole distribution, and `teacher_logits` are samples"
        yield Problem(f"{at}.logits.divergence", message, "write forward_kl, or `teacher_logits: online`")
    if loss.hidden_states is not None:
        message = "hidden states need the teacher itself, and `teacher_logits` are samples"
        yield Problem(f"{at}.hidden_states", message, "write null, or `teacher_logits: online`")


def blocks_hold_sequences(shuffle: str | ShuffledBlocks, lengths: Sequence[int], at: str) -> Iterator[Problem]:
    """Requires that a block has room for two sequences: one alone would not be shuffled."""
    if isinstance(shuffle, ShuffledBlocks) and shuffle.block < (least := 2 * max(lengths)):
        message = (
            f"{shuffle.block} tokens hold fewer than two sequences of {max(lengths)}, and nothing would be shuffled"
        )
        yield Problem(f"{at}.block", message, f"write at least {least}, such as 256M, or `shuffle: all`")


def offloading_needs_sharding(layout: Layout, at: str) -> Iterator[Problem]:
    """Requires sharding for weights that rest in host memory, also on one device."""
    if layout.cpu_offload and layout.student != "sharded":
        message = "a student that is replicated stays on its device"
        yield Problem(f"{at}.cpu_offload", message, "write `student: sharded`, also for one device")


def phases_have_a_teacher(phases: Sequence[object], teacher_logits: str | SampledLogits, at: str) -> Iterator[Problem]:
    """Requires the teacher itself for phases, because stored samples are of sequences of one length."""
    if phases and teacher_logits != "online":
        message = "stored samples of the teacher are of sequences of one length, and phases may have several"
        yield Problem(at, message, "write `teacher_logits: online`, or leave `phases` out")


def phases_make_up_the_training(phases: Sequence[Phase], tokens: int, at: str) -> Iterator[Problem]:
    """Requires that the tokens of the phases add up to those of the training, and at least one step of each phase."""
    total = sum(phase.tokens for phase in phases)
    if phases and total != tokens:
        shown = [format_quantity(one, COUNT_UNITS) for one in (total, tokens)]
        message = f"the phases' `tokens` make {shown[0]}, and `tokens` of the training is {shown[1]}"
        yield Problem(at, message, f"write `tokens: {total}` above them, or other phases")
    for index, phase in enumerate(phases):
        batch = (phase.global_batch_size or 0) * (phase.sequence_length or 0)
        if phase.tokens < batch:
            size = f"{phase.global_batch_size} x {phase.sequence_length} = {batch}"
            message = (
                f"{format_quantity(phase.tokens, COUNT_UNITS)} tokens are less than one global batch, {size} tokens"
            )
            yield Problem(f"{at}.{index}.tokens", message, f"write at least {batch}, or a smaller `global_batch_size`")


def offloading_is_of_plain_adamw(layout: Layout, weights: str, optimizer: Optimizer, at: str) -> Iterator[Problem]:
    """Requires AdamW in fp32 for weights and moments that rest in host memory: narrow ones exist to stay on the device, and
    their update in host memory would take minutes a step, as would that of `muon`."""
    given = {"weights": weights, "optimizer.states": optimizer.states, "optimizer.name": optimizer.name}
    plain = {"weights": "float32", "optimizer.states": "float32", "optimizer.name": "adamw"}
    other = [key for key, value in given.items() if value != plain[key]]
    if layout.cpu_offload and other:
        message = (
            f"weights that rest in host memory are updated there, where `{other[0]}: {given[other[0]]}` is too slow"
        )
        wanted = " and ".join(f"`{key}: {plain[key]}`" for key in other)
        yield Problem(f"{at}.cpu_offload", message, f"write `cpu_offload: false`, or {wanted}")


def pairs_exist(hidden: HiddenStateLoss, teacher_layers: int, student_layers: int, at: str) -> Iterator[Problem]:
    """Requires that the layers whose hidden states are compared exist in the two models."""
    if isinstance(hidden.pairs, str):
        return
    for index, pair in enumerate(hidden.pairs):
        for side, (name, count) in enumerate((("teacher", teacher_layers), ("student", student_layers))):
            if pair[side] >= count:
                yield Problem(
                    f"{at}.pairs.{index}.{side}",
                    f"the {name} has {count} layers, and no layer {pair[side]}",
                    f"write at most {count - 1}: layers are counted from 0, in each model's own numbering",
                )
