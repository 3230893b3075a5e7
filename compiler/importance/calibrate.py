"""Scores every axis of the teacher in one pass over the calibration samples.

The graph runs layer by layer for all batches (`graph/executor.py`), so that each weight is read once however many
samples there are. What was accumulated is saved from time to time (`progress_file.py`): a killed calibration goes on in
the middle of a layer. All axes are scored, whatever the spec narrows, so that the scores serve other specs too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from minitron.compiler.graph.executor import Executor, Place, Probes
from minitron.compiler.graph.streams import MemoryStreams, Streams
from minitron.compiler.importance.batches import batch_size, block_size
from minitron.compiler.importance.layer_removal import Removal
from minitron.compiler.importance.progress_file import Interrupted, ProgressFile, Saved
from minitron.compiler.importance.ranks import Ranks
from minitron.compiler.importance.room import Room
from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.importance.taps import CalibrationConfig, Taps
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.specs.errors import WorkError
from minitron.specs.progress import Progress

WIDTHS, LAYERS = "calibrate", "rank layers"  # the two passes, as they are shown


@dataclass(frozen=True)
class Run:
    """The way in which a calibration runs, whatever it scores.

    need_layers  layers are ranked, also where that takes removing each
    saved        where progress is kept
    room         the memory that it takes; by default as much as all samples need
    streams      where what is known of each batch rests between two layers
    ranks        the processes that share the samples
    """

    need_layers: bool
    saved: Interrupted
    progress: Progress
    room: Room = field(default_factory=Room)
    streams: Streams = field(default_factory=MemoryStreams)
    ranks: Ranks = field(default_factory=Ranks)


def calibrate(
    teacher: AnalysedTeacher, executor: Executor, samples: torch.Tensor, config: CalibrationConfig, run: Run
) -> ScoreTable:
    """Scores of all axes over `samples` [samples, sequence]; the same in every process of `run.ranks`.

    What was saved is left there, to be removed once the scores are written.
    """
    taps = Taps(teacher, config, executor.fetch)
    size = 1 if taps.one_at_a_time else run.room.batch or batch_size(samples.shape[1])
    batches = list(torch.split(samples, size))
    if len(batches) < run.ranks.size:
        raise WorkError(
            f"the calibration data makes {len(batches)} batches, and torchrun started {run.ranks.size} processes; start fewer, "
            "or name more data"
        )
    usual = batch_size(samples.shape[1])
    looked_at = -(-usual * block_size(usual, samples.shape[1], teacher.roles.hidden.size) // size)
    looked_at = min(max(looked_at, run.ranks.size), len(batches))
    taps.elimination.batches = len(range(run.ranks.rank, looked_at, run.ranks.size))
    mine, metric = run.ranks.share(batches), config.depth.metric
    removal = None
    if run.need_layers and metric != "block_influence":
        removal = Removal(executor, teacher.ends, mine, metric)
    if config.greedy:  # its matrices are those of one layer at a time
        run = replace(run, room=replace(run.room, block=None))
    return _Calibration(executor, taps, mine, run, ProgressFile(run.saved, run.room)).scores(removal)


@dataclass
class _Calibration:
    executor: Executor
    taps: Taps
    batches: Sequence[torch.Tensor]
    run: Run
    file: ProgressFile

    def scores(self, removal: Removal | None) -> ScoreTable:
        saved = self.file.read(self.run.streams)
        if saved is None:
            self.run.streams.drop()
        else:
            self.taps.restore(dict(saved.state))
        if saved is None or saved.phase == WIDTHS:
            self._pass(WIDTHS, Probes(self.taps.taps(), self.taps.given), saved, self.taps.state)
            saved = None
        widths = self.taps.state()
        self.taps.reduce(self.run.ranks)
        scores = self.taps.table()
        if removal is not None:
            if saved is None:
                self.run.streams.drop()
                self._save(Saved(LAYERS, 0, Place(), widths))
            else:
                removal.restore(saved.state)
            probes = Probes(output=removal.measure, forks=removal.forks)
            self._pass(LAYERS, probes, saved, lambda: widths | removal.state(), removal)
            scores = replace(scores, layers=removal.scores(self.run.ranks))
        self.run.streams.drop()
        return scores

    def _pass(
        self,
        name: str,
        probes: Probes,
        saved: Saved | None,
        state: Callable[[], dict[str, torch.Tensor]],
        removal: Removal | None = None,
    ) -> None:
        """Takes all batches through the graph, a block at a time, from where `saved` is."""
        room, count = self.run.room, len(self.batches)
        block = (room.block if removal is None else room.lanes) or count
        lanes = self.executor.lanes(probes)
        start, begin = (0, Place()) if saved is None else (saved.block, saved.place)
        done = start * sum(lanes)
        if saved is not None:
            inside = min(block, count - start)
            done += inside * sum(lanes[: begin.segment]) + begin.batch * lanes[begin.segment]
        with self.run.progress.task(name, count * sum(lanes), "batches", done) as task:
            for first in range(start, count, block):
                if removal is not None:
                    removal.start = first
                part = self.batches[first : first + block]
                self.taps.begin(part)
                for place in self.executor.steps(part, self.run.streams, probes, begin):
                    if place.batch == len(part):
                        self.taps.elimination.settle(self.run.ranks)
                    task.advance(lanes[place.segment])
                    if self.file.timer.due():
                        self._save(Saved(name, first, place, state()))
                self.run.streams.drop()
                begin = Place()

    def _save(self, now: Saved) -> None:
        self.file.save(now, self.run.streams)
