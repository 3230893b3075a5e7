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
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.select import Selection
from minitron.compiler.student import config as student_config
from minitron.compiler.verify import masked
from minitron.compiler.verify.checks import Check, skipped
from minitron.compiler.verify.hugging_face import logits_of
from minitron.compiler.verify.widths import wrong_widths
from minitron.specs.errors import WorkError
from minitron.specs.file_hashes import folder_hashes
from tests.foundry import CHECK_NAMES, Folder, Foundry

FFN = {"intermediate_size": 24}

Break = Callable[[Stages], Stages]


def tampered_file(name: str, change: Callable[[Path], None]) -> Break:
    """Changes a file of the build once everything is written, before it is verified."""

    def spoil(stages: Stages) -> Stages:
        def verify(compilation: Compilation, *rest: Any) -> list[Check]:
            change(compilation.build / name)
            return stages.verify(compilation, *rest)

        return replace(stages, verify=verify)

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


def rows_of_tokens_that_never_occur(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][[94, 95]] = tensors["model.embed_tokens.weight"][[95, 94]]
    save_file(tensors, path, metadata={"format": "pt"})


def lowest_scores(stages: Stages) -> Stages:
    """A ranking that stands on its head."""

    def select(plan: Plan, scores: ScoreTable) -> Selection:
        other = {name: {i: -one for i, one in layers.items()} for name, layers in scores.widths.items()}
        return stages.select(plan, replace(scores, widths=other))

    return replace(stages, select=select)


def another_selection_in_the_plan(path: Path) -> None:
    document = json.loads(path.read_text())
    kept = document["selection"]["intermediate_size"][0]
    kept[-1] = max(set(range(40)) - set(kept))
    kept.sort()
    path.write_text(json.dumps(document))


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
        tampered_file("student/config.json", config_key("intermediate_size", 32)),
        {"configuration", "widths", "reload"},
        FFN,
    ),
    "a configuration that transformers cannot read": Case(
        tampered_file("student/config.json", config_key("hidden_act", "no such function")),
        {"configuration", "reload"},
        FFN,
    ),
    "one weight on disk": Case(tampered_file("student/model.safetensors", one_weight), {"weights", "reload"}, FFN),
    "a tensor missing on disk": Case(
        tampered_file("student/model.safetensors", one_tensor_less), {"weights", "reload"}, FFN
    ),
    "a wrong index list on disk": Case(wrong_list_on_disk, {"weights", "reload"}, FFN),
    "a wrong index list": Case(wrong_list_everywhere, {"weights", "masked"}, FFN),
    "rows of tokens that never occur": Case(
        tampered_file("student/model.safetensors", rows_of_tokens_that_never_occur), {"weights"}, FFN
    ),
    "the lowest scores": Case(lowest_scores, {"selection"}, FFN),
    "another selection in the plan": Case(
        tampered_file("plan.json", another_selection_in_the_plan), {"selection", "weights"}, FFN
    ),
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
UNLOADABLE = CHECK_NAMES - {"program", "head", "generation"}


def test_an_expert_that_no_token_is_sent_to(foundry: Foundry, tmp_path: Path) -> None:
    """The files have one tensor an expert, which transformers stacks: what it makes of them is compared."""
    name = "model.layers.0.mlp.experts.2.down_proj.weight"

    def swap_neurons(path: Path) -> None:
        tensors = load_file(path)
        tensors[name][:, [3, 4]] = tensors[name][:, [4, 3]]
        save_file(tensors, path, metadata={"format": "pt"})

    loaded = foundry.load(foundry.teacher("qwen3_moe", num_hidden_layers=2), {"hidden_size": 24})
    with pytest.raises(WorkError, match=r"failed its check `weights`: model\.layers\.0\.mlp\.experts\.down_proj is "):
        foundry.compile(loaded, tmp_path, stages=tampered_file("student/model.safetensors", swap_neurons)(Stages()))


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
    assert set(left.checks) in (CHECK_NAMES, UNLOADABLE)
    first = next(check for check in document["checks"] if not check["passed"])
    assert f"`{first['name']}`: {first['detail']}" in str(caught.value)
    assert "the student must not be used" in str(caught.value)
    json.loads((tmp_path / "verification.json").read_text(), parse_constant=pytest.fail)


def test_the_mean_square_of_a_norm_over_all_channels(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference whose norms are not taken over the kept channels is not the student's function, and is noticed."""
    monkeypatch.setattr(masked, "masked_reference", lambda graph_module, table, narrowing: graph_module)
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
    with pytest.raises(WorkError, match=r"failed its check `configuration`: config.json: layer_types is "):
        foundry.compile(loaded, tmp_path)
    checks = Folder(tmp_path).checks
    assert not checks["reload"]["passed"] and checks["reload"]["max_error"] > 1e-2


def test_a_compile_that_fails_leaves_the_older_student_with_its_verdict(foundry: Foundry, tmp_path: Path) -> None:
    """Nothing takes its place in a build before all of it is there: what was verified is what lies there."""
    loaded = foundry.load(foundry.teacher("llama", num_hidden_layers=2), {"layers": {"drop": [0]}}, importance=None)
    before = foundry.compile(loaded, tmp_path).document("verification.json")

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        foundry.compile(loaded, tmp_path, stages=Stages(write_program=full_disk))
    assert Folder(tmp_path).document("verification.json") == before and before["passed"]
    assert folder_hashes(tmp_path / "student") == before["student"]


# -- the comparison itself ----------------------------------------------------------------------------------------------


def test_widths_are_those_of_the_configuration_and_of_every_tensor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 24}')
    shapes = {"a.weight": (24, 3), "b.weight": (24,)}
    assert wrong_widths(tmp_path, {"hidden_size": 24}, shapes, shapes) is None
    assert wrong_widths(tmp_path, {"hidden_size": 25}, shapes, shapes) == "hidden_size is 24, not 25"
    wrong = wrong_widths(tmp_path, {"hidden_size": 24}, shapes, {"a.weight": (24, 4)})
    assert wrong == "a.weight is (24, 4), not (24, 3); b.weight is None, not (24,)"


def test_what_cannot_be_compared_claims_nothing() -> None:
    check = skipped("masked", "what is kept differs with an index that the value reduced does not have")
    assert check.passed and not check.exact and check.max_error == 0.0


def test_a_student_that_loads_and_does_not_run_is_told_of_in_words() -> None:
    class Failing:
        device = "cpu"

        def __call__(self, **_: object) -> None:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 6x8)\nmore")

    with pytest.raises(
        WorkError, match=r"it loads, but does not run in transformers: mat1 and mat2 shapes .* \(4x8 and 6x8\)$"
    ):
        logits_of(Failing(), torch.zeros(1, 2, dtype=torch.long))
