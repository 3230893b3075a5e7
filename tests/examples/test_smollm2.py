"""examples/smollm2: what its text is made of."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "smollm2"
PROSE = (
    "A paragraph of running text says something in whole sentences, and it goes on for long enough that nobody would take "
    "it for a heading. It has another sentence as well."
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_text", FOLDER / "make_text.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_running_text_stays_and_the_rest_goes(script: ModuleType) -> None:
    table = "| name | value |\n" * 20
    code = ">>> x = f(1)\n" + "    return {'a': [1, 2]} # " * 12
    arguments = "width (`int`, *optional*): the number of channels of `x`, as in `[batch, width]`. " * 4
    wrapped = PROSE.replace(", and", ",\n    and")
    text = "\n\n".join(["A heading", table, wrapped, code, arguments])
    assert script.prose(text) == [PROSE]


def test_a_package_is_on_one_side_and_a_paragraph_once(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "library"
    for number in range(64):
        package = library / f"package{number}"
        package.mkdir(parents=True)
        own = "\n\n".join(f"{PROSE} Number {number} of part {part}." for part in range(4))
        (package / "module.py").write_text(f'"""{own}\n\n{PROSE}"""\n')
    (library / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(script.sysconfig, "get_path", lambda _: str(library))
    monkeypatch.setattr(sys, "argv", ["make_text.py", "--out", str(tmp_path / "text")])
    script.main()
    found = {
        name: [json.loads(line)["text"] for line in (tmp_path / "text" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    }
    assert sum(map(len, found.values())) == 64 and 0 < len(found["held_out"]) < 16
    assert len(found["held_out"]) == sum(script.is_held_out(f"package{number}") for number in range(64))
    assert sum(document.split("\n\n").count(PROSE) for documents in found.values() for document in documents) == 1


def test_no_host_is_named(script: ModuleType) -> None:
    """pip asks the index that it is set up with."""
    for path in FOLDER.iterdir():
        if path.is_file():
            assert "http" not in path.read_text(encoding="utf-8"), path
