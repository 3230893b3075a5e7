"""Weights and moments in fewer bits beside fp32, at equal tokens: the held-out loss of the same training.

    minitron compile examples/quickstart/spec.yaml
    python benchmarks/narrow_training.py examples/quickstart/builds/quickstart
    python benchmarks/narrow_training.py BUILD --tokens 100K --lr 3e-3 5e-7 --seeds 0 1 2

For each learning rate (constant after the warm-up) and each way of holding weights and moments: the mean of the held-out loss
over the seeds and how far it is from that of fp32, in percent of that; and how far all weights together moved from where
they began, over how far fp32 moved them. `bfloat16, to nearest` is what plain bf16 weights do; it is no option of the
spec. On a CPU, where bf16 weights are held in fp32: the numbers are those of bf16.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from minitron.runtime import narrow_adamw, train
from minitron.runtime.metrics import iter_metrics
from minitron.specs.builds import MODEL, STUDENT, WORK, metrics_file
from minitron.specs.progress import Silent
from minitron.specs.units import COUNT_UNITS, parse_quantity

NEAREST = "bfloat16, to nearest"
WAYS: dict[str, tuple[str, str]] = {
    "float32": ("float32", "float32"),
    "moments bfloat16": ("float32", "bfloat16"),
    "moments int8": ("float32", "int8"),
    "weights bfloat16": ("bfloat16", "float32"),
    "weights bfloat16, moments bfloat16": ("bfloat16", "bfloat16"),
    "weights bfloat16, moments int8": ("bfloat16", "int8"),
    NEAREST: ("bfloat16", "float32"),
}


def trained(build: Path, way: str, changes: dict[str, Any]) -> tuple[float, float]:
    """Held-out loss after the training, and the distance of the weights from where they began."""
    weights, states = WAYS[way]
    with tempfile.TemporaryDirectory(dir=build.parent) as folder:
        copy = Path(folder) / build.name
        shutil.copytree(build, copy, ignore=shutil.ignore_patterns(WORK, MODEL))
        document = yaml.safe_load((copy / "training.yaml").read_text())
        document |= {key: value for key, value in changes.items() if key != "optimizer"} | {"weights": weights}
        document["optimizer"] |= changes["optimizer"] | {"states": states}
        document["held_out"]["every_tokens"] = None
        document["student"]["dtype"] = "float32"  # the trained weights as they are, not rounded once more
        for model in ("teacher",):
            place = build / document[model]["model"]
            document[model]["model"] = str(place.resolve()) if place.exists() else document[model]["model"]
        (copy / "training.yaml").write_text(yaml.safe_dump(document))
        stochastic = narrow_adamw.round_stochastically
        if way == NEAREST:
            narrow_adamw.round_stochastically = lambda exact, generator: exact.bfloat16()
        try:
            train(copy, device="cpu", progress=Silent(), unverified=True)
        finally:
            narrow_adamw.round_stochastically = stochastic
        losses = [line["held_out_loss"] for line in iter_metrics(metrics_file(copy)) if "held_out_loss" in line]
        return losses[-1], _moved(build / STUDENT, copy / MODEL)


def _moved(before: Path, after: Path) -> float:
    """The norm of the difference of all weights."""
    old, new = (
        {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
        for folder in (before, after)
    )
    return float(sum((new[name].double() - old[name].double()).square().sum() for name in new) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--tokens", type=lambda text: parse_quantity(text, COUNT_UNITS), default=100_000)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3, 1e-4, 5e-7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.build.name}: {args.tokens} tokens, seeds {args.seeds}")
    print(f"{'lr':>8}  {'':36}{'held-out loss':>14}{'% of fp32':>11}{'moved / fp32':>14}")
    for lr in args.lr:
        base: tuple[float, float] | None = None
        for way in args.ways:
            found = [
                trained(args.build, way, {"tokens": args.tokens, "seed": seed, "optimizer": {"lr": lr, "min_lr": lr}})
                for seed in args.seeds
            ]
            loss, moved = (statistics.mean(column) for column in zip(*found, strict=True))
            base = base or (loss, moved)
            print(
                f"{lr:8.0e}  {way:36}{loss:14.4f}{100 * (loss / base[0] - 1):+11.3f}{moved / base[1]:14.3f}", flush=True
            )


if __name__ == "__main__":
    main()
