"""Drops layers one after the other, and scores the remaining ones again after each.

The layers that are worth least alone need not be worth least together: two that do the same are both dispensable, and one of
them is not once the other is gone. So each round leaves out every remaining layer in turn, in addition to those that are gone
already, and drops the one whose absence does the least harm: the loss, or the mean squared error of the logits against those of
the whole teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch.fx import GraphModule

from minitron.compiler.graph.executor import Executor, Tap
from minitron.compiler.graph.graph_module import rebuild
from minitron.compiler.importance.batches import batch_size, block_size
from minitron.compiler.importance.logit_harm import next_token_loss, squared_error
from minitron.compiler.importance.ranks import Ranks
from minitron.compiler.importance.scores import Scores
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.residual_stream import LayerEnds, skip_layers
from minitron.specs.progress import Progress

LOGITS = 1 << 28  # of the whole teacher, which wait for those without layers: 1 GB in float32


@dataclass(frozen=True)
class LayerElimination:
    """Drops layers by `metric` over `samples` [samples, sequence], of which each process takes its share; `executor` makes what
    runs a graph of the teacher's."""

    teacher: AnalysedTeacher
    executor: Callable[[GraphModule], Executor]
    samples: torch.Tensor
    metric: Literal["loss", "logit_mse"]
    ranks: Ranks = field(default_factory=Ranks)

    def scores(
        self,
        count: int,
        progress: Progress,
        gone: Sequence[int] = (),
        ended: Callable[[Sequence[int]], None] = lambda gone: None,
    ) -> Scores:
        """The round in which each of `count` layers is dropped, from 0, and `count` for those that stay: [layers].

        `gone` are the layers that an earlier process has dropped, in their order, and `ended` is called with all of them after
        each round."""
        layers, gone = len(self.teacher.ends), list(gone)[:count]
        rounds = [layers - step for step in range(count)]
        with progress.task("drop layers", sum(rounds), "layers", sum(rounds[: len(gone)])) as task:
            while len(gone) < count:
                left = [layer for layer in range(layers) if layer not in gone]
                harms = self._harms([{*gone, layer} for layer in left])
                # Of equal ones the last is dropped: everywhere the lower index stays.
                gone.append(left[len(left) - 1 - int(harms.flip(0).argmin())])
                ended(gone)
                task.advance(len(left))
        scores = np.full(layers, count, dtype=np.float32)
        scores[gone] = range(count)
        return scores

    def _harms(self, candidates: Sequence[set[int]]) -> torch.Tensor:
        """For each set of layers what the logits without them come to, summed over the samples of all processes."""
        graph = self.teacher.captured.graph_module
        narrow = [self.executor(without_layers(graph, self.teacher.ends, dropped)) for dropped in candidates]
        length = self.samples.shape[1]
        batches = self.ranks.share(torch.split(self.samples, batch_size(length)))
        held = max(1, LOGITS // (batch_size(length) * length * self.teacher.captured.config.vocab_size))
        block = min(held, block_size(batch_size(length), length, self.teacher.roles.hidden.size))
        harms = torch.zeros(len(narrow), dtype=torch.float64)
        for start in range(0, len(batches), block):
            part = batches[start : start + block]
            whole = _logits(self.executor(graph), part) if self.metric == "logit_mse" else {}
            for place, one in enumerate(narrow):
                one.run(part, output=_adding(harms, place, part, whole))
        return self.ranks.sum(harms)


def _logits(executor: Executor, part: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    executor.run(part, output=lambda logits, number: found.__setitem__(number, logits))
    return found


def _adding(harms: torch.Tensor, place: int, part: Sequence[torch.Tensor], whole: Mapping[int, torch.Tensor]) -> Tap:
    """Adds the harm of each batch: the error of its logits where those of the whole teacher are given, else its loss."""

    def measure(logits: torch.Tensor, number: int) -> None:
        value = squared_error(logits, whole[number]) if whole else next_token_loss(logits, part[number])
        harms[place] += value * part[number].shape[0]

    return measure


def without_layers(graph_module: GraphModule, ends: Sequence[LayerEnds], dropped: set[int]) -> GraphModule:
    """The teacher's graph in which the residual stream skips some layers; their names stay those of the teacher."""
    skipping = rebuild(graph_module)
    skip_layers(skipping.graph, ends, dropped)
    skipping.graph.eliminate_dead_code()
    skipping.recompile()
    return skipping
