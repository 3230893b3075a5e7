"""Faults of weights and activations: found when the bytes are first read or the value is made, with a place and a remedy."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron.compiler import Plan
from minitron.compiler.weights.source import StreamedWeights, open_weights
from minitron.specs.errors import WorkError
from tests.compiler.test_calibrate import a_run, scores
from tests.foundry import Foundry, executor

DOWN = "model.layers.1.mlp.down_proj.weight"


def enlarged(plan: Plan, factor: float) -> object:
    """The teacher's weights, one of them so large that what it yields is beyond float16, or beyond float32."""
    source = open_weights(plan.teacher.captured, plan.checkpoint)
    return lambda name: source.get(name) * (factor if name == DOWN else 1.0)


def test_what_a_dtype_cannot_hold_is_told_with_the_module_and_the_dtype_that_can(
    foundry: Foundry, tmp_path: Path
) -> None:
    plan = foundry.whole("llama", "float16")
    machine = executor(plan, enlarged(plan, 2.0**14), dtype=torch.float16)  # type: ignore[arg-type]
    message = (
        r"model\.layers\.1\.mlp\.down_proj \(linear\) yields infinity in float16 on the calibration data, and in float32 it "
        r"does not; write `teacher\.dtype: float32`"
    )
    with pytest.raises(WorkError, match=message):
        scores(plan, run=a_run(tmp_path), machine=machine)


def test_what_no_dtype_holds_is_damage(foundry: Foundry, tmp_path: Path) -> None:
    plan = foundry.whole("llama")
    machine = executor(plan, enlarged(plan, 3e38))  # type: ignore[arg-type]
    with pytest.raises(
        WorkError, match=r"layers\.1\.\S* \(\w+\) yields \w+ in float32 .* no dtype .* take another checkpoint"
    ):
        scores(plan, run=a_run(tmp_path), machine=machine)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_neox"])
def test_masks_that_hold_infinity_are_none(foundry: Foundry, family: str, tmp_path: Path) -> None:
    scores(foundry.whole(family), run=a_run(tmp_path))


class TestFiles:
    @pytest.fixture
    def weights(self, foundry: Foundry, tmp_path: Path) -> tuple[StreamedWeights, Path]:
        folder = foundry.teacher("llama", num_hidden_layers=2)
        copied = tmp_path / "teacher"
        copied.mkdir()
        for path in folder.iterdir():
            (copied / path.name).write_bytes(path.read_bytes())
        plan = foundry.plan(copied, {"intermediate_size": 24})
        source = open_weights(plan.teacher.captured, plan.checkpoint)
        assert isinstance(source, StreamedWeights)
        return source, copied / "model.safetensors"

    def test_tensors_and_rows_are_those_of_the_file(self, weights: tuple[StreamedWeights, Path]) -> None:
        source, path = weights
        rows = np.array([0, 1, 2, 5, 15])
        for name, value in load_file(path).items():
            assert torch.equal(source.get(name), value)
            if value.dim() == 2:
                assert torch.equal(source.rows(name, rows), value[rows])

    def test_rows_of_long_tensors_are_read_alone(self, foundry: Foundry, weights: tuple[StreamedWeights, Path]) -> None:
        from minitron.compiler.storage import tensors as stored

        source, path = weights
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stored, "LEAST_ROW_BYTES", 1)
            read: list[int] = []
            original = os.preadv
            patch.setattr(
                os,
                "preadv",
                lambda file, buffers, start: read.append(len(buffers[0])) or original(file, buffers, start),
            )
            rows = np.array([3, 4, 9])
            assert torch.equal(source.rows(DOWN, rows), load_file(path)[DOWN][rows])
            assert sum(read) == 3 * 40 * 4 and len(read) == 2

    def test_a_file_that_changes_is_not_read_on(self, weights: tuple[StreamedWeights, Path]) -> None:
        source, path = weights
        source.get(DOWN)
        tensors = load_file(path)
        save_file({name: value + 1 for name, value in tensors.items()}, path, {"format": "pt"})
        with pytest.raises(WorkError, match=r"model\.safetensors changed while it was in use; let it rest"):
            source.get("model.norm.weight")

    def test_a_file_that_is_cut_short_under_the_compile(self, weights: tuple[StreamedWeights, Path]) -> None:
        source, path = weights
        os.truncate(path, path.stat().st_size - 4)
        last = max(source._checkpoint.tensors.values(), key=lambda info: info.start)
        name = next(name for name, info in source._checkpoint.tensors.items() if info is last)
        with pytest.raises(
            WorkError, match=rf"model\.safetensors ends before the last byte of {name}; copy the file again"
        ):
            source.get(name)


def test_a_full_disk_under_the_residual_stream_names_its_folder(foundry: Foundry, tmp_path: Path) -> None:
    """What can be written is limited to a file of 1 KB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match=r"/streams") as raised:
            scores(foundry.whole("llama"), run=a_run(tmp_path, streams="files"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert raised.value.errno == errno.EFBIG
