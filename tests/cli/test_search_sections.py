"""What a user sees of a search: the funnel, the table of candidates, what is expected, and wrong calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minitron.cli.results_sections import results_sections
from minitron.cli.search_command import chosen_plan, opened_search, prepare
from minitron.cli.search_sections import candidates_section, search_sections
from minitron.specs import UsageError, load_spec


def judged(kl: float | None) -> dict[str, Any]:
    return {"tokens": 1000, "kl": kl, "loss": kl, "trunk_kl": kl}


def candidate(number: int, hidden: int, *rungs: float | None, lr: float = 1e-3) -> dict[str, Any]:
    return {
        "number": number,
        "widths": {"hidden_size": hidden, "num_hidden_layers": 4},
        "parameters": 1_000_000 + number,
        "kv_cache_bytes_per_token": 2048,
        "flops_per_token": 2_000_000,
        "lr": lr,
        "global_batch_size": 8,
        "zero_shot": judged(2.5),
        "rungs": [judged(one) for one in rungs],
    }


SEARCH: dict[str, Any] = {
    "funnel": [{"words": "in the grid", "shapes": 1536}, {"words": "enter the first rung", "shapes": 3}],
    "rungs": [
        {"number": 1, "tokens": 20_000, "enter": 3, "leave": 2},
        {"number": 2, "tokens": 40_000, "enter": 2, "leave": 1},
    ],
    "candidates": [candidate(1, 120, 0.9, 0.7), candidate(2, 136, 0.8, 0.6, lr=2e-3), candidate(3, 160, None)],
    "winner": 2,
    "candidate": 1,
    "forecast": {
        "tokens": 320_000, "kl": 0.4, "low": 0.35, "high": 0.45, "floor": 0.1, "factor": 9.0, "exponent": 0.3,
        "error": 0.004, "points": 2,
    },
}  # fmt: skip


def test_the_funnel_and_the_rungs_stand_before_the_candidates() -> None:
    funnel, table = search_sections(SEARCH)
    assert funnel.rows == (("in the grid", "1,536"), ("enter the first rung", "3"))
    assert funnel.notes[1] == "rung 2: 2 candidates up to 40.0k tokens, the best 1 stays"
    assert [column.name for column in table.columns] == [
        "candidate", "hidden", "rate", "parameters", "KV cache", "FLOPs", "zero-shot", "rung 1", "rung 2", "",
    ]  # fmt: skip
    assert table.rows[0][-3:] == ("0.9", "0.7", "this plan")
    assert table.rows[1][-3:] == ("0.8", "0.6", "the best")
    assert table.rows[2][-3:] == ("diverged", "", "")
    assert "expected after 320k tokens: a divergence of 0.4 (0.35 to 0.45), from L = 0.1 + 9 / D^0.3" in table.notes[1]


def test_without_rungs_there_is_no_figure_that_was_judged() -> None:
    before = [one | {"zero_shot": None, "rungs": []} for one in SEARCH["candidates"]]
    table = candidates_section({"candidates": before})
    assert "zero-shot" not in [column.name for column in table.columns] and not table.notes
    assert search_sections({}) == []


def test_results_have_the_table_too() -> None:
    found = results_sections({"models": {}, "search": {"winner": 2, "candidates": SEARCH["candidates"]}})
    assert [one.title for one in found] == ["Results", "Candidates"]


def test_options_of_a_search_need_one(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("teacher: {model: org/teacher}\nstudent: {layers: {drop: [2]}}\n", encoding="utf-8")
    loaded = load_spec(path)
    with pytest.raises(UsageError, match="--candidate: the spec has no `search`, and so one student; leave it out"):
        chosen_plan(opened_search(loaded, tmp_path), "cpu", lambda _: None, candidate=2)
    with pytest.raises(UsageError, match="--prepare: the spec has no `search` to prepare; leave it out"):
        prepare(loaded, tmp_path, "cpu")
    assert chosen_plan(opened_search(loaded, tmp_path), "cpu", lambda _: None) is None
