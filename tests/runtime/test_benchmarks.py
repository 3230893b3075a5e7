"""Benchmarks as lm-evaluation-harness runs them: names, settings, data, programs, failures. Without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from minitron.runtime import evaluate
from minitron.runtime.benchmarks.suite import Suite, load_tasks, make_suite, opened, reported, run
from minitron.runtime.generate import plain_generation
from minitron.runtime.models import LanguageModel, load_tokenizer
from minitron.runtime.world import World
from minitron.specs.blocks.benchmarks import MINITRON_9, Benchmark
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.progress import Silent
from minitron.specs.training_plan import HeadPlan
from tests.runtime import processes, tiny

pytest.importorskip("lm_eval", reason="lm-eval is an extra")

from minitron.runtime.benchmarks.catalogue import find, named, subset
from minitron.runtime.benchmarks.harness import Harness, with_padding

BENCHMARKS = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"
ALONE = World(0, 1, torch.device("cpu"))
SHOTS_AND_METRICS = {
    "winogrande": (5, "acc"),
    "arc_challenge": (25, "acc_norm"),
    "mmlu": (5, "acc"),
    "hellaswag": (10, "acc_norm"),
    "gsm8k": (5, "exact_match"),
    "truthfulqa_mc2": (0, "acc"),
    "xlsum_english": (3, "rougeL"),
    "mbpp": (0, "pass@1"),
    "humaneval": (0, "pass@1"),
}
ARC = {"question": "why?", "choices": ["a", "b", "c", "d"], "answer": 2}


@pytest.fixture(autouse=True)
def offline_and_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Local copies of all nine: seven as people have them, mmlu and XL-Sum in the same form, made up."""
    folder = tmp_path_factory.mktemp("benchmarks")
    if BENCHMARKS.is_dir():
        for file in BENCHMARKS.iterdir():
            (folder / file.name).symlink_to(file)
    (found,) = find([Benchmark(task="mmlu")])
    questions = [
        {"question": f"which {n}?", "subject": subset(task), "choices": ["a", "b", "c", "d"], "answer": n % 4}
        for task in found.tasks
        for n in range(6)
    ]
    articles = [{"text": f"the cat sat on mat {n}", "summary": f"a cat sat {n}"} for n in range(30)]
    for name, rows in (("mmlu", questions), ("xlsum_english", articles)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yield folder


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(tiny.llama(16)), HeadPlan.model_validate(tiny.HEAD))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder, bos=True)
    return load_tokenizer(folder)


