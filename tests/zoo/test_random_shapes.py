"""Any shape of three dense families, and any student of it: what was asked for comes out, or a refusal says why not.

Odd numbers of groups and channels, heads of a width of their own, one query head in each group, one channel left. A few
shapes by default; `SHAPES=60 python -m pytest tests/zoo/test_random_shapes.py` tries that many of each family, other ones
in each run. Mixtures of experts have theirs in test_experts.py.
"""

from __future__ import annotations

import os
import re
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS
from minitron.specs.errors import SpecInvalid
from tests.foundry import Foundry

FFN, HEAD_DIM = "intermediate_size", "head_dim"
ROTARY, HALF = "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
Shape = tuple[dict[str, Any], dict[str, int]]

MANY = int(os.environ.get("SHAPES", "0"))
any_shape = settings(
    max_examples=MANY or 2, deadline=None, derandomize=not MANY, database=None,
    suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate),
)  # fmt: skip


@st.composite
def grouped(draw: st.DrawFn, *, whole: bool = False) -> Shape:
    """A teacher with key-value groups, its heads as wide as hidden_size / num_attention_heads says, or not.

    `whole`: hidden_size has to be a multiple of num_attention_heads even where a head has a width of its own.
    """
    groups, repeats = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    head = draw(st.sampled_from([2, 4, 6, 8]))
    teacher: dict[str, Any] = {
        LAYERS: draw(st.integers(1, 2)), FFN: draw(st.integers(2, 24)), GROUPS: groups, HEADS: groups * repeats,
    }  # fmt: skip
    if draw(st.booleans()):
        teacher[HIDDEN] = groups * repeats * head
    else:
        unit = groups * repeats if whole else 1
        teacher |= {HIDDEN: unit * draw(st.integers(2, max(2, 40 // unit))), HEAD_DIM: head}
    student = student_of(draw, teacher)
    if whole and HIDDEN in student and draw(st.integers(0, 3)):
        heads = student.get(HEADS, groups * repeats)
        student[HIDDEN] = max(1, student[HIDDEN] // heads) * heads
    return teacher, student


@st.composite
def in_proportion(draw: st.DrawFn) -> Shape:
    """A teacher whose heads are as wide as hidden_size / num_attention_heads says, and mostly a student of that width."""
    heads, head = draw(st.integers(1, 6)), draw(st.sampled_from([4, 8, 12]))
    share = draw(st.sampled_from([0.5, 1.0]))
    teacher = {
        LAYERS: draw(st.integers(1, 2)), FFN: draw(st.integers(2, 24)), HEADS: heads, HIDDEN: heads * head,
        ROTARY: HALF | {"partial_rotary_factor": share},
    }  # fmt: skip
    student = student_of(draw, teacher)
    if HEADS in student and draw(st.integers(0, 3)):
        student[HIDDEN] = student[HEADS] * head
    return teacher, student


def student_of(draw: st.DrawFn, teacher: dict[str, Any]) -> dict[str, int]:
    """Some of the axes, each narrowed to anything; heads mostly to a number that the groups can have."""
    student = {axis: draw(st.integers(1, teacher[axis])) for axis in (HIDDEN, FFN, LAYERS) if draw(st.booleans())}
    groups = teacher.get(GROUPS, 1)
    repeats = teacher[HEADS] // groups
    if GROUPS in teacher and draw(st.booleans()):
        student[GROUPS] = groups = draw(st.integers(1, groups))
    if draw(st.booleans()):
        student[HEADS] = draw(st.integers(1, teacher[HEADS]))
        if draw(st.integers(0, 3)):
            student[HEADS] = groups * draw(st.integers(1, repeats))
    return student or {FFN: 1}


CHECKS = {"teacher", "causality", "widths", "configuration", "weights", "reload", "masked", "permutation", "generation"}


def compiles(foundry: Foundry, family: str, shape: Shape) -> dict[str, int]:
    """Every check has passed, and what was asked for is what plan and configuration say. The student's widths."""
    teacher, student = shape
    build = foundry.build(foundry.teacher(family, **teacher), student, program=False)
    assert all(check["passed"] for check in build.checks.values()) and build.checks.keys() >= CHECKS
    widths: dict[str, int] = build.document("plan.json")["student"]["widths"]
    assert {axis: widths[axis] for axis in student} == student
    assert {axis: build.config[axis] for axis in student} == student
    assert build.checks["masked"]["exact"] or family == "gpt_neox"
    return widths


def refusal(foundry: Foundry, family: str, shape: Shape) -> str:
    teacher, student = shape
    try:
        foundry.plan(foundry.teacher(family, **teacher), student)
    except SpecInvalid as error:
        return str(error)
    raise AssertionError(f"{family} {teacher} -> {student} is not refused")


def check_grouped(foundry: Foundry, family: str, shape: Shape) -> None:
    """Anything goes but query heads that do not divide into the key-value groups, and what Llama's configuration refuses."""
    teacher, student = shape
    repeats = teacher[HEADS] // teacher[GROUPS]
    follows = student[HEADS] if repeats == 1 and HEADS in student else teacher[GROUPS]
    groups = student.get(GROUPS, follows)
    heads = student.get(HEADS, groups * repeats)
    if heads > groups * repeats or heads % groups:
        words = refusal(foundry, family, shape)
        assert re.search(
            rf"(have {groups * repeats} query heads, {repeats} each|{heads} query heads (do not|equally))", words
        )
    elif family == "llama" and (hidden := student.get(HIDDEN, teacher[HIDDEN])) % heads:
        words = f"The hidden size ({hidden}) is not a multiple of the number of attention heads ({heads})"
        assert words in refusal(foundry, family, shape)
    else:
        widths = compiles(foundry, family, shape)
        assert (widths[HEADS], widths[GROUPS]) == (heads, groups)


@any_shape
@given(grouped(whole=True))
@example(
    ({LAYERS: 2, HIDDEN: 27, FFN: 13, GROUPS: 3, HEADS: 9, HEAD_DIM: 6}, {HIDDEN: 12, FFN: 5, HEADS: 4, GROUPS: 2})
)
@example(({LAYERS: 1, HIDDEN: 35, FFN: 7, GROUPS: 5, HEADS: 5, HEAD_DIM: 4}, {HIDDEN: 1, FFN: 1, HEADS: 1}))
def test_any_llama(foundry: Foundry, shape: Shape) -> None:
    check_grouped(foundry, "llama", shape)


@any_shape
@given(grouped())
@example(({LAYERS: 2, HIDDEN: 36, FFN: 9, GROUPS: 3, HEADS: 9}, {HIDDEN: 25, FFN: 4, HEADS: 6, LAYERS: 1}))
@example(({LAYERS: 1, HIDDEN: 18, FFN: 24, GROUPS: 3, HEADS: 3, HEAD_DIM: 8}, {HEADS: 2}))
def test_any_phi3(foundry: Foundry, shape: Shape) -> None:
    """One tensor for queries, keys and values, one for gate and up."""
    check_grouped(foundry, "phi3", shape)


@any_shape
@given(in_proportion())
@example(({LAYERS: 2, HIDDEN: 60, FFN: 11, HEADS: 5, ROTARY: HALF}, {HIDDEN: 36, HEADS: 3, FFN: 7, LAYERS: 1}))
def test_any_gpt_neox(foundry: Foundry, shape: Shape) -> None:
    """Queries, keys and values head by head in one tensor; hidden channels and heads in proportion, or a refusal."""
    teacher, student = shape
    shape = (teacher | {GROUPS: None}, student)
    heads, hidden = student.get(HEADS, teacher[HEADS]), student.get(HIDDEN, teacher[HIDDEN])
    if hidden * teacher[HEADS] == heads * teacher[HIDDEN]:
        compiles(foundry, "gpt_neox", shape)
    else:
        assert "narrow both in that proportion" in refusal(foundry, "gpt_neox", shape)
