"""Are the plan's estimates true? Memory and FLOPs of real small runs beside what the plan says, and published runs.

    python benchmarks/estimates.py [--device cuda] [--only NAME]

A teacher with random weights is compiled and its student trained by the commands' own functions. On CUDA the peak is the
allocator's; on a CPU the storages that operations make are counted while they live (resident memory is too noisy), and
tensors that a file was mapped for, which no operation makes.
FLOPs are those of torch.utils.flop_counter. Attention is counted there as the whole square of positions, in the plan as
the half that a causal mask leaves, so it is counted whole on both sides here.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from minitron.cli.libraries import quiet_libraries
from minitron.compiler import Plan, compile_spec, read_hardware
from minitron.compiler import score as score_module
from minitron.compiler.build_documents import training_text
from minitron.compiler.estimate.activations import Living
from minitron.compiler.estimate.estimate import Estimate
from minitron.compiler.estimate.hardware import ASSUMED_MFU
from minitron.runtime import loop as loop_module
from minitron.runtime import train
from minitron.specs import load_spec
from minitron.specs.builds import TRAINING
from minitron.specs.progress import Silent

aten = torch.ops.aten
LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 32}
# Name -> teacher, student, sequence length, and variants of training. Each shape makes other terms matter.
SHAPES: dict[str, dict[str, Any]] = {
    "deep": {
        "teacher": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 1024},
        "student": {"hidden_size": 192, "intermediate_size": 512},
        "length": 256,
    },
    "large vocabulary": {
        "teacher": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 16384},
        "student": {"hidden_size": 192},
        "length": 128,
    },
    "long": {
        "teacher": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 1024},
        "student": {"intermediate_size": 384, "num_hidden_layers": 2},
        "length": 1024,
    },
}
VARIANTS: dict[str, list[str]] = {
    "plain": ["distill.micro_batch_size=4"],
    "accumulated": ["distill.micro_batch_size=2"],
    "recomputed": ["distill.micro_batch_size=4", "distill.gradient_checkpointing=true"],
}
STEPS, GLOBAL_BATCH = 3, 4


@dataclass(frozen=True)
class Measured:
    """The peak memory in bytes and the FLOPs of one piece of work."""

    peak: int
    flops: int


@dataclass(frozen=True)
class Row:
    name: str
    what: str
    estimated: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.estimated / self.measured


@contextmanager
def measuring(device: str, owner: Any, name: str, *, inside: bool = False) -> Iterator[list[Measured]]:
    """Measures every call of `owner.name` while this is open. On a CPU what was made since then counts, or, `inside`, what
    the call itself makes."""
    found: list[Measured] = []
    counters = {
        aten.addmm_: _added_product,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    original: Callable[..., Any] = getattr(owner, name)
    cuda = device.startswith("cuda")
    living, before = Living(), real_tensors()

    def measured(*arguments: Any, **keywords: Any) -> Any:
        if not inside:
            living.count(tensor for pointer, tensor in real_tensors().items() if pointer not in before)
        living.peak = living.now
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        # Counted in other steps than memory is: the counter keeps values alive.
        counts = inside or len(found) % 2 == 0
        counter = FlopCounterMode(display=False, custom_mapping=counters)
        with counter if counts else nullcontext(), living if inside else nullcontext():
            result = original(*arguments, **keywords)
        peak = torch.cuda.max_memory_allocated() if cuda else living.peak
        found.append(Measured(peak, counter.get_total_flops() if counts else 0))
        return result

    with mock.patch.object(owner, name, measured), nullcontext() if inside else living:
        yield found


def real_tensors() -> dict[int, torch.Tensor]:
    """Maps the address of its bytes to each CPU tensor that is in memory now; tensors without bytes are left out."""
    found = (one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))
    return {one.untyped_storage().data_ptr(): one for one in found if one.device.type == "cpu"}


def _added_product(_: Any, left: Any, right: Any, *more: Any, **named: Any) -> int:
    """A product that is added to what is there, in place: torch's counter passes it over. Sizes: [M, K], [K, N]."""
    return int(2 * left[0] * left[1] * right[1])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """torch's counter knows the operators of CUDA only. Sizes: [B, H, S, E], [B, G, T, E], [B, G, T, V]."""
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[2] * (width + value[3]))


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *more: Any, **named: Any) -> int:
    """Five products for the forward's two, as torch counts that of CUDA."""
    return _attention(query, key, value) * 5 // 2


