"""Every family of transformers' causal mapping is right, or refused with a sentence; none fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.all_families import FAILED, LEFT_OUT, PLANNED, REFUSED, examine, families, main, read_log
from tests.zoo.anything import tiny
from tests.zoo.configs import EVERY

# Families without a configuration of their own here: a plain decoder, an encoder as one, a mixture, one
# whose operations follow the values of tensors.
PLANS = {
    "hyperclovax": PLANNED, "roberta": REFUSED, "mellum": PLANNED, "jetmoe": REFUSED,
}  # fmt: skip


@pytest.mark.parametrize("family", PLANS)
def test_a_family_is_planned_or_refused(family: str) -> None:
    found = examine(family, plan_only=True, seconds=60)
    outcomes = {outcome for _, outcome, _ in found}
    assert not outcomes & {FAILED, LEFT_OUT}, found
    assert PLANS[family] in outcomes
    assert all(why for _, outcome, why in found if outcome == REFUSED)


def test_the_mapping_is_gone_through_whole() -> None:
    """Families without a tiny configuration are few, and known."""
    without = []
    for family in families():
        try:
            tiny(family)
        except Exception:  # a configuration class raises anything
            without.append(family)
    assert len(families()) > 180 and len(EVERY) > 80
    assert set(without) <= {"dots3_note", "gemma4_assistant"}


@pytest.mark.slow
def test_no_family_fails(tmp_path: Path) -> None:
    """Hours: every axis of every family is compiled and verified."""
    log = tmp_path / "families.jsonl"
    assert main(["--log", str(log), "--seconds", "900"]) == 0
    assert {*read_log(log)} == {*families()}
    assert not [one for found in read_log(log).values() for one in found if one[1] == FAILED]
