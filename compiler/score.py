"""The first stage of a compile: the importance scores, calibrated or taken from the build folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minitron.compiler.compilation import RUN_DTYPE, Compilation, run_buffers, weight_hashes
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.fit import size_words
from minitron.compiler.estimate.memory import calibration_memory
from minitron.compiler.graph.executor import Executor, Feeding, Settings
from minitron.compiler.graph.memory import free_memory, host_memory, release_heap
from minitron.compiler.graph.streams import FileStreams, MemoryStreams, Streams
from minitron.compiler.importance.calibrate import Run, calibrate
from minitron.compiler.importance.layer_elimination import LayerElimination
from minitron.compiler.importance.progress_file import Interrupted
from minitron.compiler.importance.room import Room, divide
from minitron.compiler.importance.rounds_file import Rounds
from minitron.compiler.importance.samples import SampleConfig, calibration_samples
from minitron.compiler.importance.score_file import read_scores, write_scores
from minitron.compiler.importance.scores import Scores, ScoreTable
from minitron.compiler.importance.taps import CalibrationConfig
from minitron.compiler.plan.checks import teacher_key
from minitron.compiler.plan.plan import Plan
from minitron.compiler.teacher.lock import versions
from minitron.compiler.teacher.tokenizer import load_tokenizer
from minitron.specs import cache
from minitron.specs.builds import PARTIAL_ROUNDS, PARTIAL_SCORES, PARTIAL_STREAMS, SCORES
from minitron.specs.cache import entry_path, share_file
from minitron.specs.data_files import content_hash, resolve_data
from minitron.specs.errors import placing


def score(compilation: Compilation, *, made_anyhow: bool = False) -> tuple[ScoreTable, torch.Tensor | None]:
    """Returns the importance scores; reads them from the build folder if they were made from the same teacher, data and
    settings, on a device of the same kind in the same dtype. `made_anyhow`: on whatever device, because they are those that
    the build was made with."""
    plan, importance = compilation.plan, compilation.plan.loaded.spec.importance
    if importance.data is None or not plan.needs_scores:
        return ScoreTable(), None
    captured, ranks = plan.teacher.captured, compilation.work.ranks
    with placing(plan.loaded, teacher_key(plan.loaded)):
        tokenizer = load_tokenizer(plan.checkpoint.folder)
    data = resolve_data(plan.loaded)["importance.data"]
    length = captured.length or importance.data.sequence_length
    wanted = SampleConfig(importance.data.samples * (importance.data.sequence_length // length), length)
    samples = calibration_samples(data, tokenizer, captured.config.vocab_size, wanted)
    if len(samples) < wanted.samples and ranks.leads:
        compilation.progress.message(f"the calibration data makes {len(samples)} samples, not {wanted.samples}")
    key = _score_key(plan, content_hash(data), samples, plan.calibration)
    path, made = compilation.build / SCORES, _made(compilation)
    shared = entry_path(plan.build, cache.SCORES, f"{hashlib.sha256(f'{key} {made}'.encode()).hexdigest()}.safetensors")
    own = read_scores(path, key) if ranks.leads and made_anyhow else None
    found = ranks.from_leader((own or _found(compilation, path, shared, (key, made))) if ranks.leads else None)
    if found is not None:
        return found, samples
    scores = _calibrated(compilation, samples, plan.taken, key)
    if ranks.leads:
        share_file(path, shared)
    return scores, samples


def _made(compilation: Compilation) -> str:
    """The kind of device and the dtype in which this compile calibrates: bits of the scores depend on both."""
    return f"{torch.device(compilation.device).type} {run_dtype(compilation.device, compilation.plan.dtype)}"


def _found(compilation: Compilation, path: Path, shared: Path | None, wanted: tuple[str, str]) -> ScoreTable | None:
    """The scores of the build folder, or those of another build beside it."""
    for place in (path, shared):
        if place is None or compilation.work.fresh:
            continue
        cached, plan = read_scores(place, *wanted), compilation.plan
        if (
            cached is not None
            and (cached.layers is not None or not plan.rank_layers)
            and (cached.covariance or not plan.covers)
        ):
            compilation.progress.message(f"scores: taken from {place}")
            share_file(path, shared) if place == path else share_file(place, path)
            return cached
    return None


def run_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a teacher held in `dtype` is calibrated in: its own on a GPU, float32 on a CPU, which has no
    faster one."""
    return dtype if torch.device(device).type == "cuda" else RUN_DTYPE


