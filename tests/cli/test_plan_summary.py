"""The first screen of a plan: what changes and what it takes, in units that people use."""

from __future__ import annotations

from typing import Any

import pytest

from minitron.cli import figures
from minitron.cli.plan_sections import plan_sections
from minitron.cli.plan_summary import shown_plan, summary
from tests.cli.test_render import on_terminal, row


def test_only_the_widths_that_change_stand_in_the_summary(plan: dict[str, Any]) -> None:
    text = on_terminal(summary(plan))
    assert row(text, "hidden_size") == ["hidden_size", "64", "48", "75.0%"]
    assert row(text, "parameters") == ["parameters", "260,032", "130,016", "50.0%"]
    assert "head_dim" not in text and "parameters active" not in text and "reason" not in text
    assert len(text.splitlines()) < len(on_terminal(plan_sections(plan)).splitlines())
    assert shown_plan(plan, full=True) == plan_sections(plan)


def test_what_is_not_exact_is_named(plan: dict[str, Any]) -> None:
    plan["axes"] = [{"axis": "a", "teacher": 4, "student": 2, "status": "exact"}]
    assert "exact on every axis: the same as zeroing what is dropped" in summary(plan)[0].notes
    plan["axes"] += [
        {"axis": "b", "teacher": 4, "student": 2, "status": "approximate"},
        {"axis": "c", "teacher": 4, "student": 4, "status": "approximate"},
    ]
    assert "approximate: b; `--full` says why" in summary(plan)[0].notes
    plan["axes"] = plan["axes"][2:]
    assert "no axis changes" in summary(plan)[0].notes


@pytest.mark.parametrize(
    ("axes", "recovery", "repairs"),
    [
        (
            ["num_experts", "hidden_size"],
            {"refit": "none", "merge_heads": False, "merge_experts": True},
            "merge_experts",
        ),
        (
            ["num_experts"],
            {"refit": "least_squares", "merge_heads": True, "merge_experts": True},
            "refit, merge_experts",
        ),
        (["num_key_value_heads"], {"merge_heads": True, "merge_experts": True}, "merge_heads"),
        (["num_hidden_layers"], {"refit": "least_squares", "merge_heads": True, "merge_experts": True}, None),
    ],
)
def test_a_student_that_is_repaired_is_not_called_the_same_as_zeroing(
    plan: dict[str, Any], axes: list[str], recovery: dict[str, Any], repairs: str | None
) -> None:
    plan["axes"] = [{"axis": one, "teacher": 4, "student": 2, "status": "exact"} for one in axes]
    plan["spec"]["resolved"] = {"recovery": recovery}
    exact = "exact on every axis: the same as zeroing what is dropped"
    then = "" if repairs is None else f"; then recovery changes what is kept: {repairs}"
    assert exact + then in summary(plan)[0].notes


def test_what_drives_the_loss_and_what_it_takes(plan: dict[str, Any]) -> None:
    optimizer = {"lr": 1e-4, "min_lr": 4.5e-7, "warmup_steps": 60}
    distill = {"tokens": 1_000_000, "sequence_length": 1024, "global_batch_size": 8, "optimizer": optimizer}
    plan["spec"]["resolved"] = {"distill": distill, "teacher_correction": {"tokens": 5000}}
    plan["phases"] = [{"name": "distill", "tokens": 1e6, "days": 0.002, "device": "a card", "device_hours": 8.5}]
    text = on_terminal(summary(plan))
    assert "123 of 8 sequences of 1,024 tokens" in text and "1,007,616, 1,000,000 asked for" in text
    assert "0.0001 to 4.5e-07, after 60 steps of warm-up" in text and "5,000 tokens" in text
    assert row(text, "distill") == ["distill", "1.00M", "-", "-", "3 min"]
    assert "time on a card" in text and "8.5 device-hours in all" in text
    for passes, words in ((0.02, "less than a tenth of them read"), (2.04, "read 2.0 times")):
        data = {"source": "distill.data", "files": 2, "bytes": 900, "tokens": 300, "disk_bytes": 600, "passes": passes}
        plan["data"] = [data | {"process_bytes": 2**27}]
        text = on_terminal(summary(plan))
        assert words in text and "about 128 MiB of memory for each core that tokenizes" in text
    del plan["spec"]["resolved"], plan["phases"], plan["data"]
    assert [section.title for section in summary(plan)] == ["Plan tiny", "Selection"]


def test_the_build_is_said_to_be_up_to_date_or_not(plan: dict[str, Any]) -> None:
    sections = shown_plan(plan, full=False, build="builds/x is not compiled yet")
    assert sections[-1].notes == ("builds/x is not compiled yet",)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (0, "under 1 s"),
        (0.02, "under 1 s"),
        (42.4, "42 s"),
        (89.9, "90 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (172_799, "48.0 h"),
        (172_800, "2.0 days"),
        (864_000, "10 days"),
    ],
)
def test_estimated_times_have_one_unit(seconds: float | None, words: str) -> None:
    assert figures.about(seconds) == words


def test_one_and_many() -> None:
    assert figures.plural(1, "step") == "1 step" and figures.plural(1000, "step") == "1,000 steps"
