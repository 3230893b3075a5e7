"""Kills a compile with -9 again and again, at moments drawn at random, and compares what it ends with.

    python benchmarks/kills.py --kills 200

A tiny teacher is compiled and its student refitted undisturbed, which gives the bytes and the CPU time. Then the same command
is started and killed after a random share of that time, --kills times; where it was faster than the kill, it begins with a
new folder. At the end it runs through, and every file must be the undisturbed one's. Each compile is a process of its own,
forked from one that has imported everything: its time is that of the work, and so are the moments.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minitron.cli.main import command_line
from tests import models
from tests.e2e.test_compile_killed import REFIT, SMALL_BATCHES, STUDENT, contents


def prepare(folder: Path) -> Path:
    """Writes teacher, text and spec."""
    models.save_teacher(folder / "teacher", models.tiny_config("llama", num_hidden_layers=1))
    (folder / "corpus.txt").write_text(models.text(150), encoding="utf-8")
    data = {"text": ["corpus.txt"], "document": "line", "samples": 128, "sequence_length": 12}
    spec = {"name": "tiny", "teacher": {"model": "teacher"}, "student": STUDENT, "importance": {"data": data}}
    spec |= {"recovery": REFIT}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder / "spec.yaml"


class Compile:
    """`minitron compile SPEC -o BUILD` in a process of its own, whose words go to a file."""

    def __init__(self, spec: Path, build: Path) -> None:
        self.build, self.words = build, build.parent / "words"
        build.parent.mkdir(exist_ok=True)
        self.line = ["compile", str(spec), "-o", str(build), "--device", "cpu", "--threads", "1"]

    def killed(self, seconds: float) -> str | None:
        """Starts it and kills it once it has taken so much CPU time: the stage that it was in; None where it had ended.
        SystemExit where it failed."""
        pid = self._start()
        while self.cpu_seconds(pid) < seconds:
            if self._ended(pid, os.WNOHANG):
                return None
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return self._stage()

    def finished(self) -> float:
        """Runs it to its end: the CPU time that it took."""
        pid, most = self._start(), 0.0
        while not self._ended(pid, os.WNOHANG):
            most = max(most, self.cpu_seconds(pid))
            time.sleep(0.002)
        return most

    @staticmethod
    def cpu_seconds(pid: int) -> float:
        """The CPU time of a process and of those that it has started."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
        return own + sum(Compile.cpu_seconds(int(child)) for child in children)

    def _stage(self) -> str:
        """Returns the stage that began last: lines are a day, a time, and a stage before a colon."""
        said = [line.split(maxsplit=2)[2:] for line in self.words.read_text().splitlines()]
        return next((words[0].partition(":")[0] for words in reversed(said) if words), "start")

    def _start(self) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            words = os.open(self.words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(words, stream)
            code = command_line(self.line)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def _ended(self, pid: int, how: int) -> bool:
        found, status = os.waitpid(pid, how)
        if found and status:
            raise SystemExit(self.words.read_text())
        return bool(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    os.environ |= {"HF_HUB_OFFLINE": "1", "MINITRON_CACHE": "none"}
    exec(SMALL_BATCHES)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        spec = prepare(root)
        first = Compile(spec, root / "first" / "build")
        with contextlib.redirect_stdout(io.StringIO()):
            if command_line(first.line):  # in this process, which has imported everything then
                raise SystemExit(1)
        wanted = contents(first.build)
        undisturbed = Compile(spec, root / "undisturbed" / "build")
        whole = undisturbed.finished()
        check(undisturbed, wanted)
        stages, ends = Counter[str](), 0
        command = Compile(spec, root / "0" / "build")
        while stages.total() < arguments.kills:
            stage = command.killed(draw.uniform(0.02, 1.0) * whole)
            if stage is not None:
                stages[stage] += 1
                print(f"{stages.total()} kills, {ends} compiles that came through", flush=True)
                continue
            ends += check(command, wanted)
            command = Compile(spec, root / str(ends) / "build")
        command.finished()
        ends += check(command, wanted)
        print(f"{stages.total()} kills; {ends} compiles came through, each with the bytes of the undisturbed one")
        print("killed in: " + ", ".join(f"{stage} {count}" for stage, count in stages.most_common()))


def check(command: Compile, wanted: dict[str, bytes]) -> int:
    """Compares every file; SystemExit where one differs."""
    got = contents(command.build)
    wrong = [name for name in sorted({*got, *wanted}) if got.get(name) != wanted.get(name)]
    if wrong:
        raise SystemExit(f"{command.build} differs from an undisturbed compile in {', '.join(wrong)}")
    return 1


if __name__ == "__main__":
    main()
