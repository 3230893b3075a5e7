"""The functions that task files name: filters of data sets and scores of answers. The harness calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minitron.runtime.benchmarks.programs import passing


def every_fifth(documents: Any) -> Any:
    """Returns every fifth document of a `datasets.Dataset`, from the first on."""
    return documents.select(range(0, len(documents), 5))


def rougeL(references: Sequence[str], predictions: Sequence[str]) -> float:
    """The F1 of the longest common subsequence of stemmed words (ROUGE-L, Lin 2004), by Google's `rouge_score`."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score(references[0], predictions[0])["rougeL"].fmeasure)


def prompt_and_answers(answers: Sequence[Sequence[str]], documents: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Builds HumanEval's programs: the prompt, which begins a function, followed by each of the answers."""
    return [[document["prompt"] + one for one in of] for of, document in zip(answers, documents, strict=True)]


def as_they_are(answers: Sequence[Sequence[str]], documents: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns MBPP's programs: the answers themselves."""
    return [list(of) for of in answers]


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of the answers to one question that pass its tests: the unbiased estimate of pass@1 (Chen et al. 2021)."""
    passed = passing([f"{program}\n{references[0]}" for program in predictions[0]])
    return {"pass@1": sum(passed) / len(passed)}


def solved_examples(documents: Any) -> Any:
    """Returns MBPP's three examples with solutions, documents 2 to 4 of its prompt split, marked as examples for the
    template.
    """
    chosen = documents.filter(lambda document: document["task_id"] in (2, 3, 4))
    return chosen.map(lambda document: document | {"is_fewshot": True})
