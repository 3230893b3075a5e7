"""Kills a compile with -9 again and again, at moments drawn at random, and compares what it ends with.

    python benchmarks/kills.py --kills 200

A tiny teacher is compiled and its student refitted undisturbed, which gives the bytes and the time. Then the same command is
started and killed after a random share of that time, --kills times; where it was faster than the kill, it begins with a new
folder. At the end it runs through, and every file must be the undisturbed one's.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests import models
from tests.e2e.test_compile_killed import REFIT, STUDENT, Command, contents


def prepare(folder: Path) -> Path:
    """Writes teacher, text and spec."""
    models.save_teacher(folder / "teacher", models.tiny_config("llama", num_hidden_layers=1))
    (folder / "corpus.txt").write_text(models.text(150), encoding="utf-8")
    data = {"text": ["corpus.txt"], "document": "line", "samples": 128, "sequence_length": 12}
    spec = {"name": "tiny", "teacher": {"model": "teacher"}, "student": STUDENT, "importance": {"data": data}}
    spec |= {"recovery": REFIT}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder / "spec.yaml"


def killed(command: Command, seconds: float) -> bool:
    """Starts the command and kills it after a while; False where it had ended."""
    process = command.start()
    try:
        words = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return True
    if process.returncode != 0:
        raise SystemExit(words)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        spec = prepare(root)
        (root / "home").mkdir()
        undisturbed = Command(spec, root / "undisturbed" / "build", root / "home")
        began = time.monotonic()
        undisturbed.finished()
        whole = time.monotonic() - began
        wanted, kills, ends = contents(undisturbed.build), 0, 0
        command = Command(spec, root / "0" / "build", root / "home")
        while kills < arguments.kills:
            if killed(command, draw.uniform(0.3, 1.0) * whole):
                kills += 1
                print(f"{kills} kills, {ends} compiles that came through", flush=True)
                continue
            ends += check(command, wanted)
            command = Command(spec, root / str(ends) / "build", root / "home")
        command.finished()
        ends += check(command, wanted)
        print(f"{kills} kills; {ends} compiles came through, each with the bytes of the undisturbed one")


def check(command: Command, wanted: dict[str, bytes]) -> int:
    """Compares every file; SystemExit where one differs."""
    got = contents(command.build)
    wrong = [name for name in sorted({*got, *wanted}) if got.get(name) != wanted.get(name)]
    if wrong:
        raise SystemExit(f"{command.build} differs from an undisturbed compile in {', '.join(wrong)}")
    return 1


if __name__ == "__main__":
    main()
