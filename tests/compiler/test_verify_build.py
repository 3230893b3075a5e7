"""`minitron verify`: a build is held against its teacher, its plan and its scores as it lies there.

Each case changes one thing in a build that was compiled and verified, and names the tensor, list or file that is told.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron.compiler import verify_build
from minitron.compiler.importance.tensor_file import write_tensors
from minitron.compiler.verify.checks import Check
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.progress import Silent
from tests.compiler.test_refit import Stopping
from tests.foundry import CHECK_NAMES, Build, Folder, Foundry

WIDTHS = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "layers": {"drop": [1]}}


@pytest.fixture(scope="module")
def build(foundry: Foundry) -> Build:
    return foundry.build(foundry.teacher("llama"), WIDTHS)


def test_an_error_beyond_what_is_allowed_is_not_shown_within_it() -> None:
    for error, allowed, shown in (
        (1.83, 1.6, "error 1.83e+00, allowed 1.60e+00"),
        (1.604, 1.601, "error 1.60400e+00, allowed 1.60100e+00"),
        (0.0, 0.0, "error 0.00e+00, allowed 0.00e+00"),
    ):
        assert str(Check("generation", error <= allowed, True, error, allowed, "it")) == f"`generation`: it ({shown})"


def copied(build: Build, tmp_path: Path) -> Path:
    return shutil.copytree(build.folder, tmp_path / "copy")


def verified(foundry: Foundry, folder: Path) -> None:
    with foundry.shortened():
        verify_build(folder, device="cpu", progress=Silent())


def test_an_untouched_build_passes_every_check(foundry: Foundry, build: Build, tmp_path: Path) -> None:
    folder = copied(build, tmp_path)
    before = build.document("verification.json")
    verified(foundry, folder)
    after = Folder(folder).document("verification.json")
    assert after["passed"] and {check["name"] for check in after["checks"]} == CHECK_NAMES | {"files"}
    assert after["student"] == before["student"], "what training looks at stays as it was recorded"


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("phi3", {}),
        ("gemma2", {}),
        ("mixtral", {}),
        ("qwen3", {"importance": {"hidden_basis": "principal"}}),
        ("llama", {"importance": {"selection": "greedy"}, "recovery": {"refit": "least_squares"}}),
    ],
)
def test_so_do_fused_tied_repaired_rotated_and_refitted_ones(
    foundry: Foundry, tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    blocks = {**more, "importance": {"data": foundry.calibration, **more.get("importance", {})}}
    student = {"hidden_size": 24, "intermediate_size": 24}
    made = foundry.build(foundry.teacher(family, num_hidden_layers=2), student, **blocks)
    verified(foundry, shutil.copytree(made.folder, tmp_path / "copy"))


def test_an_interrupted_verification_goes_on_with_the_refit(foundry: Foundry, tmp_path: Path) -> None:
    refit = {"recovery": {"refit": "least_squares"}}
    made = foundry.build(foundry.teacher("llama", num_hidden_layers=2), {"intermediate_size": 24}, **refit)
    folder = copied(made, tmp_path)
    with pytest.raises(KeyboardInterrupt), foundry.shortened():
        verify_build(folder, device="cpu", progress=Stopping(2))
    assert list(folder.glob(".minitron-verify.tmp/values/*"))
    calm = Stopping(9)
    with foundry.shortened():
        verify_build(folder, device="cpu", progress=calm)
    assert calm.before == 3 and not list(folder.glob(".minitron-*"))

    def broken(*_: object, **__: object) -> None:
        raise WorkError("the disk is full")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(WorkError, match="full"), foundry.shortened():
        patch.setitem(
            verify_build.__globals__, "run_verification", broken
        )  # the module stands behind a function of its name
        verify_build(folder, device="cpu", progress=Silent())
    assert not list(folder.glob(".minitron-*"))


def test_it_computes_as_the_compile_did(foundry: Foundry, build: Build, tmp_path: Path) -> None:
    refit = {"recovery": {"refit": "least_squares"}}
    refitted = foundry.build(foundry.teacher("llama", num_hidden_layers=2), {"intermediate_size": 24}, **refit)
    before, seen = torch.get_num_threads(), list[int]()
    assert refitted.document("verification.json")["compiled"] == {"device": "cpu", "threads": before}

    def checks(*_: object) -> list[Check]:
        seen.append(torch.get_num_threads())
        return []

    for number, made in enumerate((build, refitted)):
        folder = shutil.copytree(made.folder, tmp_path / str(number))
        json_key(lambda document: document.update(compiled={"device": "cuda", "threads": before + 2}))(
            folder / "verification.json"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(verify_build.__globals__, "_checks", checks)
            if made is build:  # nothing of it depends on the device
                verified(foundry, folder)
                continue
            with pytest.raises(
                UsageError, match=r"was refitted on a device of the kind cuda, .*; write --device cuda$"
            ):
                verified(foundry, folder)
    assert seen == [before + 2] and torch.get_num_threads() == before


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
        found = load_file(path)
        change(found)
        save_file({name: value.contiguous() for name, value in found.items()}, path, metadata=metadata)

    return spoil


def swap(name: str, dim: int, one: int, other: int) -> Callable[[Path], None]:
    """Two indices of one tensor in each other's place."""

    def change(found: dict[str, torch.Tensor]) -> None:
        order = list(range(found[name].shape[dim]))
        order[one], order[other] = other, one
        found[name] = found[name].index_select(dim, torch.tensor(order))

    return tensors(change)


