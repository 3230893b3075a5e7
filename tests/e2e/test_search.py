"""A search from its spec to its student: the same winner however it is carried out, and one that goes on from its rungs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron.compiler import compile_spec, make_search, why_stale, write_search
from minitron.compiler.compilation import Compilation
from minitron.compiler.compile import Stages
from minitron.runtime import evaluate, search, train
from minitron.runtime.metrics import iter_metrics
from minitron.specs import LoadedSpec, SpecInvalid, UsageError, load_spec
from minitron.specs.progress import Silent
from minitron.specs.search_files import Ranking, read_ranking, read_search
from tests.compiler.test_search import search_blocks
from tests.foundry import Foundry
from tests.runtime.processes import (
    kill_while_candidates_are_removed,
    last_word,
    search_candidates,
    start,
    train_on_ranks,
)

SEARCH = {"budget": {"parameters": 20_000, "tolerance": "30%"}, "candidates": 6, "rank": {"tokens": 2560, "rungs": 2}}


@pytest.fixture(scope="module")
def origin(foundry: Foundry) -> LoadedSpec:
    """Two shapes with three rates each, their candidates written and not yet trained; the teacher is corrected first, and
    hidden states are compared in the channels that a candidate keeps."""
    blocks = search_blocks(
        foundry,
        SEARCH,
        tokens=5120,
        optimizer={"lr": [1e-3, 4e-3, 1e3], "warmup_steps": 2},
        checkpoint={"every_tokens": 256},
        loss={"hidden_states": {"coordinates": "kept", "weight": 1.0, "schedule": "constant"}},
    )
    blocks["teacher_correction"] = {"tokens": 256, "optimizer": {"lr": 1e-4, "warmup_steps": 1}}
    loaded = foundry.load(foundry.teacher("llama"), {"hidden_size": 24, "intermediate_size": [24, 40]}, **blocks)
    with foundry.shortened():
        found = make_search(loaded, build=foundry.root / "search-origin", weights=True)
        write_search(found, device="cpu", progress=Silent())
    return loaded


@pytest.fixture
def build(foundry: Foundry, origin: LoadedSpec, tmp_path: Path) -> Path:
    """A build of its own beside the teacher, for paths are relative."""
    folder = foundry.root / f"search-{tmp_path.name}"
    shutil.copytree(foundry.root / "search-origin", folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(foundry: Foundry, origin: LoadedSpec) -> tuple[Path, Ranking]:
    folder = foundry.root / "search-undisturbed"
    shutil.copytree(foundry.root / "search-origin", folder)
    return folder, search(folder, device="cpu", progress=Silent())


def never(_: Compilation) -> Any:
    raise AssertionError("nothing is compiled")


def outcome(build: Path) -> tuple[str, dict[str, bytes]]:
    """The ranking, and the bytes of the checkpoint that the winner goes on from."""
    ranking = (build / "search" / "ranking.json").read_text(encoding="utf-8")
    files = sorted((build / "search").glob("*/checkpoints/step-*/*.safetensors"))
    return ranking, {str(file.relative_to(build)): file.read_bytes() for file in files}


def test_the_best_is_kept_and_nothing_of_those_that_are_out(undisturbed: tuple[Path, Ranking]) -> None:
    build, ranking = undisturbed
    file = read_search(build)
    assert file is not None and len(ranking.candidates) == 6 and ranking.winner is not None
    stays = [len(one.rungs) for one in ranking.candidates]
    assert sorted(stays) == [1, 1, 1, 2, 2, 2] and len(ranking.of(ranking.winner).rungs) == 2
    last = {one.number: one.rungs[1].kl for one in ranking.candidates if len(one.rungs) == 2}
    assert ranking.winner == min(last, key=lambda number: last[number] or 1e9)
    assert ranking.of(ranking.winner).rungs[1].kl < ranking.of(ranking.winner).zero_shot.kl  # type: ignore[operator]
    left = {path.parent.name for path in (build / "search").glob("*/checkpoints")}
    assert left == {f"{ranking.winner:02d}"} == {path.parent.name for path in (build / "search").glob("*/student")}
    assert not list(build.rglob("*.tmp"))
    wild = [one for one in file.candidates if one.optimizer.lr == 1e3]
    for one in wild:  # a rate that no training survives loses, and stops nobody
        assert ranking.of(one.number).rungs[0].kl is None or ranking.of(one.number).rungs[0].kl > 1.0  # type: ignore[operator]


def test_a_search_that_is_done_is_not_done_again(undisturbed: tuple[Path, Ranking]) -> None:
    build, ranking = undisturbed
    before = outcome(build)
    assert search(build, device="cpu", progress=Silent()) == ranking
    assert outcome(build) == before


def test_killed_at_any_step_it_ends_the_same(build: Path, undisturbed: tuple[Path, Ranking]) -> None:
    for steps in (3, 22, 9):  # in both rungs, and before the first checkpoint
        process, pipe = start(build, work=search_candidates)
        for _ in range(steps):
            assert pipe.recv() == "step"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        last_word(process, pipe)
    assert last_word(*start(build, kill_while_candidates_are_removed, search_candidates)) is None
    assert last_word(*start(build, work=search_candidates)) == "done"
    assert outcome(build) == outcome(undisturbed[0])


def test_interrupted_it_stops_after_a_checkpoint(build: Path, undisturbed: tuple[Path, Ranking]) -> None:
    process, pipe = start(build, work=search_candidates)
    for _ in range(2):
        assert pipe.recv() == "step"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert last_word(process, pipe) == "interrupted"
    assert list((build / "search").glob("*/checkpoints/step-*/state.json"))
    search(build, device="cpu", progress=Silent())
    assert outcome(build) == outcome(undisturbed[0])


def test_two_processes_find_the_same(build: Path, undisturbed: tuple[Path, Ranking]) -> None:
    """Beside the same teacher: correcting it is a training that all processes share, whose sums depend on their number."""
    shutil.copytree(undisturbed[0] / "teacher", build / "teacher")
    assert train_on_ranks(build, 2, work=search_candidates) == ["done", "done"]
    assert outcome(build) == outcome(undisturbed[0])


def test_the_winner_goes_on_from_its_last_rung(
    foundry: Foundry, origin: LoadedSpec, undisturbed: tuple[Path, Ranking], tmp_path: Path
) -> None:
    build = foundry.root / f"search-{tmp_path.name}"
    shutil.copytree(undisturbed[0], build)
    ranking = read_ranking(build)
    assert ranking is not None and ranking.winner is not None
    with foundry.shortened():
        plan = make_search(origin, build=build, weights=True).plan(ranking.winner)
        compile_spec(origin, build, device="cpu", progress=Silent(), plan=plan)
    assert why_stale(build, origin) is None
    document = json.loads((build / "plan.json").read_text(encoding="utf-8"))["search"]
    assert document["candidate"] == document["winner"] == ranking.winner and document["forecast"]["tokens"] == 5120
    training = yaml.safe_load((build / "training.yaml").read_text(encoding="utf-8"))
    assert training["start"] == {"checkpoints": f"search/{ranking.winner:02d}/checkpoints", "step": 40}
    # Another measurement renews the documents; nothing is scored, written or verified again, and the start stays.
    document = yaml.safe_load(origin.path.read_text(encoding="utf-8"))
    document["evaluate"]["continuation_tokens"] = 7
    measured = foundry.root / "spec-measured.yaml"
    measured.write_text(yaml.safe_dump(document), encoding="utf-8")
    with foundry.shortened():
        found = make_search(load_spec(measured), build=build, weights=True)
        write_search(found, device="cpu", progress=Silent())
        compile_spec(
            found.loaded,
            build,
            device="cpu",
            progress=Silent(),
            plan=found.plan(ranking.winner),
            stages=Stages(score=never),
        )
    assert why_stale(build, found.loaded) is None
    renewed = yaml.safe_load((build / "training.yaml").read_text(encoding="utf-8"))
    assert renewed["evaluate"]["continuation_tokens"] == 7 and renewed["start"] == training["start"]
    train(build, device="cpu", progress=Silent())
    steps = list(iter_metrics(build / "train" / "metrics.jsonl"))
    assert [one["step"] for one in steps] == list(range(41, 81)), "what the rungs have learnt is not learnt again"
    rates = [one["lr"] for one in steps]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0.9 * training["optimizer"]["lr"]
    results = evaluate(build, device="cpu", progress=Silent())
    assert results["search"]["winner"] == ranking.winner and len(results["search"]["candidates"]) == 6
    assert results["search"]["candidates"][0]["zero_shot"]["kl"] > 0
    # The state is that of one student: another's training does not begin with it.
    shutil.rmtree(build / "train" / "checkpoints")
    shutil.rmtree(build / "model")
    (build / "train" / "finished.json").unlink()
    (build / "training.yaml").write_text(yaml.safe_dump(training | {"seed": 7}), encoding="utf-8")
    with pytest.raises(
        SpecInvalid, match=r"seed: was 0 when this training began and is now 7; write 0 again, search again"
    ):
        train(build, device="cpu", progress=Silent())
    shutil.rmtree(build / "search")
    with pytest.raises(SpecInvalid, match=r"start: .* holds no checkpoint of step 40; search again"):
        train(build, device="cpu", progress=Silent())


def test_another_candidate_begins_at_its_beginning(
    foundry: Foundry, origin: LoadedSpec, undisturbed: tuple[Path, Ranking], tmp_path: Path
) -> None:
    build = foundry.root / f"search-{tmp_path.name}"
    shutil.copytree(undisturbed[0], build)
    found = make_search(origin, build=build, weights=True)
    other = next(one.number for one in found.candidates.found if one.number != undisturbed[1].winner)
    with foundry.shortened():
        compile_spec(origin, build, device="cpu", progress=Silent(), plan=found.plan(other))
    training = yaml.safe_load((build / "training.yaml").read_text(encoding="utf-8"))
    assert training["start"] is None and training["optimizer"]["lr"] == found.candidate(other).lr
    with pytest.raises(UsageError, match="there is no candidate 7; write a number from 1 to 6"):
        found.plan(7)


def test_candidates_are_written_once(foundry: Foundry, origin: LoadedSpec, build: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (build / "search").rglob("*") if path.is_file()}
    with foundry.shortened():
        write_search(make_search(origin, build=build, weights=True), device="cpu", progress=Silent())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # A longer training, or another question asked of it, is the same search; another rate is not.
    document: dict[str, Any] = yaml.safe_load(origin.path.read_text(encoding="utf-8"))
    changed = foundry.root / "spec-changed.yaml"
    document["distill"]["tokens"] = 10_240
    changed.write_text(yaml.safe_dump(document), encoding="utf-8")
    with foundry.shortened():
        write_search(make_search(load_spec(changed), build=build, weights=True), device="cpu", progress=Silent())
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_build_without_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no search; `minitron compile SPEC -o .*` writes one from a spec with"):
        search(tmp_path, device="cpu", progress=Silent())
