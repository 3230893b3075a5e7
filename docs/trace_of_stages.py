"""Writes docs/trace.md: one small model through every stage of a compile, with what each stage yields.

    python docs/trace_of_stages.py

The page is made by running the stages, so it shows what they do today; tests/repository checks that it is current.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "trace.md"
sys.path.insert(0, str(ROOT))

from minitron.compiler.compilation import Compilation, run_buffers  # noqa: E402
from minitron.compiler.compile import Stages  # noqa: E402
from minitron.compiler.estimate.estimate import Estimate  # noqa: E402
from minitron.compiler.importance.select import selection_json  # noqa: E402
from minitron.compiler.plan.plan import Plan, make_plan, settled  # noqa: E402
from minitron.compiler.plan_document import plan_document  # noqa: E402
from minitron.compiler.weights.source import open_weights  # noqa: E402
from minitron.specs import load_spec  # noqa: E402
from minitron.specs.builds import PLAN  # noqa: E402
from minitron.specs.progress import Silent  # noqa: E402
from tests import models  # noqa: E402

LAYER = "model.layers.1"
SHOWN = (
    "model.embed_tokens.weight", f"{LAYER}.input_layernorm.weight", f"{LAYER}.self_attn.q_proj.weight",
    f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.self_attn.o_proj.weight", f"{LAYER}.mlp.down_proj.weight",
)  # fmt: skip
STUDENT = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "layers": {"drop": [0]}}


def block(lines: Iterator[str] | list[str]) -> str:
    return "```\n" + "\n".join(lines) + "\n```\n"


def operators(plan: Plan) -> Iterator[str]:
    """The calls of one feed-forward layer, with the sizes that they yield."""
    captured = plan.teacher.captured
    for node in captured.graph.nodes:
        if node.op == "call_function" and captured.module_of(node).startswith(f"{LAYER}.mlp"):
            value = node.meta["val"]
            sizes = ", ".join(str(size) for size in value.shape)
            yield f"{node.name:12} = {node.target!s:28} [{sizes}]   in {captured.module_of(node)}"


def dimensions(plan: Plan) -> Iterator[str]:
    table = plan.teacher.table
    for name in SHOWN:
        dims = "   ".join(f"{axis}: {table.space.describe(dim)}" for axis, dim in enumerate(table.parameters[name]))
        yield f"{name:40} {dims}"


def statuses(plan: Plan) -> Iterator[str]:
    for one in plan.targets.statuses:
        yield f"{one.axis:22} {one.teacher:>4} -> {one.student:<4} {one.status:12} {one.reason}"


def kept(selection: dict[str, list[list[int]]]) -> Iterator[str]:
    for axis, lists in selection.items():
        for number, indices in enumerate(lists):
            yield f"{axis if not number else '':22} {indices}"


def recipes(student: Any) -> Iterator[str]:
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        recipe = student.recipes[name]
        sizes = ["all" if one is None else str(len(one)) for one in recipe.positions]
        yield f"{name:40} from {recipe.source}, positions kept: {' x '.join(sizes)}"


def page() -> str:
    """The text of docs/trace.md, made in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        return _page(Path(name))


def _page(folder: Path) -> str:
    (folder / "corpus.txt").write_text(models.text(150), encoding="utf-8")
    models.save_teacher(folder / "teacher", models.tiny_config("llama"), torch.float32)
    document = {
        "name": "trace",
        "teacher": {"model": "teacher"},
        "student": STUDENT,
        "importance": {"data": {"text": "corpus.txt", "document": "line", "samples": 8, "sequence_length": 32}},
    }
    spec = folder / "spec.yaml"
    spec.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    loaded, stages = load_spec(spec), Stages()
    plan = make_plan(loaded, build=folder / "build", weights=True)
    source = open_weights(plan.teacher.captured, plan.checkpoint)
    job = Compilation(plan, source, run_buffers(plan, plan.teacher.captured.config), "cpu", Silent())
    scores, samples = stages.score(job)
    selection = stages.select(plan, scores)
    plan = settled(plan, selection)
    student = stages.rewrite(plan, selection, job.buffers)
    job = Compilation(plan, source, job.buffers, "cpu", Silent())
    stages.emit(job, student)
    stages.write_program(job, student)
    (folder / "build" / PLAN).write_text(json.dumps(plan_document(plan, selection)))
    checks = stages.verify(replace(job, scores=scores), student, samples)
    costs, captured = Estimate(plan), plan.teacher.captured
    before, after = (
        sum(n.op == "call_function" for n in g.nodes) for g in (captured.graph, student.graph_module.graph)
    )
    files = (path for path in (folder / "build").rglob("*") if path.is_file() and not path.name.startswith("."))
    written = sorted(str(path.relative_to(folder / "build")) for path in files)
    assert samples is not None and scores.hidden is not None
    return f"""# One model through every stage

A Llama of three layers with random weights, as the tests make it, and a spec that narrows every axis and drops a layer.
Made by `python docs/trace_of_stages.py`, which runs the stages of `compiler/compile.py`; the words are those of the
[glossary](glossary.md).

{block(spec.read_text(encoding="utf-8").rstrip().splitlines())}
## `teacher/`: what is on disk

{len(plan.checkpoint.tensors)} tensors in one file, of which only the header is read.

## `capture/`: the graph

{before} operators, {captured.layer_count} layers in `{captured.layer_path}`, attention by {captured.attention}. The
feed-forward part of layer 1:

{block(operators(plan))}
## `axes/`: the dimensions of parameters

`x` is a product, `+` a concatenation, `!` a pin. Rotary embeddings hold the two halves of a head of queries and keys.

{block(dimensions(plan))}
## `roles/` and `student/`: the axes by name, and what is asked of them

{block(statuses(plan))}
## `plan/` and `estimate/`: the student, proved without a weight

{costs.teacher_costs.parameters:,} parameters become {costs.student_costs.parameters:,}. The configuration with the new widths
was built on the meta device, and every tensor of it has the planned shape.

## `importance/`: scores and selection

{samples.shape[0]} samples of {samples.shape[1]} tokens; {len(scores.to_tensors())} tensors of scores. The highest stay:

{block(kept(selection_json(selection, plan.teacher.roles)))}
## `rewrite/` and `weights/`: the narrowed graph, and how its parameters are made

{after} operators are left. Layer 1 of the teacher is layer 0 of the student:

{block(recipes(student))}
## `emit/`: files

{block(written)}
## `verify/`: two routes to one function

{block(f"{check.name:14} {'passed' if check.passed else 'FAILED'}   {check.detail}" for check in checks)}"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
