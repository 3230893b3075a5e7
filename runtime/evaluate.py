"""`minitron eval BUILD`: teacher, pruned student and distilled student side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minitron.runtime.data import Windows
from minitron.runtime.disk import writing
from minitron.runtime.generate import continue_greedily, tokens_per_second
from minitron.runtime.held_out import HeldOut, held_out
from minitron.runtime.interrupt import interrupts
from minitron.runtime.models import DTYPES, LanguageModel, model_folder, open_model, readable, weight_bytes
from minitron.runtime.plan import LoadedPlan, read_training_plan
from minitron.runtime.setup import held_out_windows
from minitron.runtime.suite import check_suite, run_suite
from minitron.runtime.tokens import TextEncoder
from minitron.runtime.world import World, join_world
from minitron.specs.atomic import write_text
from minitron.specs.builds import CONFIG, CORRECTION, DATA_CACHE, RESULTS
from minitron.specs.errors import placing
from minitron.specs.progress import Progress, Silent
from minitron.specs.training_plan import ModelPlan, TrainingPlan

FORMAT_VERSION = 1

_PROMPT_TOKENS = 32
_SPEED_TOKENS = 64
_LENGTH = 2048  # of a sequence, where the plan does not train and says none
_BATCH_TOKENS = 8192


def evaluate(build: Path, *, device: str | None, progress: Progress) -> dict[str, Any]:
    """Measures every model of BUILD that is there, writes BUILD/results.json and returns what it holds.

    For each of `teacher`, `corrected_teacher` where there is one, `pruned` and, once trained, `distilled`: parameters,
    bytes of the weights on disk, held-out loss (nats a token) and perplexity, greedy decoding speed (one sequence,
    key-value cache), the tasks of the suite, and a continuation of one prompt. `recovered` is the share of the pruning
    loss that distillation won back: 1 is the teacher's loss (as it was, uncorrected), 0 the pruned student's. UsageError
    and WorkError as for training.
    """
    loaded = read_training_plan(build)
    plan = loaded.plan
    check_suite(plan.evaluate, loaded.folder)
    with placing(loaded), interrupts(), join_world(device) as world:
        progress = progress if world.leads else Silent()
        encoder = TextEncoder.load(loaded.folder / plan.tokenizer)
        windows = held_out_windows(
            loaded, _length(loaded), world, encoder, loaded.folder / plan.work / DATA_CACHE, progress
        )
        prompt = _prompt(plan.evaluate.prompt, encoder, windows)
        there = list(_models(loaded))
        measured: dict[str, Any] = {}
        with progress.task("evaluate", len(there), "models") as task:
            for name, folder, of in there:
                model = open_model(folder, DTYPES[of.dtype], world.device, of, _key(name))
                measured[name] = _measure(model, folder, loaded, encoder, windows, prompt, world)
                loss = (measured[name]["held_out"] or {}).get("loss")
                task.advance(1, model=name, **({} if loss is None else {"held_out_loss": loss}))
                del model
        results = {
            "format_version": FORMAT_VERSION,
            "name": plan.name,
            "device": world.device.type,
            "prompt": None if prompt is None else _text(encoder, prompt),
            "models": measured,
            "recovered": recovered(measured),
        }
        if world.leads:
            with writing(str(loaded.folder / RESULTS)):
                write_text(loaded.folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def _key(name: str) -> str:
    return "teacher" if name in ("teacher", "corrected_teacher") else "student"


def _models(loaded: LoadedPlan) -> Iterator[tuple[str, Path, ModelPlan]]:
    """Name, folder and plan of every model that there is."""
    plan = loaded.plan
    yield "teacher", model_folder(loaded, "teacher", plan.teacher), plan.teacher
    correction = plan.teacher_correction if isinstance(plan, TrainingPlan) else None
    if correction is not None and (loaded.folder / correction.output / CORRECTION).is_file():
        yield "corrected_teacher", loaded.folder / correction.output, plan.teacher
    yield "pruned", model_folder(loaded, "student", plan.student), plan.student
    if (loaded.folder / plan.output / CONFIG).is_file():
        yield "distilled", loaded.folder / plan.output, plan.student


def _length(loaded: LoadedPlan) -> int:
    """Of a sequence of held-out text."""
    plan = loaded.plan
    if isinstance(plan, TrainingPlan):
        return plan.sequence_length
    return min(_LENGTH, readable(model_folder(loaded, "student", plan.student)) or _LENGTH)


def _prompt(text: str | None, encoder: TextEncoder, windows: Windows | None) -> list[int] | None:
    """The prompt's tokens: what the plan says, or the beginning of the held-out text."""
    if text is not None:
        ids = [int(token) for token in encoder.tokenizer(text, add_special_tokens=False).input_ids]
        return [encoder.bos, *ids] if encoder.bos is not None else ids or None
    if windows is None:
        return None
    read, _ = windows.window(0)
    return [int(token) for token in read[:_PROMPT_TOKENS]]


def _text(encoder: TextEncoder, ids: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(list(ids), skip_special_tokens=True))


def _measure(
    model: LanguageModel,
    folder: Path,
    loaded: LoadedPlan,
    encoder: TextEncoder,
    windows: Windows | None,
    prompt: list[int] | None,
    world: World,
) -> dict[str, Any]:
    plan = loaded.plan.evaluate
    batch_size = 1 if windows is None else max(1, _BATCH_TOKENS // windows.length)
    loss: HeldOut | None = None if windows is None else held_out(model, windows, world, batch_size=batch_size)
    # Speed needs some tokens to start from, whichever they are.
    start = prompt if prompt is not None else list(range(min(_PROMPT_TOKENS, model.head.vocabulary)))
    return {
        "parameters": model.parameters,
        "weight_bytes": weight_bytes(folder),
        "held_out": None if loss is None else {"loss": loss.loss, "perplexity": loss.perplexity, "tokens": loss.tokens},
        "tokens_per_second": round(tokens_per_second(model, start, _SPEED_TOKENS), 1),
        "tasks": run_suite(model, encoder.tokenizer, plan, loaded.folder, batch_size),
        "continuation": None
        if prompt is None
        else _text(encoder, continue_greedily(model, prompt, plan.continuation_tokens)),
    }


def recovered(models: dict[str, Any]) -> float | None:
    """(pruned - distilled) / (pruned - teacher) in held-out loss; None where pruning lost nothing or a loss is
    missing."""
    losses: list[float] = []
    for name in ("teacher", "pruned", "distilled"):
        measured = (models.get(name) or {}).get("held_out")
        if measured is None:
            return None
        losses.append(measured["loss"])
    teacher, pruned, distilled = losses
    return (pruned - distilled) / (pruned - teacher) if pruned > teacher else None
