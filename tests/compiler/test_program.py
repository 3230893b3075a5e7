"""student.pt2 without this package: the README's lines, word for word, where neither it nor transformers can be imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron.compiler.emit.program import holds_custom, run_program
from minitron.specs.errors import WorkError
from tests.foundry import Build, Foundry, load_model, logits, token_ids

README = Path(__file__).parents[2] / "README.md"
SHAPES = [(1, 1), (1, 3), (2, 24), (3, 100), (5, 7)]

# Runs the README's lines in each folder, and then the program on more shapes.
ALONE = """\
import json
import os
import sys

sys.modules["minitron"] = sys.modules["transformers"] = None
lines, inputs, output, folders = sys.argv[1:]
import torch
from safetensors.torch import load_file, save_file

found = {}
for folder in json.loads(folders):
    os.chdir(folder)
    names = {}
    exec(lines, names)
    found[f"{folder}:readme"] = names["logits"]
    with torch.no_grad():
        for name, ids in load_file(inputs).items():
            found[f"{folder}:{name}"] = names["student"](ids)
save_file({name: value.detach().contiguous() for name, value in found.items()}, output)
"""


def snippet() -> str:
    """The block of the README that runs a program."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (lines,) = [block for block in blocks if "student.pt2" in block]
    return str(lines)


@dataclass(frozen=True)
class Ran:
    """Students, and what their programs gave on their own."""

    builds: dict[str, Build]
    found: dict[str, torch.Tensor]
    root: Path

    def logits(self, name: str, shape: str) -> torch.Tensor:
        return self.found[f"{self.root / name}:{shape}"]


def shard(folder: Path) -> None:
    """The same weights in three files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number in range(3):
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % 3 == number}
        save_file(part, folder / f"model-{number + 1:05d}-of-00003.safetensors")


@pytest.fixture(scope="module")
def ran(foundry: Foundry, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One process for all: importing torch takes longer than everything else."""
    root = tmp_path_factory.mktemp("alone")
    llama = foundry.build(foundry.teacher("llama", num_hidden_layers=2), {"intermediate_size": 24})
    tied = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    gemma2 = foundry.build(foundry.teacher("gemma2", num_hidden_layers=2), tied | {"num_hidden_layers": 1})
    builds = {"llama": llama, "shards": llama, "gemma2": gemma2}
    for name, build in builds.items():
        folder = root / name / "BUILD"
        (folder / "student").mkdir(parents=True)
        (folder / "student.pt2").write_bytes((build.folder / "student.pt2").read_bytes())
        weights = folder / "student" / "model.safetensors"
        weights.write_bytes((build.folder / "student" / "model.safetensors").read_bytes())
    shard(root / "shards" / "BUILD" / "student")
    save_file({f"{rows}x{length}": token_ids(rows, length) for rows, length in SHAPES}, root / "ids.safetensors")
    folders = json.dumps([str(root / name) for name in builds])
    arguments = [snippet(), str(root / "ids.safetensors"), str(root / "out.safetensors"), folders]
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Ran(builds, load_file(root / "out.safetensors"), root)


@pytest.mark.parametrize("shape", ["readme", *(f"{rows}x{length}" for rows, length in SHAPES)])
@pytest.mark.parametrize("name", ["llama", "shards", "gemma2"])
def test_the_program_is_the_model_at_any_batch_and_length(ran: Ran, name: str, shape: str) -> None:
    """One and many rows and tokens, beyond a sliding window and beyond what it was traced with."""
    ids = torch.tensor([[1, 2, 3]]) if shape == "readme" else token_ids(*map(int, shape.split("x")))
    build = ran.builds[name]
    wanted = logits(load_model(build.folder / "student", build.plan.teacher.captured.attention), ids)
    torch.testing.assert_close(ran.logits(name, shape), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_it_holds_no_second_copy_of_the_weights(ran: Ran) -> None:
    """Tables that the model computes for itself are there, with their bytes; parameters have none."""
    for name in ("llama", "gemma2"):
        program = torch.export.load(ran.builds[name].folder / "student.pt2")
        parameters = {key for key, value in program.state_dict.items() if isinstance(value, torch.nn.Parameter)}
        assert parameters == set(load_file(ran.builds[name].folder / "student" / "model.safetensors"))
        assert {str(program.state_dict[key].device) for key in parameters} == {"meta"}
        tables = [value for key, value in program.state_dict.items() if key not in parameters]
        tables += [value for value in program.constants.values() if isinstance(value, torch.Tensor)]
        assert tables and {str(value.device) for value in tables} == {"cpu"}


def test_weights_of_another_model_are_a_sentence(foundry: Foundry, ran: Ran) -> None:
    build = ran.builds["llama"]
    words = r"student\.pt2 does not run: .*(size mismatch|shape)"
    with foundry.shortened(), pytest.raises(WorkError, match=words) as caught:
        run_program(build.folder / "student.pt2", [build.teacher / "model.safetensors"], token_ids())
    assert "\n" not in str(caught.value)


def test_a_program_that_is_not_there_is_a_sentence(foundry: Foundry, tmp_path: Path) -> None:
    with foundry.shortened(), pytest.raises(WorkError, match=r"nowhere\.pt2 does not run: .*nowhere\.pt2"):
        run_program(tmp_path / "nowhere.pt2", [], token_ids())


def test_operators_of_transformers_are_registered_where_a_graph_holds_them(foundry: Foundry) -> None:
    """Experts hold one, whether their files are named as the model's parameters are or not."""
    for family, custom in (("gpt_oss", True), ("mixtral", True), ("llama", False)):
        assert holds_custom(foundry.whole(family, num_hidden_layers=2).teacher.captured.graph_module) == custom
    build = foundry.build(foundry.teacher("gpt_oss", num_hidden_layers=2), {"intermediate_size": 24})
    assert build.checks["program"]["passed"] and build.checks["program"]["exact"]