def make_spec(folder: Path, shape: dict[str, Any]) -> Path:
    """A teacher with random weights, a text and a spec in `folder`."""
    from tests.models import save_teacher, text

    length = shape["length"]
    config = AutoConfig.for_model(
        **LLAMA, **shape["teacher"], max_position_embeddings=length, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    save_teacher(folder / "teacher", config)
    tokens = STEPS * GLOBAL_BATCH * length
    (folder / "text.txt").write_text(text(2 * tokens // 12), encoding="utf-8")
    data = {"text": ["text.txt"]}
    document = {
        "name": "small",
        "teacher": {"model": "teacher", "dtype": "float32"},
        "student": shape["student"],
        "importance": {"data": {**data, "samples": 4, "sequence_length": length}},
        "distill": {
            "data": data,
            "tokens": tokens,
            "sequence_length": length,
            "global_batch_size": GLOBAL_BATCH,
            "checkpoint": {"every_tokens": tokens},
        },
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def compare(name: str, shape: dict[str, Any], folder: Path, device: str, variants: Sequence[str]) -> list[Row]:
    """Compiles and trains one shape, and sets estimate beside measurement."""
    spec, build = make_spec(folder, shape), folder / "build"
    hardware = read_hardware("cuda" if device.startswith("cuda") else "cpu", None, None)
    with measuring(device, score_module, "calibrate", inside=True) as calibrations:
        plan = compile_spec(load_spec(spec), build, device=device, progress=Silent())
    (phase,) = (one for one in Estimate(plan).phases(hardware) if one.name == "calibrate")
    rows = [
        Row(name, "calibrate: peak bytes", phase.memory.peak - read_ahead(plan, device), calibrations[0].peak),
        Row(name, "calibrate: FLOPs", phase.flops + hidden_from_calibration(plan), calibrations[0].flops),
    ]
    for variant in variants:
        varied = replace(plan, loaded=load_spec(spec, VARIANTS[variant]))
        shutil.rmtree(build / "train", ignore_errors=True)
        shutil.rmtree(build / "model", ignore_errors=True)
        (build / TRAINING).write_text(training_text(varied, "estimates"), encoding="utf-8")
        with measuring(device, loop_module, "train_step") as steps:
            train(build, device=device, progress=Silent())
        distill = next(one for one in Estimate(varied).phases(hardware) if one.name == "distill")
        flops, peak = steps[-1].flops, steps[-2].peak  # the optimizer has its moments by then
        rows += [
            Row(name, f"{variant}: peak bytes", distill.memory.peak, peak),
            Row(name, f"{variant}: FLOPs of a step", distill.flops // STEPS + spared(varied), flops),
        ]
    return rows


def read_ahead(plan: Plan, device: str) -> int:
    """Bytes of the layer that is read while another one computes: on a CPU the counter sees no tensors of another thread."""
    data = plan.loaded.spec.importance.data
    assert data is not None
    sizes = Estimate(plan).calibration_sizes(data.samples, data.sequence_length, torch.float32)
    return 0 if device.startswith("cuda") else sizes.layer_stored


def hidden_from_calibration(plan: Plan) -> int:
    """FLOPs of a calibration's attention to later positions, which a causal mask spares and the counter counts."""
    data = plan.loaded.spec.importance.data
    assert data is not None
    length = data.sequence_length
    return data.samples * length * (length - length // 2) * Estimate(plan).teacher_costs.attention_flops_per_pair


def spared(plan: Plan) -> int:
    """FLOPs of a step that a causal mask spares and the counter counts: attention to later positions, and the fifth
    product of its backward."""
    distill = plan.loaded.spec.distill
    assert distill is not None
    length, half = distill.sequence_length, distill.sequence_length // 2
    forwards = 1 + (distill.gradient_checkpointing is True)
    student = int((forwards + 2.5) * length) - (forwards + 2) * half
    pairs = (length - half) * Estimate(plan).teacher_costs.attention_flops_per_pair
    return GLOBAL_BATCH * length * (pairs + student * Estimate(plan).student_costs.attention_flops_per_pair)


@dataclass(frozen=True)
class Published:
    """A distillation that was reported with its hours. Sizes in parameters; `pairs`: attention layers x heads x width."""

    name: str
    teacher: float
    student: float
    tokens: float
    hours: float
    flops: float = 989e12


PUBLISHED = (
    Published("9B hybrid -> 7B, 6.3B tokens in about 600 H100-hours", 8.9e9, 7.0e9, 6.3e9, 600),
    Published("Qwen3-8B -> 6B, 50B tokens in about 3,000 GPU-hours (taken as H100)", 8.19e9, 6.0e9, 50e9, 3000),
)


def implied_mfu(run: Published) -> float:
    """2 N of the teacher and 6 N of the student a token; attention is left out, which makes it no more hopeful."""
    return run.tokens * (2 * run.teacher + 6 * run.student) / (run.hours * 3600 * run.flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=list(SHAPES))
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    rows: list[Row] = []
    for name, shape in SHAPES.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                rows += compare(name, shape, Path(folder), args.device, list(VARIANTS))
    print(f"{'shape':18}{'figure':32}{'estimated':>16}{'measured':>16}{'ratio':>8}")
    for row in rows:
        print(f"{row.name:18}{row.what:32}{row.estimated:16,.0f}{row.measured:16,.0f}{row.ratio:8.3f}")
    print(f"\nModel FLOPs utilisation that published runs imply; the plan assumes {ASSUMED_MFU}")
    for run in PUBLISHED:
        print(f"  {implied_mfu(run):.3f}  {run.name}")


if __name__ == "__main__":
    main()
