"""The candidates of a search, killed with -9 while they are refitted and written: the same bytes, and nothing done again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.compiler import make_search, write_search
from minitron.compiler.compile import Stages
from minitron.compiler.importance import progress_file
from minitron.compiler.planning import SearchPlan
from minitron.compiler.storage import shards
from minitron.specs import LoadedSpec, UsageError, load_spec
from minitron.specs.atomic import temporary_path
from minitron.specs.progress import Silent
from tests.compiler.test_search import search_blocks
from tests.e2e.test_compile_killed import contents
from tests.foundry import Foundry

WRITING, REFITTING = "write candidates", "refit"
Write = Callable[[SearchPlan, "Watching"], "Watching"]


class Watching(Silent):
    """Keeps how much of each task was done before it began; calls `fatal` at each step of a task, with the task's name."""

    def __init__(self, fatal: Callable[[str], None] = lambda _: None) -> None:
        self.fatal, self.before = fatal, list[tuple[str, float]]()

    @contextmanager
    def task(self, name: str, total: float, unit: str, done: float = 0.0) -> Iterator[Any]:
        self.before.append((name, done))
        yield _Watched(self.fatal, name)

    def of(self, name: str) -> list[float]:
        """What was done before each task of a name."""
        return [done for task, done in self.before if task == name]


@dataclass(frozen=True)
class _Watched:
    fatal: Callable[[str], None]
    name: str

    def advance(self, amount: float = 1.0, **figures: float | str | None) -> None:
        self.fatal(self.name)


def dying_at(wanted: str, number: int) -> Callable[[str], None]:
    """Kills the process at the n-th step of a task."""
    left = [number]

    def fatal(name: str) -> None:
        left[0] -= name == wanted
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return fatal


def killed(work: Callable[[], None]) -> None:
    """Runs the work in a process of its own, which must die of -9."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


@pytest.fixture(scope="module")
def loaded(foundry: Foundry) -> LoadedSpec:
    """Two shapes with two rates each; one calibration, a refit for each shape."""
    blocks = search_blocks(
        foundry,
        {"budget": {"memory": "100MB"}, "candidates": 4},
        optimizer={"lr": [1e-3, 4e-3], "warmup_steps": 2},
        loss={"hidden_states": {"coordinates": "kept"}},
    )
    student = {"hidden_size": 24, "intermediate_size": [24, 32]}
    teacher = foundry.teacher("llama", num_hidden_layers=2)
    return foundry.load(teacher, student, recovery={"refit": "least_squares"}, **blocks)


@pytest.fixture
def found(
    foundry: Foundry, loaded: LoadedSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], SearchPlan]:
    """The search, to be written into a build of its own; files are small, and progress is saved at every step."""
    monkeypatch.setattr(progress_file, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(progress_file, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(shards, "SHARD_BYTES", 2048)

    def search(name: str) -> SearchPlan:
        with foundry.shortened():
            return make_search(loaded, build=tmp_path / name / "build", weights=True)

    return search


@pytest.fixture
def write(foundry: Foundry) -> Write:
    """Writes a search. Models are captured once for all of them, whichever process writes, and the teacher is not checked again
    and again."""
    stages = Stages(verify_teacher=lambda _: [])

    def write(search: SearchPlan, progress: Watching) -> Watching:
        with foundry.shortened():
            write_search(search, device="cpu", progress=progress, stages=stages)
        return progress

    return write


def test_killed_while_candidates_are_refitted_and_written(
    found: Callable[[str], SearchPlan], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, search = found("undisturbed"), found("killed")
    assert write(undisturbed, Watching()).of(REFITTING) == [0, 0], "candidates of one shape share a refit"
    staging = temporary_path(search.build / "search")

    killed(lambda: write(search, Watching(dying_at(REFITTING, 3))))
    assert not (search.build / "search").exists()

    def one_file(number: int) -> None:
        """Dies once so many weight files of a student are there."""
        with monkeypatch.context() as patch:
            original, left = shards.atomic_path, [number]

            def dying(path: Path) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(path)

            patch.setattr(shards, "atomic_path", dying)
            killed(lambda: write(search, Watching()))

    one_file(2)
    assert len(list((staging / "search" / "01").glob(".minitron-student.tmp/*.safetensors"))) == 2
    one_file(3)
    assert len(list((staging / "search" / "01").glob(".minitron-student.tmp/*.safetensors"))) == 5, "two of them stayed"
    killed(lambda: write(search, Watching(dying_at(WRITING, 1))))
    assert [path.name for path in sorted(staging.glob("*.fingerprint"))] == ["01.fingerprint"]
    killed(lambda: write(search, Watching(dying_at(REFITTING, 2))))

    after = write(search, Watching())
    assert after.of(WRITING) == [2] and after.of("calibrate") == [], "neither the first shape nor the scores"
    assert after.of(REFITTING) == [2], "the refit of the second shape goes on"
    got, wanted = contents(search.build), contents(undisturbed.build)
    assert {f"search/{number:02d}/coordinates.safetensors" for number in (1, 2, 3, 4)} <= wanted.keys()
    assert got.keys() == wanted.keys() and [name for name in wanted if got[name] != wanted[name]] == []
    assert not list(search.build.rglob("*.tmp"))


def test_interrupted_between_the_last_student_and_the_whole(
    found: Callable[[str], SearchPlan], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = found("last")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # In the module, which stands behind a function of its name.
        patch.setitem(write_search.__globals__, "publish_folder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(search, Watching())
    assert not (search.build / "search").exists()
    again = write(search, Watching())
    assert again.of(WRITING) == [4] and again.of(REFITTING) == []


def test_what_is_there_stays_until_the_new_search_is_whole(
    found: Callable[[str], SearchPlan], write: Write, foundry: Foundry, loaded: LoadedSpec
) -> None:
    search = found("old")
    write(search, Watching())
    before = contents(search.build / "search")
    other = load_spec(loaded.path, ["recovery.refit=none"])
    with foundry.shortened():
        newer = make_search(other, build=search.build, weights=True)
    with pytest.raises(KeyboardInterrupt):
        write(newer, Watching(interrupting_at(WRITING, 2)))
    assert contents(search.build / "search") == before
    write(newer, Watching())
    assert contents(search.build / "search") != before and not list(search.build.rglob("*.tmp"))

    (search.build / "search" / ".minitron").unlink()
    with pytest.raises(UsageError, match=r"search was not made by minitron, and would be replaced; move it away"):
        write(search, Watching())


def interrupting_at(wanted: str, number: int) -> Callable[[str], None]:
    left = [number]

    def fatal(name: str) -> None:
        left[0] -= name == wanted
        if not left[0]:
            raise KeyboardInterrupt

    return fatal