def write(folder: Path, task: str, *rows: dict[str, Any]) -> None:
    (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def score(suite: Suite, model: LanguageModel, tokenizer: Any) -> dict[str, Any]:
    with opened() as folder:
        return {found.benchmark.task: run(suite, found, folder, model, tokenizer, ALONE, 4) for found in suite.found}


@pytest.mark.shared
def test_the_nine_of_the_published_table_run_as_published(data: Path, model: LanguageModel, tokenizer: Any) -> None:
    """Shots and metric are read back from what the harness has loaded and from what it reports."""
    if not BENCHMARKS.is_dir():
        pytest.skip("needs ../shared/data/benchmarks")
    suite = make_suite(MINITRON_9, data, limit=1)
    with opened() as folder:
        for found in suite.found:
            task = found.benchmark.task
            shots, metric = SHOTS_AND_METRICS[task]
            loaded = load_tasks(suite, found, folder, ALONE)["tasks"].values()
            assert {one.config.num_fewshot for one in loaded} == {shots}
            assert all(metric in reported(one) for one in loaded)
            if task == "humaneval":
                (one,) = loaded
                assert one.config.repeats == 20
                settings = one.config.generation_kwargs
                assert (settings["do_sample"], settings["temperature"], settings["top_p"]) == (True, 0.2, 0.95)
    scores = score(suite, model, tokenizer)
    assert list(scores) == list(SHOTS_AND_METRICS)
    for task, found_score in scores.items():
        assert (found_score["shots"], found_score["metric"]) == SHOTS_AND_METRICS[task]
        assert 0 <= found_score["value"] <= 1 and found_score["questions"] == (57 if task == "mmlu" else 1)
        assert json.dumps(found_score)
    assert scores["humaneval"]["samples"] == 20


def test_the_harness_alone_would_use_other_shots() -> None:
    """What is overridden, and that without settings a task stays as it is."""
    plain = {found.benchmark.task: found for found in find([Benchmark(task=one.task) for one in MINITRON_9])}
    assert all("num_fewshot" not in plain[task].configs[task] for task in ("winogrande", "arc_challenge", "hellaswag"))
    assert plain["mbpp"].configs["mbpp"]["num_fewshot"] == 3
    ours = {found.benchmark.task: found for found in find(MINITRON_9)}
    assert ours["mbpp"].configs["mbpp"]["num_fewshot"] == 0
    assert all(config["num_fewshot"] == 5 for config in ours["mmlu"].configs.values())
    assert len(ours["mmlu"].tasks) == 57


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (["helaswag"], r"lm-eval has no task `helaswag`; did you mean `hellaswag`\?"),
        (["humaneval_64"], r"`humaneval_64` runs the programs .* only those of humaneval and mbpp can be confined"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(suite: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find([Benchmark(task=task) for task in suite])


def test_programs_are_run_only_where_that_is_allowed_also_in_groups_and_tags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    with pytest.raises(UsageError, match="`mbpp` runs the programs that the models write; set HF_ALLOW_CODE_EVAL=1"):
        find(MINITRON_9)
    (tmp_path / "group.yaml").write_text("group: both\ntask: [hellaswag, {group: inner, task: [humaneval]}]\n")
    (tmp_path / "tagged.yaml").write_text("task: tagged\ntag: codes\nunsafe_code: true\ndataset_path: json\n")
    monkeypatch.setattr("minitron.runtime.benchmarks.catalogue.OURS", tmp_path)
    monkeypatch.setattr("minitron.runtime.benchmarks.catalogue._manager", only(tmp_path))
    for name, task in (("both", "`humaneval`, a part of `both`,"), ("codes", "`tagged`")):
        with pytest.raises(UsageError, match=f"{task} runs the programs that the models write"):
            find([Benchmark(task=name)])


def only(folder: Path) -> Any:
    """An index of the harness's humaneval and hellaswag, and of what is in a folder."""
    import lm_eval.tasks

    tasks = Path(lm_eval.tasks.__file__).parent
    paths = [str(tasks / "humaneval"), str(tasks / "hellaswag"), str(folder)]
    manager = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)
    return lambda: manager


def test_a_tag_is_its_tasks() -> None:
    assert [found.benchmark for found in find([Benchmark(task="ai2_arc", shots=2)])] == [
        Benchmark(task="arc_challenge", shots=2),
        Benchmark(task="arc_easy", shots=2),
    ]


def test_benchmarks_asked_for_by_name_keep_the_settings_of_the_suite() -> None:
    suite = (Benchmark(task="mmlu", shots=5), Benchmark(task="gsm8k"))
    assert named(suite, ["hellaswag", "mmlu", "mmlu"]) == (Benchmark(task="hellaswag"), suite[0])


def test_a_question_is_none_of_its_own_examples(tmp_path: Path) -> None:
    """Examples from the file that is asked about: none of them is the question, for any question."""
    write(tmp_path, "gsm8k", *({"question": f"question {n}", "answer": f"#### {n}"} for n in range(4)))
    suite = make_suite([Benchmark(task="gsm8k", shots=3)], tmp_path)
    with opened() as folder:
        (task,) = load_tasks(suite, suite.found[0], folder, ALONE)["tasks"].values()
        task.build_all_requests(limit=None, rank=0, world_size=1)
        for request in task.instances:
            context = request.args[0]
            assert context.count(request.doc["question"]) == 1 and context.count("question ") == 4


def test_a_metric_that_a_task_does_not_report(tmp_path: Path, model: LanguageModel, tokenizer: Any) -> None:
    write(tmp_path, "arc_easy", ARC, ARC)
    suite = make_suite([Benchmark(task="arc_easy", metric="f1")], tmp_path)
    with pytest.raises(WorkError, match="arc_easy reports acc, acc_norm and no f1; write one of these as `metric`"):
        score(suite, model, tokenizer)


def test_every_fifth_article_is_summarised(data: Path) -> None:
    suite = make_suite([Benchmark(task="xlsum_english")], data)
    with opened() as folder:
        (task,) = load_tasks(suite, suite.found[0], folder, ALONE)["tasks"].values()
        assert [document["summary"] for document in task.eval_docs] == [f"a cat sat {n}" for n in range(0, 30, 5)]
        assert task.config.num_fewshot == 3
        assert task.process_results(task.eval_docs[0], ["a cat sat 0"]) == {"rougeL": 1.0}
        assert task.process_results(task.eval_docs[0], ["dogs"]) == {"rougeL": 0.0}


def test_answers_leave_room_for_the_question(tmp_path: Path, model: LanguageModel, tokenizer: Any) -> None:
    """humaneval lets an answer have 1,024 tokens; this model reads 256."""
    write(tmp_path, "humaneval", {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"})
    assert (
        score(make_suite([Benchmark(task="humaneval")], tmp_path), model, tokenizer)["humaneval"]["max_answer_tokens"]
        == 128
    )


def bare_tokenizer() -> Any:
    """Without any special token."""
    vocabulary = {character: number for number, character in enumerate("abcdefghijklmnopqrstuvwxyz .:?\n#ABCDQ")}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_a_tokenizer_without_any_special_token(tmp_path: Path, model: LanguageModel) -> None:
    """It borrows one of the vocabulary, and is itself left as it is."""
    bare = bare_tokenizer()
    assert bare.bos_token is None and bare.eos_token is None and bare.pad_token is None
    write(tmp_path, "arc_easy", ARC, ARC)
    write(tmp_path, "gsm8k", {"question": "a?", "answer": "#### 1"}, {"question": "b?", "answer": "#### 1"})
    suite = make_suite([Benchmark(task="arc_easy"), Benchmark(task="gsm8k", shots=1)], tmp_path)
    scores = score(suite, model, bare)
    assert all(0 <= one["value"] <= 1 for one in scores.values())
    assert bare.pad_token is None and len(with_padding(bare)) == len(bare)


def test_generation_is_what_the_task_asks_for_and_nothing_of_the_model(model: LanguageModel, tokenizer: Any) -> None:
    own = model.module.generation_config
    asked = {
        "repetition_penalty": 9.0,
        "num_return_sequences": 3,
        "return_dict_in_generate": True,
        "stop_strings": ["a"],
    }
    for key, value in asked.items():
        setattr(own, key, value)
    try:
        with plain_generation(model):
            harness = Harness(model, tokenizer, ALONE, 1)
            ids = torch.tensor([[5, 6, 7]])
            plain = harness._model_generate(ids, max_length=20, stop=[], do_sample=False)
        assert plain.shape == (1, 20) and model.module.generation_config is own
    finally:
        for key in asked:
            setattr(own, key, None)


@pytest.fixture
def benchmarked(build: Path) -> Path:
    """A build with two benchmarks and their data beside it."""
    (build / "data").mkdir()
    write(build / "data", "arc_easy", *(ARC | {"question": f"why {n}?"} for n in range(4)))
    write(
        build / "data",
        "truthfulqa",
        {"Question": "Is it?", "Best Answer": "It is", "Correct Answers": "It is", "Incorrect Answers": "No"},
    )
    tiny.write_plan(build, evaluate__suite=["arc_easy", "truthfulqa_mc2"], evaluate__data_dir="data")
    return build


def measure(build: Path, **options: Any) -> dict[str, Any]:
    return evaluate(build, device="cpu", progress=Silent(), **options)


def tasks_of(results: dict[str, Any], model: str = "pruned") -> dict[str, Any]:
    tasks: dict[str, Any] = results["models"][model]["tasks"]
    return tasks


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import minitron.runtime.measured_model as module

    ran: list[str] = []

    def run_one(suite: Any, found: Any, *rest: Any) -> Any:
        ran.append(found.benchmark.task)
        return run(suite, found, *rest)

    monkeypatch.setattr(module, "run", run_one)
    return ran


def test_a_benchmark_is_run_once(benchmarked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = count_runs(monkeypatch)
    first = measure(benchmarked, limit=2)
    assert ran == ["arc_easy", "truthfulqa_mc2"] * 2 and tasks_of(first)["arc_easy"]["limit"] == 2
    ran.clear()
    assert measure(benchmarked, limit=2) == first and ran == []
    whole = measure(benchmarked)
    assert ran == ["arc_easy", "truthfulqa_mc2"] * 2 and tasks_of(whole)["arc_easy"]["questions"] == 4
    ran.clear()
    assert measure(benchmarked, limit=1) == whole and ran == [], "all questions say more than one"
    write(benchmarked / "data", "arc_easy", ARC)
    measure(benchmarked)
    assert ran == ["arc_easy"] * 2, "other data is another benchmark"


def test_tasks_by_name_leave_the_others_as_they_are(benchmarked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = count_runs(monkeypatch)
    assert list(tasks_of(measure(benchmarked, tasks=["truthfulqa_mc2"]))) == ["truthfulqa_mc2"]
    assert ran == ["truthfulqa_mc2"] * 2
    assert list(tasks_of(measure(benchmarked, tasks=["arc_easy"]))) == ["arc_easy", "truthfulqa_mc2"]
    assert ran == ["truthfulqa_mc2"] * 2 + ["arc_easy"] * 2


def test_a_task_that_fails_costs_the_others_nothing(benchmarked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(benchmarked / "data", "arc_easy", {"question": "?", "choices": ["a"], "answer": 5})
    first = measure(benchmarked)
    failed = tasks_of(first)["arc_easy"]
    assert failed["value"] is None and "arc_easy" in failed["error"]
    assert tasks_of(first)["truthfulqa_mc2"]["value"] is not None
    assert json.loads((benchmarked / "results.json").read_text()) == first
    ran = count_runs(monkeypatch)
    write(benchmarked / "data", "arc_easy", ARC)
    assert tasks_of(measure(benchmarked))["arc_easy"]["value"] is not None and ran == ["arc_easy"] * 2


def test_a_killed_evaluation_goes_on_with_the_next_task(benchmarked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import minitron.runtime.measured_model as module

    def killed(suite: Any, found: Any, *rest: Any) -> Any:
        if found.benchmark.task == "truthfulqa_mc2":
            raise KeyboardInterrupt
        return run(suite, found, *rest)

    monkeypatch.setattr(module, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(benchmarked)
    ran = count_runs(monkeypatch)
    measure(benchmarked)
    assert ran == ["truthfulqa_mc2", "arc_easy", "truthfulqa_mc2"]


def test_the_share_of_the_teacher_s_score(benchmarked: Path) -> None:
    results = measure(benchmarked)
    teacher, pruned = (tasks_of(results, name)["truthfulqa_mc2"] for name in ("teacher", "pruned"))
    assert pruned["of_teacher"] == pytest.approx(pruned["value"] / teacher["value"]) and "of_teacher" not in teacher


def test_ranks_share_the_questions(benchmarked: Path) -> None:
    """Two processes answer half of them each and come to the same scores as one, also after a task that cannot be loaded."""
    (benchmarked / "data" / "gsm8k.jsonl").write_text("not json")
    suite = ["gsm8k", "arc_easy", "truthfulqa_mc2"]
    tiny.write_plan(benchmarked, evaluate__suite=suite, evaluate__data_dir="data")
    alone = measure(benchmarked)
    (benchmarked / "measurements.json").unlink()
    assert processes.train_on_ranks(benchmarked, 2, work=processes.evaluate_rank) == ["done", "done"]
    together = json.loads((benchmarked / "results.json").read_text())
    for name in ("teacher", "pruned"):
        for task, one in tasks_of(alone, name).items():
            other = tasks_of(together, name)[task]
            if task == "gsm8k":
                assert "is not JSON Lines" in one["error"] and other["error"] == one["error"]
                continue
            assert other["value"] == pytest.approx(one["value"], abs=1e-5) and other["questions"] == one["questions"]
    # Four questions with four answers each, of which each rank has half; one question with two answers that cannot be shared.
    given = [(benchmarked.parent / f"requests-{rank}.txt").read_text().split() for rank in range(2)]
    assert given[0] == given[1] == ["8", "2"] * 2
