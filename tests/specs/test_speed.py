"""Checking specs is quick, because it imports and does nothing that it does not need."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.specs.conftest import Load
from tests.specs.specimens import WHOLE


def test_neither_torch_nor_any_other_heavy_package_is_imported() -> None:
    code = """
import sys, pathlib
from minitron.specs import *
from minitron.specs import documents
text = starting_spec()
path = pathlib.Path(sys.argv[1]); path.write_text(text)
load_spec(path); json_schema_text()
heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy", "huggingface_hub", "safetensors", "rich", "typer"}
heavy |= {"minitron.compiler", "minitron.runtime", "minitron.cli"}
print(sorted(heavy & set(sys.modules)))
"""
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        done = subprocess.run([sys.executable, "-c", code, file.name], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_hundred_specs_take_less_than_a_second_of_work(load: Load) -> None:
    started = time.process_time()
    for _ in range(100):
        load(WHOLE)
    assert time.process_time() - started < 1
