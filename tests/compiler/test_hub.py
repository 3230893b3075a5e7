"""Teachers from the Hub: from its cache, over the network, and every way in which it says no."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitron.compiler import compile_spec, make_plan
from minitron.compiler.teacher.checkpoint import fetch_weights, open_checkpoint
from minitron.compiler.teacher.hub import commit_of
from minitron.specs import load_spec
from minitron.specs.errors import SpecInvalid, UsageError, WorkError
from minitron.specs.progress import Silent
from tests.foundry import WITHOUT_PROGRAM, Foundry
from tests.hub import MAIN, NEXT, Hub, put_in_cache, serving, use_cache

REPO = "org/tiny"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and no network."""
    return use_cache(monkeypatch, tmp_path / "cache", offline=True)


@pytest.fixture
def teacher(foundry: Foundry) -> Path:
    return foundry.teacher("llama", num_hidden_layers=2)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Path) -> Iterator[Hub]:
    """A Hub with one model on it."""
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.repositories[REPO] = ({"main": MAIN, "v2": NEXT}, teacher)
        yield hub


def opened(base: Path, revision: str | None = None, *, weights: bool = False) -> Any:
    checkpoint = open_checkpoint(REPO, revision, base, weights=weights)
    return fetch_weights(checkpoint) if weights else checkpoint


# -- from the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_alone_will_do(offline: Path, teacher: Path, tmp_path: Path) -> None:
    put_in_cache(offline, REPO, MAIN, teacher, "main")
    checkpoint = opened(tmp_path, weights=True)
    assert (checkpoint.commit, checkpoint.name, checkpoint.remark) == (MAIN, REPO, "")
    assert checkpoint.config.hidden_size == 32 and "lm_head.weight" in checkpoint.tensors


def test_a_branch_a_tag_and_a_commit_are_each_what_they_were_at(offline: Path, teacher: Path, tmp_path: Path) -> None:
    put_in_cache(offline, REPO, MAIN, teacher, "main")
    put_in_cache(offline, REPO, NEXT, teacher, "v2")
    wanted = {None: MAIN, "main": MAIN, "v2": NEXT, NEXT: NEXT, MAIN: MAIN}
    assert {revision: opened(tmp_path, revision).commit for revision in wanted} == wanted


def test_a_folder_beside_the_spec_comes_before_an_id_of_the_same_name(
    offline: Path, teacher: Path, tmp_path: Path
) -> None:
    put_in_cache(offline, REPO, MAIN, teacher, "main")
    shutil.copytree(teacher, tmp_path / REPO)
    assert opened(tmp_path).commit is None


def test_a_configuration_alone_is_planned_and_the_plan_says_what_it_could_not_see(
    offline: Path, teacher: Path, tmp_path: Path, foundry: Foundry
) -> None:
    (tmp_path / "only").mkdir()
    shutil.copy(teacher / "config.json", tmp_path / "only")
    put_in_cache(offline, REPO, MAIN, tmp_path / "only", "main")
    loaded = foundry.load(Path(REPO), {"intermediate_size": 24})
    with foundry.shortened():
        plan = make_plan(loaded, build=tmp_path / "build")
    assert plan.checkpoint.commit == MAIN and plan.config.intermediate_size == 24
    assert plan.remarks[0].startswith(f"could not read the safetensors headers of {REPO} (")
    with pytest.raises(WorkError, match=f"no weights in safetensors.*`hf download {REPO} --revision {MAIN}`"):
        opened(tmp_path, weights=True)


@pytest.mark.parametrize("revision", [None, "v9"])
def test_offline_it_says_what_to_do(offline: Path, tmp_path: Path, revision: str | None) -> None:
    where, option = (" at v9", " --revision v9") if revision else ("", "")
    with pytest.raises(UsageError) as caught:
        opened(tmp_path, revision)
    assert str(caught.value) == (
        f"{REPO} is not in the local cache{where} and HF_HUB_OFFLINE is set; unset it, or run "
        f"`hf download {REPO}{option}` where there is a network"
    )


# -- over the network ---------------------------------------------------------------------------------------------------


def test_a_plan_fetches_small_files_and_the_headers_of_the_others(hub: Hub, teacher: Path, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path)
    local = open_checkpoint(str(teacher), None, tmp_path, weights=False)
    shapes = {name: (info.dtype, info.shape, info.nbytes) for name, info in checkpoint.tensors.items()}
    assert shapes == {name: (info.dtype, info.shape, info.nbytes) for name, info in local.tensors.items()}
    assert {"config.json", "tokenizer.json"} <= hub.fetched() and "model.safetensors" not in hub.fetched()
    assert not (checkpoint.folder / "model.safetensors").exists()
    assert opened(tmp_path, "v2").commit == NEXT


