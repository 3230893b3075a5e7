"""The state that the stages of one compile share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.capture.models import build_meta
from minitron.compiler.graph.executor import Settings
from minitron.compiler.importance.ranks import Ranks
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.plan.plan import Plan
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.compiler.weights.buffers import load_buffers
from minitron.compiler.weights.source import WeightSource
from minitron.specs.file_hashes import file_hash
from minitron.specs.progress import Progress

Buffers = Mapping[str, torch.Tensor]
# The dtype that graphs are compared in, whatever the checkpoint's is: comparisons are not rounded.
RUN_DTYPE = torch.float32


@dataclass(frozen=True)
class Work:
    """The resources of a compile, none of which decides its result.

    memory  bytes that calibration may take on the device; None: what is free
    ranks   the processes that calibrate together; the first one does everything else
    fresh   nothing that an earlier compile left in the build folder is taken up
    """

    memory: int | None = None
    ranks: Ranks = field(default_factory=Ranks)
    fresh: bool = False


@dataclass(frozen=True)
class Compilation:
    """The plan, the teacher's weights, the build folder and the progress.

    `buffers` are those that the teacher's own code computes when it is loaded in RUN_DTYPE. `staging` is the folder of
    what is written, until all of it takes its place in the build. `scores` are the ones that select, and `coordinates`
    what stays of the teacher's hidden states, once they are there.
    """

    plan: Plan
    source: WeightSource
    buffers: Buffers
    device: str
    progress: Progress
    staging: Path | None = None
    work: Work = field(default_factory=Work)
    scores: ScoreTable = field(default_factory=ScoreTable)
    coordinates: torch.Tensor | None = None

    @property
    def build(self) -> Path:
        """The folder that student, program and documents are written to and checked in."""
        return self.staging or self.plan.build

    @property
    def settings(self) -> Settings:
        """The device and dtype in which graphs run that are compared."""
        return Settings(self.device, RUN_DTYPE, self.plan.dtype)


def run_buffers(plan: Plan, config: Any, dtype: torch.dtype = RUN_DTYPE) -> Buffers:
    """The buffers of a model that is loaded in `dtype`: in the checkpoint's own dtype a scale may be rounded."""
    return load_buffers(build_meta(config, dtype, plan.teacher.captured.attention))


def weight_hashes(checkpoint: Checkpoint) -> list[str]:
    """The hashes of the teacher's weight files, wherever they lie."""
    return [file_hash(file) for file in sorted({info.file for info in checkpoint.tensors.values()})]
