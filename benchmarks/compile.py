"""Measures a compile against its lower bounds: calibration against a bare forward, slicing against a copy, and its memory.

    python benchmarks/compile.py                                       # CPU, a checkpoint of 1 GB in bf16
    python benchmarks/compile.py --gigabytes 0.2 --samples 8 --only calibration
    python benchmarks/compile.py --device cuda --shape 8b --samples 1024 --length 4096          # one GPU
    python benchmarks/compile.py --device cuda --shape 70b-16 --memory 20GB --only calibration  # streamed

A checkpoint with random weights is generated in shards, once, in --work. Times are medians of interleaved repetitions
in one process, memory is the peak of anonymous memory of a process of its own, less what it held before.

    calibration   the width scores of all samples, with weights that stay in memory and with weights that are read layer
                  by layer, over the same tokens through the model's own decoder (same dtype, no head)
    samples       the peak of a calibration of four times as many samples, over that of these, with --memory or a quarter of the
                  checkpoint; "in files": the streams of all samples did not fit, and waited in files
    slicing       a student of half the hidden channels and half the FFN written from the files, over a copy of the files
    whole         all of a compile, every check included, where calibration may take a quarter of the checkpoint less what
                  the graphs take: the peak beyond what a compile of a tiny model of as many layers left in memory, and
                  whether student/ has the same bytes as without such a limit. With --limit the kernel refuses this process
                  more private memory than this many bytes beyond that, files that transformers maps included (RLIMIT_DATA)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from minitron.compiler import Plan, compile_spec, make_plan
from minitron.compiler.capture.models import build_meta, stored_tensors
from minitron.compiler.compilation import Compilation, Work, run_buffers
from minitron.compiler.compile import Stages, emit, rewrite
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.graph.executor import Executor, Feeding, Settings
from minitron.compiler.graph.memory import release_heap
from minitron.compiler.graph.streams import FileStreams, MemoryStreams
from minitron.compiler.importance.calibrate import Run, calibrate
from minitron.compiler.importance.progress_file import Interrupted
from minitron.compiler.importance.room import Room, divide
from minitron.compiler.importance.scores import ScoreTable, WidthConfig
from minitron.compiler.importance.select import select
from minitron.compiler.importance.taps import CalibrationConfig, DepthConfig
from minitron.compiler.score import run_dtype
from minitron.compiler.storage.tensors import save_tensors
from minitron.compiler.weights.source import open_weights
from minitron.specs import LoadedSpec, load_spec
from minitron.specs.file_hashes import file_hash
from minitron.specs.progress import Silent
from minitron.specs.units import BYTES_UNITS, parse_quantity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.foundry import WITHOUT_PROGRAM
from tests.models import save_tokenizer, text

VOCABULARY = 8192
SHARDS = 4
# hidden, FFN, layers, query heads, key-value heads, vocabulary
SHAPES = {"8b": (4096, 14336, 32, 32, 8, 128256), "70b-16": (8192, 28672, 16, 64, 8, 128256)}
PARTS = ("calibration", "samples", "slicing", "whole")
# Of a quarter of the checkpoint, the share that calibration is told to take; the rest is for graphs and the student.
CALIBRATION_SHARE = 0.6


def shape_of(gigabytes: float) -> tuple[int, int, int, int, int, int]:
    """A Llama of about this many bytes in bf16."""
    hidden = 1536 if gigabytes >= 0.5 else 768
    ffn = hidden * 11 // 4
    layer = 2.5 * hidden * hidden + 3 * hidden * ffn
    layers = max(2, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * hidden) / layer))
    return hidden, ffn, layers, hidden // 64, hidden // 256, VOCABULARY


def generate(folder: Path, shape: tuple[int, int, int, int, int, int]) -> Path:
    """Writes the checkpoint, shard by shard."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    hidden, ffn, layers, heads, groups, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_tokenizer(folder)
    shapes = {name: value.shape for name, value in stored_tensors(build_meta(config, torch.bfloat16, "sdpa")).items()}
    generator, names, files = torch.Generator().manual_seed(0), list(shapes), {}
    each = -(-len(names) // SHARDS)
    for number in range(SHARDS):
        tensors = {}
        for name in names[number * each : (number + 1) * each]:
            value = torch.ones(shapes[name]) if len(shapes[name]) == 1 else torch.empty(shapes[name])
            if value.dim() > 1:
                value.normal_(std=0.02, generator=generator)
            tensors[name] = value.bfloat16()
            files[name] = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_tensors(folder / f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors", tensors, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@dataclass
class Bench:
    """One checkpoint, and what is measured on it."""

    teacher: Path
    work: Path
    device: str
    samples: int
    length: int
    repetitions: int
    memory: int | None
    limit: int | None = None

    @property
    def size(self) -> int:
        """The bytes of the checkpoint's weights."""
        return sum(file.stat().st_size for file in self.teacher.glob("*.safetensors"))

    def plan(self) -> Plan:
        """The plan of a student of half the width."""
        return make_plan(self.spec(self.teacher, 2, 16), build=self.work / "build", weights=True)

    def spec(self, teacher: Path, samples: int, length: int) -> LoadedSpec:
        """The spec of a student of half the width of `teacher`."""
        (self.work / "corpus.txt").write_text(text(max(50, samples * length // 4)))
        config = json.loads((teacher / "config.json").read_text())
        spec = {
            "name": "bench",
            "teacher": {"model": str(teacher)},
            "student": {
                "hidden_size": config["hidden_size"] // 2,
                "intermediate_size": config["intermediate_size"] // 2,
            },
            "importance": {
                "data": {"text": [str(self.work / "corpus.txt")], "samples": samples, "sequence_length": length}
            },
        }
        (self.work / "spec.yaml").write_text(yaml.safe_dump(spec))
        return load_spec(self.work / "spec.yaml")

    def ids(self, samples: int) -> torch.Tensor:
        """Token ids [samples, length]."""
        return torch.randint(0, VOCABULARY, (samples, self.length), generator=torch.Generator().manual_seed(0))

    def room(self, plan: Plan, samples: int, dtype: torch.dtype) -> Room:
        """The division of memory that the command would choose."""
        sizes = Estimate(plan).calibration_sizes(samples, self.length, dtype)
        return divide(self.memory or 1 << 40, sizes, self.device.split(":")[0], host=1 << 40)

    def calibration(self, plan: Plan, samples: int, feeding: Feeding, room: Room) -> Callable[[], ScoreTable]:
        """A calibration that can be run again and again."""
        captured, dtype = plan.teacher.captured, run_dtype(self.device, plan.dtype)
        executor = Executor(
            captured.graph_module, captured.layer_of, open_weights(captured, plan.checkpoint).get,
            run_buffers(plan, captured.config, dtype), Settings(self.device, dtype, plan.dtype), feeding, fast_attention=True,
        )  # fmt: skip
        ids, config = self.ids(samples), CalibrationConfig(WidthConfig(), DepthConfig())

        def run() -> ScoreTable:
            folder = Path(tempfile.mkdtemp(dir=self.work))
            streams = (
                FileStreams(folder / "s", self.device)
                if room.streams == "files"
                else MemoryStreams(self.device, "cpu" if room.streams == "host" else None)
            )
            how = Run(False, Interrupted(folder / "partial.safetensors", "k"), Silent(), room, streams)
            found = calibrate(plan.teacher, executor, ids, config, how)
            shutil.rmtree(folder)
            return found

        return run

    def bare(self, plan: Plan) -> Callable[[], None]:
        """The model's own decoder over the same batches."""
        dtype = run_dtype(self.device, plan.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(self.teacher, dtype=dtype).to(self.device).eval().model
        room = self.room(plan, self.samples, dtype)
        batches = torch.split(self.ids(self.samples), room.batch or 1)

        def run() -> None:
            with torch.no_grad():
                for batch in batches:
                    model(input_ids=batch.to(self.device), use_cache=False)
            synchronise(self.device)

        return run

    def measure_calibration(self) -> dict[str, float]:
        plan = self.plan()
        room = self.room(plan, self.samples, run_dtype(self.device, plan.dtype))
        arms: dict[str, Callable[[], object]] = {
            "bare": self.bare(plan),
            "resident": self.calibration(plan, self.samples, Feeding(resident=True), room),
            "streamed": self.calibration(plan, self.samples, Feeding(ahead=True), room),
        }
        if self.memory is not None:  # what the command chooses with so much, and nothing that takes more
            arms = {"chosen": self.calibration(plan, self.samples, Feeding(room.resident, room.ahead), room)}
        else:
            arms["resident"]()  # its weights are in memory from here on
        times = interleaved(arms, self.repetitions, self.device)
        tokens = self.samples * self.length
        layers = Estimate(plan).teacher_costs.forward_flops_per_token(self.length)
        head = 2 * plan.teacher.captured.config.hidden_size * plan.teacher.captured.config.vocab_size
        found = {f"{name}, s": times.wall(name) for name in arms}
        found |= {f"{name}, TFLOP/s": tokens * (layers - head) / times.wall(name) / 1e12 for name in arms}
        if "bare" in arms:
            others = ("resident", "streamed")
            found |= {f"{name} / bare": times.ratio(name, "bare") for name in others}
            if self.device == "cpu":
                found |= {f"{name} / bare, CPU time": times.ratio(name, "bare", cpu=True) for name in others}
        return found

    def measure_peak(self, samples: int) -> dict[str, float]:
        plan, memory = self.plan(), self.memory or self.size // 4
        dtype = run_dtype(self.device, plan.dtype)
        room = divide(memory, Estimate(plan).calibration_sizes(samples, self.length, dtype), "cpu")
        run = self.calibration(plan, samples, Feeding(room.resident, room.ahead), room)
        with peak() as found:
            run()
        return {"peak, MB": found[0] / 1e6, "in files": float(room.streams == "files")}

    def measure_slicing(self) -> dict[str, float]:
        plan, copied = self.plan(), self.work / "copied"
        source = open_weights(plan.teacher.captured, plan.checkpoint)
        teacher, config = plan.teacher, plan.teacher.captured.config
        generator = torch.Generator().manual_seed(0)

        def draw(size: int) -> Any:
            return torch.rand(size, generator=generator).numpy()

        widths = {
            name: {layer: draw(config.intermediate_size) for layer in layers}
            for name, layers in teacher.roles.widths.items()
        }
        scores = ScoreTable(hidden=draw(config.hidden_size), widths=widths)
        selection = select(plan.targets, teacher.roles, scores, teacher.captured.layer_count, contiguous=False)
        buffers = run_buffers(plan, config)
        student = rewrite(plan, selection, buffers)
        compilation = Compilation(plan, source, buffers, "cpu", Silent())

        def copy() -> None:
            shutil.rmtree(copied, ignore_errors=True)
            copied.mkdir()
            for file in sorted(self.teacher.glob("*.safetensors")):
                subprocess.run(["cp", str(file), str(copied)], check=True)
            subprocess.run(["sync", *map(str, copied.iterdir())], check=True)

        def slice_student() -> None:
            shutil.rmtree(self.work / "build" / "student", ignore_errors=True)
            emit(compilation, student)

        slice_student()  # a process checks its weights for NaN and infinity once
        times = interleaved({"cp": copy, "slicing": slice_student}, self.repetitions, "cpu")
        shutil.rmtree(copied)
        with peak() as found:
            slice_student()
        largest = max(info.nbytes for info in plan.checkpoint.tensors.values())
        return {
            "cp and sync, s": times.wall("cp"), "slicing, s": times.wall("slicing"),
            "slicing / cp": times.ratio("slicing", "cp"),
            "peak, MB": found[0] / 1e6, "2 x largest tensor + 64 MiB, MB": (2 * largest + (64 << 20)) / 1e6,
        }  # fmt: skip

    def measure_whole(self) -> dict[str, float]:
        os.environ["MINITRON_CACHE"] = "none"  # each compile makes everything itself
        layers = json.loads((self.teacher / "config.json").read_text())["num_hidden_layers"]
        tiny = generate(self.work / "tiny", (64, 128, layers, 2, 1, VOCABULARY))
        size = self.size

        def compiled(teacher: Path, name: str, memory: int | None) -> dict[str, str]:
            spec, build = self.spec(teacher, self.samples, self.length), self.work / name
            stages = WITHOUT_PROGRAM if memory is None else Stages()
            compile_spec(spec, build, device=self.device, progress=Silent(), stages=stages, work=Work(memory=memory))
            return {path.name: file_hash(path) for path in (build / "student").iterdir()}

        compiled(tiny, "tiny-build", None)
        release_heap()
        with peak() as found, limited(self.limit):
            capped = compiled(self.teacher, "capped", int(size / 4 * CALIBRATION_SHARE))
        free = compiled(self.teacher, "free", None)
        return {
            "peak, MB": found[0] / 1e6, "a quarter of the checkpoint, MB": size / 4e6, "peak / quarter": found[0] / (size / 4),
            "same bytes": float(capped == free),
        }  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Wall times and CPU times of this process, by arm, a repetition after the other; all arms run in turn."""

    walls: Mapping[str, list[float]]
    spent: Mapping[str, list[float]]

    def wall(self, arm: str) -> float:
        """The median time of an arm."""
        return statistics.median(self.walls[arm])

    def ratio(self, arm: str, over: str, *, cpu: bool = False) -> float:
        """The median, over repetitions, of an arm's time over that of another one in the same repetition: what others take of
        the machine changes from minute to minute. Where they take the cores too, CPU times are the ones to compare."""
        times = self.spent if cpu else self.walls
        return statistics.median(one / other for one, other in zip(times[arm], times[over], strict=True))


def interleaved(arms: dict[str, Callable[[], object]], repetitions: int, device: str) -> Times:
    """Runs all arms in turn, `repetitions` times."""
    walls, spent = ({name: list[float]() for name in arms} for _ in range(2))
    for _ in range(repetitions):
        for name, run in arms.items():
            synchronise(device)
            began, cpu = time.perf_counter(), time.process_time()
            run()
            synchronise(device)
            walls[name].append(time.perf_counter() - began)
            spent[name].append(time.process_time() - cpu)
    return Times(walls, spent)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most anonymous memory of this process while the block runs, less what it held before; in the list at the end."""
    before, most, ended, found = anonymous(), [0], threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found[0] = max(0, max(most[0], anonymous()) - before)


@contextmanager
def limited(beyond: int | None) -> Iterator[None]:
    """Limits the private memory of this process, used or not, to this many bytes beyond what it has; None: no limit."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if beyond is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + beyond, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def anonymous() -> int:
    """The bytes of anonymous memory that this process has."""
    return status("RssAnon")


def status(name: str) -> int:
    """An entry of the kernel's status of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def apart(arguments: argparse.Namespace, part: str, samples: int) -> dict[str, float]:
    """A part in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--samples", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory")
    parser.add_argument("--limit")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "minitron-compile-benchmark")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("not measured: there is no CUDA device here")
        return
    shape = SHAPES[arguments.shape] if arguments.shape else shape_of(arguments.gigabytes)
    teacher = generate(arguments.work / ("-".join(map(str, shape))), shape)
    memory, limit = (
        None if given is None else parse_quantity(given, BYTES_UNITS) for given in (arguments.memory, arguments.limit)
    )
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        bench = Bench(
            teacher, Path(work), arguments.device, arguments.samples, arguments.length, arguments.repetitions, memory, limit,
        )  # fmt: skip
        if arguments.part is not None:
            part = {
                "calibration": bench.measure_calibration,
                "samples": lambda: bench.measure_peak(arguments.samples),
                "slicing": bench.measure_slicing,
                "whole": bench.measure_whole,
            }[arguments.part]
            print(json.dumps(part()))
            return
    size = sum(file.stat().st_size for file in teacher.glob("*.safetensors"))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, {platform.processor() or platform.machine()}, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads; {size / 1e9:.2f} GB in {SHARDS} shards, {shape}")
    print("\n| | |\n|---|---|")
    for name in arguments.only.split(","):
        if name == "samples":
            few, many = (apart(arguments, "samples", arguments.samples * times) for times in (1, 4))
            show(
                name,
                {
                    **few,
                    "peak of four times as many, MB": many["peak, MB"],
                    "in files, four times as many": many["in files"],
                    "ratio": many["peak, MB"] / few["peak, MB"],
                },
            )
        else:
            show(name, apart(arguments, name, arguments.samples))
    if arguments.device == "cpu":
        print(
            "\non a GPU: not measured; `python benchmarks/compile.py --device cuda --shape 8b --samples 1024 --length 4096`"
        )


def show(part: str, figures: dict[str, float]) -> None:
    for name, value in figures.items():
        digits = 3 if value < 10 else 1
        print(
            f"| {part}: {name} | {value:.{digits}f} |"
            if math.isfinite(value)
            else f"| {part}: {name} | not measured |",
            flush=True,
        )


if __name__ == "__main__":
    main()
