"""training.yaml: every value of the spec and every default, in a text that people can read and the runtime takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minitron.compiler.emit.training_plan import render, training_plan
from minitron.compiler.estimate.model_costs import ModelCosts
from minitron.compiler.estimate.training_defaults import measure_every, micro_batch
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.runtime.plan import read_training_plan
from minitron.specs import load_spec
from minitron.specs.blocks.benchmarks import MINITRON_9
from minitron.specs.blocks.evaluate import Evaluate
from minitron.specs.training_plan import EvaluationPlan, HeadPlan, TrainingPlan
from tests.foundry import Foundry

HEAD = HeadPlan(
    backbone="backbone", module="embed_out", weight="embed_out.weight", bias="embed_out.bias", scale=0.25, softcap=30.0
)

LEAST = """\
name: least
teacher: {model: teacher}
student: {hidden_size: 24}
importance: {data: {text: [corpus/a.txt]}}
distill: {data: {text: [corpus/*.txt]}, tokens: 3B}
evaluate: {held_out: {text: [corpus/b.txt], document: line}}
"""
# Nothing in it is a default.
MOST = """\
name: most
teacher: {model: teacher, dtype: float32, compute: float8}
student: {hidden_size: 24}
importance: {data: {text: [corpus/a.txt]}}
distill:
  data:
    blend:
      - {weight: 0.7, text: [corpus/*.txt], document: paragraph}
      - {weight: 0.3, dataset: org/name, split: part, messages_field: chat, subset: en, revision: abc, streaming: true}
  tokens: 1.5M
  teacher_logits: online
  sequence_length: 96
  global_batch_size: 12
  micro_batch_size: 3
  optimizer:
    {name: adamw, lr: 2e-5, min_lr: 4.5e-7, warmup_steps: 7, schedule: cosine, betas: [0.8, 0.9], weight_decay: 0.2}
  loss:
    logits: {divergence: reverse_kl, temperature: 2.5, weight: 0.5}
    hidden_states: {pairs: [[4, 1]], distance: mse, embedding: false, weight: 0.125}
    cross_entropy: 0.25
    chunk_tokens: 64
  compute: float8
  gradient_checkpointing: true
  checkpoint: {every_tokens: 10K, keep_last: 5}
  seed: 11
  shuffle: {block: 8K}
teacher_correction: {tokens: 2M, optimizer: {lr: 3e-5, warmup_steps: 9}}
evaluate:
  suite: minitron-9
  require: {held_out_loss: "<= 1.05x teacher"}
  published: {source: a paper, scores: {mmlu: 0.6}}
  data_dir: tasks
  held_out: {jsonl: [corpus/c.jsonl], text_field: words}
  max_tokens: 12K
  every_tokens: 30K
  prompt: "Größe:\\n  "
  continuation_tokens: 9
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / "corpus" / name).write_text("{}")
    return tmp_path


def written(
    folder: Path, spec: str, build: str = "builds/one", teacher: str = "teacher", commit: str | None = None
) -> Path:
    """The build folder, with the training plan of a spec and nothing else."""
    path, target = folder / "spec.yaml", folder / build
    path.write_text(spec, encoding="utf-8")
    checkpoint = Checkpoint(teacher, folder / teacher, None, {}, commit)
    costs = {"teacher": ModelCosts(9, 9, 9, 18, (), 1000, 10), "student": ModelCosts(5, 5, 5, 10, (), 500, 4)}
    plan = training_plan(
        load_spec(path), target, checkpoint, {"teacher": HEAD, "student": HEAD}, "model.layers", "f" * 64, costs
    )
    target.mkdir(parents=True, exist_ok=True)
    (target / "training.yaml").write_text(render(plan, path, target), encoding="utf-8")
    return target


def content(build: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((build / "training.yaml").read_text(encoding="utf-8"))
    return document


def without_nothing(value: Any) -> Any:
    """The same without keys that are null: of a source, those of other kinds."""
    if isinstance(value, dict):
        return {key: without_nothing(item) for key, item in value.items() if item is not None}
    return [without_nothing(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("spec", [LEAST, MOST], ids=["least", "most"])
def test_every_value_is_written_and_the_runtime_adds_none(folder: Path, spec: str) -> None:
    """What the runtime understands of the file is what stands in the file, key for key."""
    build = written(folder, spec)
    plan = read_training_plan(build).training()
    assert without_nothing(plan.model_dump(mode="json")) == without_nothing(content(build))
    assert content(build).keys() == set(TrainingPlan.model_fields)


def test_what_the_spec_says_is_what_it_says(folder: Path) -> None:
    """Nothing under `distill` and `evaluate` is lost on the way."""
    plan, spec = content(written(folder, MOST)), load_spec(folder / "spec.yaml").spec
    assert spec.distill is not None
    said = spec.distill.model_dump(mode="json")
    decided = ("data", "layout", "compute")
    assert {key: plan[key] for key in said if key not in decided} == {
        key: value for key, value in said.items() if key not in decided
    }
    assert plan["compute_dtype"] == {"cpu": "float8", "cuda": "float8"} and plan["teacher"]["compute"] == "float8"
    assert plan["tokens"] == 1_500_000 and plan["checkpoint"]["every_tokens"] == 10_000
    assert plan["layout"] == said["layout"] | {"teacher": plan["layout"]["teacher"]}, "which the compiler decides"
    assert (plan["loss"]["cross_entropy"], plan["loss"]["hidden_states"]["pairs"]) == (0.25, [[4, 1]])
    correction = plan["teacher_correction"]
    assert (correction["tokens"], correction["every_tokens"]) == (2_000_000, 10_000)
    assert (correction["optimizer"]["lr"], correction["optimizer"]["warmup_steps"]) == (3e-5, 9)
    assert plan["held_out"]["max_tokens"] == 12_000 and plan["held_out"]["every_tokens"] == 30_000
    assert plan["evaluate"] == {
        "suite": [one.model_dump(exclude_none=True) for one in MINITRON_9],
        "data_dir": str(folder / "tasks"),
        "prompt": "Größe:\n  ",
        "continuation_tokens": 9,
        "require": {"held_out_loss": "<= 1.05x teacher"},
        "published": {"source": "a paper", "scores": {"mmlu": 0.6}},
    }
    assert set(Evaluate.model_fields) == {"held_out", "max_tokens", "every_tokens", *plan["evaluate"]}


def test_what_the_spec_leaves_open_is_decided(folder: Path) -> None:
    plan = content(written(folder, LEAST))
    assert plan["micro_batch_size"] == 2 and plan["sequence_length"] == 4096 and plan["global_batch_size"] == 768
    assert plan["checkpoint"]["every_tokens"] == plan["held_out"]["every_tokens"] == 3_000_000_000 // 20
    assert plan["loss"]["logits"] == {"divergence": "forward_kl", "temperature": 1.0, "weight": 1.0}
    assert plan["optimizer"]["betas"] == [0.9, 0.95] and isinstance(plan["optimizer"]["lr"], float)
    assert plan["compute_dtype"] == {"cpu": "float32", "cuda": "bfloat16"}
    assert plan["teacher"]["dtype"] == plan["student"]["dtype"] == "bfloat16"
    assert plan["seed"] == 0 and plan["evaluate"]["suite"] == []


@pytest.mark.parametrize(
    ("batch", "length", "wanted"),
    [(768, 8192, 1), (768, 4096, 2), (768, 256, 32), (12, 64, 12), (7, 2048, 1), (1, 16, 1), (10, 100_000, 1)],
)
def test_a_micro_batch_divides_the_batch_and_stays_small(batch: int, length: int, wanted: int) -> None:
    assert micro_batch(batch, length) == wanted


def test_both_models_have_the_head_that_the_graph_shows(folder: Path) -> None:
    plan = read_training_plan(written(folder, LEAST)).training()
    assert plan.teacher.head == plan.student.head == HEAD


def test_data_files_are_found_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Patterns are those of the spec's folder, not of the build's or of where somebody stands."""
    build = written(folder, LEAST)
    monkeypatch.chdir("/")
    loaded = read_training_plan(build)
    plan = loaded.training()
    assert set(loaded.data("data", plan.data).text or ()) == {
        str(folder / "corpus" / name) for name in ("a.txt", "b.txt")
    }
    assert plan.held_out is not None
    assert loaded.data("held_out.data", plan.held_out.data).text == (str(folder / "corpus" / "b.txt"),)


@pytest.mark.parametrize(
    ("build", "teacher", "wanted"),
    [
        ("builds/one", "teacher", "../../teacher"),
        ("one", "models/teacher", "../models/teacher"),
        ("a/b/c/d/e", "teacher", None),
    ],
)
def test_a_teacher_nearby_moves_with_its_build(folder: Path, build: str, teacher: str, wanted: str | None) -> None:
    """And one that lies far away, in a cache say, is named by its whole path."""
    assert content(written(folder, LEAST, build, teacher))["teacher"]["model"] == (wanted or str(folder / teacher))


def test_a_teacher_from_the_hub_is_found_there_again(folder: Path) -> None:
    teacher = content(written(folder, LEAST, teacher="org/name", commit="c" * 40))["teacher"]
    assert (teacher["model"], teacher["revision"]) == ("org/name", "c" * 40)


def test_a_person_reads_where_it_comes_from_and_what_to_do_with_it(folder: Path) -> None:
    text = (written(folder, MOST) / "training.yaml").read_text(encoding="utf-8")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert "spec.yaml" in comments[0] and "minitron train one" in comments[1]
    assert "Größe" in text and "!!" not in text and "&" not in text and "tokens: 1500000\n" in text
    assert next(line for line in text.splitlines() if not line.startswith("#")) == "format_version: 1"


def test_a_build_folder_named_by_a_dot_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert f"minitron train {folder.name}\n" in (written(folder, LEAST, ".") / "training.yaml").read_text(
        encoding="utf-8"
    )


@given(st.integers(1, 10**9), st.integers(1, 10**7))
def test_measuring_costs_less_than_training(checkpoint: int, held_out: int) -> None:
    every = measure_every(checkpoint, held_out)
    assert every % checkpoint == 0, "a checkpoint is judged by what is measured there"
    assert held_out <= 2 * every and (every == checkpoint or held_out > 2 * (every - checkpoint))


def test_without_distillation_it_is_enough_to_evaluate(folder: Path) -> None:
    spec = "\n".join(line for line in LEAST.splitlines() if not line.startswith("distill"))
    plan = read_training_plan(written(folder, spec)).plan
    assert isinstance(plan, EvaluationPlan) and not isinstance(plan, TrainingPlan)
    assert plan.held_out is not None and plan.held_out.every_tokens is None
    bare = "\n".join(line for line in spec.splitlines() if not line.startswith("evaluate"))
    assert read_training_plan(written(folder, bare, "builds/two")).plan.held_out is None


def test_what_a_compile_writes_is_what_the_runtime_reads(foundry: Foundry) -> None:
    """With the head that the graph shows: this family bounds its logits."""
    widths = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    teacher = foundry.teacher("gemma2", num_hidden_layers=2)
    build = foundry.build(teacher, widths | {"num_hidden_layers": 1})
    plan = read_training_plan(build.folder).plan
    assert plan.teacher.head.softcap == plan.student.head.softcap == 5.0
    assert plan.fingerprint == build.document("plan.json")["fingerprint"]
    assert (build.folder / plan.teacher.model).resolve() == teacher.resolve()
    assert (build.folder / plan.student.model / "config.json").is_file() and plan.tokenizer == plan.student.model
