"""The benchmarks of a suite: task, number of examples before the question, and metric of each."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, Tag

from minitron.specs.blocks.base import (
    LONGER,
    WORD,
    Block,
    Listed,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Text,
    is_longer,
    word_or,
    wrong,
)


class Benchmark(Block):
    """One task of lm-evaluation-harness, or of minitron's own (`xlsum_english`). A null value keeps the task's own
    setting."""

    task: Text
    """Name of the task or of the group of tasks."""

    shots: NonNegativeInt | None = None
    """Solved examples that stand before each question."""

    metric: Text | None = None
    """The metric that the task is quoted by: `acc`, `acc_norm`, `exact_match`, `pass@1`, `rougeL`, ..."""

    samples: PositiveInt | None = None
    """Answers written for each question, for `pass@1`; more than one need a temperature."""

    temperature: NonNegativeFloat | None = None
    """Softens the distribution that answers are drawn from; 0: the most likely token each time."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Answers are drawn from the most likely tokens that have this probability together."""


def _one(value: Any) -> Any:
    """Turns a bare name into a benchmark with the task's own settings."""
    if isinstance(value, str):
        return {"task": value}
    if not isinstance(value, dict | Benchmark):
        raise wrong("{given} is not a benchmark", "write a task such as hellaswag, or {task: hellaswag, shots: 10}")
    return value


def _shortest(benchmark: Benchmark) -> str | dict[str, Any]:
    """Returns the bare name if no other setting differs from the task's own."""
    settings = {key: value for key, value in benchmark if value is not None}
    return benchmark.task if len(settings) == 1 else settings


# A name or a mapping, in the file and in the schema; a mapping by the time it is checked.
Listing: TypeAlias = Annotated[
    Benchmark,
    BeforeValidator(_one, json_schema_input_type=Text | Benchmark),
    PlainSerializer(_shortest, return_type=str | dict[str, Any]),
]

Suite: TypeAlias = Annotated[
    Annotated[Literal["minitron-9"], Tag(WORD)] | Annotated[Listed[Listing], Tag(LONGER)],
    Discriminator(is_longer),
    word_or(
        "minitron-9 or a list of lm-eval tasks such as [hellaswag, arc_challenge]", "minitron-9", also=(list, tuple)
    ),
]

MINITRON_9 = (
    Benchmark(task="winogrande", shots=5, metric="acc"),
    Benchmark(task="arc_challenge", shots=25, metric="acc_norm"),
    Benchmark(task="mmlu", shots=5, metric="acc"),
    Benchmark(task="hellaswag", shots=10, metric="acc_norm"),
    Benchmark(task="gsm8k", shots=5, metric="exact_match"),
    Benchmark(task="truthfulqa_mc2", shots=0, metric="acc"),
    Benchmark(task="xlsum_english", shots=3, metric="rougeL"),
    Benchmark(task="mbpp", shots=0, metric="pass@1"),
    Benchmark(task="humaneval", shots=0, metric="pass@1", samples=20, temperature=0.2, top_p=0.95),
)
"""The nine benchmarks of the published tables, with their shots and metrics (arXiv 2408.11796, table 1)."""


def benchmarks(suite: Suite) -> tuple[Benchmark, ...]:
    """Returns the benchmarks that a suite stands for."""
    return MINITRON_9 if isinstance(suite, str) else suite
