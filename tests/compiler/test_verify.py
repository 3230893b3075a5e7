"""Every check of a compile fails when what it guards is broken, and fails the compile with it.

Each case breaks one thing on its way from the plan to the folder, as a bug of ours would, and names the checks that see it.
All other checks still pass: they look at other things.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron.compiler import Plan
from minitron.compiler.axes.narrowing import Narrowing
from minitron.compiler.compilation import Compilation
from minitron.compiler.compile import Stages
from minitron.compiler.emit.rewritten import RewrittenStudent
from minitron.compiler.student import config as student_config
from minitron.compiler.verify import checks as verify
from minitron.compiler.verify import run
from minitron.compiler.verify.checks import Check
from minitron.specs.errors import WorkError
from tests.foundry import Folder, Foundry

CHECKS = {"widths", "reload", "masked", "permutation", "program", "head"}
FFN = {"intermediate_size": 24}

Break = Callable[[Stages], Stages]


def tampered_file(name: str, change: Callable[[Path], None]) -> Break:
    """Changes a file of the build once everything is written, before it is verified."""

    def spoil(stages: Stages) -> Stages:
        def emit(compilation: Compilation, student: RewrittenStudent) -> None:
            stages.emit(compilation, student)
            change(compilation.build / name)

        return replace(stages, emit=emit)

    return spoil


def config_key(key: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def one_weight(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})


def one_tensor_less(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def with_other_channels(student: RewrittenStudent) -> RewrittenStudent:
    """Another list of as many columns: what a slip in the index arithmetic would yield."""
    name = "model.layers.0.mlp.down_proj.weight"
    recipe = student.recipes[name]
    rows, columns = recipe.positions
    assert columns is not None
    other = replace(recipe, positions=(rows, np.setdiff1d(np.arange(40), columns)[: len(columns)].repeat(2)[:24]))
    return replace(student, recipes={**student.recipes, name: other})


def wrong_list_on_disk(stages: Stages) -> Stages:
    return replace(stages, emit=lambda compilation, student: stages.emit(compilation, with_other_channels(student)))


def wrong_list_everywhere(stages: Stages) -> Stages:
    """In memory and on disk alike: reloading agrees with itself, and is still not the teacher without some neurons."""
    return replace(stages, rewrite=lambda *args: with_other_channels(stages.rewrite(*args)))


def axis_that_has_an_order(stages: Stages) -> Stages:
    """The channels of a rotated query, as if nobody had pinned them."""

    def rewrite(plan: Plan, *rest: Any) -> RewrittenStudent:
        student, table = stages.rewrite(plan, *rest), plan.teacher.table
        leaves = table.space.leaves(table.parameters["model.layers.0.self_attn.k_proj.weight"][0])
        rotated = next(leaf for leaf in leaves if leaf.pins)
        kept = {**student.narrowing.kept, rotated: np.arange(rotated.size.coefficient)}
        return replace(student, narrowing=Narrowing(table.space, kept, student.narrowing.dependent))

    return replace(stages, rewrite=rewrite)


def graph_with(old: Any, new: Any) -> Break:
    """student.pt2 of another function on the same weights."""

    def spoil(stages: Stages) -> Stages:
        def write_program(compilation: Compilation, student: RewrittenStudent) -> None:
            other = copy.deepcopy(student.graph_module)
            for node in other.graph.nodes:
                if node.target is old:
                    node.target = new
            other.recompile()
            stages.write_program(compilation, replace(student, graph_module=other))

        return replace(stages, write_program=write_program)

    return spoil


def program_of_the_teacher(stages: Stages) -> Stages:
    def write_program(compilation: Compilation, student: RewrittenStudent) -> None:
        whole = compilation.plan.teacher.captured.graph_module
        stages.write_program(compilation, replace(student, graph_module=whole))

    return replace(stages, write_program=write_program)


def head(**changes: Any) -> Break:
    """A description of the head that is not the model's."""

    def spoil(stages: Stages) -> Stages:
        def verify(compilation: Compilation, *rest: Any) -> list[Check]:
            teacher = compilation.plan.teacher
            other = replace(teacher, head=teacher.head.model_copy(update=changes))
            return stages.verify(replace(compilation, plan=replace(compilation.plan, teacher=other)), *rest)

        return replace(stages, verify=verify)

    return spoil


@dataclass(frozen=True)
class Case:
    """`fails`: the checks that notice; `student`: what is asked for."""

    spoil: Break
    fails: set[str]
    student: dict[str, Any]
    family: str = "llama"


CASES = {
    "a width in config.json that was not asked for": Case(
        tampered_file("student/config.json", config_key("intermediate_size", 32)), {"widths", "reload"}, FFN
    ),
    "a configuration that transformers cannot read": Case(
        tampered_file("student/config.json", config_key("hidden_act", "no such function")), {"reload"}, FFN
    ),
    "one weight on disk": Case(tampered_file("student/model.safetensors", one_weight), {"reload"}, FFN),
    "a tensor missing on disk": Case(tampered_file("student/model.safetensors", one_tensor_less), {"reload"}, FFN),
    "a wrong index list on disk": Case(wrong_list_on_disk, {"reload"}, FFN),
    "a wrong index list": Case(wrong_list_everywhere, {"masked"}, FFN),
    "an axis whose order matters": Case(axis_that_has_an_order, {"permutation"}, FFN),
    "a program of another function": Case(
        graph_with(torch.ops.aten.silu.default, torch.ops.aten.relu.default), {"program"}, FFN
    ),
    "a program of other widths": Case(program_of_the_teacher, {"program"}, FFN),
    "another scale of the logits": Case(head(scale=0.9), {"head"}, FFN),
    "a soft cap that is not there": Case(head(softcap=30.0), {"head"}, FFN),
    "a soft cap that is forgotten": Case(head(softcap=None), {"head"}, FFN, "gemma2"),
}
# Where the folder does not load, what stands on the loaded model cannot be looked at.
UNLOADABLE = {"widths", "reload"}


