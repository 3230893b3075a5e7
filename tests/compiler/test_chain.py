"""Chains: a spec whose teacher is the result of another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from minitron.compiler import Plan, make_plan, why_not_finished, why_stale
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.teacher.lock import renew
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.builds import finished_note
from minitron.specs.chain import chain
from minitron.specs.errors import SpecInvalid
from tests.foundry import Build, Folder, Foundry
from tests.models import text

DATA = "importance: {data: {text: [corpus.txt], document: line, samples: 4, sequence_length: 32}}\n"
LARGE = "teacher: {model: teacher, dtype: float32}\nstudent: {intermediate_size: 24}\n" + DATA
MIDDLE = "teacher:\n  spec: large.yaml\n  dtype: float32\nstudent: {hidden_size: 24}\n" + DATA
SMALL = "teacher:\n  spec: middle.yaml\n  dtype: float32\nstudent: {num_hidden_layers: 1}\n" + DATA


@pytest.fixture(scope="module")
def made(foundry: Foundry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a text and three specs that train nothing; the first two are compiled, one after the other."""
    folder = tmp_path_factory.mktemp("made") / "chain"
    shutil.copytree(foundry.teacher("llama", num_hidden_layers=2), folder / "teacher")
    (folder / "corpus.txt").write_text(text(60))
    for name, content in (("large", LARGE), ("middle", MIDDLE), ("small", SMALL)):
        (folder / f"{name}.yaml").write_text(content)
    compiled(foundry, folder / "large.yaml")
    compiled(foundry, folder / "middle.yaml")
    return folder


@pytest.fixture
def specs(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(made, tmp_path / "chain")


def compiled(foundry: Foundry, spec: Path) -> Build:
    loaded = load_spec(spec)
    return foundry.compile(loaded, loaded.build, program=False)


def refused(call: Callable[[], object]) -> tuple[str, int, str, str]:
    """(file, line, path, message and hint) of the one error."""
    with pytest.raises(SpecInvalid) as caught:
        call()
    (error,) = caught.value.errors
    return Path(error.file).name, error.line, error.path, f"{error.message}; {error.hint}"


def planned(foundry: Foundry, loaded: LoadedSpec) -> Plan:
    with foundry.shortened():
        return make_plan(loaded, build=loaded.build)


# -- order --------------------------------------------------------------------------------------------------------------


def test_the_first_teacher_comes_first(made: Path) -> None:
    assert [one.spec.name for one in chain(load_spec(made / "small.yaml"))] == ["large", "middle"]
    assert chain(load_spec(made / "large.yaml")) == ()


def test_a_circle_is_refused_at_the_line_that_closes_it(specs: Path) -> None:
    (specs / "large.yaml").write_text("teacher:\n  spec: small.yaml\nstudent: {layers: {drop: [0]}}\n")
    file, line, path, words = refused(lambda: chain(load_spec(specs / "small.yaml")))
    assert (file, line, path) == ("large.yaml", 2, "teacher.spec")
    assert words.startswith("`small.yaml` comes back to a spec that takes its teacher from this one; write `model`")
    (specs / "self.yaml").write_text(SMALL.replace("middle.yaml", "self.yaml"))
    assert refused(lambda: make_plan(load_spec(specs / "self.yaml"), build=specs / "build"))[:2] == ("self.yaml", 2)


def test_a_spec_that_is_not_there_is_refused_at_its_line(specs: Path) -> None:
    (specs / "middle.yaml").unlink()
    assert refused(lambda: chain(load_spec(specs / "small.yaml"))) == (
        "small.yaml",
        2,
        "teacher.spec",
        "there is no file `middle.yaml`; write the path of a spec, relative to this file",
    )
    (specs / "middle.yaml").mkdir()
    assert "`middle.yaml` is a folder" in refused(lambda: chain(load_spec(specs / "small.yaml")))[3]


def test_a_wrong_spec_above_is_refused_at_its_own_line(specs: Path) -> None:
    (specs / "large.yaml").write_text(LARGE.replace("intermediate_size: 24", "intermediate_size: many"))
    assert refused(lambda: chain(load_spec(specs / "small.yaml")))[:2] == ("large.yaml", 2)


# -- plan and compile ---------------------------------------------------------------------------------------------------


def test_a_plan_works_from_plans_where_nothing_was_run(specs: Path, foundry: Foundry) -> None:
    shutil.rmtree(specs / "builds")
    for weights in (specs / "teacher").glob("*.safetensors"):
        weights.unlink()
    plan = planned(foundry, load_spec(specs / "middle.yaml"))
    above = planned(foundry, load_spec(specs / "large.yaml"))
    assert Estimate(plan).teacher_costs == Estimate(above).student_costs
    assert plan.teacher.captured.config.to_diff_dict() == above.config.to_diff_dict()
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers")
    assert [getattr(plan.teacher.captured.config, key) for key in keys] == [32, 24, 2]
    assert [getattr(plan.config, key) for key in keys] == [24, 24, 2]
    assert plan.remarks[0] == (
        f"the teacher is the student that large.yaml plans: {specs}/builds/large is not compiled yet"
    )


def test_a_width_above_that_of_the_planned_teacher_is_refused(specs: Path, foundry: Foundry) -> None:
    (specs / "middle.yaml").write_text(MIDDLE.replace("hidden_size: 24", "intermediate_size: 32"))
    file, line, path, words = refused(lambda: planned(foundry, load_spec(specs / "middle.yaml")))
    assert (file, line, path) == ("middle.yaml", 4, "student.intermediate_size") and "24" in words


def test_compiling_takes_the_result_above(made: Path) -> None:
    build = Folder(made / "builds" / "middle")
    assert build.document("verification.json")["passed"] is True and build.document("plan.json")["remarks"] == []
    assert (build.config["hidden_size"], build.config["intermediate_size"]) == (24, 24)
    assert yaml.safe_load((build.folder / "training.yaml").read_text())["teacher"]["model"] == "../large/student"
    assert why_not_finished(load_spec(made / "middle.yaml")) is None


def test_compiling_needs_the_result_above(specs: Path, foundry: Foundry) -> None:
    shutil.rmtree(specs / "builds" / "middle")
    assert refused(lambda: compiled(foundry, specs / "small.yaml")) == (
        "small.yaml",
        2,
        "teacher.spec",
        f"`middle.yaml` has no result yet: {specs}/builds/middle is not compiled yet; "
        "`minitron run middle.yaml` first, or `minitron run small.yaml`, which runs both",
    )


def test_what_is_trained_is_finished_once_its_training_is(specs: Path) -> None:
    """By hand: a build that is compiled and trained, as the runtime leaves it."""
    path = specs / "large.yaml"
    path.write_text(
        LARGE + "distill: {data: {text: [corpus.txt]}, tokens: 1M, sequence_length: 32, global_batch_size: 8}\n"
    )
    loaded = load_spec(path)
    build = loaded.build
    plan = json.loads((build / "plan.json").read_text())
    plan["spec"]["sha256"] = loaded.sha256
    plan["inputs"]["data"]["distill.data"] = plan["inputs"]["data"]["importance.data"]
    (build / "plan.json").write_text(json.dumps(plan))
    assert loaded.result == build / "model"
    assert why_not_finished(loaded) == f"{build} is not trained to its end"
    shutil.copytree(build / "student", build / "model")
    finished_note(build).parent.mkdir()
    finished_note(build).write_text("{}")
    assert why_not_finished(loaded) is None


# -- what has changed ---------------------------------------------------------------------------------------------------


def other_text(folder: Path) -> None:
    (folder / "corpus.txt").write_text(text(61))


def other_teacher(folder: Path) -> None:
    config = folder / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-4}))


