"""One model of a build and all measurements of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitron.runtime.benchmarks.catalogue import Found
from minitron.runtime.benchmarks.suite import Suite, Unfinished, run
from minitron.runtime.data import Windows
from minitron.runtime.generate import continue_greedily, tokens_per_second
from minitron.runtime.held_out import held_out
from minitron.runtime.measurements import Measurements, key_of
from minitron.runtime.models import DTYPES, LanguageModel, check_read, open_model, weight_bytes
from minitron.runtime.plan import LoadedPlan
from minitron.runtime.tokens import TextEncoder
from minitron.runtime.world import World
from minitron.specs.errors import WorkError
from minitron.specs.progress import Progress, Task
from minitron.specs.training_plan import ModelPlan

PROMPT_TOKENS = 32
"""The tokens of a prompt where the plan has none of its own."""

_SPEED_TOKENS = 64
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Instruments:
    """The data and settings that all models of a build are measured with."""

    loaded: LoadedPlan
    encoder: TextEncoder
    windows: Windows | None
    prompt: list[int] | None
    suite: Suite
    shown: tuple[Found, ...]
    """Benchmarks that are not measured this time; results of earlier measurements are shown."""

    tasks_folder: Path
    world: World
    kept: Measurements

    @property
    def batch_size(self) -> int:
        """Returns the number of sequences in one forward pass."""
        return 1 if self.windows is None else max(1, _BATCH_TOKENS // self.windows.length)


@dataclass(frozen=True)
class Measurement:
    """One measurement of a model; `key` identifies it and everything that it depends on."""

    name: str
    key: str
    make: Callable[[LanguageModel], Any]
    task: str | None = None
    """The benchmark, where the measurement is one: it may fail without failing the rest."""

    full: str | None = None
    """The key of the same benchmark without a limit, for a benchmark with one: the unlimited result serves as well."""


@dataclass
class MeasuredModel:
    """A model of the build; `name` is its name in results.json."""

    instruments: Instruments
    name: str
    folder: Path
    plan: ModelPlan
    failures: dict[str, str] = field(default_factory=dict)
    """The reason for each benchmark that could not be run."""

    def __post_init__(self) -> None:
        by = self.instruments
        base = {
            "model": by.kept.model(self.folder),
            "dtype": self.plan.dtype,
            "device": by.world.device.type,
            "tokenizer": by.encoder.fingerprint,
        }
        measurements = [self._size(base), self._speed(base)]
        if by.windows is not None:
            measurements.append(self._held_out(base, by.windows))
        if by.prompt is not None:
            measurements.append(self._continuation(base, by.prompt))
        self._measurements = measurements + [self._benchmark(base, found) for found in by.suite.found]
        self._shown = [self._benchmark(base, found) for found in by.shown]

    def missing(self) -> list[Measurement]:
        """Returns the measurements that have not been made before."""
        return [one for one in self._measurements if self._known(one) is None]

    def measure(self, measurements: Sequence[Measurement], progress: Progress, task: Task) -> None:
        """Makes measurements and stores each as soon as it is made."""
        if not measurements:
            return
        by = self.instruments
        key = "teacher" if self.name in ("teacher", "corrected_teacher") else "student"
        dtype = DTYPES[self.plan.dtype]
        model = open_model(self.folder, dtype, by.world.device, self.plan, key)
        check_read(model, by.encoder.tokenizer, [by.windows.largest] if by.windows is not None else [])
        for one in measurements:
            # A loss goes with the line of its own measurement: what follows may be of another model.
            figures: dict[str, float | str | None] = {"model": self.name, "measured": one.name, "held_out_loss": None}
            try:
                value = one.make(model)
            except WorkError as error:
                if one.task is None or isinstance(error, Unfinished):
                    raise
                self.failures[one.task] = str(error)
                progress.message(f"{self.name}: {error}")
            else:
                by.kept.keep(one.key, {"model": self.name, "what": one.name}, value)
                if one.name == "held_out":
                    figures["held_out_loss"] = value["loss"]
            task.advance(1, **figures)

    def results(self) -> dict[str, Any]:
        """Returns the model's entry in results.json."""
        known = {one.name: self._known(one) for one in self._measurements if one.task is None}
        tasks: dict[str, Any] = {}
        for one in [*self._measurements, *self._shown]:
            if one.task is not None:
                score = self._known(one)
                if one.task in self.failures:
                    score = {"metric": None, "value": None, "stderr": None, "error": self.failures[one.task]}
                if score is not None:
                    tasks[one.task] = dict(score)
        # In the order of the plan's suite, whichever were asked for this time.
        order = [benchmark.task for benchmark in self.instruments.loaded.plan.evaluate.suite]
        places = {task: number for number, task in enumerate(dict.fromkeys([*order, *tasks]))}
        return {
            "parameters": known["parameters"],
            "weight_bytes": weight_bytes(self.folder),
            "held_out": known.get("held_out"),
            "tokens_per_second": known["tokens_per_second"],
            "tasks": dict(sorted(tasks.items(), key=lambda one: places[one[0]])),
            "continuation": known.get("continuation"),
        }

    def _known(self, one: Measurement) -> Any:
        kept = self.instruments.kept
        whole = None if one.full is None else kept.find(one.full)
        return whole if whole is not None else kept.find(one.key)

    def _size(self, base: dict[str, Any]) -> Measurement:
        return Measurement("parameters", key_of(what="parameters", model=base["model"]), lambda model: model.parameters)

    def _speed(self, base: dict[str, Any]) -> Measurement:
        prompt = self.instruments.prompt
        key = key_of(what="speed", threads=torch.get_num_threads(), tokens=_SPEED_TOKENS, **base)

        def make(model: LanguageModel) -> float:
            # Speed needs some tokens to start from, whichever they are.
            start = prompt if prompt is not None else list(range(min(PROMPT_TOKENS, model.head.vocabulary)))
            return round(tokens_per_second(model, start, _SPEED_TOKENS), 1)

        return Measurement("tokens_per_second", key, make)

    def _held_out(self, base: dict[str, Any], windows: Windows) -> Measurement:
        by = self.instruments
        text = windows.digest()

        def make(model: LanguageModel) -> dict[str, Any]:
            loss = held_out(model, windows, by.world, batch_size=by.batch_size)
            return {"loss": loss.loss, "perplexity": loss.perplexity, "tokens": loss.tokens}

        key = key_of(what="held_out", text=text, length=windows.length, bos=windows.bos, **base)
        return Measurement("held_out", key, make)

    def _continuation(self, base: dict[str, Any], prompt: list[int]) -> Measurement:
        by, tokens = self.instruments, self.instruments.loaded.plan.evaluate.continuation_tokens
        return Measurement(
            "continuation",
            key_of(what="continuation", prompt=prompt, tokens=tokens, **base),
            lambda model: by.encoder.text(continue_greedily(model, prompt, tokens)),
        )

    def _benchmark(self, base: dict[str, Any], found: Found) -> Measurement:
        by, task = self.instruments, found.benchmark.task

        def make(model: LanguageModel) -> dict[str, Any]:
            return run(by.suite, found, by.tasks_folder, model, by.encoder.tokenizer, by.world, by.batch_size)

        whole = key_of(what="task", **by.suite.identity(found, limited=False), **base)
        key = whole if by.suite.limit is None else key_of(what="task", **by.suite.identity(found), **base)
        return Measurement(task, key, make, task=task, full=None if key == whole else whole)
