"""The subject of a verification: the student as it was written, and the teacher that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.emit.rewritten import RewrittenStudent
from minitron.compiler.graph.executor import Settings
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.rotation import Rotation
from minitron.compiler.student.targets import Targets
from minitron.compiler.weights.recipes import Recipe
from minitron.compiler.weights.source import WeightSource


@dataclass(frozen=True)
class Ranking:
    """The rule by which scores select: `contiguous` layers are dropped, and with `basis` the leading components stay.
    `possible` says whether layers can be kept together."""

    scores: ScoreTable
    targets: Targets
    contiguous: bool
    basis: bool
    possible: Callable[[tuple[int, ...]], bool] = lambda layers: True


@dataclass(frozen=True)
class Original:
    """The teacher that a student is held against.

    teacher   the analysed teacher; `source` has its parameters, `buffers` what its code computes in float32
    settings  where graphs run
    folder    the teacher's files, `stored` the dtype of most of their bytes
    """

    teacher: AnalysedTeacher
    source: WeightSource
    buffers: Mapping[str, torch.Tensor]
    settings: Settings
    folder: Path
    stored: torch.dtype

    def held(self, name: str) -> torch.Tensor:
        """The teacher's parameter in the dtype that the spec loads it in."""
        return self.source.get(name).to(self.teacher.captured.stored_dtype(name))


@dataclass(frozen=True)
class Subject:
    """The student that is verified, and everything that it is compared with.

    build          the folder that was written
    original       the teacher; its weights are those that the student was cut from, rotated and refitted ones too
    student        the student as it was rewritten; `config` and `model` are those that were planned for it, without
                   weights
    config_widths  configuration key -> width that was asked for
    selection      the kept indices as plan.json has them; `ranking` is the rule that they follow, None where another
                   one selects
    recorded       file of student/ -> the hash that its compile wrote down; None while the compile is still at it
    coordinates    what the student keeps of the teacher's hidden states; None where it keeps all
    rescaled       dropped layers do more to the residual stream than to add to it
    rotation       what a rotation of the residual stream does to the parameters, where the source is rotated
    """

    build: Path
    original: Original
    student: RewrittenStudent
    config: Any
    model: torch.nn.Module
    config_widths: Mapping[str, int]
    selection: Mapping[str, Sequence[Sequence[int]]]
    ranking: Ranking | None
    recorded: Mapping[str, str] | None
    coordinates: torch.Tensor | None
    rescaled: bool
    rotation: Rotation | None = None

    @property
    def teacher(self) -> AnalysedTeacher:
        return self.original.teacher

    @property
    def source(self) -> WeightSource:
        return self.original.source

    def masked(self, name: str) -> torch.Tensor:
        """The teacher's parameter with everything dropped at zero; a dropped layer's is zero altogether."""
        recipe = self._by_source.get(name)
        if recipe is None:
            return torch.zeros_like(self.original.held(name))
        return recipe.mask(self.original.held(name))

    def unrounded(self, name: str) -> torch.Tensor:
        """The student's parameter in float32, from what the teacher's is in its own dtype."""
        recipe = self.student.recipes[name]
        return recipe.make(self.original.held(recipe.source).to(self.original.settings.dtype))

    @cached_property
    def _by_source(self) -> Mapping[str, Recipe]:
        return {recipe.source: recipe for recipe in self.student.recipes.values()}