def test_several_weight_files_are_inspected_by_their_index(hub: Hub, teacher: Path, tmp_path: Path) -> None:
    split = tmp_path / "split"
    shutil.copytree(teacher, split)
    (split / "model.safetensors").rename(split / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.repositories["org/split"] = ({"main": MAIN}, split)
    checkpoint = open_checkpoint("org/split", None, tmp_path, weights=False)
    assert "model.norm.weight" in checkpoint.tensors and checkpoint.remark == ""


def test_a_compile_fetches_the_weights(hub: Hub, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, weights=True)
    assert (checkpoint.folder / "model.safetensors").is_file() and checkpoint.tensors


def test_weights_are_fetched_when_nothing_is_wrong_any_more(hub: Hub, foundry: Foundry, tmp_path: Path) -> None:
    loaded = foundry.load(Path(REPO), {"intermediate_size": 9999})
    with pytest.raises(SpecInvalid, match="9999 is not between"):
        foundry.compile(loaded, tmp_path / "build")
    assert "config.json" in hub.fetched() and "model.safetensors" not in hub.fetched()


def test_the_weights_are_those_of_the_commit_that_was_planned(
    hub: Hub, teacher: Path, foundry: Foundry, tmp_path: Path
) -> None:
    """The same bytes as from a folder, though the branch has moved to another model by then."""
    loaded = foundry.load(Path(REPO), {"intermediate_size": 24})
    with foundry.shortened():
        plan = make_plan(loaded, build=tmp_path / "build", weights=True)
        hub.repositories[REPO][0].update(main=NEXT, then=MAIN)
        hub.asked.clear()
        compile_spec(loaded, tmp_path / "build", device="cpu", progress=Silent(), plan=plan, stages=WITHOUT_PROGRAM)
    assert "model.safetensors" in hub.fetched()
    document = json.loads((tmp_path / "build" / "plan.json").read_text())
    assert document["teacher"]["commit"] == document["inputs"]["teacher"]["commit"] == MAIN and not document["remarks"]
    other = foundry.build(teacher, {"intermediate_size": 24}, program=False)
    student = Path("student") / "model.safetensors"
    assert (tmp_path / "build" / student).read_bytes() == (other.folder / student).read_bytes()
    assert document["selection"] == other.document("plan.json")["selection"]
    assert document["fingerprint"] == other.document("plan.json")["fingerprint"]


def test_a_plan_compares_headers_on_the_hub_with_the_configuration(
    hub: Hub, teacher: Path, tmp_path: Path, foundry: Foundry
) -> None:
    other = tmp_path / "other"
    shutil.copytree(foundry.teacher("llama", num_hidden_layers=2, intermediate_size=48), other)
    shutil.copy(teacher / "config.json", other)
    hub.repositories["org/other"] = ({"main": MAIN}, other)
    loaded = foundry.load(Path("org/other"), {"num_hidden_layers": 1})
    with foundry.shortened(), pytest.raises(SpecInvalid) as caught:
        make_plan(loaded, build=tmp_path / "build")
    (error,) = caught.value.errors
    assert error.path == "teacher.model" and error.line > 0
    assert "one of the two files belongs to another model" in error.message


def test_a_gated_model_is_asked_for_on_its_page(hub: Hub, tmp_path: Path) -> None:
    hub.gated.add(REPO)
    with pytest.raises(UsageError, match=f"{REPO} is gated on the Hugging Face Hub; ask for access.*`hf auth login`"):
        opened(tmp_path)


def test_a_missing_or_private_model_is_named(hub: Hub, tmp_path: Path) -> None:
    del hub.repositories[REPO]
    with pytest.raises(UsageError, match=f"{REPO} is no folder beside the spec and not on the Hugging Face Hub, or pr"):
        opened(tmp_path)


def test_a_wrong_revision_stands_at_its_own_line(hub: Hub, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"teacher:\n  model: {REPO}\n  revision: v9\nstudent: {{layers: {{drop: [0]}}}}\n")
    loaded = load_spec(spec)
    with pytest.raises(SpecInvalid) as caught:
        make_plan(loaded, build=tmp_path / "build")
    (error,) = caught.value.errors
    assert (error.line, error.path) == (3, "teacher.revision")
    assert error.message.startswith(f"{REPO} has no revision v9 on the Hugging Face Hub; write")


def test_what_was_fetched_once_is_there_when_the_network_has_gone(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert opened(tmp_path).commit == MAIN
    use_cache(monkeypatch, tmp_path / "cache", offline=True)
    assert opened(tmp_path).commit == MAIN
    (opened(tmp_path).folder / "tokenizer.json").unlink()
    assert opened(tmp_path).config.hidden_size == 32, "a plan needs the configuration and nothing else"
    with pytest.raises(UsageError, match="the local cache holds only a part of org/tiny"):
        opened(tmp_path, weights=True)


def test_a_dead_network_is_a_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UsageError, match=r"not in the local cache and the Hugging Face Hub cannot be reached \(.*\); run"
    ):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["org/a b", "org/--x", "org/x..y"])
def test_what_can_be_no_id_is_said_without_asking(offline: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is neither a folder beside the spec nor a Hugging Face id; write owner/name"):
        open_checkpoint(name, None, tmp_path, weights=False)


@pytest.mark.parametrize("revision", ["../../../secret.txt", "nested/../../../../secret.txt", "broken"])
def test_no_file_but_a_commit_is_taken_for_one(offline: Path, tmp_path: Path, revision: str) -> None:
    """A revision that leads out of `refs/`, or to something that is none, gives nothing of that file away."""
    refs = offline / "datasets--org--rows" / "refs"
    (refs / "nested").mkdir(parents=True)
    (refs / "broken").write_text("the secret")
    for folder in (tmp_path, offline, refs.parent):
        (folder / "secret.txt").write_text("the secret")
    with pytest.raises(UsageError) as caught:
        commit_of("org/rows", revision, "dataset")
    assert "the secret" not in str(caught.value)
    (refs / "main").write_text(MAIN)
    assert commit_of("org/rows", None, "dataset") == MAIN
