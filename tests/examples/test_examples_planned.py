"""Every example is planned, the published recipes against the published configurations of their teachers: the published
numbers come out of the plan, not out of the recipe."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from minitron.compiler import make_plan
from minitron.compiler.capture import capture as capture_module
from minitron.compiler.estimate.devices import DEVICES, read_device
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.fit import fits_json
from minitron.compiler.estimate.hardware import HardwareAssumptions, read_hardware
from minitron.compiler.estimate.memory import Memory
from minitron.compiler.estimate.model_costs import ModelCosts
from minitron.compiler.plan import prove
from minitron.compiler.plan.plan import Plan
from minitron.compiler.plan_document import plan_document
from minitron.compiler.student.status import AxisStatus
from minitron.specs import load_spec, recipe_names, recipe_text
from tests.output import conforms

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
# The two of examples/repository: the embedding is tied to the head.
WHOLE = "mistral-nemo-minitron-8b"
REPOSITORY = {"qwen3-1b": (1_720_574_976, 1_092_252_160), "qwen3-1b-24-layers": (1_720_574_976, 1_139_424_768)}


@dataclass(frozen=True)
class Planned:
    """What is asked of a plan. The whole document, whose costs take as long again, is made of one of them."""

    teacher: ModelCosts
    student: ModelCosts
    before: Any
    after: Any
    """The configurations of teacher and student."""
    statuses: tuple[AxisStatus, ...]
    remarks: tuple[str, ...]
    document: dict[str, Any] | None
    memory: tuple[Memory, ...]
    """Of distilling on 8 H100, activations kept and recomputed."""
    cards: tuple[Memory, ...]
    """Of distilling on one device, for each way of holding weights and moments."""
    fits: dict[str, Any]
    """Whether every phase fits a machine of eight H100."""
    on_h100: Any


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Planned]:
    """The plans of all examples, by name. What was captured of a teacher serves all that begin with it, and is forgotten
    after them: it is large."""
    folder = tmp_path_factory.mktemp("planned") / "examples"
    # Without what a user has built there: `make quickstart` leaves a build beside its spec, `make smollm2` a text too.
    shutil.copytree(ROOT / "examples", folder, ignore=shutil.ignore_patterns("builds", "text"))
    for beside in ("recipes", "repository/specs"):
        for config in CONFIGS.glob("*.json"):
            teacher = folder / beside / config.stem.replace("--", "/")
            teacher.mkdir(parents=True)
            shutil.copy(config, teacher / "config.json")
    smollm2 = folder / "smollm2"
    (smollm2 / "teacher").mkdir(exist_ok=True)
    shutil.copy(CONFIGS / "smollm2-135m-instruct.json", smollm2 / "teacher" / "config.json")
    (smollm2 / "text").mkdir(exist_ok=True)
    for name in ("train", "held_out"):
        (smollm2 / "text" / f"{name}.jsonl").write_text('{"text": "prose"}\n')
    captured: dict[str, Any] = {}
    original = capture_module.capture

    def capture(config: Any, *arguments: Any) -> Any:
        key = config.to_json_string(use_diff=False)
        if key not in captured:
            captured[key] = original(config, *arguments)
        return captured[key]

    found: dict[str, Planned] = {}
    before = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_module, "capture", capture)
        # Captures two small models more for every plan, to compare constants of the graph: nothing that is asked here.
        patch.setattr(prove, "compare_constants", lambda *_: None)
        specs = [path for path in folder.rglob("*.yaml") if not any(part.startswith(".") for part in path.parts)]
        for path in sorted(specs, key=lambda path: (path.parent, first_teacher(path))):
            if first_teacher(path) != before:
                captured.clear()
                before = first_teacher(path)
            loaded = load_spec(path)
            plan = make_plan(loaded, build=folder / "builds")
            found[loaded.spec.name] = Planned(
                Estimate(plan).teacher_costs, Estimate(plan).student_costs, plan.teacher.captured.config, plan.config,
                tuple(plan.targets.statuses), plan.remarks, plan_document(plan) if loaded.spec.name == WHOLE else None,
                distilling(plan) if loaded.spec.name == WHOLE else (),
                on_one_card(plan) if loaded.spec.name == WHOLE else (),
                fits_json(Estimate(plan), HardwareAssumptions(read_device("h100x8"), named=True)),
                on_h100(plan, path) if loaded.spec.name == WHOLE else None,
            )  # fmt: skip
    return found


def distilling(plan: Plan) -> tuple[Memory, ...]:
    estimate = Estimate(plan)
    layout = estimate.layout(8)
    return tuple(estimate.training("cuda", replace(layout, recompute=again)) for again in (False, True))


WAYS = (
    ("float32", "float32", "bfloat16"),
    ("bfloat16", "float32", "bfloat16"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "int8", "bfloat16"),
    ("bfloat16", "int8", "float8"),
)
ONE_CARD = {
    "weights": "bfloat16", "optimizer.states": "int8", "gradient_checkpointing": "true", "compute": "float8", "compile": "true"
}  # fmt: skip


@dataclass(frozen=True)
class OnOneCard:
    """Of the pair on one card of 80 GB: whether it fits and its phases, then with the teacher in bf16, and on an A100."""

    fits: dict[str, Any]
    phases: list[dict[str, Any]]
    without: dict[str, Any]
    on_a100: dict[str, Any]


def on_h100(plan: Plan, path: Path) -> OnOneCard:
    """As the page writes it: without the correction of the teacher, whose moments alone take more."""
    overrides = [f"distill.{key}={value}" for key, value in ONE_CARD.items()]
    found = []
    for compute in ("float8", "bfloat16"):
        loaded = load_spec(path, [*overrides, f"teacher.compute={compute}", "teacher_correction=null"])
        found.append(Estimate(replace(plan, loaded=loaded)))
    h100, a100 = (read_hardware(name, None, None) for name in ("h100", "a100"))
    phases = [phase.to_json(h100) for phase in found[0].phases(h100)]
    return OnOneCard(fits_json(found[0], h100), phases, fits_json(found[1], h100), fits_json(found[0], a100))


def on_one_card(plan: Plan) -> tuple[Memory, ...]:
    """Of distilling on one device, recomputed, for each way of holding weights and moments."""
    estimate = Estimate(plan)
    layout = replace(estimate.layout(1), recompute=True)
    return tuple(
        estimate.training(
            "cuda",
            replace(layout, bf16_weights=weights == "bfloat16", moments=moments, float8_teacher=teacher == "float8"),
        )
        for weights, moments, teacher in WAYS
    )


def first_teacher(path: Path) -> str:
    """What a spec begins with: specs of one teacher, and chains that start there, stand together."""
    return path.name.split("-")[0]


def test_every_example_is_planned(plans: dict[str, Planned]) -> None:
    assert set(recipe_names()) == set(PARAMETERS)
    assert set(plans) == {*PARAMETERS, *REPOSITORY, "quickstart", "search", "smollm2"}


@pytest.mark.parametrize("name", [*PARAMETERS, *REPOSITORY])
def test_the_numbers_come_out_of_the_plan(plans: dict[str, Planned], name: str) -> None:
    plan = plans[name]
    assert (plan.teacher.parameters, plan.student.parameters) == (PARAMETERS | REPOSITORY)[name]
    for status in plan.statuses:
        assert status.status != "refused" or status.teacher == status.student, status.axis


def test_every_example_fits_eight_h100(plans: dict[str, Planned]) -> None:
    """A micro batch and a recomputation that fit are chosen; batches are shared equally."""
    for name, plan in plans.items():
        whole = {"device": "h100x8", "ok": True, "nearest": None, "reason": None}
        shared = "sequences of a global batch cannot be shared equally by 8 devices"
        assert plan.fits == whole or shared in plan.fits["reason"], name
        assert plan.fits == whole or name not in PARAMETERS | REPOSITORY, name


def test_smollm2_keeps_three_fifths(plans: dict[str, Planned]) -> None:
    plan = plans["smollm2"]
    assert plan.teacher.parameters == 134_515_008
    assert 0.58 < plan.student.parameters / plan.teacher.parameters < 0.62
    assert any("one matrix is fitted to the embedding and the head" in remark for remark in plan.remarks)


def test_the_document_says_the_same(plans: dict[str, Planned]) -> None:
    document = plans[WHOLE].document
    assert document is not None
    conforms("plan", document)
    assert tuple(document[side]["parameters"] for side in ("teacher", "student")) == PARAMETERS[WHOLE]
    phases = {phase["name"]: phase["tokens"] for phase in document["phases"]}
    # 127 billion tokens of teacher correction, 380 billion of distillation, as published, in whole steps.
    for name, tokens in (("teacher_correction", 127 * 10**9), ("distill", 380 * 10**9)):
        assert 0 <= phases[name] - tokens < 768 * 8192 and phases[name] % (768 * 8192) == 0


def test_the_page_on_scaling_quotes_the_plan(plans: dict[str, Planned]) -> None:
    lines = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    kept, recomputed = plans[WHOLE].memory
    quoted = {cells[1].strip(): cells[3:5] for line in lines if len(cells := line.split("|")) == 6}
    for part in (*kept.parts, "peak"):
        sizes = [memory.peak if part == "peak" else memory.parts[part] for memory in (kept, recomputed)]
        assert [float(cell) for cell in quoted[part]] == [round(size / 1e9, 1) for size in sizes], part
    rule = kept.parts["activations"] / (8192 * 4096 * 40)
    assert f"Activations are {rule:.0f} bytes a token, channel and layer here" in "\n".join(lines)


def test_the_page_on_performance_quotes_the_plan(plans: dict[str, Planned]) -> None:
    """12B to 8B on one card: what it takes, and which cards hold it."""
    cards = plans[WHOLE].cards
    lines = (ROOT / "docs" / "performance.md").read_text().splitlines()
    for (weights, moments, teacher), memory in zip(WAYS, cards, strict=True):
        (line,) = [line for line in lines if line.startswith(f"| {weights} | {moments} | {teacher} |")]
        states, held = (
            sum(memory.parts[part] for part in ("weights", "gradients", "optimizer")),
            memory.parts["teacher"],
        )
        assert line.endswith(f"| {states / 1e9:.1f} GB | {held / 1e9:.1f} GB | {memory.peak / 1e9:.1f} |")
    h200, h100 = (DEVICES[name].memory_bytes for name in ("h200", "h100"))
    assert [memory.peak <= h200 for memory in cards] == [False, True, True, True, True]
    assert [memory.peak <= h100 for memory in cards] == [False, False, False, False, True]


def test_one_card_of_80_gb_holds_the_pair(plans: dict[str, Planned]) -> None:
    """As the page on performance writes it, and on what it says that it cannot run."""
    own = plans[WHOLE].on_h100
    assert own.fits == {"device": "h100", "ok": True, "nearest": None, "reason": None}
    (distill,) = [phase for phase in own.phases if phase["name"] == "distill"]
    parts = distill["memory_bytes"]
    assert parts["teacher"] < 14e9 and distill["peak_memory_bytes"] < DEVICES["h100"].memory_bytes
    # The rest is attention over 8,192 tokens and the heads of both models.
    assert distill["float8_flops"] / distill["flops"] == pytest.approx(0.82, abs=0.01)
    assert own.without["nearest"].startswith("teacher.compute: float8 (")
    reason = "a100-80 has no products in float8: that needs compute capability 8.9 or later"
    assert own.on_a100["reason"] == reason and not own.on_a100["ok"]


def test_what_the_recipes_leave_alone_stays(plans: dict[str, Planned]) -> None:
    """Heads keep their width: the 8B's attention is as wide as the 15B's, 48 x 128, though its residual stream is not."""
    config = plans["nemotron-4-minitron-8b"].after
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (4096, 48, 128)
    config = plans["nemotron-4-minitron-4b"].after
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (24, 8, 32)


def test_the_chain_ends_where_the_single_step_does(plans: dict[str, Planned]) -> None:
    chain, single = plans["nemotron-4-minitron-4b-chain"], plans["nemotron-4-minitron-4b"]
    assert chain.student == single.student and chain.after.to_diff_dict() == single.after.to_diff_dict()
    assert chain.before.to_diff_dict() == plans["nemotron-4-minitron-8b"].after.to_diff_dict()
    assert "the student that nemotron-4-minitron-8b.yaml plans" in chain.remarks[0]


def test_the_examples_have_every_recipe_as_it_is_packaged() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.yaml")) == recipe_names()
    for path in EXAMPLES.glob("*.yaml"):
        assert not path.readlink().is_absolute()
        assert path.read_text() == recipe_text(path.stem)
