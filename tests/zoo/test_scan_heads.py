"""Mixers that scan: their heads, the channels of these, and what their configurations tie to the residual stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron.compiler.roles.names import HIDDEN, SCAN_HEAD_DIM, SCAN_HEADS
from minitron.specs.errors import SpecInvalid
from tests.foundry import Build, Foundry, load_model, logits, token_ids
from tests.models import save_teacher
from tests.zoo.configs import config_of

STUDENTS: dict[str, dict[str, int]] = {
    "bamba": {HIDDEN: 16, SCAN_HEADS: 2},  # the configuration has the mixer's channels as so many times hidden_size
    "nemotron_h": {HIDDEN: 24, SCAN_HEADS: 2, SCAN_HEAD_DIM: 12},  # and here they are free
}


def teacher(foundry: Foundry, family: str) -> Path:
    folder = foundry.root / f"zoo-{family}"
    return folder if folder.exists() else save_teacher(folder, config_of(family))


@pytest.fixture(scope="module", params=STUDENTS)
def narrowed(request: pytest.FixtureRequest, foundry: Foundry) -> tuple[Build, dict[str, int]]:
    wanted = STUDENTS[request.param]
    return foundry.build(teacher(foundry, request.param), wanted, program=False), wanted


def test_heads_and_their_channels_are_narrowed_and_proved(narrowed: tuple[Build, dict[str, int]]) -> None:
    made, wanted = narrowed
    assert all(check["passed"] for check in made.checks.values())
    assert made.checks["masked"]["exact"]
    widths = made.document("plan.json")["student"]["widths"]
    assert {axis: widths[axis] for axis in wanted} == wanted


def test_every_group_keeps_as_many_heads(narrowed: tuple[Build, dict[str, int]]) -> None:
    """Two groups of two heads each: one of heads 0 and 1, one of 2 and 3."""
    for heads in narrowed[0].document("plan.json")["selection"][SCAN_HEADS]:
        assert [head // 2 for head in heads] == [0, 1]


def test_what_is_kept_has_the_highest_scores(foundry: Foundry) -> None:
    made = foundry.build(teacher(foundry, "nemotron_h"), STUDENTS["nemotron_h"], program=False)
    selection = made.document("plan.json")["selection"]
    scores = made.tensors_of("scores.safetensors")
    of_heads, of_channels = scores[f"{SCAN_HEADS}.0"], scores[f"{SCAN_HEAD_DIM}.0"]
    assert of_heads.shape == (2, 2) and of_channels.shape == (4, 16)
    heads = selection[SCAN_HEADS][0]
    assert heads == [2 * group + int(best) for group, best in enumerate(of_heads.argmax(1))]
    for head, channels in zip(heads, selection[SCAN_HEAD_DIM], strict=True):
        assert channels == sorted(of_channels[head].topk(12).indices.tolist())


def test_a_dropped_head_is_missed(foundry: Foundry) -> None:
    """Else `masked` and `permutation` would prove nothing of these axes."""
    made = foundry.build(teacher(foundry, "nemotron_h"), {SCAN_HEADS: 2}, program=False)
    ids = token_ids()
    whole, left = (logits(load_model(folder), ids) for folder in (made.teacher, made.folder / "student"))
    assert (whole - left).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize(
    ("family", "student", "message"),
    [
        ("nemotron_h", {SCAN_HEADS: 3}, "3 heads do not divide into the 2 groups .* write 2 or 4"),
        ("nemotron_h", {SCAN_HEADS: 5}, "5 is not between 1 and the teacher's 4"),
        ("bamba", {HIDDEN: 24}, "mamba_num_heads x mamba_head_dim is 2 x hidden_size .* narrow them together"),
    ],
)
def test_what_a_configuration_cannot_say_is_refused(
    foundry: Foundry, family: str, student: dict[str, int], message: str
) -> None:

    with pytest.raises(SpecInvalid, match=message):
        foundry.plan(teacher(foundry, family), student)


def test_a_key_that_says_how_many_times_is_found_by_the_shapes(foundry: Foundry) -> None:
    """Half of hidden_size, all channels of the mixers: these are four times as many then."""
    assert foundry.plan(teacher(foundry, "bamba"), {HIDDEN: 16}).config.mamba_expand == 4


def test_a_share_is_rounded_down_to_whole_groups(foundry: Foundry) -> None:
    assert foundry.plan(teacher(foundry, "nemotron_h"), {SCAN_HEADS: "80%"}).targets.widths == {SCAN_HEADS: 2}


def test_channels_that_are_as_many_as_the_residual_stream_follow_it(foundry: Foundry) -> None:
    """No key says how many channels these convolutions have: the shapes that transformers builds do."""
    made = foundry.build(teacher(foundry, "lfm2"), {HIDDEN: 24, "intermediate_size": 20}, program=False)
    assert all(check["passed"] for check in made.checks.values())
    assert made.checks["masked"]["exact"]
    axes = {one["axis"]: one for one in made.document("plan.json")["axes"]}
    assert (axes["convolved_channels"]["teacher"], axes["convolved_channels"]["student"]) == (32, 24)
    assert "follows hidden_size" in axes["convolved_channels"]["reason"]
    assert made.tensors["model.layers.0.conv.conv.weight"].shape == (24, 1, 3)


def test_tables_that_a_module_above_fills_are_what_a_loaded_model_has(foundry: Foundry) -> None:
    """Falcon-H1 fills a table of each mixer from its outermost module."""
    made = foundry.build(teacher(foundry, "falcon_h1"), {"intermediate_size": 20}, program=False)
    assert all(check["passed"] for check in made.checks.values())
    with pytest.raises(SpecInvalid, match=r"a buffer that the model's code computes .*mup_vector"):
        foundry.plan(teacher(foundry, "falcon_h1"), {SCAN_HEADS: 2})