@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_noticed(foundry: Foundry, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    loaded = foundry.load(foundry.teacher(case.family, num_hidden_layers=2), case.student)
    with pytest.raises(WorkError, match="the student failed its check `") as caught:
        foundry.compile(loaded, tmp_path, stages=case.spoil(Stages()))
    left = Folder(tmp_path)
    document = left.document("verification.json")
    assert document["passed"] is False
    assert {one for one, check in left.checks.items() if not check["passed"]} == case.fails
    assert set(left.checks) in (CHECKS, UNLOADABLE)
    first = next(check for check in document["checks"] if not check["passed"])
    assert f"`{first['name']}`: {first['detail']}" in str(caught.value)
    assert "the student must not be used" in str(caught.value)
    json.loads((tmp_path / "verification.json").read_text(), parse_constant=pytest.fail)


def test_the_mean_square_of_a_norm_over_all_channels(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference whose norms are not taken over the kept channels is not the student's function, and is noticed."""
    monkeypatch.setattr(run, "masked_reference", lambda graph_module, table, narrowing: graph_module)
    with pytest.raises(WorkError, match="failed its check `masked`"):
        foundry.compile(foundry.load(foundry.teacher("llama", num_hidden_layers=2), {"hidden_size": 24}), tmp_path)


def test_layer_lists_that_do_not_follow_the_layers(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face sees only that the list is as long as the layers are many; the masks are other ones."""
    original = student_config.student_config

    def stale(teacher: Any, widths: Any, kept: Any, also: Any = None) -> Any:
        config = original(teacher, widths, kept, also)
        config.layer_types = teacher.captured.config.layer_types[: len(kept)]
        return config

    loaded = foundry.load(foundry.teacher("gemma2"), {"layers": {"drop": [0]}}, importance=None)
    monkeypatch.setattr(student_config, "student_config", stale)
    with pytest.raises(WorkError, match="failed its check `reload`"):
        foundry.compile(loaded, tmp_path)
    checks = Folder(tmp_path).checks
    assert not checks["reload"]["passed"] and checks["reload"]["max_error"] > 1e-2


def test_a_compile_that_fails_leaves_no_older_verdict(foundry: Foundry, tmp_path: Path) -> None:
    """Also where it fails before there is anything to verify: the verdict of the student before it does not stay."""
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), {"layers": {"drop": [0]}}, importance=None)
    assert foundry.compile(loaded, tmp_path).document("verification.json")["passed"]

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        foundry.compile(loaded, tmp_path, stages=Stages(write_program=full_disk))
    assert not (tmp_path / "verification.json").exists()


# -- the comparison itself ----------------------------------------------------------------------------------------------


def test_logits_are_compared_relative_to_the_largest() -> None:
    wanted = torch.tensor([[0.0, -50.0, 1.0]])
    check = verify.compare("reload", wanted + torch.tensor([[0.001, 0.0, 0.0]]), wanted, "words")
    assert check.passed and check.max_error == pytest.approx(0.001 / 50, rel=1e-3)
    assert not verify.compare("reload", wanted + 0.01, wanted, "words").passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_never_passes(value: float) -> None:
    good, bad = torch.ones(1, 2), torch.tensor([[1.0, value]])
    for check in (verify.compare("x", bad, good, "words"), verify.compare("x", good, bad, "words")):
        assert not check.passed
        assert check.to_json()["max_error"] is None and str(check) == "`x`: words"


def test_other_shapes_never_pass() -> None:
    check = verify.compare("x", torch.ones(1, 1), torch.ones(1, 2), "words")
    assert not check.passed and "[1, 1] against [1, 2]" in check.detail


def test_widths_are_those_of_the_configuration_and_of_every_tensor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 24}')
    shapes = {"a.weight": (24, 3), "b.weight": (24,)}
    assert verify.check_widths(tmp_path, {"hidden_size": 24}, shapes, shapes).passed
    wrong = verify.check_widths(tmp_path, {"hidden_size": 25}, shapes, shapes)
    assert not wrong.passed and wrong.detail == "hidden_size is 24, not 25"
    wrong = verify.check_widths(tmp_path, {"hidden_size": 24}, shapes, {"a.weight": (24, 4)})
    assert not wrong.passed and wrong.detail == "a.weight is (24, 4), not (24, 3); b.weight is None, not (24,)"


def test_what_cannot_be_compared_claims_nothing() -> None:
    check = verify.skipped("masked", "hidden_size: layer_norm is taken over the kept channels")
    assert check.passed and not check.exact and check.max_error == 0.0


def test_it_compares_on_calibration_data_and_without_it_on_random_tokens() -> None:
    samples = torch.arange(4 * 60).reshape(4, 60)
    assert torch.equal(verify.sample_ids(1000, 48, samples), samples[:2, :48])
    assert verify.sample_ids(1000, 32, samples).shape == (2, 32)
    ids = verify.sample_ids(1000, 48, None)
    assert ids.shape == (2, 48) and torch.equal(ids, verify.sample_ids(1000, 48, None)) and int(ids.max()) < 1000


def test_a_student_that_loads_and_does_not_run_is_told_of_in_words() -> None:
    def fails(**_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 6x8)\nmore")

    with pytest.raises(
        WorkError, match=r"loads, but does not run in transformers: mat1 and mat2 shapes .* \(4x8 and 6x8\)$"
    ):
        verify.logits_of(fails, torch.zeros(1, 2, dtype=torch.long))
