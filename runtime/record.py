"""Samples the teacher's distribution once and stores the samples, for training without the teacher: `minitron capture
BUILD`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron.runtime.correction import corrected
from minitron.runtime.data import Batch, Corpus, data_hash
from minitron.runtime.disk import writing
from minitron.runtime.float8 import require_float8
from minitron.runtime.folders import claim_folders, require_own_folders
from minitron.runtime.identity import resume_identity
from minitron.runtime.interrupt import interrupts
from minitron.runtime.loss.divergence import log_softmax_
from minitron.runtime.loss.products import project
from minitron.runtime.loss.sampled import count, draw
from minitron.runtime.models import LanguageModel, check_teacher, model_folder
from minitron.runtime.order import mix
from minitron.runtime.plan import LoadedPlan, read_training_plan
from minitron.runtime.sampled_teacher import samples_identity, samples_needed
from minitron.runtime.setup import Session, load_teacher
from minitron.runtime.teacher_logits import (
    Index,
    Shard,
    begin,
    has_shard,
    shard_path,
    write_index,
    write_shard,
)
from minitron.runtime.world import join_world, locked
from minitron.specs.atomic import remove_leftovers
from minitron.specs.blocks.distill import SampledLogits
from minitron.specs.builds import DATA_CACHE, LOGITS
from minitron.specs.cache import TEACHER_LOGITS, entry_path, share_file, tokens_folder
from minitron.specs.errors import UsageError, placing
from minitron.specs.progress import Progress
from minitron.specs.training_plan import TrainingPlan

_CHUNK_ELEMENTS = 1 << 23
"""The number of logits at a time: 32 MiB of them and, for the sums, 64 MiB in fp64."""

_DRAWS = 0x647261777300
"""The salt that keeps the draws independent of everything else that follows from the seed."""


def record(build: Path, *, device: str | None, progress: Progress, outside: bool = False) -> dict[str, Any]:
    """Stores the samples that training.yaml asks for in BUILD/teacher_logits and returns {samples, tokens, bytes,
    folder}. Resumes a capture that was killed, extends one that was for fewer tokens, and does nothing where all
    samples exist.

    With several ranks each makes its share of the shards; the teacher is whole on each or sharded, as `layout` says.
    UsageError and WorkError as for training.
    """
    loaded = read_training_plan(build)
    plan = loaded.training()
    if not isinstance(plan.teacher_logits, SampledLogits):
        raise UsageError(
            f"{loaded.path} trains with the teacher beside the student, and there is nothing to store; write "
            "`teacher_logits: {sampled: 12}` in the spec and compile again"
        )
    folder, work = loaded.folder / LOGITS, loaded.folder / plan.work
    with placing(loaded), interrupts() as interrupt, join_world(device) as world:
        require_own_folders(loaded, outside=outside)
        require_float8(plan, world.device, student=plan.teacher_correction is not None)
        with locked(world, "capturing", loaded.folder, work):
            world.from_leader(lambda: _tidy_up(loaded, work))
            session = Session.open(loaded, tokens_folder(loaded.folder, work), world, interrupt, progress)
            with session.closing:
                return _record(loaded, plan, folder, session)


def _tidy_up(loaded: LoadedPlan, work: Path) -> None:
    with writing(str(work)):
        claim_folders(loaded)
    remove_leftovers(work / DATA_CACHE)  # that of this build alone, which is locked


def _record(loaded: LoadedPlan, plan: TrainingPlan, folder: Path, session: Session) -> dict[str, Any]:
    world, progress = session.world, session.progress
    training = resume_identity(plan, data_hash(session.data, session.encoder, plan.tokens))
    loaded = corrected(loaded, session)
    identity = samples_identity(training, model_folder(loaded, "teacher", loaded.training().teacher))
    samples = samples_needed(plan)
    index = world.from_leader(lambda: begin(folder, identity, samples, plan.sequence_length, progress))
    shared = entry_path(loaded.folder, TEACHER_LOGITS, f"{index.key[:24]}-{index.shard_samples}")
    world.from_leader(lambda: _share(shared, folder, index, samples))
    if index.samples < samples or not _complete(folder, index, samples):
        _draw_missing(loaded, index, samples, session)
        world.wait()
        index = replace(index, samples=max(samples, index.samples), bytes=_bytes(folder))
        world.from_leader(partial(write_index, folder, index))
    world.from_leader(lambda: _share(folder, shared, index, samples, replace=True))
    done = {"samples": index.samples, "tokens": index.samples * plan.sequence_length, "bytes": _bytes(folder)}
    progress.message(f"teacher logits of {done['samples']} sequences: {folder}")
    return done | {"folder": str(folder)}


def _complete(folder: Path, index: Index, samples: int) -> bool:
    return all(shard_path(folder, number).is_file() for number in range(len(index.shards(samples))))


def _share(source: Path | None, target: Path | None, index: Index, samples: int, *, replace: bool = False) -> None:
    """Links intact shards from the cache into the build where it lacks them, or, with `replace`, from the build into the
    cache, whose own may be damaged."""
    if source is None or target is None or not source.is_dir():
        return
    target.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(index.shards(samples)):
        old, new = shard_path(source, number), shard_path(target, number)
        if old.is_file() and (replace or not new.is_file()) and has_shard(source, number, index.key, len(shard)):
            share_file(old, new)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))


def _draw_missing(loaded: LoadedPlan, index: Index, samples: int, session: Session) -> None:
    """Writes the missing shards of the first `samples` global samples, this rank's share of them."""
    plan, folder = loaded.training(), loaded.folder / LOGITS
    world, progress = session.world, session.progress
    (corpus,) = session.open_corpora(plan)
    teacher = load_teacher(loaded, world)
    check_teacher(loaded, teacher, session.encoder.tokenizer, [corpus.largest])
    mine = index.shards(samples)[world.rank :: world.size]
    missing = [one for one in mine if not has_shard(folder, index.number(one), index.key, len(one))]
    done = sum(map(len, mine)) - sum(map(len, missing))
    length, micro = plan.sequence_length, plan.micro_batch_size
    forwards = sum(-(-len(one) // micro) for one in missing)
    most = world.most(forwards)
    with progress.task("capture", sum(map(len, mine)) * length, "tokens", done=done * length) as task:
        for one in missing:
            drawn = []
            for start in range(one.start, one.stop, micro):
                part = range(start, min(start + micro, one.stop))
                drawn.append(sample_teacher(teacher, corpus, part, plan, world.device))
                task.advance(len(part) * length)
            write_shard(folder, index.number(one), _joined(drawn), index.key)
    if teacher.root is not None:  # ranks that have less to do help the others to gather its layers
        for _ in range(most - forwards):
            _hidden_states(teacher, corpus.batch([0]).to(world.device))


@torch.no_grad()
def _hidden_states(teacher: LanguageModel, batch: Batch) -> Tensor:
    """Returns the hidden states [T, width] at the positions that predict a token."""
    return teacher.gathered(lambda: batch.pick(teacher.hidden_states(batch.input_ids_BL)))


@torch.no_grad()
def sample_teacher(
    teacher: LanguageModel, corpus: Corpus, samples: range, plan: TrainingPlan, device: torch.device
) -> Shard:
    """Draws samples for every predicted token of some global samples. The random numbers follow from the seed and the
    sample.
    """
    assert isinstance(plan.teacher_logits, SampledLogits)
    draws, temperature = plan.teacher_logits.sampled, plan.loss.logits.temperature
    batch = corpus.batch(samples)
    tokens = batch.valid_BL.sum(-1)
    uniform_T = torch.cat(
        [
            torch.rand(
                int(valid), dtype=torch.float64, generator=torch.Generator().manual_seed(mix(plan.seed, sample, _DRAWS))
            )
            for sample, valid in zip(samples, tokens, strict=True)
        ]
    ).to(device)
    batch = batch.to(device)
    hidden_TE = _hidden_states(teacher, batch)
    vocabulary, head = teacher.head.vocabulary, teacher.head  # stays gathered: see `shard_teacher`
    chunk = max(1, min(hidden_TE.shape[0], _CHUNK_ELEMENTS // vocabulary))
    logits_CV, q_CV = (torch.empty(chunk, vocabulary, device=device) for _ in range(2))
    entropy_T = torch.empty(hidden_TE.shape[0], device=device, dtype=torch.float64)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, hidden_TE.shape[0], chunk):
        part = slice(start, min(start + chunk, hidden_TE.shape[0]))
        z_CV, p_CV = logits_CV[: part.stop - start], q_CV[: part.stop - start]
        project(hidden_TE[part], head.weight_VD, z_CV)
        head.finish_(z_CV)
        z_CV.div_(temperature)
        log_softmax_(z_CV, p_CV)
        entropy_T[part] = -z_CV.mul_(p_CV).sum(-1, dtype=torch.float64)
        found.append(count(draw(p_CV, uniform_T[part], draws)))
    sums = [part.sum() for part in torch.split(entropy_T, tokens.tolist())]
    small = np.uint8 if draws < 1 << 8 else np.uint16
    wide = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    ids, counts, unique = (torch.cat([one[place] for one in found]).cpu().numpy() for place in range(3))
    return Shard(
        tokens=tokens.numpy().astype(np.int32),
        entropy=torch.stack(sums).cpu().numpy(),
        unique=unique.astype(small),
        ids=ids.astype(wide),
        counts=counts.astype(small),
    )


def _joined(parts: list[Shard]) -> Shard:
    arrays = [part.arrays() for part in parts]
    return Shard(**{name: np.concatenate([one[name] for one in arrays]) for name in arrays[0]})
