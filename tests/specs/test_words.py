"""Numbers in every spelling, and what a mistyped call is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron.specs import load_spec
from minitron.specs.documents import Tally
from minitron.specs.errors import SpecInvalid, UsageError
from minitron.specs.one_line import plain

SPEC = """\
name: a
teacher: {{model: a}}
student: {{layers: {{drop: [1]}}}}
distill:
  data: {{text: [a.txt]}}
  tokens: 2B
  sequence_length: {length}
  global_batch_size: {batch}
  optimizer: {{warmup_steps: {warmup}}}
"""


def loaded(folder: Path, length: str = "8K", batch: str = "64", warmup: str = "10") -> object:
    (folder / "a.yaml").write_text(SPEC.format(length=length, batch=batch, warmup=warmup))
    return load_spec(folder / "a.yaml").spec.distill


@pytest.mark.parametrize(("text", "number"), [("8K", 8000), ("1e3", 1000), ("8192", 8192), ("2.5K", 2500), ("1.0", 1)])
def test_whole_numbers_have_units_everywhere(tmp_path: Path, text: str, number: int) -> None:
    if number > 1:
        assert loaded(tmp_path, length=text).sequence_length == number  # type: ignore[attr-defined]
    distill = loaded(tmp_path, length="64", batch=text, warmup=text)
    assert distill.global_batch_size == number  # type: ignore[attr-defined]
    assert distill.optimizer.warmup_steps == number  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["1.5", '"64"', "8k", "many", "0.0001K"])
def test_other_spellings_are_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecInvalid, match="global_batch_size"):
        loaded(tmp_path, batch=text)


def test_a_build_is_no_spec(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder; name the spec file in it"):
        load_spec(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UsageError, match=f"is a build and not a spec; `minitron show {tmp_path}` shows it"):
        load_spec(tmp_path)


def test_a_training_plan_is_no_spec(tmp_path: Path) -> None:
    (tmp_path / "training.yaml").write_text("format_version: 1\nname: a\nfingerprint: b\ntokens: 5\n")
    with pytest.raises(
        UsageError, match=f"is the training plan of a build and not a spec; `minitron train {tmp_path}`"
    ):
        load_spec(tmp_path / "training.yaml")


def test_values_are_written_as_yaml_has_them() -> None:
    assert [plain(one) for one in (True, None, 0.001, "attention", [1, "a"])] == [
        "true", "null", "0.001", "attention", '[1, "a"]',
    ]  # fmt: skip


def test_one_document_is_one() -> None:
    tally = Tally()
    tally.skip("it is broken")
    assert tally.notes() == ["1 document could not be read and was left out, such as it is broken"]
    tally.skip("so is this")
    assert tally.notes()[0].startswith("2 documents could not be read and were left out")
