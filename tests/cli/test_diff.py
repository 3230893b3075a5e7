"""What changes between two plans and two resolved specs."""

from __future__ import annotations

import copy
import io
from typing import Any

from rich.console import Console

from minitron.cli.diff import Side, diff_sections, difference
from minitron.cli.render import terminal


def text_of(left: Side, right: Side) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(terminal(diff_sections(difference(left, right), left, right)))
    return " ".join(stream.getvalue().split())


def test_a_plan_does_not_differ_from_itself(plan: dict[str, Any]) -> None:
    side = Side("a", plan, {"name": "tiny"})
    assert difference(side, side) == {"a": "a", "b": "a", "spec": [], "plan": []}
    assert "no difference" in text_of(side, side)


def test_changes_are_named_by_path_with_both_values(plan: dict[str, Any]) -> None:
    other = copy.deepcopy(plan)
    other["student"]["widths"]["hidden_size"] = 32
    other["student"]["widths"]["vocab_size"] = 512
    other["student"]["parameters"] = 65_008
    other["phases"][1]["tokens"] = 6_000_000
    del other["phases"][0]
    left = Side("a.yaml", plan, {"student": {"hidden_size": 48}, "data": {"text": ["a"]}})
    right = Side("b.yaml", other, {"student": {"hidden_size": 32}, "data": {"text": ["a"]}})
    content = difference(left, right)
    assert content["spec"] == [{"path": "student.hidden_size", "a": 48, "b": 32}]
    changed = {one["path"]: (one["a"], one["b"]) for one in content["plan"]}
    assert changed["student.widths.hidden_size"] == (48, 32)
    assert changed["student.widths.vocab_size"] == (None, 512)
    assert changed["student.parameters"] == (130_016, 65_008)
    assert changed["phases.distill.tokens"] == (3_000_000, 6_000_000)
    assert changed["phases.calibrate.tokens"] == (65_536, None)
    assert not any(path.startswith("teacher") for path in changed)

    text = text_of(left, right)
    assert "hidden_size 48 32 -33.3%" in text
    assert "parameters 130,016 65,008 -50.0%" in text
    assert "distill tokens 3,000,000 6,000,000 +100.0%" in text
    assert "Teacher" not in text


def test_another_teacher_is_shown_and_a_build_has_no_spec_to_compare(plan: dict[str, Any]) -> None:
    other = copy.deepcopy(plan)
    other["teacher"]["model_type"] = "mistral"
    left, right = Side("build", plan, None), Side("b.yaml", other, {"name": "b"})
    assert difference(left, right)["spec"] is None
    assert "Teacher A B change" in text_of(left, right)
    assert "model type llama mistral changed" in text_of(left, right)


def test_what_is_selected_is_no_difference_of_the_plan(plan: dict[str, Any]) -> None:
    unselected = copy.deepcopy(plan)
    del unselected["selection"]
    assert difference(Side("a", plan, None), Side("b", unselected, None))["plan"] == []
