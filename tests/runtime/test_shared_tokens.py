"""Tokens and teacher logits are made once for all builds that read the same data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minitron.runtime import record, train
from minitron.specs.progress import Silent
from tests.runtime import tiny


class Heard(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def __contains__(self, words: str) -> bool:
        return any(words in message for message in self.messages)


@pytest.fixture
def other(build: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second build beside the first one, with a cache that both share."""
    monkeypatch.delenv("MINITRON_CACHE")
    shutil.copytree(build, build.parent / "other")
    return build.parent / "other"


def test_the_second_build_does_not_tokenize(build: Path, other: Path) -> None:
    for folder, anew in ((build, True), (other, False)):
        tiny.write_plan(folder, tokens=64)
        train(folder, device="cpu", progress=(heard := Heard()))
        assert ("tokenized" in heard) == anew
        assert not (folder / "train" / "data").exists()
    assert len(list((build.parent / ".minitron-cache" / "tokens").iterdir())) == 2, "training and held-out text"


def test_the_second_capture_links_the_shards_of_the_first(build: Path, other: Path) -> None:
    plan = {"teacher_logits": {"sampled": 4}, "tokens": 64 * 4}
    for folder in (build, other):
        tiny.write_plan(folder, **plan)
    first = record(build, device="cpu", progress=Silent())
    (shard,) = (other.parent / ".minitron-cache" / "teacher_logits").glob("*/shard-*")
    assert shard.samefile(build / "teacher_logits" / shard.name)
    assert record(other, device="cpu", progress=Silent())["bytes"] == first["bytes"]
    assert shard.samefile(other / "teacher_logits" / shard.name)
    # A damaged shard of the cache is drawn again, and replaced there.
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    for path in (shard, *(folder / "teacher_logits" / shard.name for folder in (build, other))):
        path.unlink()
    shard.write_bytes(content)
    record(other, device="cpu", progress=Silent())
    assert shard.read_bytes() != content and shard.samefile(other / "teacher_logits" / shard.name)
