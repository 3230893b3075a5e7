"""What a plan says of the data: what is missing, how much there is, and how often it is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from minitron.compiler import make_plan, plan_document
from minitron.specs import load_spec
from minitron.specs.errors import SpecInvalid
from tests.foundry import Foundry
from tests.models import text

STUDENT = {"intermediate_size": 24}


def distill(source: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {"data": source, "tokens": tokens, "sequence_length": 32, "global_batch_size": 4}


def test_widths_are_priced_without_any_data(foundry: Foundry, tmp_path: Path) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    nothing = foundry.load(teacher, STUDENT, importance=None)
    missing = foundry.load(teacher, STUDENT, distill=distill({"text": ["not/there/*.txt"]}, 4096))
    for loaded, words in (
        (nothing, "importance.data: is missing: which part of `student.intermediate_size` to keep"),
        (missing, "distill.data.text.0: `not/there/*.txt` matches no file"),
    ):
        plan = make_plan(loaded, build=tmp_path)
        assert any(one.startswith(f"a compile needs data: {words}") for one in plan.remarks)
        assert plan_document(plan)["student"]["parameters"] > 0
        with pytest.raises(SpecInvalid, match=re.escape(words)):
            make_plan(loaded, build=tmp_path, weights=True)


def test_a_folder_has_no_revision(foundry: Foundry, tmp_path: Path) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"text": "the cat"}\n')
    training = distill({"dataset": str(tmp_path / "rows"), "revision": "v1"}, 4096)
    path = foundry.load(teacher, {"layers": {"drop": [1]}}, distill=training).path
    loaded = load_spec(path, ["teacher.revision=main"])
    with foundry.shortened():
        remarks = make_plan(loaded, build=tmp_path).remarks
    idle = [one.partition(":")[0] for one in remarks if "changes nothing here" in one and "is a folder" in one]
    assert idle == ["teacher.revision", "distill.data.revision"]


def test_held_out_text_that_a_pattern_of_the_training_matches_is_refused(foundry: Foundry, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(text(20))
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    held_out = {"held_out": {"text": [f"{tmp_path}/b.txt"], "document": "line"}}
    training = distill({"text": [f"{tmp_path}/../{tmp_path.name}/*.txt"], "document": "line"}, 4096)
    loaded = foundry.load(teacher, {"layers": {"drop": [1]}}, distill=training, evaluate=held_out)
    with pytest.raises(
        SpecInvalid, match=r"evaluate\.held_out: `.*b\.txt` is trained on as well, under `distill\.data`; n"
    ):
        make_plan(loaded, build=tmp_path)


def test_held_out_text_may_be_another_split_or_share_of_the_same_files(foundry: Foundry, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(f'{{"text": "the {split} cat {n}"}}\n' for n in range(20)))
    teacher, rows = foundry.teacher("llama", num_hidden_layers=2), {"dataset": str(tmp_path)}
    text = {"text": [f"{tmp_path}/*.jsonl"], "document": "line"}
    for learnt, held in ((rows, rows | {"split": "test"}), (text | {"leave_out": 0.5}, text | {"only": 0.5})):
        loaded = foundry.load(
            teacher, {"layers": {"drop": [1]}}, distill=distill(learnt, 4096), evaluate={"held_out": held}
        )
        with foundry.shortened():
            make_plan(loaded, build=tmp_path)


def test_how_often_the_data_is_read(foundry: Foundry, tmp_path: Path) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text(100), encoding="utf-8")
    source = {"text": [str(corpus)], "document": "line"}
    loaded = foundry.load(teacher, STUDENT, distill=distill(source, 100_000))
    plan = make_plan(loaded, build=tmp_path)
    (use,) = plan_document(plan)["data"]
    assert use["files"] == 1 and use["bytes"] == corpus.stat().st_size
    # Whole steps of 4 x 32 tokens are trained.
    assert use["read_tokens"] == 100_096 == loaded.spec.distill.trained_tokens  # type: ignore[union-attr]
    assert use["process_bytes"] > 56 << 20
    assert use["passes"] == round(100_096 / use["tokens"], 2) and use["disk_bytes"] == 2 * use["tokens"]
    assert any(f"distill.data is read {100_096 / use['tokens']:.1f} times over" in one for one in plan.remarks)
    assert next(one for one in plan_document(plan)["phases"] if one["name"] == "distill")["tokens"] == 100_096
    once = make_plan(foundry.load(teacher, STUDENT, distill=distill(source, 4096)), build=tmp_path)
    assert not any("times over" in one for one in once.remarks)


def test_blocks_leave_the_end_of_the_data_unread(foundry: Foundry, tmp_path: Path) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    (tmp_path / "corpus.txt").write_text(text(400), encoding="utf-8")
    source = {"text": [str(tmp_path / "corpus.txt")], "document": "line"}
    uses, said = [], []
    for shuffle in ("all", {"block": "1K"}):
        loaded = foundry.load(teacher, STUDENT, distill=distill(source, 2048) | {"shuffle": shuffle})
        plan = make_plan(loaded, build=tmp_path)
        uses.append(plan_document(plan)["data"][0])
        said.append([one for one in plan.remarks if "block by block" in one])
    everything, beginning = uses
    assert beginning["tokens"] == everything["tokens"] > 2 * 2048
    assert everything["disk_bytes"] == 2 * everything["tokens"] and beginning["disk_bytes"] == 2 * 2048
    share = f"{2048 / beginning['tokens']:.0%}"
    assert not said[0] and said[1][0].startswith(
        f"distill.data: training reads about {share} of its tokens, those at its"
    )


def test_each_part_of_a_blend_has_its_own(foundry: Foundry, tmp_path: Path) -> None:
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    for name, lines in (("small", 10), ("large", 100)):
        (tmp_path / f"{name}.txt").write_text(text(lines), encoding="utf-8")
    parts = [{"weight": 3, "text": [str(tmp_path / "small.txt")]}, {"weight": 1, "text": [str(tmp_path / "large.txt")]}]
    plan = make_plan(foundry.load(teacher, STUDENT, distill=distill({"blend": parts}, 12_800)), build=tmp_path)
    assert [one.read for one in plan.data] == [9600, 3200]
    assert [one.source for one in plan.data] == ["distill.data.blend.0", "distill.data.blend.1"]
    assert [f"{one.source} is read" in " ".join(plan.remarks) for one in plan.data] == [True, False]
