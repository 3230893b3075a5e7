"""What changes between two specs or builds, in every rendering."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import minitron.compiler
from minitron.cli.diff import Side, diff_sections, difference
from minitron.cli.main import command_line
from minitron.cli.markdown import markdown
from minitron.cli.render import terminal

SPEC = "teacher: {model: teacher}\nstudent: {layers: {drop: [0]}}\n"


def text_of(left: Side, right: Side) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(terminal(diff_sections(difference(left, right), left, right)))
    return " ".join(stream.getvalue().split())


def test_a_plan_does_not_differ_from_itself(plan: dict[str, Any], results: dict[str, Any]) -> None:
    side = Side("a", plan, {"name": "tiny"}, results)
    assert difference(side, side) == {"a": "a", "b": "a", "spec": [], "plan": [], "selection": [], "results": []}
    assert "Spec no difference" in text_of(side, side) and "Results no difference" in text_of(side, side)


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


def test_settings_of_the_loss_stand_among_the_keys(plan: dict[str, Any]) -> None:
    logits = {"divergence": "forward_kl", "temperature": 1.0}
    left = Side("a", plan, {"distill": {"loss": {"logits": logits}}})
    right = Side("b", plan, {"distill": {"loss": {"logits": logits | {"temperature": 2.0}, "cross_entropy": 0.5}}})
    assert "distill.loss.logits.temperature 1.0 2.0" in text_of(left, right)
    assert "distill.loss.cross_entropy - 0.5" in text_of(left, right)


def test_another_teacher_is_shown_and_an_older_build_has_no_spec_to_compare(plan: dict[str, Any]) -> None:
    other = copy.deepcopy(plan)
    other["teacher"]["model_type"] = "mistral"
    left, right = Side("build", plan, None), Side("b.yaml", other, {"name": "b"})
    assert difference(left, right)["spec"] is None
    assert "Teacher A B change" in text_of(left, right)
    assert "model type llama mistral changed" in text_of(left, right)


def test_a_selection_is_no_difference_of_the_plan_and_two_are_compared(plan: dict[str, Any]) -> None:
    unselected, other = copy.deepcopy(plan), copy.deepcopy(plan)
    del unselected["selection"]
    one_sided = difference(Side("a", plan, None), Side("b", unselected, None))
    assert one_sided["plan"] == [] and one_sided["selection"] is None
    other["selection"]["intermediate_size"] = [[0, 3], [2, 4, 5]]
    left, right = Side("a", plan, None), Side("b", other, None)
    assert difference(left, right)["selection"] == [{"axis": "intermediate_size", "a": 4, "b": 5, "shared": 3}]
    assert "Selection axis A B kept in both intermediate_size 4 5 3" in text_of(left, right).replace("─", "").replace(
        "  ", " "
    )


def test_results_are_compared_where_both_have_been_measured(plan: dict[str, Any], results: dict[str, Any]) -> None:
    other = copy.deepcopy(results)
    other["models"]["distilled"]["held_out"]["loss"] = 1.25
    other["models"]["distilled"]["tasks"]["arc"]["value"] = 0.5
    other["models"]["distilled"]["continuation"] = "another text"
    other["models"]["teacher"]["tokens_per_second"] = 1.0
    left, right = Side("a", plan, None, results), Side("b", plan, None, other)
    assert difference(left, right)["results"] == [
        {"path": "distilled.loss", "a": 1.5, "b": 1.25},
        {"path": "distilled.arc", "a": 0.25, "b": 0.5},
    ]
    assert "distilled.loss 1.5 1.25 -16.7%" in text_of(left, right)
    assert difference(left, Side("b", plan, None))["results"] is None


def test_the_markdown_of_a_pull_request_has_the_same_rows(plan: dict[str, Any]) -> None:
    other = copy.deepcopy(plan)
    other["student"]["parameters"] = 65_008
    left, right = Side("a|b.yaml", plan, {"x": 1}), Side("b.yaml", other, {"x": 2})
    text = markdown(diff_sections(difference(left, right), left, right))
    assert "| parameters | 130,016 | 65,008 | -50.0% |" in text
    assert "| x | 1 | 2 |" in text and "A is a\\|b.yaml" in text


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], tmp_path: Path) -> Path:
    """A spec, and a compiler that plans `plan` for it."""
    (tmp_path / "tiny.yaml").write_text(SPEC)
    monkeypatch.setattr(minitron.compiler, "make_plan", lambda loaded, *, build: None)
    monkeypatch.setattr(minitron.compiler, "plan_document", lambda made: plan)
    return tmp_path / "tiny.yaml"


def test_a_spec_against_a_build(
    spec: Path, build: Path, plan: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The build holds the spec that it was compiled from, so that what was changed since is seen key by key."""
    from minitron.specs import load_spec

    built = copy.deepcopy(plan)
    built["spec"]["resolved"] = load_spec(spec, ["student.layers.drop=[0, 1]"]).resolved
    (build / "plan.json").write_text(json.dumps(built))
    assert command_line(["diff", str(build), str(spec), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content) == ["format_version", "a", "b", "spec", "plan", "selection", "results"]
    assert content["spec"] == [{"path": "student.layers.drop", "a": [0, 1], "b": [0]}]
    assert (content["a"], content["b"]) == (str(build), str(spec))
    assert command_line(["diff", str(build), str(spec), "--markdown"]) == 0
    assert "| student.layers.drop | [0, 1] | [0] |" in capsys.readouterr().out


def test_two_builds(build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["diff", str(build), str(build)]) == 0
    out = capsys.readouterr().out
    assert "Results" in out and "no difference" in out


def test_what_cannot_be_compared_is_a_wrong_call(spec: Path, build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (build / "plan.json").unlink()
    for arguments, words in (
        ([spec, build], "has no plan.json; give a build that `minitron compile` has written, or a spec"),
        ([spec, build.parent / "nowhere.yaml"], "there is no such file"),
        ([spec, spec, "--json", "--markdown"], "choose one"),
    ):
        assert command_line(["diff", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert words in captured.out + captured.err
