"""Specs to start from are valid, and ask for what was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron.specs import UsageError, load_spec, recipe_names, recipe_text, starting_spec
from tests.specs.conftest import Load

# teacher, what becomes smaller, tokens, highest and lowest learning rate: arXiv 2407.14679 and 2408.11796.
PUBLISHED = {
    "mistral-nemo-minitron-8b": ({"hidden_size": 4096, "intermediate_size": 11520}, 380, 1e-4, 4.5e-7),
    "llama-3.1-minitron-4b-width": ({"hidden_size": 3072, "intermediate_size": 9216}, 94, 1e-4, 1e-5),
    "llama-3.1-minitron-4b-depth": ({"num_hidden_layers": 16}, 94, 1e-4, 1e-5),
    "nemotron-4-minitron-8b": (
        {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 48},
        94,
        2e-4,
        4.5e-7,
    ),
    **dict.fromkeys(
        ("nemotron-4-minitron-4b", "nemotron-4-minitron-4b-chain"),
        (
            {"hidden_size": 3072, "intermediate_size": 9216, "num_attention_heads": 24},
            94,
            2e-4,
            4.5e-7,
        ),
    ),
}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_valid_spec_of_its_own_name(load: Load, name: str) -> None:
    loaded = load(recipe_text(name))
    assert loaded.spec.name == name
    assert loaded.spec.distill is not None and loaded.spec.importance.data is not None
    assert recipe_text(name).startswith("# ")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_asks_for_what_was_published(load: Load, name: str) -> None:
    spec = load(recipe_text(name)).spec
    widths, billions, lr, min_lr = PUBLISHED[name]
    assert dict(spec.student.targets()) == widths
    assert spec.distill is not None and spec.distill.tokens == billions * 10**9
    assert (spec.distill.optimizer.lr, spec.distill.optimizer.min_lr) == (lr, min_lr)


def test_the_chain_takes_its_teacher_from_the_recipe_before(load: Load, tmp_path: Path) -> None:
    teacher = load(recipe_text("nemotron-4-minitron-4b-chain")).spec.teacher
    before = recipe_text("nemotron-4-minitron-8b")
    assert teacher.spec == "nemotron-4-minitron-8b.yaml"
    (tmp_path / teacher.spec).write_text(before)
    assert load_spec(tmp_path / teacher.spec).spec.name == "nemotron-4-minitron-8b"


def test_the_depth_recipe_drops_neighbouring_layers(load: Load) -> None:
    depth = load(recipe_text("llama-3.1-minitron-4b-depth")).spec.importance.depth
    assert (depth.metric, depth.contiguous) == ("loss", True)


def test_every_line_that_the_starting_spec_leaves_out_is_valid_as_well(load: Load) -> None:
    """What is commented out inside a block is a key of the language, not a memory of one."""
    lines = starting_spec().splitlines()
    keys = [
        line.strip().lstrip("# ").split(":")[0] for line in lines if line.startswith("  ") and line.strip()[0] == "#"
    ]
    assert len(keys) > 5
    for index, line in enumerate(lines):
        code = line.strip()
        if line.startswith("  ") and code.startswith("# "):
            changed = [*lines[:index], line.replace("# ", "", 1), *lines[index + 1 :]]
            try:
                load("\n".join(changed))
            except UsageError as error:
                assert "unknown key" not in str(error) and "not valid YAML" not in str(error)


def test_an_unknown_recipe_says_which_there_are() -> None:
    with pytest.raises(
        UsageError, match=r"there is no recipe mistral-nemo-8b; did you mean mistral-nemo-minitron-8b\?"
    ):
        recipe_text("mistral-nemo-8b")
    with pytest.raises(UsageError, match=r"there are llama.*, qwen3"):
        recipe_text("zzz")
    with pytest.raises(UsageError, match="there is no recipe starter"):
        recipe_text("starter")
