"""The commands in this process, with the compiler and the runtime replaced by what writes their documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import minitron.compiler
import minitron.runtime
from minitron.cli.main import command_line
from minitron.compiler import Work
from minitron.specs import load_spec
from minitron.specs.progress import Progress

SPEC = """\
name: tiny
teacher: {model: teacher}
student: {hidden_size: 48}
importance: {data: {text: [corpus.txt]}}
distill: {data: {text: [corpus.txt]}, tokens: 1M, sequence_length: 64, global_batch_size: 8}
evaluate: {held_out: {text: [held_out.txt]}}
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SPEC)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command and returns (exit code, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = command_line([str(one) for one in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def calls(
    monkeypatch: pytest.MonkeyPatch, spec: Path, plan: dict[str, Any], results: dict[str, Any], verification: Any
) -> list[str]:
    """Replaces the long work; the list says what was called, in order."""
    done: list[str] = []

    def make_plan(loaded: Any, *, build: Path, weights: bool = False) -> Any:
        done.append("plan")
        plan["spec"] = {"name": loaded.spec.name, "path": str(loaded.path), "sha256": loaded.sha256}
        return SimpleNamespace(document=plan)

    def compile_spec(loaded: Any, build: Path, *, device: str, progress: Progress, plan: Any, work: Work) -> Any:
        assert work.ranks.leads and replace(work, ranks=Work().ranks, fresh=False) == Work(), (
            "nothing else was asked for"
        )
        if (made := plan) is None:
            made = make_plan(loaded, build=build)
            done.pop()
        done.append(f"compile on {device}" + ", anew" * work.fresh)
        (build / "student").mkdir(parents=True, exist_ok=True)
        (build / "plan.json").write_text(json.dumps(made.document))
        (build / "verification.json").write_text(json.dumps(verification | {"student": {}}))
        (build / "training.yaml").write_text("tokens: 1000000\n")
        return made

    def train(build: Path, *, device: str | None, progress: Progress, **asked: bool) -> None:
        assert not any(asked.values()), "nothing was asked for"
        done.append("train")
        with progress.task("train", 10, "tokens") as task:
            task.advance(10, loss=1.0)
        (build / "train").mkdir(exist_ok=True)
        (build / "train" / "metrics.jsonl").write_text('{"step": 1, "tokens": 1000000, "loss": 1.0}\n')
        (build / "model").mkdir(exist_ok=True)

    def evaluate(build: Path, *, device: str | None, progress: Progress, **asked: Any) -> dict[str, Any]:
        given = {key: value for key, value in asked.items() if value}
        done.append(f"eval {given}" if given else "eval")
        return results

    monkeypatch.setattr(minitron.compiler, "make_plan", make_plan)
    monkeypatch.setattr(minitron.compiler, "plan_document", lambda made, hardware=None: made.document)
    monkeypatch.setattr(minitron.compiler, "compile_spec", compile_spec)
    monkeypatch.setattr(minitron.runtime, "train", train)
    monkeypatch.setattr(minitron.runtime, "evaluate", evaluate)
    return done


def test_validate_says_valid_for_each_file(run: Run, spec: Path) -> None:
    assert run("validate", spec, spec) == (0, f"{spec}: valid\n" * 2, "")


def test_validate_reports_all_mistakes_of_all_files(run: Run, spec: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(SPEC.replace("name: tiny", "nmae: tiny").replace("1M", "a lot"))
    two.write_text(SPEC.replace("hidden_size: 48", "hidden_size: off"))
    code, out, err = run("validate", one, spec, two, tmp_path / "three.yaml")
    assert (code, out) == (2, f"{spec}: valid\n")
    lines = err.splitlines()
    assert lines[0].startswith(f"{one}:1:1: nmae: ") and "name" in lines[0]
    assert lines[1].startswith(f"{one}:5:") and "distill.tokens" in lines[1]
    assert lines[2].startswith(f"{two}:3:") and "student.hidden_size" in lines[2]
    assert lines[3].startswith(f"error: {tmp_path / 'three.yaml'}: there is no such file")
    assert lines[4:] == ["4 errors"]


def test_validate_json_is_one_document_with_every_error(run: Run, spec: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(SPEC.replace("name: tiny", "nmae: tiny"))
    code, out, err = run("validate", "--json", bad, spec)
    document = json.loads(out)
    assert (code, err) == (2, "")
    assert (document["format_version"], document["valid"]) == (1, False)
    assert [one["file"] for one in document["specs"]] == [str(spec)]
    (error,) = document["errors"]
    assert list(error) == ["file", "line", "column", "path", "message", "hint"]
    assert (error["file"], error["line"], error["path"]) == (str(bad), 1, "nmae")

    code, out, _ = run("validate", "--json", spec)
    assert code == 0 and json.loads(out)["errors"] == [] and json.loads(out)["valid"] is True


def test_set_overrides_before_validation(run: Run, spec: Path) -> None:
    assert run("validate", spec, "--set", "student.hidden_size=32")[0] == 0
    code, _, err = run("validate", spec, "--set", "student.hidden_sizes=32")
    assert code == 2 and "hidden_size" in err
    assert load_spec(spec).sha256 != load_spec(spec, ["student.hidden_size=32"]).sha256


def test_schema_is_json(run: Run) -> None:
    code, out, err = run("schema")
    assert (code, err) == (0, "")
    assert "teacher" in json.loads(out)["properties"]


def test_init_writes_a_valid_spec_and_never_overwrites(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "new.yaml"
    code, out, err = run("init", "-o", target)
    assert (code, out) == (0, f"{target}\n") and f"minitron plan {target}" in err
    assert "#" in target.read_text()
    assert run("validate", target)[0] == 0
    target.write_text("mine")
    code, _, err = run("init", "-o", target)
    assert code == 2 and "not overwritten" in err and target.read_text() == "mine"


def test_every_recipe_is_listed_and_valid(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("init", "--list")
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and names
    for name in names:
        target = tmp_path / f"{name}.yaml"
        assert run("init", name, "-o", target)[0] == 0
        code, _, err = run("validate", target)
        assert code == 0 and all(line.startswith(f"warning: {target}:") for line in err.splitlines())
    code, _, err = run("init", "no-such-recipe", "-o", tmp_path / "x.yaml")
    assert code == 2 and not (tmp_path / "x.yaml").exists() and names[0] in err


def test_plan_and_dry_run_print_the_same(run: Run, spec: Path, calls: list[str]) -> None:
    for flags in ([], ["--json"], ["--markdown"]):
        planned = run("plan", spec, *flags)
        assert planned[0] == 0 and planned[1]
        assert planned == run("compile", spec, "--dry-run", *flags)
    assert set(calls) == {"plan"}
    assert not (spec.parent / "builds").exists()


def test_a_plan_is_estimated_for_the_devices_that_are_named(
    run: Run, spec: Path, calls: list[str], plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    monkeypatch.setattr(minitron.compiler, "make_plan", lambda loaded, *, build: loaded)
    monkeypatch.setattr(minitron.compiler, "plan_document", lambda made, hardware: asked.append(hardware) or plan)
    assert run("plan", spec, "--device", "h200x8", "--mfu", "0.4")[0] == 0
    assert run("compile", spec, "--dry-run", "--device", "a100")[0] == 0
    assert [(one.cluster.name, one.mfu) for one in asked] == [("h200x8", 0.4), ("a100-80", 0.17)]
    code, _, err = run("plan", spec, "--device", "h300")
    assert code == 2 and "did you mean `h200`?" in err and "a100-40, a100-80, h100, h200, b200 or this" in err
    code, _, err = run("compile", spec, "--mfu", "0.4")
    assert code == 2 and "add --dry-run" in err


def test_plan_json_is_the_plan(run: Run, spec: Path, calls: list[str], plan: dict[str, Any]) -> None:
    code, out, _ = run("plan", spec, "--json", "--set", "student.hidden_size=32")
    assert code == 0
    assert json.loads(out)["spec"]["sha256"] == load_spec(spec, ["student.hidden_size=32"]).sha256
    assert set(json.loads(out)) == set(plan)


def test_plan_refuses_two_renderings_at_once(run: Run, spec: Path, calls: list[str]) -> None:
    code, out, _ = run("plan", spec, "--json", "--markdown")
    assert code == 2 and "choose one" in json.loads(out)["errors"][0]["message"]


def test_detailed_exitcode_compares_the_build_with_the_spec(run: Run, spec: Path, calls: list[str]) -> None:
    code, _, err = run("plan", spec, "--detailed-exitcode")
    assert code == 3 and "not compiled yet" in err
    assert run("compile", spec)[0] == 0
    assert run("plan", spec, "--detailed-exitcode")[0] == 0
    code, _, err = run("plan", spec, "--detailed-exitcode", "--set", "student.hidden_size=32")
    assert code == 3 and "another version of the spec" in err
    assert run("plan", spec, "--detailed-exitcode", "-o", spec.parent / "elsewhere")[0] == 3


def test_compile_writes_beside_the_spec_or_where_it_is_told(run: Run, spec: Path, calls: list[str]) -> None:
    code, out, _ = run("compile", spec, "--device", "cpu")
    assert code == 0 and calls == ["compile on cpu"]
    assert str(spec.parent / "builds" / "tiny" / "student") in out and "all checks passed" in out
    code, out, _ = run("compile", spec, "-o", spec.parent / "other", "--json")
    assert code == 0 and json.loads(out)["format_version"] == 1
    assert (spec.parent / "other" / "plan.json").exists()


def test_what_is_compiled_is_not_compiled_again(run: Run, spec: Path, calls: list[str]) -> None:
    assert run("compile", spec, "--device", "cpu")[0] == 0
    calls.clear()
    code, out, err = run("compile", spec, "--device", "cpu")
    assert code == 0 and calls == [] and "is up to date with" in err and "--force compiles it again" in err
    assert "all checks passed" in out, "and it is shown as if it had been"
    assert run("compile", spec, "--device", "cpu", "--force")[0] == 0 and calls == ["compile on cpu, anew"]


@pytest.mark.parametrize("command", ["plan", "compile", "run"])
def test_a_file_is_no_place_for_a_build(run: Run, spec: Path, calls: list[str], command: str) -> None:
    code, out, err = run(command, spec, "-o", spec)
    assert (code, out, calls) == (2, "", []) and "the build needs a folder; name another with -o" in err


def test_preview_options_need_a_dry_run(run: Run, spec: Path, calls: list[str]) -> None:
    assert run("compile", spec, "--markdown")[0] == 2
    assert calls == []


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(run: Run, spec: Path, calls: list[str], device: str) -> None:
    code, _, err = run("compile", spec, "--device", device)
    assert code == 2 and f"--device {device}" in err and calls == []


def test_run_does_everything_and_again_only_what_is_left(run: Run, spec: Path, calls: list[str]) -> None:
    code, out, err = run("run", spec, "--device", "cpu")
    assert code == 0 and calls == ["plan", "compile on cpu", "train", "eval"], "and it plans once"
    assert out.index("Plan tiny") < out.index("Results") < out.index("Continuations") < out.index("Files")
    assert str(spec.parent / "builds" / "tiny" / "model") in out
    assert "train: 10 of 10 tokens (100%)" in err

    calls.clear()
    code, _, err = run("run", spec)
    assert code == 0 and calls == ["train", "eval"] and "is up to date with" in err


def test_run_without_a_distill_block_trains_nothing(run: Run, spec: Path, calls: list[str]) -> None:
    spec.write_text("\n".join(line for line in SPEC.splitlines() if not line.startswith("distill")))
    code, _, err = run("run", spec)
    assert code == 0 and "train" not in calls and "no `distill` block" in err


def test_train_and_eval_work_on_a_build(run: Run, spec: Path, calls: list[str]) -> None:
    run("compile", spec)
    build = spec.parent / "builds" / "tiny"
    code, out, _ = run("train", build)
    assert code == 0 and "1,000,000 of 1,000,000 tokens, 100.0%" in out
    code, out, _ = run("eval", build, "--json")
    assert code == 0 and set(json.loads(out)["models"]) == {"teacher", "pruned", "distilled"}


def test_eval_is_noop_cast_what_is_asked_for(run: Run, build: Path, calls: list[str]) -> None:
    assert run("eval", build, "--tasks", "mmlu, gsm8k", "--limit", "5")[0] == 0
    assert calls == ["eval {'tasks': ['mmlu', 'gsm8k'], 'limit': 5}"]
    code, _, err = run("eval", build, "--tasks", ",")
    assert code == 2 and "--tasks names no benchmark; write --tasks hellaswag,mmlu" in err


MISSED = {
    "name": "arc", "bound": ">= 0.95x teacher", "model": "distilled", "value": 0.25, "limit": 0.285, "ok": False,
    "short_by": 0.035,
}  # fmt: skip


def test_a_requirement_that_is_not_reached_ends_with_1_and_says_by_how_much(
    run: Run, spec: Path, build: Path, calls: list[str], results: dict[str, Any]
) -> None:
    results["requirements"] = [{**MISSED, "name": "held_out_loss", "ok": True, "short_by": 0.0}]
    assert run("eval", build)[0] == 0
    results["requirements"].append(MISSED)
    code, out, err = run("eval", build)
    assert code == 1 and "NOT REACHED" in out
    assert 'evaluate.require.arc: the distilled model has 0.25, ">= 0.95x teacher" is 0.285: short by 0.035' in err
    code, out, err = run("eval", build, "--json")
    assert code == 1 and json.loads(out)["requirements"][1]["ok"] is False and "short by" in err
    assert run("run", spec)[0] == 1
    results["requirements"] = [MISSED | {"value": None, "short_by": None}, MISSED | {"limit": None, "short_by": None}]
    code, _, err = run("eval", build)
    assert code == 1 and "was not measured of the distilled model" in err and "that it is compared with" in err


def test_a_benchmark_that_failed_ends_with_1_once_all_is_shown(
    run: Run, build: Path, calls: list[str], results: dict[str, Any]
) -> None:
    results["models"]["pruned"]["tasks"] = {
        "arc": {"metric": None, "value": None, "stderr": None, "error": "lm-eval could not run arc (no data)"}
    }
    code, out, err = run("eval", build)
    assert code == 1 and "failed" in out and "pruned: lm-eval could not run arc (no data)" in err


def test_train_without_a_training_plan_says_what_is_missing(run: Run, build: Path, calls: list[str]) -> None:
    (build / "training.yaml").unlink()
    code, _, err = run("train", build)
    assert code == 2 and "training.yaml" in err and "`distill`" in err and calls == []


def test_show_gives_everything_in_both_forms(run: Run, build: Path) -> None:
    code, out, err = run("show", build)
    assert (code, err) == (0, "")
    for title in ("Plan tiny", "Selection", "Verification", "Training", "Results", "Files"):
        assert f"\n{title}\n" in f"\n{out}"
    document = json.loads(run("show", build, "--json")[1])
    assert list(document) == ["format_version", "build", "plan", "edited", "training", "verification", "results"]
    assert document["edited"] == []


@pytest.mark.parametrize("command", ["train", "eval", "show"])
def test_what_is_no_build_is_a_wrong_call(run: Run, tmp_path: Path, command: str) -> None:
    code, out, err = run(command, tmp_path / "nowhere")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_diff_takes_specs_and_builds(run: Run, spec: Path, build: Path, calls: list[str]) -> None:
    other = spec.with_name("other.yaml")
    other.write_text(SPEC.replace("48", "32"))
    code, out, _ = run("diff", spec, other, "--json")
    assert code == 0
    assert {"path": "student.hidden_size", "a": 48, "b": 32} in json.loads(out)["spec"]
    code, out, _ = run("diff", spec, build)
    assert code == 0 and "B is " + str(build) in out


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["plan"], ["plan", "a.yaml", "--bogus"], ["compile", "a.yaml", "--threads", "0"]]
)
def test_wrong_calls_end_with_2_and_point_to_the_help(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "--help` shows how it is called" in err
    code, out, err = run(*arguments, "--json")
    assert code == 2 and err == ""
    assert json.loads(out)["errors"][0]["message"]


def test_without_arguments_the_help_is_shown(run: Run) -> None:
    code, out, err = run()
    assert code == 2 and "validate" in out + err and "error" not in err
    assert run("--version") == (0, f"{minitron.__version__}\n", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device", "/x"), 1), (ZeroDivisionError("oh"), 1)],
)
def test_whatever_happens_is_a_sentence_and_debug_shows_where(
    run: Run, spec: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(minitron.compiler, "make_plan", fail)
    got, out, err = run("plan", spec)
    assert (got, out) == (code, "") and "Traceback" not in err and err.count("\n") == 1
    got, out, err = run("plan", spec, "--json")
    assert (got, err) == (code, "") and len(json.loads(out)["errors"]) == 1
    if code != 130:
        assert "Traceback" in run("plan", spec, "--debug")[2]
