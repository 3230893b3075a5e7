"""Every family through the whole compiler: each axis alone, all together, in both number formats, and what is refused.

A compile verifies itself (`minitron.compiler.verify`); looked at here besides is what a user would look at: the
configuration, the tensors, and what the folder does in a process that has never heard of this package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.compiler import compile
from minitron.compiler.capture.models import build_meta, quiet
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.select import select, selection_json
from minitron.compiler.roles.names import GROUPS, HEAD_DIM, HEADS, HIDDEN, LAYERS
from minitron.compiler.weights.buffers import load_buffers
from minitron.specs.errors import SpecInvalid
from tests.foundry import CHECK_NAMES, Build, Foundry, logits, teacher_model, token_ids
from tests.models import FAMILIES

FFN = "intermediate_size"
# Half of the query heads leaves one for each key-value group, half of the groups leaves one group: both change the graph.
WIDTHS = {HIDDEN: 24, FFN: 24, HEADS: 2, GROUPS: 1, LAYERS: 1}
# The width of its heads is derived: hidden channels and heads go together, and every query head has its own key.
IN_PROPORTION = {HIDDEN: 24, HEADS: 3}
ALONE: dict[str, list[dict[str, int]]] = {
    family: [{axis: width} for axis, width in WIDTHS.items()] for family in FAMILIES
} | {"gpt_neox": [{FFN: 24}, IN_PROPORTION, {LAYERS: 1}]}
TOGETHER = dict.fromkeys(FAMILIES, WIDTHS) | {"gpt_neox": {FFN: 24, **IN_PROPORTION, LAYERS: 1}}
EVERYTHING = [(family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")]
CACHED = 8  # tokens that a student is made to write
# Sums of fp32 in another order, over the largest logit.
EQUAL = 1e-5


def alone(foundry: Foundry, family: str, student: dict[str, int]) -> Build:
    return foundry.build(foundry.teacher(family, num_hidden_layers=2), student, program=False)


def together(foundry: Foundry, family: str, dtype: str = "float32") -> Build:
    """In bfloat16 without what a number format cannot change: layers and the program."""
    if dtype == "float32":
        return foundry.build(foundry.teacher(family, num_hidden_layers=2), TOGETHER[family])
    teacher = foundry.teacher(family, dtype, num_hidden_layers=1)
    return foundry.build(teacher, TOGETHER[family], dtype=dtype, program=False)


def widths_after(teacher: dict[str, int], wanted: dict[str, int]) -> dict[str, int]:
    """The width of every axis: what was asked for, what follows from it, and else what it was."""
    follows = {}
    if GROUPS in wanted:
        follows[HEADS] = wanted[GROUPS] * (teacher[HEADS] // teacher[GROUPS])
    elif teacher[HEADS] == teacher[GROUPS] and HEADS in wanted:
        follows[GROUPS] = wanted[HEADS]
    return teacher | follows | wanted


def check(build: Build, wanted: dict[str, int]) -> None:
    """Every check is there and has passed, and what was asked for is what configuration and tensors say."""
    assert set(build.checks) == CHECK_NAMES and all(one["passed"] for one in build.checks.values())
    assert build.document("verification.json")["passed"]
    plan = build.document("plan.json")
    widths = widths_after(plan["teacher"]["widths"], wanted)
    assert plan["student"]["widths"] == widths
    keys = {key for key in widths if build.config.get(key) is not None}
    assert keys >= set(wanted), "each axis here has a key of its own in the configuration"
    assert {key: build.config[key] for key in keys} == {key: widths[key] for key in keys}
    assert sum(tensor.numel() for tensor in build.tensors.values()) == plan["student"]["parameters"]


@pytest.mark.parametrize(
    ("family", "student"),
    [pytest.param(family, one, id=f"{family}-{'-'.join(one)}") for family, axes in ALONE.items() for one in axes],
)
def test_each_axis_alone(foundry: Foundry, family: str, student: dict[str, int]) -> None:
    build = alone(foundry, family, student)
    check(build, student)
    assert build.checks["masked"]["exact"]


@pytest.mark.parametrize(("family", "dtype"), EVERYTHING)
def test_all_axes_together(foundry: Foundry, family: str, dtype: str) -> None:
    build = together(foundry, family, dtype)
    check(build, TOGETHER[family])
    assert {str(tensor.dtype) for tensor in build.tensors.values()} == {f"torch.{dtype}"}
    assert build.config["dtype"] == dtype
    assert build.checks["masked"]["exact"], "norms with a mean have a reference too"
    assert build.checks["program"]["exact"] == (dtype == "float32"), "it has run"
    assert all(one["max_error"] < EQUAL for one in build.checks.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_says_of_each_axis_what_becomes_of_it(foundry: Foundry, family: str) -> None:
    axes = {axis["axis"]: axis for axis in together(foundry, family).document("plan.json")["axes"]}
    hidden = axes.pop(HIDDEN)
    if family == "gpt_neox":
        assert hidden["status"] == "approximate" and "layer_norm" in hidden["reason"]
        assert "which differs from masking" in hidden["reason"]
    else:
        assert hidden["status"] == "exact" and "with norms over the kept channels" in hidden["reason"]
    assert axes.pop(HEAD_DIM)["status"] == "refused"
    assert {axes[axis]["status"] for axis in (FFN, HEADS, GROUPS, LAYERS)} == {"exact"}


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_a_head_width_that_was_derived_is_written_where_it_no_longer_follows(foundry: Foundry, family: str) -> None:
    """Their modelling files read `head_dim`, though their configurations know nothing of it."""
    assert "head_dim" not in alone(foundry, family, {FFN: 24}).config
    assert alone(foundry, family, {HIDDEN: 24}).config["head_dim"] == 8


# -- refusals -----------------------------------------------------------------------------------------------------------


def refusal(foundry: Foundry, family: str, student: dict[str, int]) -> str:
    with pytest.raises(SpecInvalid) as caught:
        foundry.plan(foundry.teacher(family, num_hidden_layers=2), student)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_width_of_a_head_is_refused_with_its_reason(foundry: Foundry, family: str) -> None:
    words = refusal(foundry, family, {HEAD_DIM: 4})
    assert "student.head_dim: cannot be narrowed: " in words and "rotary" in words
    assert "leave it out, or write " in words


@pytest.mark.parametrize("student", [{HIDDEN: 24}, {HEADS: 2}, {HIDDEN: 24, HEADS: 2}])
def test_gpt_neox_is_refused_where_its_head_width_would_change(foundry: Foundry, student: dict[str, int]) -> None:
    words = refusal(foundry, "gpt_neox", student)
    assert "this model's head width is always hidden_size / num_attention_heads, 32 / 4" in words
    assert "narrow both in that proportion" in words


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_what_no_such_teacher_has_is_refused(foundry: Foundry, family: str) -> None:
    assert f"the teacher ({family}) has no num_experts; leave it out" in refusal(foundry, family, {"num_experts": 2})


# -- the folder in another process --------------------------------------------------------------------------------------

ELSEWHERE = """
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

