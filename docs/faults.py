"""Runs the tests of faults, kind by kind, and writes their table into docs/reliability.md: `python docs/faults.py`.

A kind is a list of test files. Only where every case passes is the table written; tests/repository checks that every kind
stands in it, and every test file whose name is of faults in a kind.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- counted by docs/faults.py -->", "<!-- end -->"

_WORDS = "(?<!de)fault|wrong|mistake|kill|changing|refus|interrupt|damage"
OF_FAULTS = re.compile(rf"tests/(hostile/test_|(?!benchmarks/).*({_WORDS}))")
"""The test files that are of faults by their names."""

KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "checkpoints": (
        "cut, mixed, quantised, foreign, linked, not finite, of several towers",
        (
            "tests/compiler/test_teacher_files.py", "tests/specs/test_weight_files.py",
            "tests/compiler/test_number_faults.py",
        ),
    ),
    "models": (
        "something planted in their code that an analysis may get wrong, and what no student can be cut from",
        ("tests/zoo/test_planted_faults.py", "tests/compiler/test_refusals.py"),
    ),
    "builds": (
        "files changed, lost or swapped between two steps",
        ("tests/hostile/test_integrity.py", "tests/compiler/test_verify_build.py"),
    ),
    "students": (
        "one wrong channel, key, scale, list or file in what a compile writes",
        (
            "tests/compiler/test_verify.py", "tests/compiler/test_verify_teacher.py",
            "tests/compiler/test_verify_configuration.py",
        ),
    ),
    "specs": (
        "mistyped, contradictory, endless, nested without end, no text at all",
        (
            "tests/e2e/test_wrong_specs.py", "tests/specs/test_mistakes.py", "tests/specs/test_any_mistake.py",
            "tests/specs/test_mistakes_of_training.py", "tests/specs/test_small_files.py",
        ),
    ),
    "data": (
        "broken lines, wrong encodings, other columns, documents that a template refuses, files that change meanwhile",
        (
            "tests/specs/test_data_forms.py", "tests/specs/test_documents.py", "tests/specs/test_encoding.py",
            "tests/runtime/test_changing_files.py",
        ),
    ),
    "folders": (
        "links, a user's own files, folders inside one another, paths that name nothing",
        ("tests/hostile/test_folders.py", "tests/hostile/test_calls.py"),
    ),
    "action": ("pull requests that read, write or say what they must not", ("tests/hostile/test_action.py",)),
    "programs": ("code that a model writes", ("tests/runtime/test_programs.py",)),
    "processes": (
        "signals, killed ranks, variables left over, readers that went away",
        (
            "tests/hostile/test_processes.py", "tests/cli/test_interrupts.py", "tests/cli/test_processes.py",
            "tests/runtime/test_interrupt.py",
        ),
    ),
    "kills": (
        "kill -9 of a compile, a search, a training, a capture; the same bytes in the end",
        (
            "tests/e2e/test_compile_killed.py", "tests/compiler/test_search_killed.py",
            "tests/runtime/test_training_killed.py", "tests/runtime/test_checkpoints.py",
            "tests/runtime/test_token_cache.py",
        ),
    ),
    "disks": ("full, or not writable", ("tests/compiler/test_emit.py", "tests/specs/test_atomic.py")),
}  # fmt: skip


def pytest(*arguments: str) -> str:
    """The output of a pytest run in a process of its own. Raises RuntimeError where it fails."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-2000:])
    return done.stdout


def counted() -> dict[str, int]:
    """The number of cases of each kind, found without running them."""
    every = sorted({file for _, files in KINDS.values() for file in files})
    lines = pytest("--collect-only", *every).splitlines()
    cases = [line.split("::")[0] for line in lines if "::" in line]
    return {kind: sum(cases.count(file) for file in files) for kind, (_, files) in KINDS.items()}


def table(counts: dict[str, int]) -> str:
    """The table as Markdown, between its two marks."""
    rows = ["| kind | cases | what is wrong in them | tests |", "|---|---|---|---|"]
    for kind, (what, files) in KINDS.items():
        rows.append(f"| {kind} | {counts[kind]} | {what} | {_names(files)} |")
    rows.append(f"| all | {sum(counts.values())} | | |")
    return "\n".join([BEGIN, "", *rows, "", END])


def _names(files: Sequence[str]) -> str:
    return ", ".join(f"`{file.removeprefix('tests/')}`" for file in files)


def page(text: str, counts: dict[str, int]) -> str:
    """The page with its table renewed."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: table(counts), text, flags=re.DOTALL)


if __name__ == "__main__":
    for kind, (_, files) in KINDS.items():
        print(kind, pytest(*files).strip().splitlines()[-1], flush=True)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), counted()), encoding="utf-8")
