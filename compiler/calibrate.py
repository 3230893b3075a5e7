"""Scores every axis of the teacher in one pass over the calibration samples.

Samples go through in blocks; in a block the graph runs layer by layer for all its batches (`execute`), so that memory is
one layer's weights and the block's residual stream. After every block what was accumulated is saved: a killed calibration
goes on with the next block. All axes are scored, whatever the spec narrows, so that the scores serve other specs too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.fx import Node

from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import MOVES
from minitron.compiler.graph.executor import Executor, Tap
from minitron.compiler.roles.experts import Mixture
from minitron.compiler.roles.names import NUM_EXPERTS, SCAN_HEAD_DIM, SCAN_HEADS
from minitron.compiler.roles.residual_stream import LayerEnds
from minitron.compiler.roles.roles import Roles, Width
from minitron.compiler.scores import (
    Accumulator,
    Contributions,
    Scores,
    ScoreTable,
    WidthConfig,
    over_owned_tokens,
    over_tokens,
)
from minitron.specs.atomic import atomic_path
from minitron.specs.progress import Progress

BATCH_TOKENS = 4096  # tokens that go through the graph at a time


BLOCK_BYTES = 1 << 30  # residual stream that is held between two layers


@dataclass(frozen=True)
class DepthConfig:
    """How layers are ranked (Minitron, arXiv 2407.14679, section 2.3)."""

    metric: Literal["block_influence", "loss", "logit_mse"] = "block_influence"


@dataclass(frozen=True)
class CalibrationConfig:
    """What decides the scores, besides teacher and samples."""

    width: WidthConfig
    depth: DepthConfig


class _Taps:
    """All accumulators, and the nodes that feed them."""

    def __init__(
        self, captured: Captured, table: AxisTable, roles: Roles, ends: Sequence[LayerEnds], config: CalibrationConfig
    ):
        self.roles = roles
        self.space = table.space
        self.accumulators: dict[str, Accumulator] = {}
        self.contributions: dict[int, Contributions] = {}
        self.influence: dict[str, torch.Tensor] = {
            "turned": torch.zeros(len(ends), dtype=torch.float64),
            "tokens": torch.zeros(len(ends), dtype=torch.float64),
        }
        self.by_node: dict[str, list[Tap]] = {}
        self._entered: dict[int, torch.Tensor] = {}
        self._ends: dict[str, torch.Tensor] = {}  # where the rows of each expert end, of the batch that is being run
        self._config = config
        for node in norm_outputs(captured, roles):
            self._accumulate(node, f"hidden_size.{node.name}")
        for layer, site in roles.heads.items():
            for reader in site.readers[:1]:
                self._accumulate(reader.value, f"num_attention_heads.{layer}")
        for name, layers in roles.widths.items():
            for layer, width in layers.items():
                for reader in width.readers[:1]:
                    mixture = roles.mixtures.get(layer)
                    if mixture is not None and width.parents == mixture.experts:
                        self._accumulate_by_expert(table, reader.value, mixture, f"{name}.{layer}")
                    else:
                        self._accumulate(reader.value, f"{name}.{layer}")
        for layer, mixture in roles.mixtures.items():
            self._contribution(table, layer, mixture)
        if config.depth.metric == "block_influence":
            for layer, end in enumerate(ends):
                self._influence(layer, end)

    def _add(self, name: str, tap: Tap) -> None:
        self.by_node.setdefault(name, []).append(tap)

    def _accumulate(self, node: Node, key: str) -> None:
        accumulator = self.accumulators.setdefault(key, Accumulator(self._config.width))

        def tap(value: torch.Tensor, number: int) -> None:
            # Rows of experts come without a batch dimension: all of a batch's rows count as one sample.
            accumulator.update(value if value.dim() == 3 else value.reshape(1, -1, value.shape[-1]))

        self._add(node.name, tap)

    def _accumulate_by_expert(self, table: AxisTable, node: Node, mixture: Mixture, key: str) -> None:
        """The channels of every expert, [experts, channels]."""
        accumulator = self.accumulators.setdefault(key, Accumulator(self._config.width))
        how = self._config.width.sequence

        def tap(value: torch.Tensor, number: int) -> None:
            value = value.float().abs()
            if mixture.ends is None:
                score_EC = over_tokens(experts_first(table, node, mixture, value), how)
            else:
                score_EC = over_owned_tokens(value, self._ends[mixture.ends.name], how)
            accumulator.add(score_EC.unsqueeze(0))

        self._add(node.name, tap)

    def _contribution(self, table: AxisTable, layer: int, mixture: Mixture) -> None:
        """The norm of what every expert adds. Where all experts see all tokens, those not sent to one add nothing to it."""
        contributions = self.contributions.setdefault(layer, Contributions())

        def keep(value: torch.Tensor, number: int) -> None:
            assert mixture.ends is not None
            self._ends[mixture.ends.name] = value

        def tap(value: torch.Tensor, number: int) -> None:
            value = value.float()
            if mixture.ends is None:
                norms_EN = experts_first(table, mixture.contribution, mixture, value).norm(dim=-1)
                contributions.add(norms_EN.sum(-1), (norms_EN > 0).sum(-1))
            else:
                ends = self._ends[mixture.ends.name]
                sums = over_owned_tokens(value.norm(dim=-1, keepdim=True), ends, "mean")[:, 0] * value.shape[0]
                contributions.add(sums, torch.diff(ends, prepend=ends.new_zeros(1)))

        if mixture.ends is not None:
            self._add(mixture.ends.name, keep)
        self._add(mixture.contribution.name, tap)

    def _influence(self, layer: int, end: LayerEnds) -> None:
        """Block influence: 1 - E[cos(x_in, x_out)] over all tokens."""

        def enter(value: torch.Tensor, number: int) -> None:
            self._entered[number] = value

        def leave(value: torch.Tensor, number: int) -> None:
            before = self._entered[number]
            cosine = torch.nn.functional.cosine_similarity(before.float(), value.float(), dim=-1)
            self.influence["turned"][layer] += (1 - cosine).sum().double().cpu()
            self.influence["tokens"][layer] += cosine.numel()
            self._entered[number] = value

        if layer == 0:
            self._add(end.entry, enter)
        self._add(end.leave, leave)

    def taps(self) -> dict[str, Tap]:
        def all_of(taps: list[Tap]) -> Tap:
            def call(value: torch.Tensor, number: int) -> None:
                for tap in taps:
                    tap(value, number)

            return call

        return {name: all_of(taps) for name, taps in self.by_node.items()}

    # -- what is kept of a calibration that was killed ------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        state = {f"influence/{key}": value.clone() for key, value in self.influence.items()}
        for key, accumulator in self.accumulators.items():
            if accumulator.total is not None and accumulator.squares is not None:
                state[f"total/{key}"] = accumulator.total.cpu()
                state[f"squares/{key}"] = accumulator.squares.cpu()
                state[f"samples/{key}"] = torch.tensor(accumulator.samples)
        for layer, contributions in self.contributions.items():
            if contributions.total is not None and contributions.tokens is not None:
                state[f"contributed/{layer}"] = contributions.total
                state[f"received/{layer}"] = contributions.tokens
        return state

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.influence = {key: state[f"influence/{key}"].clone() for key in self.influence}
        for key, accumulator in self.accumulators.items():
            if f"total/{key}" in state:
                accumulator.total, accumulator.squares = state[f"total/{key}"], state[f"squares/{key}"]
                accumulator.samples = int(state[f"samples/{key}"])
        for layer, contributions in self.contributions.items():
            if f"contributed/{layer}" in state:
                contributions.total, contributions.tokens = state[f"contributed/{layer}"], state[f"received/{layer}"]

    # -- the end ------------------------------------------------------------------------------------------------------

    def table(self) -> ScoreTable:
        hidden: Scores | None = None
        for key, accumulator in self.accumulators.items():
            if key.startswith("hidden_size."):
                score = accumulator.result().numpy()
                hidden = score if hidden is None else hidden + score
        heads = {}
        for layer, site in self.roles.heads.items():
            key = f"num_attention_heads.{layer}"
            if key in self.accumulators:
                channels = self.accumulators[key].result().reshape(site.groups, site.repeats, -1)
                heads[layer] = channels.norm(dim=-1).numpy()  # L2 over the width of a head
        widths = {
            name: {layer: self._width_scores(name, layer, width) for layer, width in layers.items() if width.readers}
            for name, layers in self.roles.widths.items()
            if any(width.readers for width in layers.values())
        }
        if self.contributions:
            widths[NUM_EXPERTS] = {
                layer: one.result().reshape(self.roles.mixtures[layer].groups, -1).squeeze(0).numpy()
                for layer, one in self.contributions.items()
            }
        layers = None
        if self._config.depth.metric == "block_influence":
            layers = (self.influence["turned"] / self.influence["tokens"]).float().numpy()
        return ScoreTable(hidden, heads, widths, layers)

    def _width_scores(self, name: str, layer: int, width: Width) -> Scores:
        score = self.accumulators[f"{name}.{layer}"].result()
        if name in (SCAN_HEADS, SCAN_HEAD_DIM):
            score = self.roles.scans[layer].scores(name, score, apart=bool(width.parents))
        return score.numpy()


def experts_first(table: AxisTable, node: Node, mixture: Mixture, value: torch.Tensor) -> torch.Tensor:
    """[experts, rows, channels] of a value that has the experts in a dimension of their own."""
    dims = table.dims(node)
    (axis,) = (i for i, dim in enumerate(dims) if table.space.flat(dim) == mixture.experts)
    return value.movedim(axis, 0).reshape(value.shape[axis], -1, value.shape[-1])


def norm_outputs(captured: Captured, roles: Roles) -> list[Node]:
    """The values of the residual stream's width that projections inside the layers read: outputs of the input norms."""
    result: list[Node] = []
    for reader in roles.hidden.readers:
        if reader.weight is None or captured.layer_in_path(reader.weight) is None:
            continue
        node = reader.value
        while getattr(node.target, "_opname", "") in MOVES and isinstance(node.args[0], Node):
            node = node.args[0]
        if node not in result and node.meta["val"].dim() == 3:
            result.append(node)
    return result


