"""Writes the student as a Hugging Face checkpoint: weights in shards, configuration, tokenizer, model card."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.capture.models import quiet, stored_tensors
from minitron.compiler.emit.older_loaders import for_older_loaders
from minitron.compiler.storage.shards import write_shards
from minitron.compiler.storage.tensors import Entry
from minitron.compiler.teacher.folder_files import copy_tokenizer_and_settings
from minitron.compiler.weights.recipes import Recipe
from minitron.compiler.weights.source import StreamedWeights, WeightSource
from minitron.specs.atomic import atomic_folder
from minitron.specs.builds import CARD, CONFIG

Make = Callable[[str], torch.Tensor]


def student_weights(
    source: WeightSource, recipes: Mapping[str, Recipe], stored_dtype: Callable[[str], torch.dtype]
) -> Make:
    """Returns a function from a student parameter's name to its tensor, made when it is asked for. `stored_dtype` is by
    the teacher's name."""

    def make(name: str) -> torch.Tensor:
        recipe = recipes[name]
        rows = recipe.rows
        if rows is not None and isinstance(source, StreamedWeights):
            weight, recipe = source.rows(recipe.source, rows), recipe.without_rows()
        else:
            weight = source.get(recipe.source)
        return recipe.make(weight.to(stored_dtype(recipe.source)))

    return make


@dataclass(frozen=True)
class StudentFolder:
    """The contents of student/ beside its weights.

    config, model   the student's configuration, and the model on the meta device that it describes
    dtype           that of the weights, as the configuration names it
    teacher_folder  where tokenizer files and the generation configuration are copied from
    card            the model card, Markdown
    """

    config: Any
    model: torch.nn.Module
    dtype: torch.dtype
    teacher_folder: Path
    card: str


@dataclass(frozen=True)
class Tensors:
    """The student's tensors: `make` gives each when its turn comes, in the dtype that `dtype_of` its name says.
    `streamed`: they are named and shaped in files as in the model."""

    make: Make
    dtype_of: Callable[[str], torch.dtype]
    streamed: bool


def student_tensors(
    source: WeightSource, recipes: Mapping[str, Recipe], stored_dtype: Callable[[str], torch.dtype]
) -> Tensors:
    """The student's tensors, cut from the teacher's; `stored_dtype` is by the teacher's name."""
    make = student_weights(source, recipes, stored_dtype)
    return Tensors(make, lambda name: stored_dtype(recipes[name].source), source.streamed)


def write_student(
    target: Path,
    student: StudentFolder,
    tensors: Tensors,
    advance: Callable[[int], None],
    *,
    resumed: bool = False,
) -> None:
    """Writes `target` whole or not at all. `resumed`: weight files that an earlier process has written of the same student
    stay.

    Streamed tensors are in memory one at a time; others are written by transformers, which undoes its own conversions.
    """
    with atomic_folder(target, resumed=resumed and tensors.streamed) as folder:
        config, model = copy.deepcopy(student.config), student.model
        config.dtype = student.dtype
        config.architectures = [type(model).__name__]
        if tensors.streamed:
            shapes = {name: tuple(value.shape) for name, value in stored_tensors(model).items()}
            entries = [Entry(name, tensors.dtype_of(name), shape) for name, shape in shapes.items()]
            write_shards(folder, entries, tensors.make, advance)
            with quiet():
                config.save_pretrained(folder)
        else:
            with quiet(), torch.device("meta"):
                loaded: Any = type(model)(copy.deepcopy(config))
            for name, value in stored_tensors(loaded).items():
                _assign(loaded, value, tensors.make(name))
                advance(value.numel() * value.element_size())
            loaded.tie_weights()
            loaded.config.dtype = student.dtype
            with quiet():
                loaded.save_pretrained(folder)
                config.save_pretrained(folder)
        document = for_older_loaders(config, json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        (folder / CONFIG).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        copy_tokenizer_and_settings(student.teacher_folder, folder)
        (folder / CARD).write_text(student.card, encoding="utf-8")


def _assign(model: torch.nn.Module, old: torch.Tensor, new: torch.Tensor) -> None:
    """Puts a tensor in the place of another, under every name that it is tied to."""
    parameter = torch.nn.Parameter(new, requires_grad=False)
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is old:
                module._parameters[key] = parameter
        for key, buffer in module._buffers.items():
            if buffer is old:
                module._buffers[key] = new
