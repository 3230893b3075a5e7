"""The commands as a user runs them: real processes, a real checkpoint, every exit code."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .tiny import COMMAND, TIMEOUT, Command, environment

Finished = subprocess.CompletedProcess[str]


def documents(text: str) -> dict[str, object]:
    """The one JSON document that `text` is, with its format version."""
    content = json.loads(text)
    assert content["format_version"] == 1
    assert isinstance(content, dict)
    return content


def copied(workshop: Path, folder: Path) -> Path:
    """A copy of the workshop without its builds, for tests that break something; returns its spec."""
    shutil.copytree(workshop, folder, ignore=shutil.ignore_patterns("builds", "wrong.yaml"), dirs_exist_ok=True)
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def planned(finished: Finished, workshop: Path, minitron: Command) -> Finished:
    """The plan of the same spec, after it was compiled."""
    return minitron("plan", workshop / "tiny.yaml", "--json", "--detailed-exitcode")


@pytest.fixture(scope="module")
def changed(finished: Finished, workshop: Path, minitron: Command) -> Finished:
    """The plan of a spec that asks for more than was compiled."""
    spec = workshop / "tiny.yaml"
    return minitron("plan", spec, "--markdown", "--detailed-exitcode", "--set", "student.hidden_size=16")


class TestTheWholeWay:
    """`minitron run` once, and what can be done with what it leaves."""

    def test_it_ends_well_and_says_where_everything_is(self, finished: Finished, workshop: Path) -> None:
        assert finished.returncode == 0, finished.stderr
        build = workshop / "builds" / "tiny"
        for name in ("plan.json", "verification.json", "training.yaml", "results.json", "student", "model"):
            assert (build / name).exists(), name
        assert str(build / "model") in finished.stdout
        assert re.search(r"held-out loss( +\d+\.\d+){3}", finished.stdout)
        assert re.search(r"parameters( +[\d,]+){3}", finished.stdout)

    def test_plan_results_and_progress_are_where_they_belong(self, finished: Finished) -> None:
        assert finished.stdout.index("Plan tiny") < finished.stdout.index("Results")
        assert "tokens/s" in finished.stderr or "done in" in finished.stderr
        assert "done in" not in finished.stdout
        for noise in ("Warning", "Traceback", "it/s", "\x1b", "\r"):
            assert noise not in finished.stdout + finished.stderr

    def test_the_student_loads_in_transformers(self, finished: Finished, workshop: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model_folder = workshop / "builds" / "tiny" / "model"
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        assert model.config.hidden_size == 24
        assert model.config.num_hidden_layers == 2
        words = AutoTokenizer.from_pretrained(model_folder)("the cat sees", return_tensors="pt")
        assert model.generate(**words, max_new_tokens=3, do_sample=False).shape[1] >= words["input_ids"].shape[1] + 1

    def test_again_it_only_looks(self, finished: Finished, workshop: Path, minitron: Command) -> None:
        student = workshop / "builds" / "tiny" / "student" / "model.safetensors"
        before = student.stat().st_mtime_ns
        again = minitron("run", workshop / "tiny.yaml", "--device", "cpu")
        assert again.returncode == 0 and "up to date" in again.stderr
        assert student.stat().st_mtime_ns == before

    def test_show_and_eval_print_the_documents(self, finished: Finished, workshop: Path, minitron: Command) -> None:
        build = workshop / "builds" / "tiny"
        shown = documents(minitron("show", build, "--json").stdout)
        assert shown["plan"] == json.loads((build / "plan.json").read_text())
        assert shown["verification"]["passed"] is True  # type: ignore[index]
        assert shown["training"]["last"]["tokens"] >= 4096  # type: ignore[index]
        report = Path(str(documents(minitron("show", build, "--html", "--json").stdout)["report"]))
        assert report == build / "report.html"
        chapters = set(re.findall(r"href=.#(\w+)", report.read_text()))
        assert chapters == {"plan", "verification", "importance", "training", "results", "spec"}
        results = documents(minitron("eval", build, "--json", "--device", "cpu").stdout)
        assert set(results["models"]) == {"teacher", "pruned", "distilled"}  # type: ignore[call-overload]

    def test_detailed_exitcode_knows_what_is_up_to_date(self, planned: Finished, changed: Finished) -> None:
        assert (planned.returncode, planned.stderr) == (0, "")
        assert changed.returncode == 3 and "another version of the spec" in changed.stderr

    def test_the_plan_before_is_the_plan_after(self, planned: Finished, workshop: Path) -> None:
        compiled = json.loads((workshop / "builds" / "tiny" / "plan.json").read_text())
        for key in ("spec", "teacher", "student", "axes", "phases"):
            assert documents(planned.stdout)[key] == compiled[key]

    def test_the_three_renderings_name_the_same_figures(
        self, finished: Finished, planned: Finished, changed: Finished
    ) -> None:
        plan = documents(planned.stdout)
        teacher, student = (f"{plan[side]['parameters']:,}" for side in ("teacher", "student"))  # type: ignore[index]
        assert re.search(rf"parameters +{teacher} +{student}", finished.stdout)
        assert f"| parameters | {teacher} |" in changed.stdout
        assert "| hidden_size | 32 | 16 | 50.0% |" in changed.stdout


def interrupted(command: list[str], home: Path, when: Callable[[], bool]) -> Finished:
    """Starts a command, interrupts it as Ctrl-C does as soon as `when()` holds, and waits for its end."""
    process = subprocess.Popen(
        [*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(home)
    )
    deadline = time.monotonic() + TIMEOUT
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("sign", ["plan.json", "train/metrics.jsonl"])
def test_interrupted_it_ends_with_130_and_goes_on_when_started_again(
    workshop: Path, minitron: Command, home: Path, tmp_path: Path, sign: str
) -> None:
    spec = copied(workshop, tmp_path)
    build = tmp_path / "builds" / "tiny"
    spec.write_text(spec.read_text().replace("tokens: 4096", "tokens: 65536"))
    stopped = interrupted(["run", str(spec), "--device", "cpu"], home, (build / sign).exists)
    assert stopped.returncode == 130
    assert "interrupted" in stopped.stderr and "Traceback" not in stopped.stderr
    again = minitron("run", spec, "--device", "cpu")
    assert again.returncode == 0, again.stderr
    steps = [json.loads(line)["step"] for line in (build / "train" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 65_536 // (32 * 8)


def test_a_teacher_that_is_corrected_and_captured_first(workshop: Path, minitron: Command, tmp_path: Path) -> None:
    spec = copied(workshop, tmp_path)
    correction = "teacher_correction: {tokens: 1024, optimizer: {lr: 1e-3, warmup_steps: 1}}\n"
    spec.write_text(
        correction + spec.read_text().replace("tokens: 4096", "tokens: 1024\n  teacher_logits: {sampled: 4}")
    )
    done = minitron("run", spec, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    build = tmp_path / "builds" / "tiny"
    names = [phase["name"] for phase in json.loads((build / "plan.json").read_text())["phases"]]
    assert names == ["calibrate", "teacher_correction", "capture", "distill"]
    assert re.search(r"corrected the teacher: held-out loss \d+\.\d+ before, \d+\.\d+ after", done.stderr)
    assert re.search(r"teacher +corrected_teacher +pruned +distilled", done.stdout)
    stored = sum(path.stat().st_size for path in (build / "teacher_logits").glob("shard-*"))
    planned = json.loads((build / "plan.json").read_text())["phases"][2]["disk_bytes"]
    assert stored < planned + 4096  # the plan says at most, and headers beside
    again = minitron("capture", build, "--device", "cpu")
    assert again.returncode == 0 and str(build / "teacher_logits") in again.stdout


def test_nothing_to_capture_is_a_wrong_call(finished: Finished, workshop: Path, minitron: Command) -> None:
    done = minitron("capture", workshop / "builds" / "tiny")
    assert done.returncode == 2 and "there is nothing to store" in done.stderr


@pytest.mark.parametrize("command", ["train", "eval", "show", "capture"])
def test_what_is_no_build_is_a_wrong_call(minitron: Command, workshop: Path, tmp_path: Path, command: str) -> None:
    for wrong in (tmp_path / "nowhere", workshop / "teacher", workshop / "tiny.yaml"):
        done = minitron(command, wrong)
        assert done.returncode == 2
        assert done.stdout == "" and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def cut_weights(teacher: Path) -> None:
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def break_header(teacher: Path) -> None:
    weights = teacher / "model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])


def remove_weights(teacher: Path) -> None:
    (teacher / "model.safetensors").unlink()


def break_config(teacher: Path) -> None:
    (teacher / "config.json").write_text('{"model_type": "llama", ')


def remove_config(teacher: Path) -> None:
    (teacher / "config.json").unlink()


def strange_model(teacher: Path) -> None:
    (teacher / "config.json").write_text('{"model_type": "no-such-model"}')


def no_tokenizer(teacher: Path) -> None:
    for file in teacher.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    "damage",
    [cut_weights, break_header, remove_weights, break_config, remove_config, strange_model, no_tokenizer],
)
def test_a_bad_checkpoint_is_a_sentence(
    minitron: Command, workshop: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    spec = copied(workshop, tmp_path)
    damage(tmp_path / "teacher")
    done = minitron("compile", spec, "--device", "cpu", "--json")
    assert done.returncode in (1, 2), done.stderr
    (error,) = documents(done.stdout)["errors"]  # type: ignore[misc]
    assert str(tmp_path / "teacher") in error["message"] and "unexpected" not in error["message"]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "builds" / "tiny" / "student").exists()


def test_a_teacher_that_is_not_there_is_named_at_its_line(minitron: Command, workshop: Path, tmp_path: Path) -> None:
    spec = copied(workshop, tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    done = minitron("plan", spec)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "teacher" in done.stderr


def test_text_that_is_not_there_is_named(minitron: Command, workshop: Path, tmp_path: Path) -> None:
    spec = copied(workshop, tmp_path)
    (tmp_path / "corpus.txt").unlink()
    done = minitron("compile", spec, "--device", "cpu")
    assert done.returncode in (1, 2)
    assert "corpus.txt" in done.stderr and "Traceback" not in done.stderr and "unexpected" not in done.stderr


def test_a_build_without_its_student_is_a_sentence(
    minitron: Command, finished: Finished, workshop: Path, tmp_path: Path
) -> None:
    shutil.copytree(workshop, tmp_path, dirs_exist_ok=True)
    build = tmp_path / "builds" / "tiny"
    for name in ("student", "model", "train"):
        shutil.rmtree(build / name)
    done = minitron("train", build, "--device", "cpu")
    assert done.returncode in (1, 2)
    assert "student" in done.stderr and "Traceback" not in done.stderr and "unexpected" not in done.stderr


def test_a_folder_that_cannot_be_written_is_a_sentence(minitron: Command, workshop: Path) -> None:
    done = minitron("compile", workshop / "tiny.yaml", "-o", "/proc/build", "--device", "cpu")
    assert done.returncode == 1
    assert "/proc/build" in done.stderr and "Traceback" not in done.stderr and "unexpected" not in done.stderr


def test_relative_paths_are_relative_to_where_the_user_stands(
    minitron: Command, workshop: Path, tmp_path: Path
) -> None:
    spec = copied(workshop, tmp_path)
    done = minitron("compile", spec.name, "-o", "out/build", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "build" / "student" / "config.json").exists()
