"""Weights, moments and products in fewer bits beside fp32, at equal tokens: the held-out loss of the same training.

    minitron compile examples/quickstart/spec.yaml
    python benchmarks/narrow_training.py examples/quickstart/builds/quickstart
    python benchmarks/narrow_training.py BUILD --tokens 100K --lr 3e-3 5e-7 --seeds 0 1 2
    python benchmarks/narrow_training.py --stories MODEL   # a build of a small model of stories, trained on what it tells
    python benchmarks/narrow_training.py --stories MODEL --hidden 48 --ways float32 "student float8" "both float8"

For each learning rate (constant after the warm-up) and each way of holding weights and moments: the mean of the held-out loss
over the seeds and how far it is from that of fp32, in percent of that; and how far all weights together moved from where
they began, over how far fp32 moved them. `bfloat16, to nearest` is what plain bf16 weights do; it is not an option of the
spec. On a CPU, where bf16 weights are held in fp32: the numbers are those of bf16. Products in float8 are emulated: the
rounding is that of float8, the sums are fp32. float8 takes sizes that are multiples of 16, which 56 is not.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.compiler import compile_spec
from minitron.runtime import narrow_adamw, train
from minitron.runtime.metrics import iter_metrics
from minitron.specs import load_spec
from minitron.specs.builds import MODEL, STUDENT, WORK, metrics_file
from minitron.specs.progress import Silent
from minitron.specs.units import COUNT_UNITS, parse_quantity

NEAREST = "bfloat16, to nearest"
WAYS: dict[str, tuple[str, ...]] = {
    "float32": ("float32", "float32"),
    "moments bfloat16": ("float32", "bfloat16"),
    "moments int8": ("float32", "int8"),
    "weights bfloat16": ("bfloat16", "float32"),
    "weights bfloat16, moments bfloat16": ("bfloat16", "bfloat16"),
    "weights bfloat16, moments int8": ("bfloat16", "int8"),
    NEAREST: ("bfloat16", "float32"),
    "student float8": ("float32", "float32", "float8"),
    "both float8": ("float32", "float32", "float8", "float8"),
    "both float8, bfloat16, int8": ("bfloat16", "int8", "float8", "float8"),
}
"""The dtypes of weights, moments, the student's products and the teacher's; those left out are as in the plan."""


STORIES = """\
apiVersion: minitron/v1
kind: Compression
name: stories
teacher: {{model: {model}}}
student: {{num_hidden_layers: 4, intermediate_size: 128, hidden_size: {hidden}}}
importance: {{data: {{text: [told.txt], document: paragraph, samples: 64, sequence_length: 256}}}}
distill:
  data: {{text: [told.txt], document: paragraph}}
  tokens: 200K
  sequence_length: 256
  global_batch_size: 4
  optimizer: {{lr: 3e-3, warmup_steps: 10}}
evaluate: {{held_out: {{text: [valid.txt], document: paragraph}}, max_tokens: 20K}}
"""


def stories_build(model: Path, folder: Path, hidden: int) -> Path:
    """Compiles a student of the `model`, which continues its BOS with stories; the data are 600 stories that it tells, and
    60 others for the held-out loss."""
    build = folder / "builds" / f"stories-{hidden}"
    if (build / STUDENT).is_dir():
        return build
    folder.mkdir(parents=True, exist_ok=True)
    teacher = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    for name, rounds in (("told.txt", 10), ("valid.txt", 1)):
        texts: list[str] = []
        for _ in range(rounds):
            begin = torch.full((60, 1), tokenizer.bos_token_id)
            told = teacher.generate(begin, do_sample=True, max_new_tokens=250, pad_token_id=tokenizer.eos_token_id)
            texts += tokenizer.batch_decode(told, skip_special_tokens=True)
        (folder / name).write_text("\n\n".join(text.replace("\n\n", "\n") for text in texts), encoding="utf-8")
    spec = folder / "stories.yaml"
    spec.write_text(STORIES.format(model=model.resolve(), hidden=hidden), encoding="utf-8")
    compile_spec(load_spec(spec), build, device="cpu", progress=Silent())
    return build


def trained(build: Path, way: str, changes: dict[str, Any]) -> tuple[float, float]:
    """Held-out loss after the training, and the distance of the weights from where they began."""
    weights, states, *computes = WAYS[way]
    with tempfile.TemporaryDirectory(dir=build.parent) as folder:
        copy = Path(folder) / build.name
        shutil.copytree(build, copy, ignore=shutil.ignore_patterns(WORK, MODEL))
        document = yaml.safe_load((copy / "training.yaml").read_text())
        document |= {key: value for key, value in changes.items() if key != "optimizer"} | {"weights": weights}
        document["optimizer"] |= changes["optimizer"] | {"states": states}
        for place, key, compute in zip(("compute_dtype", "teacher"), ("cpu", "compute"), computes, strict=False):
            document[place][key] = compute
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
    parser.add_argument("build", type=Path, nargs="?")
    parser.add_argument("--stories", type=Path, metavar="MODEL", help="make a build of this model in --work")
    parser.add_argument("--hidden", type=int, default=56, help="hidden size of the student of --stories")
    parser.add_argument("--work", type=Path, default=Path("/tmp/narrow_training"))
    parser.add_argument("--tokens", type=lambda text: parse_quantity(text, COUNT_UNITS), default=100_000)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3, 1e-4, 5e-7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stories is not None:
        args.build = stories_build(args.stories, args.work, args.hidden)
    if args.build is None:
        parser.error("name a build, or --stories MODEL")
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
