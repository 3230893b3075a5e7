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
import yaml

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


def spec_of(folder: Path, data: str, student: str = "{intermediate_size: 24}") -> Path:
    """A spec for a tiny teacher in `folder` whose training reads `data`."""
    from tests import models

    if not (folder / "teacher").exists():
        models.save_teacher(folder / "teacher", models.tiny_config("llama"))
    (folder / "spec.yaml").write_text(
        f"teacher: {{model: teacher}}\nstudent: {student}\n"
        f"distill: {{data: {data}, tokens: 64, sequence_length: 8, global_batch_size: 2}}\n"
    )
    return folder / "spec.yaml"


def test_a_build_stays_with_the_commit_that_it_was_compiled_with(hub: Hub, tmp_path: Path) -> None:
    """A branch may move between calibration and training, and its tokens are cached by what they were made of."""
    from minitron.compiler.teacher.provenance import data_at_commits
    from minitron.specs import load_spec
    from minitron.specs.data_files import content_hash, resolve_data

    serve(hub, tmp_path / "first", "one")
    (tmp_path / "here").mkdir()
    parts = f"{{weight: 1, dataset: {NAME}}}, {{weight: 1, dataset: {NAME}, revision: next}}"
    more = f"{{weight: 1, dataset: {NAME}, revision: '{MAIN}'}}, {{weight: 1, dataset: here}}"
    loaded = load_spec(spec_of(tmp_path, f"{{blend: [{parts}, {more}]}}", "{layers: {drop: [1]}}"))
    pinned = data_at_commits(loaded)
    assert pinned.pins == {"distill.data.blend.0.revision": MAIN, "distill.data.blend.1.revision": NEXT}
    assert pinned.sha256 == loaded.sha256

    hub.repositories[f"datasets/{NAME}"] = {"main": NEXT, "next": NEXT}, tmp_path / "first"
    moved = data_at_commits(loaded)
    hashes = [content_hash(resolve_data(one)["distill.data"]) for one in (pinned, moved, data_at_commits(loaded))]
    assert hashes[0] != hashes[1] == hashes[2]
    assert data_at_commits(pinned).pins == pinned.pins, "what is pinned stays"
    hub.repositories.clear()
    assert data_at_commits(loaded).pins == {}, "what cannot be found out is for the reader to say"


def test_a_compile_says_the_commit_and_writes_it(hub: Hub, tmp_path: Path) -> None:
    serve(hub, tmp_path / "first", "one")
    spec = spec_of(tmp_path, f"{{dataset: {NAME}}}", "{layers: {drop: [1]}}")
    done = subprocess.run(
        [sys.executable, "-m", "minitron", "compile", str(spec), "--device", "cpu"],
        env=environment(hub, tmp_path / "home"), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    training = yaml.safe_load((tmp_path / "builds" / "spec" / "training.yaml").read_text())
    assert training["data"]["revision"] == MAIN
    assert f"the data set {NAME} is read at commit {MAIN}, where its revision `main` is" in " ".join(
        done.stdout.split()
    )


def test_a_command_reads_it(hub: Hub, tmp_path: Path) -> None:
    """`minitron data` shows what a training will see of it."""
    serve(hub, tmp_path / "first", "one")
    spec = spec_of(tmp_path, f"{{dataset: {NAME}}}")
    done = subprocess.run(
        [sys.executable, "-m", "minitron", "data", str(spec), "--json"],
        env=environment(hub, tmp_path / "home"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one </s>" in done.stdout and "Traceback" not in done.stderr  # the tokenizer knows no digits
