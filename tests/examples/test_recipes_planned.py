"""The published recipes, planned against the published configurations of their teachers: the published numbers come out
of the plan, not out of the recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from minitron.compiler import make_plan
from minitron.compiler import plan as plan_module
from minitron.specs import load_spec, recipe_names, recipe_text

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
EXAMPLES = ROOT / "examples" / "recipes"

# teacher and student, parameters: model cards and arXiv 2407.14679, 2408.11796. Recipes of one teacher stand together.
PARAMETERS = {
    "mistral-nemo-minitron-8b": (12_247_782_400, 8_414_105_600),
    "llama-3.1-minitron-4b-width": (8_030_261_248, 4_512_746_496),
    "llama-3.1-minitron-4b-depth": (8_030_261_248, 4_540_469_248),
    "nemotron-4-minitron-8b": (15_628_775_424, 8_271_699_968),
    "nemotron-4-minitron-4b": (15_628_775_424, 4_190_509_056),
    "nemotron-4-minitron-4b-chain": (8_271_699_968, 4_190_509_056),
    "qwen3-8b-28-layers": (8_190_735_360, 6_647_163_904),
    "qwen3-8b-32-layers-3840": (8_190_735_360, 6_955_265_792),
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The plans of all recipes. A teacher is captured once for all that begin with it, and forgotten after them: what is
    captured is large."""
    folder = tmp_path_factory.mktemp("recipes")
    for config in CONFIGS.glob("*.json"):
        teacher = folder / config.stem.replace("--", "/")
        teacher.mkdir(parents=True)
        shutil.copy(config, teacher / "config.json")
    for name in recipe_names():
        (folder / f"{name}.yaml").write_text(recipe_text(name))
    captured: dict[str, Any] = {}
    original = plan_module.capture

    def capture(config: Any, *arguments: Any) -> Any:
        key = config.to_json_string(use_diff=False)
        if key not in captured:
            captured[key] = original(config, *arguments)
        return captured[key]

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "capture", capture)
        for name, (teacher, _) in PARAMETERS.items():
            if captured and found and list(found.values())[-1]["teacher"]["parameters"] != teacher:
                captured.clear()
            found[name] = make_plan(load_spec(folder / f"{name}.yaml"), build=folder / "builds" / name).to_json()
    return found


def test_every_recipe_is_planned(plans: dict[str, dict[str, Any]]) -> None:
    assert sorted(plans) == recipe_names()


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_published_numbers_come_out_of_the_plan(plans: dict[str, dict[str, Any]], name: str) -> None:
    plan = plans[name]
    assert (plan["teacher"]["parameters"], plan["student"]["parameters"]) == PARAMETERS[name]
    for axis in plan["axes"]:
        assert axis["status"] != "refused" or axis["teacher"] == axis["student"]
    phases = {phase["name"]: phase["tokens"] for phase in plan["phases"]}
    distill = plan["spec"]["resolved"]["distill"]
    assert phases["distill"] == distill["tokens"]


def test_what_the_recipes_leave_alone_stays(plans: dict[str, dict[str, Any]]) -> None:
    """Heads keep their width: the 8B's attention is as wide as the 15B's, 48 x 128, though its residual stream is not."""
    widths = plans["nemotron-4-minitron-8b"]["student"]["widths"]
    assert (widths["hidden_size"], widths["num_attention_heads"], widths["head_dim"]) == (4096, 48, 128)
    widths = plans["nemotron-4-minitron-4b"]["student"]["widths"]
    assert (widths["num_attention_heads"], widths["num_key_value_heads"], widths["num_hidden_layers"]) == (24, 8, 32)


def test_the_chain_ends_where_the_single_step_does(plans: dict[str, dict[str, Any]]) -> None:
    chain, single = plans["nemotron-4-minitron-4b-chain"], plans["nemotron-4-minitron-4b"]
    assert chain["student"] == single["student"]
    assert chain["teacher"]["widths"] == plans["nemotron-4-minitron-8b"]["student"]["widths"]
    assert "the student that nemotron-4-minitron-8b.yaml plans" in chain["remarks"][0]


def test_the_examples_have_every_recipe_as_it_is_packaged() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.yaml")) == recipe_names()
    for path in EXAMPLES.glob("*.yaml"):
        assert not path.readlink().is_absolute()
        assert path.read_text() == recipe_text(path.stem)
