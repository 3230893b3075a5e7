"""The distillation loss beside the naive one (and Liger's, where it is installed): peak memory, time, gradient
error.

    python benchmarks/kd_loss.py                      # vocabulary 131072, 1,024 tokens, hidden 256 / 384, fp32, CPU
    python benchmarks/kd_loss.py --repetitions 0 --dtype bfloat16 --kl 0.02 0.001      # gradient errors alone
    python benchmarks/kd_loss.py --device cuda --tokens 8192 --hidden 4096 --teacher-hidden 5120 --dtype bfloat16

Every measurement runs in a process of its own, the methods interleaved, and the medians are compared; ours is also
measured with twice the tokens. Memory is what forward and backward add at their peak to the inputs (resident set on a
CPU, allocator on CUDA), the gradients included; beside it, what is left without the head's gradient: ours is a sum in
fp32, as a training keeps it, that of the others has the dtype of the inputs. Time is that of the last of --passes
forwards and backwards on a CPU; on CUDA the median of 20 after 3 to warm up, by events. The gradient error is the norm of the
difference to fp64 autograd over the norm, on 32 tokens whose student and teacher are a KL of --kl apart; the fp64 inputs
are those of --dtype, so that what is counted is the loss's own error.
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
WARM_UP, TIMED = 3, 20  # on CUDA

Inputs = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # student hidden [T, D] and head [V, D], teacher hidden [T, E] and head [V, E]
Method = Callable[[Inputs], tuple[Tensor, Tensor | None]]
"""The loss, and the sum that the head's gradient was added to where that is not its `.grad`."""


def naive(inputs: Inputs) -> tuple[Tensor, None]:
    """The straightforward loss, which holds all logits, in the dtype of the inputs."""
    student_TD, student_VD, teacher_TE, teacher_VE = inputs
    with torch.no_grad():
        log_q_TV = F.log_softmax(teacher_TE @ teacher_VE.T, dim=-1)
    log_p_TV = F.log_softmax(student_TD @ student_VD.T, dim=-1)
    return F.kl_div(log_p_TV, log_q_TV, reduction="batchmean", log_target=True), None


def ours(inputs: Inputs) -> tuple[Tensor, Tensor]:
    student_TD, student_VD, teacher_TE, teacher_VE = inputs
    gradient_VD = torch.zeros(student_VD.shape, device=student_VD.device)
    total = distillation_loss(
        DistillationLoss(),
        student_TD,
        Head(student_VD),
        teacher_TE,
        Head(teacher_VE),
        None,
        normaliser=student_TD.shape[0],
        compute_dtype=student_TD.dtype,
        head_gradient_VD=gradient_VD,
    ).total
    return total, gradient_VD


def liger(compiled: bool) -> Method:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)

    def method(inputs: Inputs) -> tuple[Tensor, None]:
        student_TD, student_VD, teacher_TE, teacher_VE = inputs
        labels_T = torch.zeros(student_TD.shape[0], dtype=torch.long, device=student_TD.device)
        return loss(student_TD, student_VD, teacher_TE, teacher_VE, labels_T), None

    return method


TWICE = "minitron, 2x tokens"

METHODS: dict[str, Callable[[], Method]] = {
    "naive": lambda: naive,
    "minitron": lambda: ours,
    TWICE: lambda: ours,
    "liger": lambda: liger(compiled=True),
    "liger, not compiled": lambda: liger(compiled=False),
}


def make_inputs(args: argparse.Namespace, tokens: int, dtype: torch.dtype, apart: float = 1.0) -> Inputs:
    """Hidden states and heads whose distributions are as sharp as a language model's. What only one of the models has
    sets them apart, a KL of about 1; `apart` scales it."""
    generator = torch.Generator(args.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=args.device)

    shared = min(args.hidden, args.teacher_hidden)
    teacher_TE, teacher_VE = (
        normal(tokens, args.teacher_hidden),
        normal(args.vocabulary, args.teacher_hidden).mul_(0.15),
    )
    student_TD, student_VD = normal(tokens, args.hidden), normal(args.vocabulary, args.hidden).mul_(0.15)
    student_TD[:, :shared], student_VD[:, :shared] = teacher_TE[:, :shared], teacher_VE[:, :shared]
    for own in (student_TD, teacher_TE):
        own[:, shared:].mul_(apart)
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
    """One process: the peak of the last pass over the memory before it, what of that is not the head's gradient, and the
    time of a pass."""
    dtype = getattr(torch, args.dtype)
    method = METHODS[args.only]()
    method(make_inputs(args, 8, dtype))[0].backward()  # libraries and thread pools
    inputs = make_inputs(args, 2 * args.tokens if args.only == TWICE else args.tokens, dtype)
    seconds = []
    for _ in range(WARM_UP + TIMED if args.device == "cuda" else args.passes):  # the first passes compile
        inputs[0].grad = inputs[1].grad = sums = None
        _reset_peak(args.device)
        before = _peak(args.device)
        took = _timer(args.device)
        loss, sums = method(inputs)
        loss.backward()
        seconds.append(took())
        del loss
    peak = _peak(args.device) - before
    gradient = sums if sums is not None else inputs[1].grad
    assert gradient is not None
    time_of = statistics.median(seconds[WARM_UP:]) if args.device == "cuda" else seconds[-1]
    return {"bytes": float(peak), "beyond": float(peak - gradient.nbytes), "seconds": time_of}


