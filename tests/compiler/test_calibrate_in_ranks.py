"""Several processes calibrate together and select as one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minitron.compiler.importance.ranks import Ranks, join_ranks
from minitron.specs.builds import SCORES
from minitron.specs.errors import UsageError, WorkError
from tests.compiler.rank_processes import compile_in
from tests.compiler.test_calibrate import a_run, scores
from tests.foundry import Folder, Foundry

STUDENT = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize("selection", ["scores", "greedy"])
def test_one_two_and_four_processes_make_the_same_student(foundry: Foundry, tmp_path: Path, selection: str) -> None:
    """Seven samples: the shares differ. Layers are ranked by the loss without each."""
    importance = {
        "data": foundry.calibration | {"samples": 7, "sequence_length": 12},
        "depth": {"metric": "loss"},
        "selection": selection,
    }
    recovery, student = None, STUDENT
    if selection == "greedy":
        recovery, student = {"refit": "least_squares"}, {"intermediate_size": 24, "num_attention_heads": 2}
    spec = foundry.load(foundry.teacher("llama"), student, importance=importance, recovery=recovery)
    found = []
    for size in (1, 2, 4) if selection == "scores" else (1, 2):
        build = tmp_path / str(size)
        assert compile_in(size, spec.path, build) == [0] * size
        found.append((Folder(build).document("plan.json")["selection"], load_file(build / SCORES)))
        assert Folder(build).document("verification.json")["passed"]
        assert not list(build.glob("*partial*"))
    for selected, table in found[1:]:
        assert selected == found[0][0]
        for name, value in found[0][1].items():
            np.testing.assert_allclose(table[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_processes_see_the_same_experts(foundry: Foundry, tmp_path: Path) -> None:
    importance = {"data": foundry.calibration | {"samples": 7, "sequence_length": 12}, "selection": "greedy"}
    teacher = foundry.teacher("mixtral", num_hidden_layers=2)
    spec = foundry.load(teacher, {"num_experts": 2}, importance=importance, recovery={"merge_experts": True})
    tables = []
    for size in (1, 2):
        assert compile_in(size, spec.path, tmp_path / str(size)) == [0] * size
        tables.append(load_file(tmp_path / str(size) / SCORES))
    assert {"num_experts.0", "expert_tokens.1", "expert_outputs.1"} <= tables[0].keys()
    for name, value in tables[0].items():
        np.testing.assert_allclose(tables[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_more_processes_than_batches_are_refused(foundry: Foundry, tmp_path: Path) -> None:
    run = replace(a_run(tmp_path, batch=4), ranks=Ranks(1, 3))
    message = "makes 2 batches, and torchrun started 3 processes; start fewer, or name more data"
    with pytest.raises(WorkError, match=message):
        scores(foundry.whole("llama"), run=run)


def test_a_world_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with (
        pytest.raises(UsageError, match="WORLD_SIZE is `many` in the environment, and a whole number is wanted"),
        join_ranks("cpu"),
    ):
        pass
