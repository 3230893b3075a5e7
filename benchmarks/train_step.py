"""Our training step beside a plain Hugging Face loop with the naive loss: tokens a second and peak memory.

    python benchmarks/train_step.py                                       # CPU, fp32, small shapes
    python benchmarks/train_step.py --device cuda --shape 3b-to-1b        # one GPU, bf16
    python benchmarks/train_step.py --device cuda --shape 12b-to-8b --alone --recompute --weights bfloat16 --states int8
    python benchmarks/train_step.py --device cuda --shape 8b-to-4b --alone --compile --float8 student teacher
    torchrun --nproc-per-node 8 benchmarks/train_step.py --device cuda --shape 12b-to-8b

In one process: every measurement runs in a process of its own, the two loops interleaved, and medians are compared. Both
have the same models, data, optimizer and micro batches; the plain loop holds all logits of a micro batch. Under torchrun:
our step alone, spread over the devices, with its share of their peak (MFU) and the memory of the first device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.initialization import no_init_weights

from minitron.runtime.checkpoint import Checkpoints
from minitron.runtime.course import Course
from minitron.runtime.data import Corpus, Windows
from minitron.runtime.float8 import compute_student_in_float8, hold_teacher_in_float8
from minitron.runtime.loss import DistillationLoss
from minitron.runtime.models import LanguageModel
from minitron.runtime.optimizer import make_optimizer
from minitron.runtime.recomputation import recompute, recompute_layers
from minitron.runtime.saving import Saver
from minitron.runtime.setup import Run
from minitron.runtime.sharding import compile_layers, shard_student, shard_teacher
from minitron.runtime.step import train_step
from minitron.runtime.utilisation import peak_flops, utilisation
from minitron.runtime.world import World, join_world
from minitron.specs.training_plan import HeadPlan, TrainingPlan

HEAD = HeadPlan(backbone="model", module="lm_head", weight="lm_head.weight", bias=None, scale=1.0, softcap=None)


@dataclass(frozen=True)
class Shape:
    """Teacher and student as (hidden, FFN, layers), and what a step reads."""

    vocabulary: int
    heads: tuple[int, int, int]
    """Query heads, key-value groups, width of a head."""

    teacher: tuple[int, int, int]
    student: tuple[int, int, int]
    length: int
    micro: int
    sequences: int
    """The sequences of a step, on each device."""


SHAPES = {
    "tiny": Shape(512, (2, 1, 16), (48, 96, 2), (32, 64, 2), 32, 1, 2),
    "small": Shape(32768, (8, 2, 32), (384, 1024, 4), (256, 768, 4), 256, 2, 2),
    "3b-to-1b": Shape(131072, (24, 8, 128), (3072, 8192, 24), (2048, 6144, 16), 4096, 1, 4),
    "8b-to-4b": Shape(128256, (32, 8, 128), (4096, 14336, 32), (3072, 9216, 32), 8192, 1, 2),
    "12b-to-8b": Shape(131072, (32, 8, 128), (5120, 14336, 40), (4096, 11520, 40), 8192, 1, 4),
}


def config(shape: Shape, side: tuple[int, int, int]) -> MistralConfig:
    hidden, ffn, layers = side
    heads, groups, width = shape.heads
    return MistralConfig(
        vocab_size=shape.vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=width, sliding_window=None,
        max_position_embeddings=shape.length, tie_word_embeddings=False,
    )  # fmt: skip


def empty_model(shape: Shape, side: tuple[int, int, int], dtype: torch.dtype) -> Any:
    """On the CPU, its weights not yet drawn: a page that nobody has written takes no memory."""
    with no_init_weights():
        return AutoModelForCausalLM.from_config(config(shape, side), dtype=dtype)


@torch.no_grad()
def draw(model: Any, seed: int) -> None:
    """Random weights, sharp enough that there is something to distil; where rows are spread, each rank's its own."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        rows = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        rows.fill_(1.0) if parameter.ndim == 1 else rows.normal_(0.0, 0.05, generator=generator)