def _calibrated(compilation: Compilation, samples: torch.Tensor, config: CalibrationConfig, key: str) -> ScoreTable:
    """Calibrates, and writes the scores."""
    plan, work, build = compilation.plan, compilation.work, compilation.build
    captured, device = plan.teacher.captured, compilation.device
    dtype = run_dtype(device, plan.dtype)
    which = f"{work.ranks.rank}-of-{work.ranks.size}" if work.ranks.size > 1 else ""
    # Another dtype, or another share of the samples, is another calibration, though the scores serve the same; and so is one
    # that takes the covariance.
    begun = f"{key} {_made(compilation)}{' covariance' if config.sites else ''}"
    saved = Interrupted(build / _beside(PARTIAL_SCORES, which), f"{begun} {which}")
    if work.fresh:
        saved.remove()
    metric, at_once = config.depth.metric, plan.rank_layers and not config.depth.one_by_one
    compared = at_once and metric != "block_influence"
    sizes = Estimate(plan).calibration_sizes(samples.shape[0], samples.shape[1], dtype)
    budget, kind = work.memory or free_memory(device), torch.device(device).type
    # One that goes on takes what it took, whatever is free now; but not more than it is told to.
    room = (saved.room() if work.memory is None else None) or divide(
        budget, sizes, kind, host=host_memory(), compared=compared, whole=config.greedy
    )
    least = calibration_memory(sizes, room, kind, compared=compared).peak
    if work.memory is not None and least > work.memory and work.ranks.leads:
        compilation.progress.message(
            f"calibrate: takes about {size_words(least)}, and --memory allows {size_words(work.memory)}: one layer's weights, "
            "one sample and what its activations are summed up in are the least"
        )
    settings = Settings(device, dtype, plan.dtype)
    buffers = compilation.buffers if dtype == RUN_DTYPE else run_buffers(plan, captured.config, dtype)

    def executor(graph: torch.fx.GraphModule, feeding: Feeding = Feeding()) -> Executor:
        source = compilation.source.get
        return Executor(graph, captured.layer_of, source, buffers, settings, feeding, fast_attention=True)

    run = Run(
        at_once, saved, compilation.progress, room,
        _streams(room, device, build / _beside(PARTIAL_STREAMS, which)), work.ranks,
    )  # fmt: skip
    rounds = Rounds(build / PARTIAL_ROUNDS, begun)
    if work.fresh and work.ranks.leads:
        rounds.remove()
    begun = work.ranks.from_leader(rounds.read() if work.ranks.leads else None)
    feeding = Feeding(room.resident, room.ahead)
    if begun is None:
        scores = calibrate(plan.teacher, executor(captured.graph_module, feeding), samples, config, run)
    else:
        scores = begun[0]
    if config.depth.one_by_one and metric != "block_influence":
        elimination = LayerElimination(plan.teacher, executor, samples, metric, work.ranks)
        layers = _layers_one_by_one(compilation, elimination, rounds, scores, () if begun is None else begun[1])
        scores = replace(scores, layers=layers)
    if work.ranks.leads:
        write_scores(build / SCORES, key, scores, _made(compilation))
        rounds.remove()
    saved.remove()
    release_heap()
    return scores


def _layers_one_by_one(
    compilation: Compilation, elimination: LayerElimination, rounds: Rounds, scores: ScoreTable, gone: Sequence[int]
) -> Scores:
    """Drops layer after layer, after those that are `gone`; keeps what is known between two rounds in a file."""

    def keep(gone: Sequence[int]) -> None:
        if compilation.work.ranks.leads:
            rounds.write(scores, gone)

    if not gone:
        keep(gone)
    return elimination.scores(compilation.plan.layers_one_by_one, compilation.progress, gone, keep)


def _beside(name: str, which: str) -> str:
    """The name of a file of one process, among those of others."""
    stem, dot, ending = name.partition(".")
    return f"{stem}.{which}{dot}{ending}" if which else name


def _streams(room: Room, device: str, folder: Path) -> Streams:
    if room.streams == "files":
        return FileStreams(folder, device)
    return MemoryStreams(device, "cpu" if room.streams == "host" else None)


# Part of the key of scores.safetensors: another one where the same inputs give other scores.
SCORES_DEFINITION = "each sample apart"


def _score_key(plan: Plan, data: str, samples: torch.Tensor, config: CalibrationConfig) -> str:
    """A hash of everything that decides the scores."""
    digest = hashlib.sha256()
    for part in (
        SCORES_DEFINITION,
        (plan.checkpoint.tied_config or plan.checkpoint.config).to_json_string(),
        repr(weight_hashes(plan.checkpoint)),
        data,
        repr(config),
        str(plan.dtype),
        repr(sorted(versions().items())),
    ):
        digest.update(part.encode())
    digest.update(samples.numpy().tobytes())
    return digest.hexdigest()
