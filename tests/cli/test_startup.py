"""What a fresh process does: starts without torch, writes no colours into a pipe, ends quietly when nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SPEC = """\
teacher: {model: org/teacher}
student: {hidden_size: 48}
importance: {data: {text: [corpus.txt]}}
"""

# Runs the command line with every connection forbidden and says which of the heavy packages were imported.
PROBE = """
import sys
def forbid(event, _):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError("no network in this command")
sys.addaudithook(forbid)
from minitron.cli.main import command_line
code = command_line(sys.argv[1:])
heavy = [name for name in ("torch", "transformers", "huggingface_hub", "datasets", "numpy") if name in sys.modules]
print("imported:", *heavy, file=sys.stderr)
sys.exit(code)
"""


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "SPEC"], ["validate", "--json", "SPEC"], ["schema"]])
def test_commands_about_files_import_neither_torch_nor_transformers(tmp_path: Path, arguments: list[str]) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)
    done = start("-c", PROBE, *(one.replace("SPEC", str(spec)) for one in arguments))
    assert (done.returncode, done.stderr) == (0, "imported:\n")


@pytest.mark.parametrize("module", ["minitron", "minitron.cli"])
def test_the_command_is_a_module_too(module: str) -> None:
    assert start("-m", module, "--version").stdout.strip() == start("-m", "minitron", "--version").stdout.strip() != ""


def test_the_installed_command_is_the_same() -> None:
    command = Path(sys.executable).with_name("minitron")
    if not command.exists():
        pytest.skip("minitron is not installed beside this python")
    done = subprocess.run([command, "validate", "/nowhere.yaml"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nowhere.yaml")


@pytest.mark.parametrize("arguments", [["--help"], ["show", "BUILD"], ["show", "NOWHERE"], ["frobnicate"]])
def test_a_pipe_gets_no_colours(build: Path, arguments: list[str]) -> None:
    words = {"BUILD": str(build), "NOWHERE": str(build / "nowhere")}
    done = start("-m", "minitron", *(words.get(one, one) for one in arguments))
    assert done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_reader_that_stops_early_sees_no_traceback(build: Path) -> None:
    # One byte is read of a document that is larger than a pipe holds.
    large = build / "plan.json"
    large.write_text('{"spec": {"name": "' + "x" * 1_000_000 + '"}}')
    command = f"'{sys.executable}' -m minitron show --json '{build}' | head -c 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("{", "")


def test_tables_in_a_pipe_are_not_folded_to_a_terminal_width(build: Path) -> None:
    done = start("-m", "minitron", "show", str(build))
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) > 80
