"""The sweep over transformers' causal families: nothing fails and nothing crashes, and its log is taken up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.all_families import FAILED, LEFT_OUT, PLANNED, REFUSED, RIGHT, examine, families, main, render
from benchmarks.architectures import OTHERS, with_section

# A decoder that is half of a pair; sizes out of data; layers that differ by their number; a head behind a norm.
SAMPLE = ["bart", "jetmoe", "gpt_neox_japanese", "modernbert-decoder"]


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_is_planned_or_refused_in_words(family: str) -> None:
    found = examine(family, plan_only=True, seconds=600)
    assert found and {outcome for _, outcome, _ in found} <= {PLANNED, REFUSED}
    for _, outcome, why in found:
        assert outcome != REFUSED or not any(word in why for word in ("Error:", "Traceback", "GuardOn", "aten."))


def test_a_family_is_compiled() -> None:
    found = {axis: (outcome, why) for axis, outcome, why in examine("bart", plan_only=False, seconds=600)}
    assert found["intermediate_size"] == (RIGHT, "exact") and found["num_hidden_layers"][0] == RIGHT
    assert found["hidden_size"][0] == REFUSED and "narrow both in that proportion" in found["hidden_size"][1]


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_no_family_fails(family: str) -> None:
    failed = [one for one in examine(family, plan_only=False, seconds=900) if one[1] == FAILED]
    assert not failed


def log_of(path: Path, **found: list[tuple[str, str, str]]) -> Path:
    path.write_text("".join(json.dumps({"family": name, "found": one}) + "\n" for name, one in found.items()))
    return path


@pytest.mark.parametrize(("outcome", "code"), [(RIGHT, 0), (REFUSED, 0), (FAILED, 1)])
def test_a_family_of_the_log_is_not_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], outcome: str, code: int
) -> None:
    log = log_of(tmp_path / "log", nobody=[("hidden_size", outcome, "why")])
    assert main(["nobody", "--log", str(log)]) == code
    assert f"hidden_size                  {outcome:9} why" in capsys.readouterr().out


def test_the_page_gets_the_families_that_it_has_no_row_of() -> None:
    section = render(
        {
            "llama": [("hidden_size", RIGHT, "exact")],  # which stands in the table
            "odd": [
                ("hidden_size", RIGHT, "approximate"),
                ("num_experts", REFUSED, "no rows"),
                ("head_dim", REFUSED, "x"),
            ],
            "closed": [("", REFUSED, "no graph")],
            "unknown": [("", LEFT_OUT, "ValueError")],
        }
    )
    assert section.splitlines() == [
        "| family | compiled and verified | planned | refused |",
        "|---|---|---|---|",
        "| closed | | | all<sup>1</sup> |",
        "| odd | hidden_size (approx.) |  | num_experts<sup>2</sup> |",
        "",
        "1. no graph",
        "2. no rows",
    ]
    page = with_section("table\n", section)
    assert page == "table\n" + OTHERS + section
    assert with_section(page, "other\n") == "table\n" + OTHERS + "other\n"