def other_width(folder: Path) -> None:
    (folder / "large.yaml").write_text(LARGE.replace("intermediate_size: 24", "intermediate_size: 32"))


def other_training(folder: Path) -> None:
    path = folder / "builds" / "large" / "train"
    path.mkdir()
    (path / "finished.json").write_text('{"identity": "anew"}')


@pytest.mark.parametrize(
    ("change", "large", "middle"),
    [
        (other_text, "inputs: data importance.data corpus.txt is built from", "inputs: teacher inputs is built from"),
        (other_teacher, "inputs: teacher config is built from", "inputs: teacher inputs is built from"),
        (other_width, "another version of the spec", "inputs: teacher sha256 is built from"),
        (other_training, None, "inputs: teacher result is built from"),
    ],
)
def test_what_changes_above_is_noticed_below(
    specs: Path, change: Callable[[Path], None], large: str | None, middle: str
) -> None:
    def reasons() -> dict[str, str | None]:
        both = {name: load_spec(specs / f"{name}.yaml") for name in ("large", "middle")}
        return {name: why_stale(one.build, one) for name, one in both.items()}

    assert reasons() == {"large": None, "middle": None}
    change(specs)
    found = reasons()
    for name, words in (("large", large), ("middle", middle)):
        assert (found[name] is None) == (words is None)
        assert words is None or words in str(found[name])


def test_why_a_build_is_not_up_to_date(specs: Path) -> None:
    large = load_spec(specs / "large.yaml")
    build = large.build
    assert why_stale(build, large) is None
    verification = json.loads((build / "verification.json").read_text())
    (build / "verification.json").write_text(json.dumps(verification | {"passed": False}))
    assert why_stale(build, large) == "compiled, and its verification did not pass"
    (build / "verification.json").write_text(json.dumps(verification))
    config = build / "student" / "config.json"
    whole = config.read_text()
    config.write_text(whole + "\n")
    words = "compiled, and its student is not what was verified: config.json has changed"
    assert why_stale(build, large) == words
    config.write_text(whole)
    assert why_stale(build, large) is None
    (build / "verification.json").unlink()
    assert why_stale(build, large) == "not compiled to its end"
    assert why_stale(build.parent / "nowhere", large) == "not compiled yet"
    assert why_stale(build, load_spec(specs / "large.yaml", ["student.intermediate_size=32"])) == (
        "compiled from another version of the spec"
    )


def test_a_lock_of_a_chain_follows_what_the_spec_above_is_compiled_from(specs: Path) -> None:
    first = renew(load_spec(specs / "middle.yaml"))[0]["teacher"]
    assert isinstance(first, dict) and list(first) == ["spec", "sha256", "inputs"]
    other_text(specs)
    assert renew(load_spec(specs / "middle.yaml"))[0]["teacher"]["inputs"] != first["inputs"]  # type: ignore[call-overload, index]
