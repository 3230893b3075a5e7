"""The distillation loss beside the naive one (and Liger's, where it is installed): peak memory, time, gradient
error.

    python benchmarks/kd_loss.py                      # vocabulary 131072, 1,024 tokens, hidden 256 / 384, fp32, CPU
    python benchmarks/kd_loss.py --tokens 2048        # the memory hardly grows
    python benchmarks/kd_loss.py --device cuda --tokens 8192 --hidden 4096 --teacher-hidden 5120 --dtype bfloat16

Every measurement runs in a process of its own, the methods interleaved, and the medians are compared. Memory is
what forward and backward add at their peak to the inputs (resident set on a CPU, allocator on CUDA), the gradients
included. Time is that of the last of --passes forwards and backwards. The gradient error is the norm of the
difference to fp64 autograd over the norm, on 32 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.runtime.loss import DistillationLoss, Head, distillation_loss

ERROR_TOKENS = 32

Inputs = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # student hidden [T, D] and head [V, D], teacher hidden [T, E] and head [V, E]
Method = Callable[[Inputs], Tensor]


def naive(inputs: Inputs) -> Tensor:
    """What one writes without thinking about memory: all logits, in the dtype of the inputs."""
    student_TD, student_VD, teacher_TE, teacher_VE = inputs
    with torch.no_grad():
        log_q_TV = F.log_softmax(teacher_TE @ teacher_VE.T, dim=-1)
    log_p_TV = F.log_softmax(student_TD @ student_VD.T, dim=-1)
    return F.kl_div(log_p_TV, log_q_TV, reduction="batchmean", log_target=True)


def ours(inputs: Inputs) -> Tensor:
    student_TD, student_VD, teacher_TE, teacher_VE = inputs
    return distillation_loss(
        DistillationLoss(),
        student_TD,
        Head(student_VD),
        teacher_TE,
        Head(teacher_VE),
        None,
        normaliser=student_TD.shape[0],
        compute_dtype=student_TD.dtype,
    ).total


def liger(compiled: bool) -> Method:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)

    def method(inputs: Inputs) -> Tensor:
        student_TD, student_VD, teacher_TE, teacher_VE = inputs
        labels_T = torch.zeros(student_TD.shape[0], dtype=torch.long, device=student_TD.device)
        result: Tensor = loss(student_TD, student_VD, teacher_TE, teacher_VE, labels_T)
        return result

    return method


METHODS: dict[str, Callable[[], Method]] = {
    "naive": lambda: naive,
    "minitron": lambda: ours,
    "liger": lambda: liger(compiled=True),
    "liger, not compiled": lambda: liger(compiled=False),
}


def make_inputs(args: argparse.Namespace, tokens: int, dtype: torch.dtype) -> Inputs:
    """Hidden states and heads whose distributions are as sharp as a language model's, student and teacher a KL of
    about 1 apart."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared = min(args.hidden, args.teacher_hidden)
    teacher_TE, teacher_VE = (
        normal(tokens, args.teacher_hidden),
        normal(args.vocabulary, args.teacher_hidden).mul_(0.15),
    )
    student_TD, student_VD = normal(tokens, args.hidden), normal(args.vocabulary, args.hidden).mul_(0.15)
    student_TD[:, :shared], student_VD[:, :shared] = teacher_TE[:, :shared], teacher_VE[:, :shared]
    student_TD, student_VD, teacher_TE, teacher_VE = (
        tensor.to(args.device, dtype) for tensor in (student_TD, student_VD, teacher_TE, teacher_VE)
    )
    return student_TD.requires_grad_(), student_VD.requires_grad_(), teacher_TE, teacher_VE


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One process: the peak of the last pass over the memory before it, and its time."""
    dtype = getattr(torch, args.dtype)
    method = METHODS[args.only]()
    method(make_inputs(args, 8, dtype)).backward()  # libraries and thread pools
    inputs = make_inputs(args, args.tokens, dtype)
    for _ in range(args.passes):  # the first passes compile
        inputs[0].grad = inputs[1].grad = None
        _reset_peak(args.device)
        before = _peak(args.device)
        start = time.perf_counter()
        method(inputs).backward()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return {"bytes": float(_peak(args.device) - before), "seconds": seconds}


def gradient_error(args: argparse.Namespace, name: str) -> float:
    """Relative error of the gradients of student hidden states and head, the larger of the two."""
    dtype = getattr(torch, args.dtype)
    inputs = make_inputs(args, ERROR_TOKENS, dtype)
    METHODS[name]()(inputs).backward()
    exact: Inputs = tuple(tensor.detach().double() for tensor in inputs)  # type: ignore[assignment]
    exact[0].requires_grad_(), exact[1].requires_grad_()
    naive(exact).backward()
    return max(_relative(inputs[i].grad, exact[i].grad) for i in (0, 1))


def _relative(got: Tensor | None, want: Tensor | None) -> float:
    assert got is not None and want is not None
    return float((got.double() - want).norm() / want.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=384)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--passes", type=int, default=2, help="forwards and backwards in each process; the last one counts"
    )
    parser.add_argument("--only", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args)))
        return

    names = ["naive", "minitron"]
    try:
        liger(compiled=False)
        names += ["liger", "liger, not compiled"]
    except ImportError:
        print("liger-kernel is not installed: compared with the naive loss alone")
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.repetitions):
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            figures[name].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))

    print(
        f"vocabulary {args.vocabulary}, {args.tokens} tokens, hidden {args.hidden} / {args.teacher_hidden}, "
        f"{args.dtype}, {args.device}, {torch.get_num_threads()} threads, medians of {args.repetitions}"
    )
    base = {key: statistics.median(f[key] for f in figures["naive"]) for key in ("bytes", "seconds")}
    print(f"{'':22}{'peak MiB':>10}{'/ naive':>9}{'seconds':>10}{'/ naive':>9}{'gradient error':>17}")
    for name in names:
        memory, seconds = (statistics.median(f[key] for f in figures[name]) for key in ("bytes", "seconds"))
        print(
            f"{name:22}{memory / 2**20:10.0f}{memory / base['bytes']:9.3f}{seconds:10.2f}"
            f"{seconds / base['seconds']:9.3f}{gradient_error(args, name):17.1e}"
        )


if __name__ == "__main__":
    main()