def forward_flops(shape: Shape, side: tuple[int, int, int]) -> int:
    """Counts the FLOPs of one token: two for each weight that it meets, and attention to half of the sequence."""
    (hidden, ffn, layers), (heads, groups, width) = side, shape.heads
    layer = 2 * hidden * width * (heads + groups) + 3 * hidden * ffn
    return 2 * (layers * layer + shape.vocabulary * hidden) + layers * 4 * (shape.length // 2) * heads * width


def parameters(shape: Shape, side: tuple[int, int, int]) -> int:
    (hidden, ffn, layers), (heads, groups, width) = side, shape.heads
    return (
        layers * (2 * hidden * width * (heads + groups) + 3 * hidden * ffn)
        + (2 * shape.vocabulary + 2 * layers + 1) * hidden
    )


def training_plan(shape: Shape, world: World) -> TrainingPlan:
    model = {"model": "-", "dtype": "bfloat16", "head": HEAD.model_dump()}
    whole = shape.sequences * world.size
    return TrainingPlan.model_validate({
        "format_version": 1, "name": "benchmark", "teacher": model, "student": model, "tokenizer": "-", "output": "-",
        "work": "-", "held_out": None,
        "evaluate": {"suite": [], "data_dir": None, "prompt": None, "continuation_tokens": 1},
        "data": {"text": ["-"]}, "teacher_logits": "online", "tokens": 100 * whole * shape.length,
        "sequence_length": shape.length, "global_batch_size": whole, "micro_batch_size": shape.micro,
        "optimizer": {"lr": 1e-4}, "loss": {}, "seed": 0, "compute_dtype": {"cpu": "float32", "cuda": "bfloat16"},
        "gradient_checkpointing": False, "compile": False,
        "layout": {"student": "sharded", "teacher": "replicated"}, "checkpoint": {"every_tokens": 10**9},
    })  # fmt: skip


def corpus(shape: Shape, sequences: int) -> Corpus:
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, sequences * shape.length * 4 + 1, dtype=np.uint32)
    return Corpus((Windows(tokens, shape.length, None),), (1,), 0)


def ours(args: argparse.Namespace, shape: Shape, world: World) -> Callable[[int], float]:
    """A function that trains the step with a number and returns its loss."""
    plan = training_plan(shape, world)
    compute = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    teacher = LanguageModel(empty_model(shape, shape.teacher, compute), HEAD)
    teacher.module.requires_grad_(False)
    if world.size > 1 and args.teacher == "sharded":
        teacher = shard_teacher(teacher, world)
    else:
        teacher.module.to(world.device)
    draw(teacher.module, 0)
    if "teacher" in args.float8:  # before the student takes its memory: for a moment it is held twice
        hold_teacher_in_float8(teacher, world.device, world.device)
    student = LanguageModel(empty_model(shape, shape.student, compute), HEAD)
    if "student" in args.float8:
        compute_student_in_float8(student, world.device, plan)
    for model in (teacher, student) if args.compile else ():
        compile_layers(model)
    if args.recompute:
        recompute(student, True)
    if world.size > 1:
        student = shard_student(student, world, compute, cpu_offload=False)
    else:
        bf16 = args.weights == "bfloat16" and world.device.type == "cuda"
        student.module.to(world.device, torch.bfloat16 if bf16 else torch.float32)
    draw(student.module, 1)
    run = Run(
        plan=plan, world=world, work=Path("-"), student=student, teacher=teacher, hidden=None, stored=None,
        course=Course.of(plan), corpora=(corpus(shape, plan.global_batch_size),), held_out=None,
        optimizer=make_optimizer(
            student.module, plan.optimizer.model_copy(update={"states": args.states}),
            bf16_weights=args.weights == "bfloat16",
        ),
        saver=Saver(Checkpoints(Path("-"), 1), {}, world, spread=world.size > 1), identity={}, loss=DistillationLoss(),
        compute_dtype=compute,
    )  # fmt: skip
    student.module.train()
    return lambda step: train_step(run, run.course.state(step))["loss"]


def plain(args: argparse.Namespace, shape: Shape, world: World) -> Callable[[int], float]:
    """The straightforward training step, written with transformers and without regard to memory."""
    plan, device = training_plan(shape, world), world.device
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = empty_model(shape, shape.teacher, compute).to(device).eval()
    student = empty_model(shape, shape.student, compute).to(device, torch.float32).train()
    for seed, model in enumerate((teacher, student)):
        draw(model, seed)
    if args.recompute:
        recompute_layers(student)
    optimizer = make_optimizer(student, plan.optimizer)
    data, whole = corpus(shape, plan.global_batch_size), plan.global_batch_size

    def step(number: int) -> float:
        batch, total = data.batch(range(number * whole, (number + 1) * whole)), 0.0
        for micro in batch.micro_batches(plan.micro_batch_size):
            ids = micro.input_ids_BL.to(device)
            with torch.no_grad():
                log_q = F.log_softmax(teacher(ids, use_cache=False).logits.float(), dim=-1)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
                logits = student(ids, use_cache=False).logits
            log_p = F.log_softmax(logits.float(), dim=-1)
            loss = F.kl_div(log_p.flatten(0, 1), log_q.flatten(0, 1), reduction="sum", log_target=True)
            loss = loss / (whole * shape.length)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.optimizer.lr * (number + 1) / plan.optimizer.warmup_steps
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


