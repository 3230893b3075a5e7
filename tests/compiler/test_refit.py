"""`recovery.refit: least_squares`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron.compiler import compile as compile_module
from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.compilation import run_buffers
from minitron.compiler.compile import refit
from minitron.compiler.estimate.activations import Living
from minitron.compiler.estimate.devices import Cluster, Device
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.hardware import HardwareAssumptions
from minitron.compiler.graph.executor import Executor, Settings
from minitron.compiler.importance import progress_file, row_blocks
from minitron.compiler.importance.row_blocks import fitted_rows
from minitron.compiler.importance.select import Selection
from minitron.compiler.importance.tensor_file import write_tensors
from minitron.compiler.recovery.refit import Refit, find_stages
from minitron.compiler.recovery.refit_progress import RefitProgress
from minitron.compiler.recovery.refitted_weights import RefittedWeights
from minitron.compiler.teacher.tokenizer import load_tokenizer
from minitron.compiler.weights.recipes import recipes
from minitron.compiler.weights.source import open_weights
from minitron.specs.progress import Silent
from tests.foundry import Build, Foundry, load_model, logits, stages_of, teacher_model, token_ids
from tests.models import save_teacher, text, tiny_config

REFIT = {"refit": "least_squares"}


def error(build: Build, ids: torch.Tensor) -> float:
    """Mean squared difference of logits from the teacher's."""
    student = load_model(build.folder / "student", build.plan.teacher.captured.attention)
    return float((logits(student, ids) - logits(teacher_model(build.plan), ids)).square().mean())


def of_text(build: Build) -> torch.Tensor:
    """Token ids of text like that of the calibration: what a refit learns of."""
    tokenizer = load_tokenizer(build.teacher)
    return torch.tensor(tokenizer(text(100, seed=5)).input_ids[: 16 * 48]).reshape(16, 48)


@pytest.mark.parametrize(
    ("family", "student", "importance"),
    [
        ("llama", {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2}, {}),
        ("phi3", {"intermediate_size": 24}, {}),  # gate and up in one matrix
        ("llama", {"hidden_size": 24, "num_hidden_layers": 2}, {"hidden_basis": "principal"}),
        ("qwen3", {"hidden_size": 24}, {"hidden_basis": "principal"}),  # a tied head
    ],
)
def test_a_refit_is_nearer_and_all_that_is_checked_still_holds(
    foundry: Foundry, family: str, student: dict[str, Any], importance: dict[str, Any]
) -> None:
    calibration = {"data": foundry.calibration | {"samples": 60}, **importance}
    teacher = foundry.teacher(family)
    cut = foundry.build(teacher, student, program=False, importance=calibration)
    refitted = foundry.build(teacher, student, program=False, importance=calibration, recovery=REFIT)
    ids = of_text(cut)
    assert error(refitted, ids) < 0.95 * error(cut, ids)
    assert all(check["passed"] for check in refitted.checks.values())
    assert refitted.checks["masked"]["exact"] == cut.checks["masked"]["exact"]
    assert ("rotation" in refitted.checks) == ("rotation" in cut.checks)
    assert not list(refitted.folder.glob(".minitron-*")), "no temporary file is left"


def test_neurons_that_others_repeat_are_made_up_for(foundry: Foundry, tmp_path: Path) -> None:
    """Sixteen neurons do what sixteen others do: without them, the down projections of the others take over."""
    teacher = save_teacher(tmp_path / "teacher", tiny_config("llama", num_hidden_layers=2))
    path = teacher / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if "gate_proj" in name or "up_proj" in name:
            weight[24:] = weight[:16]
    save_file(weights, path, metadata={"format": "pt"})
    chosen = Selection((0, 1), widths={"intermediate_size": {i: np.arange(24) for i in (0, 1)}})
    builds = [
        foundry.compile(
            foundry.load(teacher, {"intermediate_size": 24}, recovery=recovery), tmp_path / name,
            stages=stages_of(program=False, selection=chosen),
        )
        for name, recovery in (("cut", {}), ("refitted", REFIT))
    ]  # fmt: skip
    ids = of_text(builds[0])
    assert error(builds[1], ids) < 0.01 * error(builds[0], ids)


