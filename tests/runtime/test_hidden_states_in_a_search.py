"""A candidate of a search whose hidden states are compared learns, beside others, what a training alone would."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minitron.runtime.data import Data
from minitron.runtime.hidden_states import record_teacher
from minitron.runtime.interrupt import interrupts
from minitron.runtime.loss import DistillationLoss
from minitron.runtime.plan import read_training_plan
from minitron.runtime.search.learner import CandidateStore, branch_progress, branch_rate, trunk_rate
from minitron.runtime.search.shared_teacher import SharedTeacher
from minitron.runtime.setup import Session, load_teacher
from minitron.runtime.tokens import TextEncoder
from minitron.runtime.world import join_world
from minitron.specs.progress import Silent
from minitron.specs.training_plan import TrainingPlan
from tests.runtime import tiny
from tests.runtime.test_training import run, weights

# The rate is that of a trunk, a warm-up throughout; the learning stays visible.
TRUNK: dict[str, Any] = {"optimizer__warmup_steps": 12, "held_out": None}
WAYS = {
    "kept": {"coordinates": "kept", "pairs": [[0, 0], [1, 1]]},
    "projected": {"pairs": "last:last", "schedule": "linear", "weight": 0.5},
}


def ridden(build: Path, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The weights of two students that learn side by side over all of the training's samples."""
    loaded = read_training_plan(build)
    plan = loaded.training()
    assert plan.loss.hidden_states is not None
    with interrupts() as interrupt, join_world("cpu") as world:
        data = Data.read(loaded.data("data", plan.data))
        encoder = TextEncoder.load(loaded.folder / plan.tokenizer)
        session = Session(world, encoder, data, folder / "cache", interrupt, Silent())
        (corpus,) = session.open_corpora(plan)
        teacher = load_teacher(loaded, world)
        recorder = record_teacher(teacher, [plan.loss.hidden_states])
        store = CandidateStore(loaded, world, lambda _: {}, teacher, recorder)
        learners = [store.load(number, plan, folder / str(number), partial(trunk_rate, plan=plan)) for number in (1, 2)]
        loss = DistillationLoss(divergence="forward_kl", temperature=1.0, weight=1.0, cross_entropy=0.0)
        shared_teacher = SharedTeacher(teacher, corpus, loss, world, plan.micro_batch_size, recorder)
        shared_teacher.train(learners, lambda _: plan.steps * plan.global_batch_size, lambda _: None)
        assert [learner.diverged for learner in learners] == [None, None]
        return [dict(learner.student.module.state_dict()) for learner in learners]


@pytest.mark.parametrize("way", WAYS)
def test_it_learns_what_a_training_alone_learns(build: Path, tmp_path: Path, way: str) -> None:
    kept = {"kept_coordinates": "coordinates.safetensors"} if way == "kept" else {}
    save_file({"index": torch.arange(16)}, build / "coordinates.safetensors")
    tiny.write_plan(build, **TRUNK, **kept, loss__hidden_states=WAYS[way])
    alone = weights(build) if run(build) else {}
    for one in ridden(build, tmp_path):
        assert all(torch.equal(one[name], weight) for name, weight in alone.items())


def test_on_a_branch_a_weight_falls_to_nothing() -> None:
    plan = TrainingPlan.model_validate(tiny.plan())
    assert plan.steps == 12
    on_the_way = [1.0 - branch_progress(step, plan, begin=6, end=10) for step in range(6, 11)]
    assert on_the_way == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0])


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_branch_falls_from_the_rate_of_the_trunk_and_learns_at_each_of_its_steps(steps: int) -> None:
    plan = TrainingPlan.model_validate(tiny.plan())
    rates = [branch_rate(step, plan, begin=12 - steps, end=12) for step in range(12 - steps, 12)]
    assert rates[0] == trunk_rate(12 - steps, plan)
    assert all(before > after > 0 for before, after in pairwise(rates))
