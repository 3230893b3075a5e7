"""`import minitron`: the commands' steps as functions, and the page that shows them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import minitron as mt
from tests import models

ROOT = Path(__file__).resolve().parents[2]
SPEC = """\
name: tiny
teacher: {model: teacher, dtype: float32}
student: {intermediate_size: 24}
importance: {data: {text: [text.txt], document: line, samples: 8, sequence_length: 16}}
distill:
  data: {text: [text.txt], document: line}
  tokens: 8K
  sequence_length: 16
  global_batch_size: 8
  optimizer: {lr: 1e-3, warmup_steps: 2}
evaluate: {held_out: {text: [valid.txt], document: line}, max_tokens: 512}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spec with its teacher and its text."""
    folder = tmp_path_factory.mktemp("python")
    models.save_teacher(folder / "teacher", models.tiny_config("llama", num_hidden_layers=2))
    (folder / "text.txt").write_text(models.text(150))
    (folder / "valid.txt").write_text(models.text(20, seed=1))
    (folder / "spec.yaml").write_text(SPEC)
    return folder


def test_importing_minitron_imports_nothing_else() -> None:
    source = (
        "import sys; before = set(sys.modules); import minitron; minitron.__version__, dir(minitron)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - sys.stdlib_module_names))\n"
        "minitron.load, minitron.UsageError\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["minitron", "False False"], done.stderr


def test_everything_is_typed_and_documented() -> None:
    for name in mt.__all__:
        one = getattr(mt, name)
        assert inspect.getdoc(one), name
        assert name in dir(mt)
    for function in (mt.load, mt.plan, mt.compile, mt.Build.train, mt.Build.evaluate, mt.Build.capture):
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not p.empty for n, p in signature.parameters.items() if n != "self"), function
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mt.nothing  # type: ignore[attr-defined]
    assert typing.TYPE_CHECKING is False


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def cell(source: str, names: dict[str, Any]) -> Any:
    """Runs a block as a notebook does; what its last line comes to, where that is an expression."""
    import ast

    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def test_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    shown = [cell(source, names) for source in blocks(ROOT / "docs" / "python.md")]
    text = capsys.readouterr().out
    first, _, _, ratio, axes, _, passed, parameters, losses, again, stale = shown
    assert first is None, "the spec leaves hidden_size as it is"
    assert "student.hiden_size | unknown key `hiden_size` | did you mean `hidden_size`?" in text
    assert 0 < ratio < 1 and axes["hidden_size"] == "exact" and passed is True
    assert re.search(r"hidden_size +32 +24 +75.0%", text), "a plan prints as the command prints it"
    assert len(re.findall(r"^(16|24|32) \d+ \d+$", text, flags=re.MULTILINE)) == 3
    assert parameters == names["plan"].student["parameters"]
    assert list(losses) == ["teacher", "pruned", "distilled"] and again == parameters
    assert stale is None
    build = names["build"]
    assert build.path == folder / "builds" / "tiny" and (build.path / "report.html").is_file()
    assert build.model.is_dir() and repr(build) == f"Build('{build.path}')"
    assert "### Results" in build._repr_markdown_() and "all checks passed" in str(build)


def test_a_build_is_kept_or_moved_aside(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = mt.compile(folder / "spec.yaml", folder / "kept", device="cpu", quiet=True)
    before = (build.path / "verification.json").stat().st_mtime_ns
    assert mt.compile(folder / "spec.yaml", folder / "kept", device="cpu") == build
    assert (build.path / "verification.json").stat().st_mtime_ns == before
    assert "is up to date with" in capsys.readouterr().err
    assert mt.compile(folder / "spec.yaml", folder / "kept", device="cpu", fresh=True, quiet=True) == build
    assert (folder / "kept.1" / "verification.json").stat().st_mtime_ns == before
    assert build.verification is not None and build.verification["passed"]


def test_errors_are_those_of_the_commands(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(mt.UsageError, match=r"there is no such file"):
        mt.load(tmp_path / "none.yaml")
    with pytest.raises(mt.SpecInvalid) as caught:
        mt.plan(mt.load(folder / "spec.yaml", ["student.head_dim=4"]))
    ((error,),) = [caught.value.errors]
    assert error.path == "student.head_dim" and caught.value.exit_code == 2
    with pytest.raises(mt.UsageError, match="no such build folder"):
        mt.Build(tmp_path / "none")
    with pytest.raises(mt.UsageError, match="not a device that minitron works on"):
        mt.compile(folder / "spec.yaml", tmp_path / "build", device="tpu", quiet=True)
    with pytest.raises(mt.UsageError, match="-o"):
        mt.plan(folder / "spec.yaml", folder / "text.txt")
