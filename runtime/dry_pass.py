"""The dry pass before the first step: the largest micro batch, forward and backward, with the memory of the moments reserved.

Memory runs out there and not after an hour, when the moments are made or a longer phase begins. Where it does, changes are
tried in turn, and the error names the first that fits. Weights, moments and random numbers stay what they were.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minitron.runtime.course import Stretch
from minitron.runtime.data import Batch
from minitron.runtime.optimizer import moments_like
from minitron.runtime.out_of_memory import in_a_sentence
from minitron.runtime.recomputation import recompute
from minitron.runtime.setup import Run
from minitron.runtime.step import micro_batch_loss
from minitron.specs.training_plan import divisor_within


def check_memory(run: Run) -> None:
    """Finds out whether each phase's micro batch fits the device, before the first step. Only a GPU runs out in a way that
    can be tried. WorkError, with the change that would do, where one does not fit.
    """
    if run.world.device.type == "cuda":
        dry_pass(run)


def dry_pass(run: Run) -> None:
    """Tries the micro batch of each phase. WorkError where one does not fit: with one process, with a change that was
    tried; with several, whose work depends on each other, with those that take less.
    """
    seen: set[tuple[int, int]] = set()
    for stretch in run.course.stretches:
        size = stretch.phase.micro_batch_size, stretch.phase.sequence_length
        if size in seen:
            continue
        seen.add(size)
        if not _fits(run, stretch, size[0]):
            tried = None if run.world.size > 1 else next(_that_fit(run, stretch), None)
            raise in_a_sentence(run.plan, stretch, tried)
    if run.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.world.device)


def _that_fit(run: Run, stretch: Stretch) -> Iterator[str]:
    """Yields the changes that fit: smaller micro batches, then recomputation, then both."""
    at = "" if len(run.course.stretches) == 1 else f"phases.{stretch.number}."
    sizes = list(_smaller(stretch))
    for size in sizes:
        if _fits(run, stretch, size):
            yield f"`{at}micro_batch_size: {size}`"
    if run.plan.gradient_checkpointing is True:
        return
    recompute(run.student, True)
    for size in [stretch.phase.micro_batch_size, *sizes]:
        if _fits(run, stretch, size):
            also = "" if size == stretch.phase.micro_batch_size else f" and `{at}micro_batch_size: {size}`"
            yield f"`gradient_checkpointing: true`{also}"


def _smaller(stretch: Stretch) -> Iterator[int]:
    size, whole = stretch.phase.micro_batch_size, stretch.phase.global_batch_size
    while size > 1:
        size = divisor_within(whole, size // 2)
        yield size


def _fits(run: Run, stretch: Stretch, size: int) -> bool:
    fits = True
    try:
        _compute(run, stretch, size)
    except torch.OutOfMemoryError:
        fits = False
    # Outside of the handler: the traceback holds the tensors of the forward.
    run.optimizer.zero_grad(set_to_none=True)
    for parameter in run.student.module.parameters():
        parameter.grad = None
    gc.collect()
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _compute(run: Run, stretch: Stretch, size: int) -> None:
    """Computes the gradient of one micro batch of the phase, and of a second where a step has several: gradients are kept
    then while activations are made.
    """
    device, reserved = run.world.device, _reserve(run)
    samples = range(stretch.taken, stretch.taken + size)
    batch = _batch(run, stretch, samples).to(device)
    targets = None if run.stored is None else run.stored.read(samples).to(device)
    hidden = None if run.hidden is None else run.hidden.at(0.0)
    several = stretch.phase.global_batch_size // run.world.size > size
    for _ in range(1 + several):
        total, _terms = micro_batch_loss(run, batch, targets, math.prod(batch.valid_BL.shape), hidden)
        total.backward()  # type: ignore[no-untyped-call]
    del reserved


def _batch(run: Run, stretch: Stretch, samples: range) -> Batch:
    """Returns samples of the phase, or, where they are not tokenized yet, tokens at random: memory does not depend on them,
    but for routers, which send tokens at random to all experts.
    """
    corpus = run.corpora[stretch.corpus]
    if corpus.ready(samples) or run.stored is not None:
        return corpus.batch(samples)
    size, generator = (len(samples), stretch.phase.sequence_length), torch.Generator().manual_seed(0)
    ids_BL = torch.randint(run.student.head.vocabulary, size, generator=generator)
    return Batch.of(ids_BL, ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))


def _reserve(run: Run) -> list[Tensor]:
    """Takes the memory that the optimizer's moments will have after the first step."""
    wanting = [
        parameter
        for group in run.optimizer.param_groups
        for parameter in group["params"]
        if not run.optimizer.state.get(parameter)
    ]
    return [tensor for parameter in wanting for tensor in moments_like(run.optimizer, parameter)]
