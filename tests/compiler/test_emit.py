"""What a student's folder holds: weights in shards, configuration, tokenizer; and that it is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from minitron.compiler import Plan, compile
from minitron.compiler.emit.model_card import model_card
from minitron.compiler.emit.program import build_program, save_program
from minitron.compiler.emit.rewritten import RewrittenStudent
from minitron.compiler.emit.student import Make, StudentFolder, Tensors, student_tensors, write_student
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.importance.select import leading
from minitron.compiler.plan_document import plan_document
from minitron.compiler.storage import shards
from minitron.compiler.teacher.tokenizer import tokenizer_files
from minitron.compiler.weights.buffers import load_buffers
from minitron.compiler.weights.source import StreamedWeights, WeightSource, open_weights
from minitron.specs.atomic import MARKER
from minitron.specs.errors import WorkError
from tests.foundry import Foundry, load_model, logits, token_ids

FFN = {"intermediate_size": 24}


@dataclass(frozen=True)
class Pruned:
    """A student that is ready to be written: the first channels of everything."""

    plan: Plan
    source: WeightSource
    student: RewrittenStudent

    @property
    def tensors(self) -> Tensors:
        return student_tensors(self.source, self.student.recipes, self.plan.teacher.captured.stored_dtype)

    @property
    def make(self) -> Make:
        return self.tensors.make

    def write(
        self, target: Path, make: Make | None = None, teacher: Path | None = None, *, resumed: bool = False
    ) -> Path:
        """Writes it as the driver does."""
        plan = self.plan
        folder = teacher or plan.checkpoint.folder
        student = StudentFolder(plan.config, plan.model, plan.dtype, folder, model_card(plan_document(plan), folder))
        write_student(target, student, replace(self.tensors, make=make or self.make), lambda _: None, resumed=resumed)
        return target


def pruned(foundry: Foundry, family: str = "llama") -> Pruned:
    plan = foundry.plan(foundry.teacher(family, num_hidden_layers=2), FFN)
    student = compile.rewrite(
        plan, leading(plan.targets, plan.teacher.roles), load_buffers(plan.teacher.captured.model)
    )
    return Pruned(plan, open_weights(plan.teacher.captured, plan.checkpoint), student)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def names(folder: Path) -> set[str]:
    """Everything in a folder but for its mark."""
    return {path.name for path in folder.iterdir() if path.name != MARKER}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- weights ------------------------------------------------------------------------------------------------------------


def test_a_student_larger_than_a_shard(foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = pruned(foundry)
    whole = tensors(ready.write(tmp_path / "whole"))
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    folder = ready.write(tmp_path / "shards")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert {name for name in names(folder) if name.endswith(".safetensors")} == set(files)
    held = {shard: load_file(folder / shard) for shard in files}
    assert index["weight_map"] == {name: shard for shard, of in held.items() for name in of}
    sizes = [sum(tensor.nbytes for tensor in of.values()) for of in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes) == Estimate(ready.plan).student_costs.weight_bytes
    assert all(size <= 10_000 or len(of) == 1 for size, of in zip(sizes, held.values(), strict=True))
    assert same(tensors(folder), whole)
    ids = token_ids()
    assert torch.equal(logits(load_model(folder), ids), logits(load_model(tmp_path / "whole"), ids))


def test_weight_files_that_an_interrupted_process_wrote_are_not_written_again(
    foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 16 << 10)
    one = pruned(foundry)
    whole = one.write(tmp_path / "whole")
    target, made = tmp_path / "student", list[str]()

    def interrupted(name: str) -> torch.Tensor:
        made.append(name)
        if len(made) == 10:
            raise KeyboardInterrupt
        return one.make(name)

    with pytest.raises(KeyboardInterrupt):
        one.write(target, interrupted, resumed=True)
    (partial,) = tmp_path.glob(".minitron-student*.tmp")
    there = {name for path in partial.glob("*.safetensors") for name in load_file(path)}
    assert there == set(made[: len(there)]) and 0 < len(there) < 10, "whole files alone"
    (partial / ".minitron-model-00009-of-00009.safetensors.1.tmp").write_bytes(
        b"half a file of a process that was killed"
    )
    again: list[str] = []

    def remembered(name: str) -> torch.Tensor:
        again.append(name)
        return one.make(name)

    one.write(target, remembered, resumed=True)
    assert not there & set(again) and there | set(again) == set(tensors(whole))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    assert not partial.exists()


def test_no_more_than_a_tensor_is_in_memory(foundry: Foundry, tmp_path: Path) -> None:
    ready, alive, most = pruned(foundry), [], 0

    def make(name: str) -> torch.Tensor:
        nonlocal most
        tensor = ready.make(name)
        alive.append((weakref.ref(tensor), tensor.nbytes))
        most = max(most, sum(size for ref, size in alive if ref() is not None))
        return tensor

    ready.write(tmp_path / "student", make)
    assert most == max(size for _, size in alive)


def test_rows_that_go_are_not_read(foundry: Foundry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, asked = pruned(foundry), dict[str, int]()
    assert isinstance(ready.source, StreamedWeights)
    original = ready.source.rows
    monkeypatch.setattr(
        ready.source, "rows", lambda name, kept: asked.update({name: len(kept)}) or original(name, kept)
    )
    ready.write(tmp_path / "student")
    assert asked == {f"model.layers.{i}.mlp.{name}_proj.weight": 24 for i in (0, 1) for name in ("gate", "up")}


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
def test_a_head_that_is_the_embedding_is_written_once(
    foundry: Foundry, tmp_path: Path, family: str, tied: bool
) -> None:
    ready = pruned(foundry, family)
    written = tensors(ready.write(tmp_path / "student"))
    assert ("lm_head.weight" in written) != tied
    assert sum(tensor.numel() for tensor in written.values()) == Estimate(ready.plan).student_costs.parameters
    model = load_model(tmp_path / "student")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_files_name_their_tensors_as_the_teachers(foundry: Foundry, tmp_path: Path, family: str) -> None:
    """Also where transformers holds the experts of a layer in one tensor and the files do not."""
    ready = pruned(foundry, family)
    written, teacher = tensors(ready.write(tmp_path / "student")), tensors(ready.plan.checkpoint.folder)
    assert written.keys() == teacher.keys()
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert (config["dtype"], config["intermediate_size"]) == ("float32", 24)
    assert config["architectures"] == [type(ready.plan.model).__name__]


# -- what stands beside them --------------------------------------------------------------------------------------------


@pytest.fixture
def furnished(foundry: Foundry, tmp_path: Path) -> Path:
    """A teacher's folder with every kind of file that such folders have, weights left out."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    for path in tokenizer_files(foundry.teacher("llama", num_hidden_layers=2)):
        (folder / path.name).write_bytes(path.read_bytes())
    for name in (
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ):
        (folder / name).write_text(name)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in ("pytorch_model.bin", "modeling_own.py", "LICENSE", "README.md", "training_args.bin"):
        (folder / name).write_text("the teacher's")
    return folder


