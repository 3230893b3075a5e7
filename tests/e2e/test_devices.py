"""`--devices N`: capture, training and evaluation in processes that the command starts, on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.tiny import Command


def spec_in(folder: Path, workshop: Path) -> Path:
    """A spec whose teacher is captured first, in a folder of its own."""
    folder.mkdir()
    for name in ("teacher", "corpus.txt", "held_out.txt"):
        place = shutil.copytree if (workshop / name).is_dir() else shutil.copy
        place(workshop / name, folder / name)
    text = (workshop / "tiny.yaml").read_text().replace("tokens: 4096", "tokens: 2048\n  teacher_logits: {sampled: 4}")
    (folder / "tiny.yaml").write_text(text)
    return folder / "tiny.yaml"


def figures(build: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (build / "train" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_two_processes_is_the_run_of_one(workshop: Path, minitron: Command, tmp_path: Path) -> None:
    builds = []
    for number in ("1", "2"):
        spec = spec_in(tmp_path / number, workshop)
        done = minitron("run", spec, "--device", "cpu", "--devices", number)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("held-out loss") == 1 and "Traceback" not in done.stderr
        builds.append(spec.parent / "builds" / "tiny")
    two = builds[1]
    # Samples are drawn by two processes and are the same, byte for byte.
    shards = [sorted((build / "teacher_logits").glob("shard-*")) for build in builds]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]] and shards[0]
    losses = [figures(build, "loss") for build in builds]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 8
    assert figures(two, "seconds_left")[-1] == 0.0
    results = [json.loads((build / "results.json").read_text()) for build in builds]
    for model in ("teacher", "pruned", "distilled"):
        first, second = (one["models"][model]["held_out"] for one in results)
        assert first["tokens"] == second["tokens"] and first["loss"] == pytest.approx(second["loss"], rel=1e-4)

    for path in (two / "teacher_logits").iterdir():
        path.unlink()
    again = minitron("capture", two, "--device", "cpu", "--devices", "2")
    assert again.returncode == 0, again.stderr
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    assert again.stdout.count(str(two / "teacher_logits")) == 1, "by one of the processes"

    (two / "results.json").unlink()
    measured = minitron("eval", two, "--device", "cpu", "--devices", "2", "--json")
    assert measured.returncode == 0, measured.stderr
    document = json.loads(measured.stdout)  # one document, and nothing else
    loss = document["models"]["distilled"]["held_out"]["loss"]
    assert loss == results[1]["models"]["distilled"]["held_out"]["loss"]
