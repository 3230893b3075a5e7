"""training.yaml is strict, and what is wrong in it is shown at its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.runtime.identity import resume_identity
from minitron.runtime.plan import read_training_plan
from minitron.specs.errors import SpecInvalid, UsageError, placing
from minitron.specs.training_plan import EvaluationPlan, TrainingPlan, divisor_within
from tests.runtime import tiny


def errors(folder: Path, text: str | None = None, **changes: Any) -> list[str]:
    (folder / "training.yaml").write_text(text or yaml.safe_dump(tiny.plan(**changes), sort_keys=False))
    with pytest.raises(SpecInvalid) as caught:
        read_training_plan(folder)
    assert caught.value.exit_code == 2
    return [str(error).replace(str(folder), "BUILD") for error in caught.value.errors]


def test_a_whole_plan(tmp_path: Path) -> None:
    tiny.write_plan(tmp_path)
    loaded = read_training_plan(tmp_path)
    assert isinstance(loaded.plan, TrainingPlan)
    assert loaded.folder == tmp_path
    assert loaded.training().steps == 12 and loaded.training().trained_tokens == 12 * 64


def test_tokens_are_rounded_up_to_whole_steps(tmp_path: Path) -> None:
    tiny.write_plan(tmp_path, tokens=65)
    assert read_training_plan(tmp_path).training().steps == 2


def test_units_and_spellings_are_those_of_the_spec(tmp_path: Path) -> None:
    text = yaml.safe_dump(tiny.plan()).replace("lr: 0.003", "lr: 3e-3").replace("tokens: 768", "tokens: 768K")
    (tmp_path / "training.yaml").write_text(text)
    plan = read_training_plan(tmp_path).training()
    assert plan.optimizer.lr == 0.003 and plan.tokens == 768_000


def test_a_build_that_does_not_train(tmp_path: Path) -> None:
    document = {k: v for k, v in tiny.plan().items() if k in EvaluationPlan.model_fields}
    (tmp_path / "training.yaml").write_text(yaml.safe_dump(document))
    loaded = read_training_plan(tmp_path)
    with pytest.raises(UsageError, match="compiled from a spec without `distill`; add that block"):
        loaded.training()


def test_no_build(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such build folder; `minitron compile SPEC -o .*` makes one"):
        read_training_plan(tmp_path / "builds")


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no training\.yaml; `minitron compile SPEC"):
        read_training_plan(tmp_path)


def test_every_error_comes_at_its_line(tmp_path: Path) -> None:
    text = yaml.safe_dump(tiny.plan(), sort_keys=False)
    lines = (
        text.replace("seed: 0", "sead: 0").replace("scale: 1.0", "scale: big", 1).replace("tokens: 768", "tokens: -1")
    )
    found = errors(tmp_path, lines)
    where = {line: number for number, line in enumerate(lines.splitlines(), 1)}
    assert [error.split(": ")[:2] for error in found] == [
        [f"BUILD/training.yaml:{where['    scale: big']}:12", "teacher.head.scale"],
        [f"BUILD/training.yaml:{where['tokens: -1']}:9", "tokens"],
        [f"BUILD/training.yaml:{where['sead: 0']}:1", "sead"],
    ]
    assert "did you mean `seed`?" in found[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__min_lr": 1.0}, "optimizer.min_lr: 1 is higher than `lr`, 0.003; write at most 0.003"),
        ({"loss__logits": {"weight": 0}}, "loss: every weight is 0: nothing would be learnt"),
        (
            {"teacher_logits": {"sampled": 12}, "loss__logits": {"divergence": "reverse_kl"}},
            "loss.logits.divergence: `reverse_kl` needs the teacher's whole distribution, and `teacher_logits` are samples",
        ),
        (
            {"teacher_logits": {"sampled": 12}, "loss__hidden_states": {}},
            "loss.hidden_states: hidden states need the teacher itself, and `teacher_logits` are samples; write null, or",
        ),
        (
            {"loss": {"logits": {"weight": 0}, "hidden_states": {}}},
            "loss.hidden_states.weight: `dynamic` is scaled to the logit loss, whose weight is 0; write a number, or",
        ),
        ({"compute_dtype": {"cpu": "float32"}}, "compute_dtype.cuda: `cuda` is missing"),
        ({"layout__student": "shardet"}, "layout.student: `shardet` is not a valid value; did you mean `sharded`?"),
        ({"layout__teacher": None}, "layout.teacher: "),
        ({"layout": {"student": "sharded"}}, "layout.teacher: `teacher` is missing"),
        (
            {"layout": {"student": "replicated", "teacher": "replicated", "cpu_offload": True}},
            "layout.cpu_offload: a student that is replicated stays on its device; write `student: sharded`",
        ),
        (
            {"layout__cpu_offload": True, "weights": "bfloat16", "optimizer__states": "int8"},
            "layout.cpu_offload: weights that rest in host memory are updated there, where `weights: bfloat16` is too slow; "
            "write `cpu_offload: false`, or `weights: float32` and `optimizer.states: float32`",
        ),
        ({"compile": "yes"}, "compile: "),
        ({"teacher__dtype": "float8"}, "teacher.dtype: `float8` is not a valid value; did you mean `float32`?"),
        ({"student__model": 3}, "student.model: `3` is a number, and text is wanted"),
        ({"data": {}}, "data: says no source of documents"),
        ({"format_version": 2}, "format_version: `2` is not the format that this version reads, 1; compile again"),
    ],
)
def test_what_is_wrong_and_what_to_write(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (found,) = errors(tmp_path, **changes)
    assert message in found


@pytest.mark.parametrize("text", ["just words", "- a\n- list", "", "a: [1"])
def test_what_is_no_plan_at_all(tmp_path: Path, text: str) -> None:
    assert errors(tmp_path, text or "# empty\n")


def test_data_files_that_are_gone(tmp_path: Path) -> None:
    tiny.write_plan(tmp_path, data={"text": ["gone/*.txt"]})
    loaded = read_training_plan(tmp_path)
    message = r"training\.yaml:\d+:\d+: data\.text\.0: `gone/\*\.txt` matches no file"
    with pytest.raises(SpecInvalid, match=message), placing(loaded):
        loaded.data("data", loaded.training().data)


@pytest.mark.parametrize(
    ("share", "most", "size"), [(8, 16, 8), (8, 3, 2), (7, 6, 1), (12, 8, 6), (1, 1, 1), (2**40, 2**50, 2**16)]
)
def test_a_micro_batch_is_the_largest_divisor_of_a_share(share: int, most: int, size: int) -> None:
    assert divisor_within(share, most) == size


def test_a_training_remembers_what_decides_its_result(tmp_path: Path) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        tiny.write_plan(tmp_path, **changes)
        return resume_identity(read_training_plan(tmp_path).training(), "hash of the data")

    base = identity()
    harmless: dict[str, Any] = {
        "checkpoint": {"every_tokens": 1, "keep_last": 9, "keep_best": False},
        "layout": {"student": "replicated", "teacher": "sharded", "cpu_offload": False},
        "compile": True,
        "student__flops_per_token": 5,
        "held_out": None,
        "micro_batch_size": 1,
        "loss__chunk_tokens": 8,
        "gradient_checkpointing": True,
        "name": "other",
        "teacher__model": "elsewhere",
    }
    assert identity(**harmless) == base
    for key, value in {
        "seed": 1,
        "tokens": 64,
        "optimizer__lr": 1e-2,
        "loss__cross_entropy": 0.5,
        "fingerprint": "9",
    }.items():
        changed = identity(**{key: value})
        assert [name for name in base if base[name] != changed[name]] == [key.replace("__", ".")]