def calibrate(
    captured: Captured,
    table: AxisTable,
    roles: Roles,
    ends: Sequence[LayerEnds],
    executor: Executor,
    samples: torch.Tensor,
    config: CalibrationConfig,
    *,
    need_layers: bool,
    partial: Path,
    key: str,
    progress: Progress,
) -> ScoreTable:
    """Scores of all axes. `partial` keeps what was accumulated so far, for the calibration that `key` identifies."""
    taps = _Taps(captured, table, roles, ends, config)
    batches, block = batches_of(samples, roles.hidden.size)
    done = _restore(taps, partial, key)
    with progress.task("calibrate", len(batches) * executor.segments, "batches", done * executor.segments) as task:
        while done < len(batches):
            part = batches[done : done + block]
            executor.run(part, taps=taps.taps(), advance=lambda _: task.advance(1))
            done += len(part)
            if done < len(batches):
                _save(taps.state(), partial, key, done)
    scores = taps.table()
    if need_layers and config.depth.metric != "block_influence":
        layers = removal_scores(captured, ends, executor, batches, block, config.depth.metric, progress)
        scores = ScoreTable(scores.hidden, scores.heads, scores.widths, layers)
    partial.unlink(missing_ok=True)
    return scores


def batches_of(samples: torch.Tensor, hidden: int) -> tuple[list[torch.Tensor], int]:
    """Samples as batches, and how many batches make a block."""
    size = batch_size(samples.shape[1])
    return list(torch.split(samples, size)), block_size(size, samples.shape[1], hidden)


