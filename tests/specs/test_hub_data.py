"""Data sets by their name on the Hub, as the `datasets` library fetches them from a server and finds them again in its cache.

What the libraries read from the environment they read when they are imported: each state of the network is a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import MAIN, NEXT, Hub, serving

pytest.importorskip("datasets")

NAME = "org/tales"
READ = """
import json, sys
from minitron.specs.data import Source
from minitron.specs.documents.hub import dataset_rows
from minitron.specs.errors import WorkError
for asked in json.loads(sys.argv[1]):
    try:
        print(json.dumps([row["text"] for row, _ in dataset_rows(Source(dataset="org/tales", **asked))]))
    except WorkError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(monkeypatch, tmp_path / "unused") as hub:
        yield hub


def serve(hub: Hub, folder: Path, word: str) -> None:
    """Lets the Hub have a data set of three documents, at whatever revision."""
    folder.mkdir()
    lines = [json.dumps({"text": f"{word} {number}"}) for number in range(3)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    hub.repositories[f"datasets/{NAME}"] = {"main": MAIN, "next": NEXT}, folder


def environment(hub: Hub, home: Path, *, offline: bool = False) -> dict[str, str]:
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": str(int(offline))}
    return os.environ | own


def read(hub: Hub, home: Path, *asked: dict[str, Any], offline: bool = False) -> list[Any]:
    """What each source holds: its documents, or the error."""
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(asked)], env=environment(hub, home, offline=offline), capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_by_name_and_revision_with_and_without_a_network(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    serve(hub, tmp_path / "first", "one")
    first = ["one 0", "one 1", "one 2"]
    half = {"split": "train[:34%]"}
    assert read(hub, home, {}, half, {"streaming": True}) == [first, ["one 0"], first]
    fetched = [path for path in hub.asked if path == " GET train.jsonl"]
    assert len(fetched) == 1, "fetched once, and once more only where it is streamed (in ranges)"
    serve(hub, tmp_path / "second", "two")
    second = ["two 0", "two 1", "two 2"]
    assert read(hub, home, {"revision": "next"}, {"revision": MAIN}) == [second, first]

    hub.repositories.clear()
    asked = [{"revision": "next"}, {"revision": NEXT}, {"revision": MAIN}, {"revision": "never"}, {}]
    found = read(hub, home, *asked, offline=True)
    # The library takes the newest copy that it has, whatever was asked for.
    assert found[:2] == [second, second] and found[4] in (first, second)
    for error, revision in zip(found[2:4], (MAIN, "never"), strict=True):
        assert error == (
            f"the data set {NAME} is in the cache as of commit {NEXT}, and `revision` asks for {revision}; go online, or write "
            "`revision` with what is there"
        )
    (absent,) = read(hub, tmp_path / "other", {}, offline=True)
    assert f"the data set {NAME} cannot be loaded" in absent and "without a network, write a folder" in absent


def test_a_command_reads_it(hub: Hub, tmp_path: Path) -> None:
    """`minitron data` shows what a training will see of it."""
    from tests import models

    serve(hub, tmp_path / "first", "one")
    models.save_teacher(tmp_path / "teacher", models.tiny_config("llama"))
    (tmp_path / "spec.yaml").write_text(
        f"teacher: {{model: teacher}}\nstudent: {{intermediate_size: 24}}\n"
        f"distill: {{data: {{dataset: {NAME}}}, tokens: 64, sequence_length: 8, global_batch_size: 2}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "minitron", "data", str(tmp_path / "spec.yaml"), "--json"],
        env=environment(hub, tmp_path / "home"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one </s>" in done.stdout and "Traceback" not in done.stderr  # the tokenizer knows no digits