def _timer(device: str) -> Callable[[], float]:
    """A function that says how many seconds have passed since this call, of the device's own time."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()

        def passed() -> float:
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3

        return passed
    began = time.perf_counter()
    return lambda: time.perf_counter() - began


def divergence(inputs: Inputs) -> float:
    """Nats a token, in fp64."""
    with torch.no_grad():
        return float(naive(tuple(tensor.double() for tensor in inputs))[0])  # type: ignore[arg-type]


def inputs_apart(args: argparse.Namespace, dtype: torch.dtype, kl: float) -> Inputs:
    """A few tokens whose student and teacher are `kl` apart: it grows with the square of what sets them apart, nearly."""
    apart = 1.0
    for _ in range(3):
        apart *= (kl / divergence(make_inputs(args, ERROR_TOKENS, dtype, apart))) ** 0.5
    return make_inputs(args, ERROR_TOKENS, dtype, apart)


def gradient_error(name: str, inputs: Inputs) -> float:
    """Relative error of the gradients of student hidden states and head, the larger of the two."""
    inputs[0].grad = inputs[1].grad = None
    loss, sums = METHODS[name]()(inputs)
    loss.backward()
    exact: Inputs = tuple(tensor.detach().double() for tensor in inputs)  # type: ignore[assignment]
    exact[0].requires_grad_(), exact[1].requires_grad_()
    naive(exact)[0].backward()
    head = inputs[1].grad if sums is None else sums
    return max(_relative(inputs[0].grad, exact[0].grad), _relative(head, exact[1].grad))


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
    parser.add_argument("--repetitions", type=int, default=5, help="0: gradient errors alone")
    parser.add_argument("--kl", type=float, nargs="+", default=[1.0], help="nats between student and teacher")
    parser.add_argument(
        "--passes", type=int, default=2, help="forwards and backwards in each process; the last one counts"
    )
    parser.add_argument("--only", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args)))
        return

    names = ["naive", "minitron", TWICE]
    try:
        liger(compiled=False)
        names += ["liger", "liger, not compiled"]
    except ImportError:
        print("liger-kernel is not installed: compared with the naive loss alone")
    about = f"vocabulary {args.vocabulary}, hidden {args.hidden} / {args.teacher_hidden}, {args.dtype}, {args.device}"
    print(f"{about}, {torch.get_num_threads()} threads")
    if args.repetitions:
        compare(args, names)
    errors(args, [name for name in names if name != TWICE])


def compare(args: argparse.Namespace, names: list[str]) -> None:
    """Memory and time of each, in processes of their own, one after the other in each round."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.repetitions):
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            figures[name].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {
        name: {key: statistics.median(one[key] for one in of) for key in ("bytes", "beyond", "seconds")}
        for name, of in figures.items()
    }
    bases = [name for name in ("naive", "minitron", "liger") if name in names]
    print(f"{args.tokens} tokens, medians of {args.repetitions} interleaved runs")
    print(f"{'':22}{'peak MiB':>10}{'beyond head':>13}" + "".join(f"{f'/ {base}':>11}" for base in bases), end="")
    print(f"{'ms':>11}" + "".join(f"{f'/ {base}':>11}" for base in bases))
    for name, one in medians.items():
        memory = "".join(f"{one['bytes'] / max(1.0, medians[base]['bytes']):11.3f}" for base in bases)
        seconds = "".join(f"{one['seconds'] / medians[base]['seconds']:11.3f}" for base in bases)
        print(
            f"{name:22}{one['bytes'] / 2**20:10.0f}{one['beyond'] / 2**20:13.0f}{memory}{one['seconds'] * 1e3:11.1f}{seconds}"
        )


def errors(args: argparse.Namespace, names: list[str]) -> None:
    """Gradient errors at each KL, on the same inputs for all methods."""
    print(f"gradient error, {ERROR_TOKENS} tokens:" + "".join(f"{name:>22}" for name in names))
    for kl in args.kl:
        inputs = inputs_apart(args, getattr(torch, args.dtype), kl)
        found = "".join(f"{gradient_error(name, inputs):22.1e}" for name in names)
        print(f"{f'KL {divergence(inputs):.4f}':>26}{found}", flush=True)


if __name__ == "__main__":
    main()