def test_where_nothing_is_narrowed_nothing_changes(foundry: Foundry, tmp_path: Path) -> None:
    """All indices are kept, and every projection is refitted."""
    plan = foundry.whole("llama", num_hidden_layers=2)
    teacher, source = plan.teacher, open_weights(plan.teacher.captured, plan.checkpoint)
    leaves = [teacher.roles.hidden.leaf, *(w.leaf for w in teacher.roles.widths["intermediate_size"].values())]
    narrowing = Narrowing(teacher.table.space, {leaf: np.arange(leaf.size.coefficient) for leaf in leaves})
    made = recipes(teacher.captured, teacher.table.parameters, narrowing, [0, 1])
    buffers, settings = run_buffers(plan, plan.teacher.captured.config), Settings("cpu", torch.float32, plan.dtype)
    refitted = RefittedWeights(source, made, tmp_path)
    graph = teacher.captured.graph_module
    executors = [
        Executor(graph, teacher.captured.layer_of, fetch, buffers, settings)
        for fetch in (source.get, refitted.narrowed)
    ]
    stages = find_stages(teacher.table, teacher.roles, narrowing, set(made))
    names = {one.parameter for stage in stages for one in stage.projections}
    assert len(names) == 15  # all projections of two layers, and the head
    with Silent().task("refit", 1, "stages") as task:
        work = Refit(executors[0], executors[1], source.get, refitted, None)
        work.run(stages, [token_ids(4, 32)], task, RefitProgress(tmp_path / "streams"))
    for name in names:
        assert (tmp_path / f"{name}.safetensors").exists()
        torch.testing.assert_close(refitted.narrowed(name), source.get(name), rtol=0, atol=1e-6)


class Stopping(Silent):
    """Interrupts the refit after `left` stages; keeps how many were done before it began."""

    def __init__(self, left: int) -> None:
        self.left, self.before = left, -1.0

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Any]:
        if name == "refit":
            self.before = done
        yield self if name == "refit" else Ignoring()

    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


