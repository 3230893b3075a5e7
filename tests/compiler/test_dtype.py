"""The dtype of teacher and student: the checkpoint's own unless the spec says otherwise, and a change is stated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.specs.weight_files import TensorInfo
from tests.foundry import Foundry


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_student_has_its_teachers_dtype(foundry: Foundry, dtype: str) -> None:
    teacher = foundry.teacher("llama", dtype, num_hidden_layers=2)
    made = foundry.build(teacher, {"intermediate_size": 24}, dtype=None)
    assert {tensor.dtype for tensor in made.tensors.values()} == {getattr(torch, dtype)}
    assert made.config["dtype"] == dtype and all(check["passed"] for check in made.checks.values())
    assert not [remark for remark in made.plan.remarks if "teacher.dtype" in remark]
    training = (made.folder / "training.yaml").read_text()
    assert training.count(f"dtype: {dtype}\n") >= 2


def test_another_dtype_is_stated(foundry: Foundry) -> None:
    teacher = foundry.teacher("llama", "float16", num_hidden_layers=2)
    plan = foundry.plan(teacher, {"intermediate_size": 24}, dtype="bfloat16")
    words = "the teacher's weights are float16 and are held as bfloat16, as the student's are (teacher.dtype)"
    assert words in plan.remarks and plan.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("sizes", "own"),
    [
        ({"BF16": 90, "F32": 10}, "bfloat16"), ({"F32": 90, "BF16": 10}, "float32"), ({"F64": 9}, "float32"),
        ({"F8_E4M3": 9, "F32": 1}, "bfloat16"), ({}, "bfloat16"),
    ],
)  # fmt: skip
def test_most_bytes_decide(sizes: dict[str, int], own: str) -> None:
    tensors = {dtype: TensorInfo(Path("x"), dtype, (1,), size) for dtype, size in sizes.items()}
    assert Checkpoint("x", Path("x"), None, tensors).dtype == own
