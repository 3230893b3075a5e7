"""The lock file: what stands in it, what it pins, and how it says what has changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from minitron.compiler import apply_lock, make_plan
from minitron.compiler.plan_document import plan_document
from minitron.compiler.teacher import provenance as inputs_module
from minitron.compiler.teacher.lock import is_locked, renew
from minitron.compiler.teacher.open_teacher import open_teacher
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.errors import SpecInvalid, UsageError
from minitron.specs.lockfile import lock_path, pins, read_lock
from tests.foundry import Foundry
from tests.hub import MAIN, NEXT, put_in_cache, use_cache
from tests.models import text

SPEC = """\
name: locked
teacher:
  model: teacher
  dtype: float32
student:
  intermediate_size: 24
importance:
  data: {text: [corpus/*.txt], document: line, samples: 4, sequence_length: 32}
evaluate:
  held_out: {text: [valid.txt]}
  data_dir: tasks
"""


@pytest.fixture
def spec(tmp_path: Path, foundry: Foundry) -> Path:
    """A spec beside its teacher and its texts."""
    shutil.copytree(foundry.teacher("llama", num_hidden_layers=2), tmp_path / "teacher")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(text(60))
    (tmp_path / "corpus" / "b.txt").write_text(text(60, seed=1))
    (tmp_path / "valid.txt").write_text(text(9, seed=2))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "arc.jsonl").write_text("")
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def locked(spec: Path) -> LoadedSpec:
    """The spec, with a lock written beside it."""
    loaded = load_spec(spec)
    renew(loaded)
    return loaded


# -- what stands in it --------------------------------------------------------------------------------------------------


def test_a_lock_can_be_read_in_a_review(spec: Path) -> None:
    loaded = locked(spec)
    path = lock_path(loaded)
    assert path == spec.parent / "locked.lock.yaml"
    lines = path.read_text().splitlines()
    assert lines[0] == "# What spec.yaml is compiled from, pinned: commit this file beside it."
    content = yaml.safe_load(path.read_text())
    assert list(content) == ["format_version", "spec", "teacher", "tokenizer", "data", "versions"]
    assert list(content["teacher"]) == ["model", "config", "generation_config", "weights"]
    assert list(content["data"]["importance.data"]) == ["corpus/a.txt", "corpus/b.txt"]
    assert list(content["versions"]) == ["minitron", "torch", "transformers"]
    assert all(lines[index - 1].startswith("# ") for index, line in enumerate(lines) if line in ("teacher:", "data:"))
    assert max(map(len, lines)) < 125


def test_the_same_inputs_give_the_same_file_wherever_it_lies(
    spec: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = lock_path(locked(spec)).read_bytes()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "repository"
    shutil.copytree(spec.parent, elsewhere)
    (elsewhere / "locked.lock.yaml").unlink()
    assert lock_path(locked(elsewhere / "spec.yaml")).read_bytes() == first
    assert renew(load_spec(spec))[1] is False, "a lock that holds is not written again"


def test_of_many_files_there_is_one_hash(spec: Path) -> None:
    for number in range(20):
        (spec.parent / "corpus" / f"{number}.txt").write_text(f"document {number}")
    before = renew(load_spec(spec))[0]["data"]["importance.data"]  # type: ignore[index, call-overload]
    assert isinstance(before, dict) and list(before) == ["files", "all"] and before["files"] == "22"
    (spec.parent / "corpus" / "7.txt").write_text("another document")
    assert "data importance.data all" in [error.path for error in apply_lock(load_spec(spec), locked=False)[1]]


# -- what is stale ------------------------------------------------------------------------------------------------------


def more_text(folder: Path) -> None:
    (folder / "corpus" / "b.txt").write_text(text(61))


def another_file(folder: Path) -> None:
    (folder / "corpus" / "c.txt").write_text(text(3))


def a_file_less(folder: Path) -> None:
    (folder / "corpus" / "b.txt").unlink()


def another_tokenizer(folder: Path) -> None:
    path = folder / "teacher" / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")


def another_configuration(folder: Path) -> None:
    path = folder / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))


def another_model(folder: Path) -> None:
    (folder / "teacher").rename(folder / "other")
    path = folder / "spec.yaml"
    path.write_text(path.read_text().replace("model: teacher", "model: other"))


def other_benchmarks(folder: Path) -> None:
    (folder / "tasks" / "arc.jsonl").write_text("{}")


def another_version(folder: Path) -> None:
    path = folder / "locked.lock.yaml"
    path.write_text(path.read_text().replace("transformers: ", "transformers: 4."))


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        (more_text, "data importance.data corpus/b.txt", r"is locked at sha256:\w{12} and is sha256:\w{12} now"),
        (another_file, "data importance.data corpus/c.txt", r"is sha256:\w{12} and not locked"),
        (a_file_less, "data importance.data corpus/b.txt", r"is locked at sha256:\w{12} and no longer used"),
        (another_tokenizer, "tokenizer tokenizer_config.json", r"is locked at sha256:\w{12} and is sha256:\w{12} now"),
        (another_configuration, "teacher config", r"is locked at sha256:\w{12} and is sha256:\w{12} now"),
        (other_benchmarks, "data evaluate.data_dir all", r"is locked at sha256:\w{12} and is sha256:\w{12} now"),
        (another_model, "teacher model", "is locked at teacher and is other now"),
        (another_version, "versions transformers", r"is locked at 4\.[\d.]+ and is [\d.]+ now"),
    ],
)
def test_what_changed_is_said_at_its_line(spec: Path, change: Callable[[Path], None], where: str, words: str) -> None:
    loaded = locked(spec)
    assert apply_lock(loaded, locked=True)[1] == []
    change(spec.parent)
    loaded = load_spec(spec)
    with pytest.raises(SpecInvalid) as caught:
        apply_lock(loaded, locked=True)
    (error,) = caught.value.errors
    assert error.path == where
    assert re.fullmatch(words, error.message), error.message
    assert error.hint == "`minitron lock spec.yaml` renews it"
    key = where.split()[-1]
    line = lock_path(loaded).read_text().splitlines()[error.line - 1]
    assert line.split(":")[0].strip() in (key, where.split()[-2]), "the line of the key, or of what it would stand in"
    # Without --locked it is a warning, and renewing the lock ends it.
    assert [str(one) for one in apply_lock(loaded, locked=False)[1]] == [str(error)]
    renew(loaded)
    assert is_locked(loaded)


def test_what_the_spec_says_itself_is_not_locked(spec: Path) -> None:
    locked(spec)
    spec.write_text(SPEC.replace("intermediate_size: 24", "hidden_size: 16").replace("samples: 4", "samples: 2"))
    assert apply_lock(load_spec(spec), locked=True)[1] == []


def test_locked_without_a_lock_is_refused(spec: Path) -> None:
    loaded = load_spec(spec)
    assert apply_lock(loaded, locked=False) == (loaded, [])
    with pytest.raises(
        UsageError, match=r"locked\.lock\.yaml: there is no lock file; `minitron lock spec\.yaml` writes"
    ):
        apply_lock(loaded, locked=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("teacher:\n", "<<<<<<< ours\nteacher:\n", "not valid YAML"),
        ("format_version: 1", "format_version: 2", "2 is not the format that this version reads, 1"),
        ("format_version: 1\n", "", "None is not the format"),
        ("  model: teacher\n", "  model: teacher\n  model: other\n", "stands twice"),
    ],
)
def test_a_broken_lock_is_refused_at_its_line(spec: Path, old: str, new: str, message: str) -> None:
    path = lock_path(locked(spec))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(SpecInvalid, match=message) as caught:
        apply_lock(load_spec(spec), locked=False)
    assert caught.value.errors[0].file == str(path) and caught.value.errors[0].line > 0
    assert not is_locked(load_spec(spec))
    renew(load_spec(spec))
    assert is_locked(load_spec(spec))


def test_what_is_not_there_is_left_to_the_plan_unless_locked(spec: Path) -> None:
    loaded = locked(spec)
    (spec.parent / "valid.txt").unlink()
    assert apply_lock(loaded, locked=False)[1] == []
    for refused in (lambda: apply_lock(loaded, locked=True), lambda: renew(loaded)):
        with pytest.raises(SpecInvalid, match=r"spec\.yaml:10:.*there is no file `valid\.txt`"):
            refused()


# -- what it pins -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return use_cache(monkeypatch, tmp_path / "cache", offline=True)


def test_a_branch_is_followed_until_there_is_a_lock(spec: Path, cache: Path, foundry: Foundry) -> None:
    put_in_cache(cache, "org/tiny", MAIN, foundry.teacher("llama", num_hidden_layers=2), "main")
    spec.write_text(SPEC.replace("model: teacher", "model: org/tiny\n  revision: main"))
    teacher = renew(load_spec(spec))[0]["teacher"]
    assert isinstance(teacher, dict)
    assert {key: teacher[key] for key in ("model", "revision", "commit")} == {
        "model": "org/tiny",
        "revision": "main",
        "commit": MAIN,
    }
    put_in_cache(cache, "org/tiny", NEXT, foundry.teacher("llama"), "main")

    loaded, stale = apply_lock(load_spec(spec), locked=True)
    assert stale == [] and loaded.pins == {"teacher.revision": MAIN}
    assert loaded.sha256 == load_spec(spec).sha256, "the spec is what its author wrote"
    assert open_teacher(load_spec(spec), weights=False, planned=pytest.fail).commit == NEXT
    with foundry.shortened():
        pinned = plan_document(make_plan(loaded, build=spec.parent / "build"))
    assert pinned["teacher"]["commit"] == MAIN and pinned["teacher"]["widths"]["num_hidden_layers"] == 2
    assert pinned["spec"]["pins"] == {"teacher.revision": MAIN}
    assert pinned["spec"]["resolved"]["teacher"]["revision"] == "main"

    renew(load_spec(spec))
    assert apply_lock(load_spec(spec), locked=True)[0].pins == {"teacher.revision": NEXT}


def test_a_pin_of_another_model_or_branch_is_not_followed(spec: Path, cache: Path, foundry: Foundry) -> None:
    put_in_cache(cache, "org/tiny", MAIN, foundry.teacher("llama", num_hidden_layers=2), "main", "v2")
    spec.write_text(SPEC.replace("model: teacher", "model: org/tiny"))
    renew(load_spec(spec))
    spec.write_text(SPEC.replace("model: teacher", "model: org/tiny\n  revision: v2"))
    loaded, stale = apply_lock(load_spec(spec), locked=False)
    assert loaded.pins == {}
    assert [(one.path, one.message) for one in stale] == [("teacher revision", "is v2 and not locked")]


BLEND = """\
teacher: {model: teacher}
student: {layers: {drop: [0]}}
distill:
  data:
    blend:
      - {weight: 1, dataset: org/words, split: train, revision: main}
      - {weight: 2, text: [valid.txt]}
  tokens: 1M
  sequence_length: 32
  global_batch_size: 8
"""


def test_data_sets_of_the_hub_are_pinned_part_by_part(spec: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec.write_text(BLEND)
    with pytest.raises(SpecInvalid, match=r"spec\.yaml:6:.*the data set org/words is not in.*--repo-type dataset`"):
        renew(load_spec(spec))
    (spec.parent / "empty").mkdir()
    put_in_cache(cache, "org/words", NEXT, spec.parent / "empty", "main", kind="dataset")
    data = renew(load_spec(spec))[0]["data"]
    assert isinstance(data, dict)
    assert data["distill.data.blend.0"] == {
        "dataset": "org/words",
        "split": "train",
        "revision": "main",
        "commit": NEXT,
    }
    assert list(data["distill.data.blend.1"]) == ["valid.txt"]
    loaded = apply_lock(load_spec(spec), locked=True)[0]
    assert loaded.spec.distill is not None and loaded.spec.distill.data.blend is not None
    assert loaded.spec.distill.data.blend[0].revision == NEXT
    # A commit is not looked up again: it cannot have moved.
    monkeypatch.setattr(inputs_module, "commit_of", lambda *_: pytest.fail("asked"))
    assert apply_lock(load_spec(spec), locked=True)[1] == []
    lock = read_lock(load_spec(spec))
    assert lock is not None and pins(lock, loaded) == {"distill.data.blend.0.revision": NEXT}


def test_the_same_spec_and_lock_give_the_same_selection_and_bytes(spec: Path, foundry: Foundry) -> None:
    locked(spec)
    builds = [
        foundry.compile(apply_lock(load_spec(spec), locked=True)[0], spec.parent / f"build-{number}", program=False)
        for number in (1, 2)
    ]
    first, second = (build.document("plan.json") for build in builds)
    assert first["selection"] == second["selection"] and first["inputs"] == second["inputs"]
    assert first["fingerprint"] == second["fingerprint"]
    files = [sorted(path for path in (build.folder / "student").iterdir()) for build in builds]
    for one, other in zip(*files, strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()