def batch_size(length: int) -> int:
    """Samples of `length` tokens that go through the graph at a time."""
    return max(1, BATCH_TOKENS // length)


def block_size(sequences: int, length: int, hidden: int) -> int:
    """Batches that wait between two layers: the residual stream, its copy and the norm's output may live, in fp32."""
    return max(1, BLOCK_BYTES // (3 * 4 * sequences * length * hidden))


def compared_batches(tokens: int, vocabulary: int) -> int:
    """Batches whose logits wait, in fp32, to be compared with those that each dropped layer leads to."""
    return max(1, BLOCK_BYTES // (4 * tokens * vocabulary))


def removal_scores(
    captured: Captured,
    ends: Sequence[LayerEnds],
    executor: Executor,
    batches: Sequence[torch.Tensor],
    block: int,
    metric: Literal["loss", "logit_mse"],
    progress: Progress,
) -> Scores:
    """The harm of dropping each layer alone: the rise of the loss, or the mean squared error of the logits."""
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


def _save(state: dict[str, torch.Tensor], path: Path, key: str, done: int) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"key": key, "done": json.dumps(done)})


def _restore(taps: _Taps, path: Path, key: str) -> int:
    """The number of batches that an earlier process has accumulated."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("key") != key:
                return 0
            taps.restore({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
            return int(json.loads(metadata["done"]))
    except SafetensorError:  # a damaged file: what it held is computed again
        return 0