class Ignoring:
    def advance(self, amount: float = 1.0, **figures: float | str) -> None:
        pass


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a build that do not say where it is."""
    files = [*(folder / "student").iterdir(), folder / "verification.json", folder / "scores.safetensors"]
    return {path.name: path.read_bytes() for path in files}


NARROW = {"hidden_size": 24, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("at", "half", "again"),
    [
        (2, None, [1, 2]),  # in the first layer: two layers are run up to the head
        (6, None, [2]),
        (6, "model.layers.1.self_attn.k_proj.weight", [2]),  # killed between two projections of a stage
        (6, "model.layers.0.mlp.down_proj.weight", [0, 1, 2]),  # a layer that was finished is damaged
    ],
)
def test_a_refit_that_was_interrupted_goes_on_with_the_same_bytes(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, half: str | None, again: list[int]
) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    whole = foundry.build(teacher, NARROW, program=False, recovery=REFIT)
    monkeypatch.setattr(progress_file, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(progress_file, "SAVE_SHARE", 1e9)
    folder = tmp_path / "build"
    with pytest.raises(KeyboardInterrupt):
        foundry.compile(whole.loaded, folder, Stopping(at), program=False)
    values = folder / ".minitron-refit.tmp" / "values"
    assert list(values.iterdir())
    if half is not None:
        (values / f"{half}.safetensors").write_bytes(b"damaged")
    ran: list[int] = []
    run_segment = Executor.run_segment

    def counted(self: Executor, number: int, known: Any) -> Any:
        ran.append(number)
        return run_segment(self, number, known)

    monkeypatch.setattr(Executor, "run_segment", counted)
    calm = Stopping(9)
    foundry.compile(whole.loaded, folder, calm, program=False)
    assert calm.before == at + 1 - (half is not None), "the stage that was interrupted had been stored"
    assert ran == [number for number in again for _ in ("student", "teacher")]
    assert contents(folder) == contents(whole.folder)
    assert not list(folder.glob(".minitron-*")), "no temporary file is left"


def test_a_full_disk_keeps_what_was_fitted(foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = foundry.build(foundry.teacher("llama", num_hidden_layers=2), NARROW, program=False, recovery=REFIT)
    folder, left = tmp_path / "build", [4]

    def full(path: Path, *rest: Any, **more: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_tensors(path, *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("minitron.compiler.recovery.refitted_weights.write_tensors", full)
        foundry.compile(whole.loaded, folder, program=False)
    calm = Stopping(9)
    foundry.compile(whole.loaded, folder, calm, program=False)
    assert calm.before == 2, "queries, keys and values are one stage, the output projection is the next"
    assert contents(folder) == contents(whole.folder)


def test_the_values_of_another_refit_are_not_taken_up(foundry: Foundry, tmp_path: Path) -> None:
    teacher, folder = foundry.teacher("llama", num_hidden_layers=2), tmp_path / "build"
    whole = foundry.build(teacher, NARROW, program=False, recovery=REFIT)
    data = foundry.calibration | {"samples": 5}
    other = foundry.load(teacher, NARROW, recovery=REFIT, importance={"data": data})
    with pytest.raises(KeyboardInterrupt):
        foundry.compile(other, folder, Stopping(6), program=False)
    calm = Stopping(9)
    foundry.compile(whole.loaded, folder, calm, program=False)
    assert calm.before == 0 and contents(folder) == contents(whole.folder)


def test_the_plan_has_a_phase_for_it(foundry: Foundry) -> None:
    teacher = foundry.teacher("llama")
    plan = foundry.plan(teacher, {"intermediate_size": 24}, recovery=REFIT)
    phases = {phase.name: phase for phase in Estimate(plan).phases(HardwareAssumptions())}
    assert list(phases) == ["calibrate", "refit"]
    assert phases["refit"].tokens == 6 * 48 and phases["refit"].flops > phases["calibrate"].flops
    assert phases["refit"].memory.peak > phases["calibrate"].memory.peak
    assert not foundry.plan(teacher, {"num_hidden_layers": 2}, recovery=REFIT).refits  # nothing is narrowed


@pytest.mark.parametrize("dropped", [[1], [0, 1], [3], [1, 2, 3]])
def test_what_a_dropped_layer_yields_is_what_it_was_given(foundry: Foundry, dropped: list[int]) -> None:
    """The stream of the layer behind a dropped one has another name in the student."""
    student = {"hidden_size": 24, "intermediate_size": 24, "layers": {"drop": dropped}}
    build = foundry.build(
        foundry.teacher("llama", num_hidden_layers=4), student, program=False, recovery={"refit": "least_squares"}
    )
    assert all(check["passed"] for check in build.checks.values())


@pytest.mark.parametrize(
    ("shape", "student"),
    [
        ({"intermediate_size": 768}, {"intermediate_size": 512}),  # the products of a layer's neurons decide it
        ({"vocab_size": 4096, "hidden_size": 96, "head_dim": 24}, {"hidden_size": 80}),  # the head's rows
    ],
)
def test_a_refit_holds_what_the_plan_says(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], student: dict[str, Any]
) -> None:
    data = foundry.calibration | {"samples": 4, "sequence_length": 64}
    teacher = foundry.teacher("llama", num_hidden_layers=2, **shape)
    loaded = foundry.load(teacher, student, recovery=REFIT, importance={"data": data})
    peaks: list[int] = []

    def measured(*given: Any) -> Any:
        with Living() as living:
            result = refit(*given)
        peaks.append(living.peak)
        return result

    monkeypatch.setattr(compile_module, "refit", measured)
    monkeypatch.setattr(row_blocks, "FITTED_ELEMENTS", 1 << 14)
    build = foundry.compile(loaded, tmp_path / "build", program=False)
    cpu = HardwareAssumptions(Cluster(Device("this machine", 1 << 40, 1e12, kind="cpu")))
    (phase,) = (one for one in Estimate(build.plan).phases(cpu) if one.name == "refit")
    assert phase.memory.peak == pytest.approx(peaks[0], rel=0.15)


def test_rows_are_fitted_a_block_at_a_time() -> None:
    assert [*fitted_rows(700, 1 << 30)] == [slice(0, 256), slice(256, 512), slice(512, 700)]
    assert [*fitted_rows(700, 64)] == [slice(0, 700)]
