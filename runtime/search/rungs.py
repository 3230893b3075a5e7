"""Successive halving: `minitron search BUILD` carries out the rungs that BUILD/search/search.json asks for.

Every candidate is trained alone, on the same samples in the same order, whichever others learn beside it and on whichever
process: so the ranking does not depend on how many processes there are, nor on how often the search was killed.

At the end of a rung a branch leaves the trunk a tenth before its end and lowers the learning rate to zero; the branch is judged
and forgotten, and the trunk goes on (arXiv 2405.18392). Without it, high rates would look worse than they end.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minitron.runtime.correction import corrected
from minitron.runtime.data import Windows
from minitron.runtime.disk import writing
from minitron.runtime.float8 import require_float8
from minitron.runtime.folders import claim_folders
from minitron.runtime.hidden_states import record_teacher
from minitron.runtime.identity import resume_identity
from minitron.runtime.interrupt import interrupts
from minitron.runtime.plan import LoadedPlan, read_training_plan
from minitron.runtime.search.learner import (
    CandidateStore,
    Learner,
    branch_progress,
    branch_rate,
    saved_step,
    trunk_rate,
)
from minitron.runtime.search.shared_teacher import Figures, SharedTeacher
from minitron.runtime.setup import Session, compute_dtype_of, held_out_windows, load_teacher, loss_of
from minitron.runtime.world import World, join_world, locked
from minitron.specs.atomic import remove_leftovers
from minitron.specs.blocks.distill import Loss
from minitron.specs.builds import CHECKPOINTS, COORDINATES, RANKING, SEARCH, STUDENT, WORK
from minitron.specs.cache import tokens_folder
from minitron.specs.errors import UsageError, WorkError, placing
from minitron.specs.halving import LEARNERS_SHARE, branch_steps
from minitron.specs.progress import Progress, Task
from minitron.specs.search_files import (
    CandidatePlan,
    Judged,
    Ranked,
    Ranking,
    RungPlan,
    SearchFile,
    best_first,
    read_ranking,
    read_search,
    write_model_file,
)
from minitron.specs.training_plan import TrainingPlan, divisor_within

BYTES_A_PARAMETER = 16  # weight, gradient and two moments in fp32
ZERO_SHOT = "zero-shot.json"


def search(build: Path, *, device: str | None, progress: Progress) -> Ranking:
    """Carries out the rungs of a search that was written into BUILD and returns the ranking with its winner. What an
    interrupted search has done is not done again.

    UsageError where there is no search; WorkError for broken files, a full disk, or where every candidate diverged;
    KeyboardInterrupt, after checkpoints are written, for a signal that asks the search to end.
    """
    file = read_search(build)
    if file is None:
        raise UsageError(
            f"{build} has no search; `minitron compile SPEC -o {build}` writes one from a spec with `search`"
        )
    done = read_ranking(build, file.identity)
    if done is not None and done.winner is not None and done.inputs == file.inputs:
        progress.message(f"search: its rungs are done, candidate {done.winner} is the best")
        return done
    loaded = read_training_plan(build / SEARCH)
    plan = loaded.training()
    with (
        placing(loaded),
        interrupts() as interrupt,
        join_world(device) as world,
        locked(world, "searching", build, build / SEARCH),
    ):
        require_float8(plan, world.device)
        world.from_leader(lambda: claim_folders(loaded))
        session = Session.open(loaded, tokens_folder(build, build / WORK), world, interrupt, progress)
        with session.closing:
            return Rungs.prepare(corrected(loaded, session), file, session, build).run()


@dataclass(frozen=True)
class Rungs:
    """The rungs on this process. `alone` is the world of one in which each candidate is trained."""

    file: SearchFile
    loaded: LoadedPlan
    session: Session
    alone: World
    shared_teacher: SharedTeacher
    store: CandidateStore
    windows: Windows
    build: Path

    @classmethod
    def prepare(cls, loaded: LoadedPlan, file: SearchFile, session: Session, build: Path) -> Rungs:
        plan, world = loaded.training(), session.world
        alone = replace(world, rank=0, size=1, waiting=None)
        assert plan.held_out is not None, "a rule of the language: a search has held-out text"
        held_out = plan.held_out.model_copy(update={"max_tokens": file.judged_tokens})
        judged = replace(loaded, plan=plan.model_copy(update={"held_out": held_out}))
        windows = held_out_windows(
            judged, plan.sequence_length, world, session.encoder, session.cache, session.progress
        )
        assert windows is not None
        (corpus,) = session.open_corpora(plan)
        digest = world.from_leader(lambda: session.data_hash(plan))
        shared = math.gcd(*(one.global_batch_size for one in file.candidates))
        part = divisor_within(shared, plan.micro_batch_size)
        teacher = load_teacher(loaded, alone)
        compared = [of for one in file.candidates if (of := _loss(one, plan).compared) is not None]
        recorder = record_teacher(teacher, compared) if compared else None
        shared_teacher = SharedTeacher(teacher, corpus, loss_of(plan), alone, part, recorder)

        def identity(own: TrainingPlan) -> dict[str, Any]:
            return dict(json.loads(json.dumps(resume_identity(own, digest))))

        store = CandidateStore(loaded, alone, identity, teacher, recorder)
        return cls(file, loaded, session, alone, shared_teacher, store, windows, build)

    # -- the rungs --------------------------------------------------------------------------------------------------------

    def run(self) -> Ranking:
        """Cuts the field down rung by rung."""
        world, field = self.session.world, [one.number for one in self.file.candidates]
        before = read_ranking(self.build, self.file.identity)
        decided = 0 if before is None else max(len(one.rungs) for one in before.candidates)
        world.wait()  # until all have read it
        for rung in self.file.rungs:
            mine = [number for number in field[world.rank :: world.size] if not self.is_done(number, rung)]
            mine = [] if rung.number <= decided else mine  # those that are out may be half removed
            self._tidy_up(mine)
            for numbers in self._groups(mine):
                with self.session.interrupt.deferring():
                    self.train(numbers, rung)
            world.wait()
            judged = {number: self._judged(number, rung) for number in field}
            order = best_first(judged)
            if judged[order[0]].kl is None:
                raise WorkError(
                    f"every candidate diverged in rung {rung.number}: losses are not finite; write lower learning rates"
                )
            field = sorted(order[: rung.leave])
            world.from_leader(lambda rung=rung, field=field: self._cut(rung, field))  # type: ignore[misc]
        (winner,) = field
        ranking = self.ranking(len(self.file.rungs), winner)
        world.from_leader(lambda: self._write(ranking))
        self.session.progress.message(f"search: candidate {winner} is the best")
        return ranking

    def _cut(self, rung: RungPlan, field: Sequence[int]) -> None:
        """Writes the ranking so far and removes the students and checkpoints of those that are out."""
        ranking = self.ranking(rung.number, None)
        self._write(ranking)
        figures = [one.rungs[rung.number - 1] for one in ranking.candidates if len(one.rungs) >= rung.number]
        best = min(one.kl for one in figures if one.kl is not None)
        self.session.progress.message(
            f"search: rung {rung.number} of {len(self.file.rungs)}, {len(figures)} candidates at {rung.tokens} tokens, "
            f"divergence from {best:.4f}; {len(field)} stay{'s' if len(field) == 1 else ''}"
        )
        for one in self.file.candidates:
            if one.number not in field:
                for name in (STUDENT, CHECKPOINTS):
                    shutil.rmtree(self._folder(one.number) / name, ignore_errors=True)
                (self._folder(one.number) / COORDINATES).unlink(missing_ok=True)

    def ranking(self, rungs: int, winner: int | None) -> Ranking:
        ranked = []
        for one in self.file.candidates:
            found = []
            for rung in self.file.rungs[:rungs]:
                judged = _read(self._folder(one.number) / _rung_file(rung))
                if judged is None:
                    break
                found.append(judged)
            zero_shot = _read(self._folder(one.number) / ZERO_SHOT)
            assert zero_shot is not None, "every candidate is judged before it is trained"
            ranked.append(Ranked(number=one.number, zero_shot=zero_shot, rungs=tuple(found)))
        return Ranking(identity=self.file.identity, inputs=self.file.inputs, candidates=tuple(ranked), winner=winner)

    def _write(self, ranking: Ranking) -> None:
        with writing(str(self.build / SEARCH)):
            write_model_file(self.build / SEARCH / RANKING, ranking)

    # -- one rung of some candidates --------------------------------------------------------------------------------------

    def train(self, numbers: Sequence[int], rung: RungPlan) -> None:
        """Trains candidates side by side up to the end of a rung and judges them."""
        learners = [self.learner(number) for number in numbers]
        unjudged = [learner for learner in learners if not (self._folder(learner.number) / ZERO_SHOT).exists()]
        for learner, figures in zip(unjudged, self._judge(unjudged), strict=True):
            self._note(learner.number, ZERO_SHOT, Judged(tokens=0, kl=figures.kl, loss=figures.loss))
        begins = {learner.number: self._branch(learner.plan, rung) for learner in learners}
        name = f"search, rung {rung.number} of {len(self.file.rungs)}"
        sequence = self.loaded.training().sequence_length
        total = sequence * sum(
            2 * self._end(learner.plan, rung)
            - learner.samples
            - begins[learner.number] * learner.plan.global_batch_size
            for learner in learners
        )
        with self.session.progress.task(name, total, "tokens") as task:
            self._advance(
                learners, lambda learner: begins[learner.number] * learner.plan.global_batch_size, task, saves=True
            )
            for learner in learners:
                if learner.diverged is None:
                    self.store.save(learner, self._folder(learner.number))
            living = [learner for learner in learners if learner.diverged is None]
            branches = [self.learner(learner.number) for learner in living]
            for branch in branches:
                begin, end = begins[branch.number], self._end(branch.plan, rung) // branch.plan.global_batch_size
                branch.rate = partial(branch_rate, plan=branch.plan, begin=begin, end=end)
                branch.progress = partial(branch_progress, plan=branch.plan, begin=begin, end=end)
            self._advance([*living, *branches], lambda learner: self._end(learner.plan, rung), task, saves=False)
        judged = iter(self._judge([learner for learner in (*branches, *living) if learner.diverged is None]))
        of_branch = {learner.number: next(judged) for learner in branches if learner.diverged is None}
        of_trunk = {learner.number: next(judged) for learner in living if learner.diverged is None}
        for learner in learners:
            tokens = self._end(learner.plan, rung) * sequence
            own, trunk = of_branch.get(learner.number), of_trunk.get(learner.number)
            # A trunk that diverges after its branch has left cannot go on: the candidate is out.
            alive = own is not None and trunk is not None and math.isfinite(own.kl)
            note = Judged(tokens=tokens, kl=None, loss=None)
            if alive and own is not None and trunk is not None:
                note = Judged(tokens=tokens, kl=own.kl, loss=own.loss, trunk_kl=_finite(trunk.kl))
            self._note(learner.number, _rung_file(rung), note)
            if alive:
                self.store.save(learner, self._folder(learner.number))

    def _advance(
        self, learners: Sequence[Learner], until: Callable[[Learner], int], task: Task, *, saves: bool
    ) -> None:
        """Trains learners, with a checkpoint after each interval of the plan where `saves`, and when interrupted."""
        interrupt, plan = self.session.interrupt, self.loaded.training()
        every, sequence = plan.checkpoint.every_tokens, plan.sequence_length
        learnt = 0

        def after_part(students: int) -> None:
            nonlocal learnt
            before, learnt = learnt, learnt + self.shared_teacher.part * sequence
            task.advance(self.shared_teacher.part * sequence * students)
            between = all(learner.diverged is not None or not learner._micro for learner in learners)
            if saves and between and (before // every < learnt // every or interrupt.requested):
                for learner in learners:
                    if learner.diverged is None:
                        self.store.save(learner, self._folder(learner.number))
            if interrupt.requested and (between or not saves):
                self.session.progress.message("interrupted; search again to go on from there")
                raise KeyboardInterrupt

        self.shared_teacher.train(learners, until, after_part)

    def _judge(self, learners: Sequence[Learner]) -> list[Figures]:
        dtype = compute_dtype_of(self.loaded.training(), self.alone)
        return (
            self.shared_teacher.judge([learner.student for learner in learners], self.windows, dtype)
            if learners
            else []
        )

    # -- candidates -------------------------------------------------------------------------------------------------------

    def _candidate(self, number: int) -> CandidatePlan:
        return next(one for one in self.file.candidates if one.number == number)

    def _folder(self, number: int) -> Path:
        return self.build / SEARCH / self._candidate(number).folder

    def _plan(self, number: int) -> TrainingPlan:
        """The training of a candidate as if it stood alone."""
        one, shared = self._candidate(number), self.loaded.training()
        changes = {
            "fingerprint": one.fingerprint,
            "student": shared.student.model_copy(update={"model": f"{one.folder}/{STUDENT}"}),
            "optimizer": one.optimizer,
            "global_batch_size": one.global_batch_size,
            "loss": _loss(one, shared),
            "kept_coordinates": one.kept_coordinates,
        }
        return shared.model_copy(update=changes)

    def learner(self, number: int) -> Learner:
        plan = self._plan(number)
        return self.store.load(number, plan, self._folder(number), lambda step: trunk_rate(step, plan))

    def _end(self, plan: TrainingPlan, rung: RungPlan) -> int:
        """The samples of a candidate at the end of a rung: whole global batches."""
        return rung_steps(plan, rung) * plan.global_batch_size

    def _branch(self, plan: TrainingPlan, rung: RungPlan) -> int:
        """The step at which the branch of a rung leaves the trunk."""
        steps = rung_steps(plan, rung)
        return steps - branch_steps(steps)

    def _groups(self, numbers: Sequence[int]) -> list[list[int]]:
        """Cuts candidates into groups that fit the device's memory, each with a trunk and a branch."""
        if self.alone.device.type != "cuda" or not numbers:
            return [list(numbers)] if numbers else []
        torch.cuda.empty_cache()  # what the rung before has left
        free = LEARNERS_SHARE * torch.cuda.mem_get_info(self.alone.device)[0]
        groups: list[list[int]] = []
        taken = math.inf
        for number in numbers:
            size = 2 * BYTES_A_PARAMETER * self._candidate(number).parameters
            if taken + size > free:
                groups.append([])
                taken = 0
            groups[-1].append(number)
            taken += size
        return groups

    # -- what is on the disk ----------------------------------------------------------------------------------------------

    def is_done(self, number: int, rung: RungPlan) -> bool:
        """Checks whether a candidate was judged after a rung, and stands at its end or is out."""
        judged = _read(self._folder(number) / _rung_file(rung))
        if judged is None:
            return False
        at = saved_step(self._folder(number))
        return judged.kl is None or (at is not None and at >= rung_steps(self._plan(number), rung))

    def _judged(self, number: int, rung: RungPlan) -> Judged:
        found = _read(self._folder(number) / _rung_file(rung))
        if found is None:
            raise WorkError(
                f"{self._folder(number)} has no {_rung_file(rung)}, which another process wrote; put the build on a file "
                "system that all processes share"
            )
        return found

    def _note(self, number: int, name: str, judged: Judged) -> None:
        with writing(str(self._folder(number))):
            write_model_file(self._folder(number) / name, judged)

    def _tidy_up(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            remove_leftovers(self._folder(number))


def _loss(one: CandidatePlan, shared: TrainingPlan) -> Loss:
    """The loss of a candidate, whose layers are those that it keeps."""
    return (
        shared.loss
        if one.hidden_states is None
        else shared.loss.model_copy(update={"hidden_states": one.hidden_states})
    )


def rung_steps(plan: TrainingPlan, rung: RungPlan) -> int:
    """Returns the steps of a candidate from its beginning to the end of a rung."""
    return -(-rung.tokens // (plan.global_batch_size * plan.sequence_length))


def _rung_file(rung: RungPlan) -> str:
    return f"rung-{rung.number}.json"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(path: Path) -> Judged | None:
    try:
        return Judged.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