inputs, output, count, folders = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
ids, found = load_file(inputs)["ids"], {}
torch.set_grad_enabled(False)
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found[f"{folder}/logits"] = model(input_ids=ids).logits
    written = model.generate(
        ids[:1, :12], attention_mask=torch.ones_like(ids[:1, :12]), do_sample=False, max_new_tokens=count,
        min_new_tokens=count, use_cache=True, output_logits=True, return_dict_in_generate=True,
    )
    found[f"{folder}/ids"] = written.sequences
    found[f"{folder}/cached"] = torch.stack(written.logits, dim=1)
    found[f"{folder}/whole"] = model(input_ids=written.sequences, use_cache=False).logits[:, 11:-1]
assert not any(name.startswith("minitron") for name in sys.modules)
save_file({name: value.contiguous() for name, value in found.items()}, output)
"""


@pytest.fixture(scope="module")
def elsewhere(foundry: Foundry, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What all students do in one fresh process that knows transformers alone."""
    work = tmp_path_factory.mktemp("elsewhere")
    save_file({"ids": token_ids(2, 40)}, work / "in.safetensors")
    folders = [str(together(foundry, *which).folder / "student") for which in EVERYTHING]
    arguments = [str(work / "in.safetensors"), str(work / "out.safetensors"), str(CACHED), json.dumps(folders)]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr
    return load_file(work / "out.safetensors")


def in_memory(build: Build) -> Any:
    """The student as a Hugging Face model that never was on disk: a fresh one, filled from the teacher in memory."""
    plan = build.plan
    scores = ScoreTable.from_tensors(build.tensors_of("scores.safetensors"))
    selection = select(plan.targets, plan.teacher.roles, scores, plan.teacher.captured.layer_count, contiguous=False)
    assert selection_json(selection, plan.teacher.roles) == build.document("plan.json")["selection"]
    tables = load_buffers(build_meta(plan.teacher.captured.config, torch.float32, plan.teacher.captured.attention))
    made = compile.rewrite(plan, selection, tables).recipes
    teacher = dict(teacher_model(plan).named_parameters())
    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(plan.config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            parameter.copy_(made[name].make(teacher[made[name].source].detach().to(plan.dtype)))
    return model


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=EQUAL, atol=EQUAL * float(wanted.abs().max()))


@pytest.mark.parametrize(("family", "dtype"), EVERYTHING)
def test_a_fresh_process_gets_the_logits_that_were_in_memory(
    foundry: Foundry, elsewhere: dict[str, torch.Tensor], family: str, dtype: str
) -> None:
    build = together(foundry, family, dtype)
    close(elsewhere[f"{build.folder}/student/logits"], logits(in_memory(build), token_ids(2, 40)))


@pytest.mark.parametrize(("family", "dtype"), EVERYTHING)
def test_writing_token_by_token_is_reading_all_at_once(
    foundry: Foundry, elsewhere: dict[str, torch.Tensor], family: str, dtype: str
) -> None:
    """Generation with its cache, past the sliding window where there is one."""
    student = f"{together(foundry, family, dtype).folder}/student"
    ids, cached = elsewhere[f"{student}/ids"], elsewhere[f"{student}/cached"]
    assert ids.shape == (1, 12 + CACHED) and cached.shape[1] == CACHED
    close(cached, elsewhere[f"{student}/whole"])
    greedy = cached.clone()
    greedy[..., AutoConfig.from_pretrained(student).eos_token_id] = -torch.inf  # which it was told not to write
    assert torch.equal(greedy.argmax(-1), ids[:, 12:])
