"""Ranks layers by the harm of removing each: the rise of the loss, or the error of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from minitron.compiler.graph.executor import Executor
from minitron.compiler.importance.batches import compared_batches
from minitron.compiler.importance.scores import (
    Scores,
)
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.specs.progress import Progress


def removal_scores(
    teacher: AnalysedTeacher,
    executor: Executor,
    batches: Sequence[torch.Tensor],
    block: int,
    metric: Literal["loss", "logit_mse"],
    progress: Progress,
) -> Scores:
    """The harm of dropping each layer alone: the rise of the loss, or the mean squared error of the logits."""
    captured, ends = teacher.captured, teacher.ends
    nodes = {node.name: node for node in captured.graph.nodes}
    block = min(block, compared_batches(batches[0].numel(), captured.config.vocab_size))
    harm = np.zeros(len(ends), dtype=np.float64)
    with progress.task("rank layers", len(batches) * (len(ends) + 1), "batches") as task:
        for start in range(0, len(batches), block):
            part = batches[start : start + block]
            whole: dict[int, torch.Tensor] = {}
            executor.run(part, output=lambda logits, n, whole=whole: whole.__setitem__(n, logits))  # type: ignore[misc]
            task.advance(len(part))
            for layer, end in enumerate(ends):
                measure = _removal(metric, part, whole, harm, layer)
                executor.run(part, output=measure, skip={nodes[end.leave]: nodes[end.entry]})
                task.advance(len(part))
    return (harm / sum(batch.shape[0] for batch in batches)).astype(np.float32)


def _removal(
    metric: str,
    part: Sequence[torch.Tensor],
    whole: dict[int, torch.Tensor],
    harm: np.ndarray[tuple[int], np.dtype[np.float64]],
    layer: int,
) -> Callable[[torch.Tensor, int], None]:
    def loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
        flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
        return float(torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1).to(flat.device)))

    def measure(logits: torch.Tensor, number: int) -> None:
        if metric == "loss":
            value = loss(logits, part[number]) - loss(whole[number], part[number])
        else:
            value = float((logits.float() - whole[number].float()).square().mean())
        harm[layer] += value * part[number].shape[0]

    return measure