def test_everything_that_makes_up_the_tokenizer_goes_along_and_nothing_else(
    foundry: Foundry, tmp_path: Path, furnished: Path
) -> None:
    student = pruned(foundry).write(tmp_path / "student", teacher=furnished)
    own = {"config.json", "model.safetensors", "README.md"}
    assert names(student) - own == {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates",
    }  # fmt: skip
    for name in names(student) - own:
        if (student / name).is_file():
            assert (student / name).read_bytes() == (furnished / name).read_bytes()
    assert (student / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert (student / "README.md").read_text() != "the teacher's"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_tokenizer_and_generation_settings_are_the_teachers(foundry: Foundry, tmp_path: Path, family: str) -> None:
    ready = pruned(foundry, family)
    teacher, student = ready.plan.checkpoint.folder, ready.write(tmp_path / "student")
    generation, theirs = (json.loads((folder / "generation_config.json").read_text()) for folder in (student, teacher))
    assert generation == theirs
    assert load_model(student).generation_config.max_new_tokens == 7
    words = "the cat sat on a mat"
    assert AutoTokenizer.from_pretrained(student)(words) == AutoTokenizer.from_pretrained(teacher)(words)


def test_the_model_card_says_what_was_made_of_what(foundry: Foundry, tmp_path: Path) -> None:
    ready = pruned(foundry)
    _, front, text = (ready.write(tmp_path / "student") / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "| intermediate_size | 40 | 24 |" in text
    teacher, student = Estimate(ready.plan).teacher_costs, Estimate(ready.plan).student_costs
    assert f"| parameters | {teacher.parameters:,} | {student.parameters:,} |" in text


FRONT = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["minitron", "pruned"]}


@pytest.mark.parametrize(
    ("name", "commit", "card", "front"),
    [
        ("org/Model: 8B", "abc", None, {"base_model": "org/Model: 8B"}),
        ("models/teacher", None, None, {}),
        (
            "org/m", "abc", "---\nlicense: other\nlicense_name: x # y\nlanguage: [en, 'no']\ntags: [a]\n---\n# m\n",
            {"license": "other", "license_name": "x", "language": ["en", "no"], "base_model": "org/m"},
        ),
        ("teacher", None, "---\nlicense: [\n---\n", {}),
        ("teacher", None, "no front matter\n---\nlicense: mit\n---\n", {}),
    ],
)  # fmt: skip
def test_the_card_has_the_teachers_terms_and_names_a_base_that_others_can_find(
    foundry: Foundry, tmp_path: Path, name: str, commit: str | None, card: str | None, front: dict[str, Any]
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    document = plan_document(pruned(foundry).plan)
    document["teacher"] |= {"model": name, "commit": commit}
    _, written, _ = model_card(document, tmp_path).split("---\n", 2)
    assert yaml.safe_load(written) == FRONT | front


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_permissions_follow_the_umask(foundry: Foundry, tmp_path: Path, family: str) -> None:
    """safetensors and temporary folders would keep everybody else out."""
    ready, old = pruned(foundry, family), os.umask(0o027)
    try:
        student = ready.write(tmp_path / "student")
    finally:
        os.umask(old)
    assert student.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in student.iterdir()} == {0o640}


# -- whole, or not there ------------------------------------------------------------------------------------------------


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: every writer, Python or not, meets an error of the system in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def untouched(folder: Path, work: Callable[[], Any], kind: type[Exception]) -> Exception:
    """`work` fails, and the folder is as it was: the error."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(kind) as caught:
        work()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not list(folder.rglob("*.tmp"))
    return caught.value


@pytest.mark.parametrize("there", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_full_disk_leaves_no_half_student(foundry: Foundry, tmp_path: Path, family: str, there: bool) -> None:
    ready = pruned(foundry, family)
    if there:
        ready.write(tmp_path / "student")

    def work() -> None:
        with disk_of(40_000):
            ready.write(tmp_path / "student")

    error = untouched(tmp_path, work, OSError)
    assert isinstance(error, OSError) and error.errno == errno.EFBIG
    assert Path(error.filename).is_relative_to(tmp_path / "student"), "the user is told where"


def test_a_teacher_that_cannot_be_read_to_its_end_leaves_no_half_student(foundry: Foundry, tmp_path: Path) -> None:
    ready = pruned(foundry)

    def make(name: str) -> torch.Tensor:
        if "layers.1" in name:
            raise WorkError("model.safetensors: cannot read it")
        return ready.make(name)

    untouched(tmp_path, lambda: ready.write(tmp_path / "student", make), WorkError)
    assert names(tmp_path) == set()


def test_a_full_disk_leaves_no_half_program(foundry: Foundry, tmp_path: Path) -> None:
    """Torch itself would abort the process."""
    ready = pruned(foundry)
    program = build_program(ready.student.graph_module, load_buffers(ready.plan.model))
    save_program(program, tmp_path / "student.pt2")

    def work() -> None:
        with disk_of(1_000):
            save_program(program, tmp_path / "student.pt2")

    error = untouched(tmp_path, work, OSError)
    assert isinstance(error, OSError) and error.errno == errno.EFBIG


def test_the_same_student_is_the_same_program(foundry: Foundry, tmp_path: Path) -> None:
    """Whatever its file is called, and whoever has made it where: neither places nor addresses stand in it."""
    ready = pruned(foundry)
    for name in ("one", "other"):
        program = build_program(ready.student.graph_module, load_buffers(ready.plan.model))
        save_program(program, tmp_path / f"{name}.pt2")
    content = (tmp_path / "one.pt2").read_bytes()
    assert content == (tmp_path / "other.pt2").read_bytes()
    assert b"/compiler/" not in content and b"site-packages" not in content
    assert b"self_attn.q_proj" in content, "the modules that operators belong to"