def flipped(name: str) -> Callable[[Path], None]:
    """The scores of an axis in another order, with the checksum of what then stands there."""

    def spoil(path: Path) -> None:
        with safe_open(path, framework="pt") as handle:
            key = json.loads(handle.metadata()["about"])["key"]
        found = load_file(path)
        write_tensors(path, key, found | {name: found[name].flip(0)})

    return spoil


def json_key(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return spoil


def kept_neuron(document: dict[str, Any]) -> None:
    """Another neuron than the scores say, in the document alone."""
    kept = document["selection"]["intermediate_size"][0]
    kept[-1] = max(set(range(40)) - set(kept))
    kept.sort()


STUDENT = "student/model.safetensors"
DOWN, KEYS = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def turned_heads(found: dict[str, torch.Tensor]) -> None:
    """Key-value groups in each other's place, in the keys only."""
    found[KEYS] = found[KEYS].roll(8, 0)


@dataclass(frozen=True)
class Lie:
    """A change of `file`; `check` notices and its detail matches `words`."""

    file: str
    change: Callable[[Path], None]
    check: str
    words: str


LIES = {
    "rows of tokens that never occur": Lie(
        STUDENT,
        swap("model.embed_tokens.weight", 0, 94, 95),
        "weights",
        r"model\.embed_tokens\.weight is .* at \[94, 0\]",
    ),
    "two neurons in one matrix": Lie(STUDENT, swap(DOWN, 1, 3, 4), "weights", rf"{re.escape(DOWN)} is "),
    "groups in the keys only": Lie(STUDENT, tensors(turned_heads), "weights", rf"{re.escape(KEYS)} is "),
    "a norm that was rescaled": Lie(
        STUDENT, tensors(lambda t: t["model.norm.weight"].mul_(0.9)), "weights", r"model\.norm\.weight is .* at \[0\]"
    ),
    "a tensor that is gone": Lie(STUDENT, tensors(lambda t: t.pop(UP)), "weights", rf"{re.escape(UP)} is missing"),
    "a shorter context": Lie(
        "student/config.json",
        json_key(lambda document: document.update(max_position_embeddings=64)),
        "files",
        r"student/config\.json is not what the compile wrote",
    ),
    "another end of text": Lie(
        "student/generation_config.json",
        json_key(lambda document: document.update(eos_token_id=7)),
        "files",
        r"student/generation_config\.json is not what the compile wrote",
    ),
    "scores in another order": Lie(
        "scores.safetensors",
        flipped("intermediate_size.2"),
        "selection",
        r"intermediate_size in layer 2 keeps \d+, scored .*, and drops \d+, scored",
    ),
    "another selection in the plan": Lie(
        "plan.json", json_key(kept_neuron), "selection", r"intermediate_size in layer 0 keeps \d+, scored"
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_what_was_changed_is_named(foundry: Foundry, build: Build, tmp_path: Path, name: str) -> None:
    folder = copied(build, tmp_path)
    lie = LIES[name]
    lie.change(folder / lie.file)
    with pytest.raises(WorkError, match="failed its check"):
        verified(foundry, folder)
    found = Folder(folder)
    assert found.document("verification.json")["passed"] is False
    assert not found.checks[lie.check]["passed"]
    assert re.search(lie.words, found.checks[lie.check]["detail"]), found.checks[lie.check]["detail"]


def test_a_build_that_is_not_whole(foundry: Foundry, build: Build, tmp_path: Path) -> None:
    folder = copied(build, tmp_path)
    (folder / "student.pt2").unlink()
    with pytest.raises(UsageError, match=r"student\.pt2 is missing; compile again"):
        verified(foundry, folder)
    (folder / "verification.json").unlink()
    with pytest.raises(UsageError, match="was not compiled to its end; compile it first"):
        verified(foundry, folder)


def test_a_spec_that_has_changed(foundry: Foundry, build: Build, tmp_path: Path) -> None:
    folder = copied(build, tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(Path(build.document("plan.json")["spec"]["path"]).read_text().replace("24", "20"))
    json_key(lambda document: document["spec"].update(path=str(spec)))(folder / "plan.json")
    with pytest.raises(UsageError, match=r"has changed since .* was compiled from it; compile again, or restore it"):
        verified(foundry, folder)
