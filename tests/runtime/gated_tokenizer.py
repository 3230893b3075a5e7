"""The process that tokenizes beside a training, with a gate: it is real, and waits or finds its disk full where a test says so.

MINITRON_TEST_GATE names a folder: `closed` in it holds the number of the first shard that may not be written while that file
is there, `full` that of the shard for which the disk has no room.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

from minitron.specs.shards import process, writer

VARIABLE = "MINITRON_TEST_GATE"
COMMAND = (sys.executable, "-m", "tests.runtime.gated_tokenizer")


def main() -> None:
    gate, real = Path(os.environ[VARIABLE]), writer.write_shard

    def write_shard(folder: Path, number: int, *args: Any, **about: Any) -> Any:
        while number >= _number(gate / "closed"):
            time.sleep(0.01)
        if number >= _number(gate / "full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(folder, number, *args, **about)

    writer.write_shard = write_shard
    process.main()


def _number(file: Path) -> int:
    try:
        return int(file.read_text())
    except FileNotFoundError:
        return 1 << 30


if __name__ == "__main__":
    main()
