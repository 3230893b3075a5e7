"""The course of a training: its phases one after the other, and the place of every step in them.

A phase draws sequences from one corpus. A phase with data or a length of its own begins a corpus of its own, in an order of
its own; one that changes the batch alone goes on with the sequences that the phase before has left. So the data of a step is
a function of the seed, the phase and the number of the sequence in it, and nothing is stored.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from minitron.runtime.checkpoint import TrainerState
from minitron.runtime.order import mix
from minitron.specs.training_plan import PhasePlan, TrainingPlan


@dataclass(frozen=True)
class Stretch:
    """A phase and where it begins: the steps, sequences and tokens before it, the number of its corpus, and the sequences
    of that corpus which earlier phases have taken.
    """

    phase: PhasePlan
    number: int
    steps_before: int
    samples_before: int
    tokens_before: int
    corpus: int
    taken: int

    def first(self, step: int) -> int:
        """Returns the number, in the phase's corpus, of the first sequence of a step of the training."""
        return self.taken + (step - self.steps_before) * self.phase.global_batch_size


@dataclass(frozen=True)
class Course:
    """The stretches of a training."""

    stretches: tuple[Stretch, ...]

    @classmethod
    def of(cls, plan: TrainingPlan) -> Course:
        found: list[Stretch] = []
        for number, phase in enumerate(plan.course):
            if not found:
                found.append(Stretch(phase, 0, 0, 0, 0, 0, 0))
                continue
            last = found[-1]
            samples = last.phase.steps * last.phase.global_batch_size
            same = (phase.data, phase.sequence_length) == (last.phase.data, last.phase.sequence_length)
            found.append(
                Stretch(
                    phase,
                    number,
                    last.steps_before + last.phase.steps,
                    last.samples_before + samples,
                    last.tokens_before + last.phase.steps * last.phase.step_tokens,
                    last.corpus if same else last.corpus + 1,
                    last.taken + samples if same else 0,
                )
            )
        return cls(tuple(found))

    def at(self, step: int) -> Stretch:
        """Returns the stretch that the step with this number, from 0, belongs to."""
        begins = [stretch.steps_before for stretch in self.stretches]
        return self.stretches[bisect_right(begins, step) - 1]

    def state(self, step: int) -> TrainerState:
        """Returns the progress of a training after its first `step` steps."""
        one = self.at(step)
        inside = step - one.steps_before
        return TrainerState(
            step,
            one.samples_before + inside * one.phase.global_batch_size,
            one.tokens_before + inside * one.phase.step_tokens,
        )

    def corpora(self) -> list[tuple[Stretch, int]]:
        """Returns each corpus in order: the stretch that begins it, and the tokens that all its stretches take."""
        found: list[tuple[Stretch, int]] = []
        for stretch in self.stretches:
            if stretch.taken:
                found[-1] = found[-1][0], found[-1][1] + stretch.phase.tokens
            else:
                found.append((stretch, stretch.phase.tokens))
        return found

    def samples(self, corpus: int) -> int:
        """Returns the number of sequences that are drawn from a corpus."""
        return max(
            one.taken + one.phase.steps * one.phase.global_batch_size for one in self.stretches if one.corpus == corpus
        )


def corpus_seed(seed: int, corpus: int) -> int:
    """Returns the seed of the order of a corpus: that of the plan for the first, others of its own for those after it."""
    return seed if corpus == 0 else mix(seed, corpus, _CORPUS)


_CORPUS = 0x706861736500
"""The salt that keeps the orders of later corpora independent of everything else that follows from the seed."""