METHODS = {"plain": plain, "minitron": ours}


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(args: argparse.Namespace, world: World) -> dict[str, float]:
    """Seconds of the fastest of `--steps` steps after one to warm up, peak bytes beyond what the imports took, and the
    loss of the last step."""
    before = 0 if world.device.type == "cuda" else _memory(world.device)
    step = METHODS[args.only](args, args.of, world)
    seconds, loss = [], step(0)
    for number in range(1, args.steps + 1):
        start = time.perf_counter()
        loss = step(number)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "bytes": float(_memory(world.device) - before), "loss": loss}


def compare(args: argparse.Namespace) -> None:
    """One device: both loops, each in processes of its own."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(args.repetitions):
        for name in METHODS:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name].append(json.loads(output.splitlines()[-1]))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()
    }
    print(f"{describe(args)}, {torch.get_num_threads()} threads, medians of {args.repetitions} interleaved runs")
    states = 16 * parameters(args.of, args.of.student)
    states += parameters(args.of, args.of.teacher) * (2 if args.device == "cuda" else 4)
    tokens, base = args.of.sequences * args.of.length, medians["plain"]
    print(
        f"{'':12}{'tokens/s':>10}{'/ plain':>9}{'peak MiB':>10}{'/ plain':>9}{'beyond weights, moments':>25}{'loss':>12}"
    )
    for name, one in medians.items():
        print(
            f"{name:12}{tokens / one['seconds']:10.1f}{base['seconds'] / one['seconds']:9.3f}{one['bytes'] / 2**20:10.0f}"
            f"{one['bytes'] / base['bytes']:9.3f}{(one['bytes'] - states) / 2**20:21.0f} MiB{one['loss']:12.6f}"
        )
    if args.device == "cpu":
        print("not measured: CUDA devices, and with them MFU and the 12B and 8B shapes")


def alone(args: argparse.Namespace, world: World) -> None:
    """Our step, on one device or several."""
    args.only = "minitron"
    figures = measure(args, world)
    shape = args.of
    rate = shape.sequences * world.size * shape.length / figures["seconds"]
    work = forward_flops(shape, shape.teacher) + 3 * forward_flops(shape, shape.student)
    peak = peak_flops(world.device, torch.bfloat16 if world.device.type == "cuda" else torch.float32)
    share = utilisation(work, rate, peak, world.size)
    if world.leads:
        print(f"{describe(args)}, weights {args.weights}, moments {args.states}, float8: {args.float8 or None}")
        where = "on this device alone" if world.size == 1 else f"student sharded, teacher {args.teacher}"
        print(f"devices: {world.size}, {where}")
        used = "not measured (no CUDA device whose peak is known)" if share is None else f"{share:.1%}"
        print(f"{rate:.1f} tokens/s, MFU {used}, peak memory of the first device {figures['bytes'] / 2**30:.2f} GiB")


def describe(args: argparse.Namespace) -> str:
    shape: Shape = args.of
    sizes = " to ".join(f"{parameters(shape, side) / 1e6:,.1f}M" for side in (shape.teacher, shape.student))
    step = f"steps of {shape.sequences} x {shape.length} tokens a device, {shape.micro} at a time"
    return f"{args.shape} ({sizes} parameters, vocabulary {shape.vocabulary}), {step}, {args.device}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--teacher", choices=["replicated", "sharded"], default="replicated", help="under torchrun")
    parser.add_argument("--compile", action="store_true", help="our layers through torch.compile")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, in both")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32", help="of our student")
    parser.add_argument("--states", choices=["float32", "bfloat16", "int8"], default="float32", help="our moments")
    parser.add_argument(
        "--float8", nargs="*", choices=["student", "teacher"], default=[], help="our products in float8"
    )
    parser.add_argument("--alone", action="store_true", help="our step without the plain loop, which may not fit")
    parser.add_argument("--only", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.of = SHAPES[args.shape]
    if args.only is None and not args.alone and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        compare(args)
        return
    with join_world(args.device) as world:
        if args.only:
            print(json.dumps(measure(args, world)))
        else:
            alone(args, world)


if __name__ == "__main__":
    main()
