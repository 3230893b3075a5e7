"""What the basis, the selection and recovery are worth: one teacher, one shape, equal tokens, each arm at its best rate.

    python benchmarks/recovery.py TEACHER                                # hidden, FFN, heads and all at 75% and 50%, zero-shot
    python benchmarks/recovery.py TEACHER --tokens 200K --case all-75    # and distilled, each arm at three learning rates
    python benchmarks/recovery.py TEACHER --tokens 200K --seeds 3 --arms channels,principal

TEACHER is a Hugging Face folder; ../shared/data/stories260K is the one that docs/method.md quotes. The text is written by the
teacher itself, sampled from its own distribution, so the excess of a student's held-out loss over the teacher's is the
divergence between the two, in nats a token, and no arm gains by knowing the text. Calibration, training and held-out text
are different documents.

An arm is a set of values in the spec; everything goes through the compiler and the runtime as `minitron run` does. Finished
runs in `--work` are kept. Published methods that stand beside ours:
    channels          Minitron (arXiv 2407.14679): channels, neurons and heads by their activations; norms as they are
    random init       the student's shape with fresh weights, distilled
    cross-entropy     the pruned student trained on the text alone, without the teacher
    rotated, no KD    the principal basis (SliceGPT, arXiv 2401.15024), trained on the text alone
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from minitron.compiler import compile_spec
from minitron.runtime import evaluate, train
from minitron.specs import load_spec
from minitron.specs.atomic import atomic_folder, write_text
from minitron.specs.progress import Silent

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.quality import edit_training, fresh_weights, loss_of, take_tokens

DOCUMENT_TOKENS = 256
SAMPLED_AT_ONCE = 250
CASES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size",),
    "ffn": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "all": ("hidden_size", "intermediate_size", "num_attention_heads"),
}


@dataclass(frozen=True)
class Arm:
    """Values of the spec, and what is done to the pruned student. `goes` with cases that narrow one of these."""

    values: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False
    cross_entropy: bool = False
    trained_only: bool = False


PRINCIPAL = {"importance.hidden_basis": "principal"}
REFIT = {"recovery.refit": "least_squares"}
ARMS: dict[str, Arm] = {
    "channels": Arm(),
    "channels, untied": Arm({"importance.untie": True}),
    "principal": Arm(PRINCIPAL),
    "principal, untied": Arm({**PRINCIPAL, "importance.untie": True}),
    "channels + refit": Arm(REFIT),
    "greedy + refit": Arm({**REFIT, "importance.selection": "greedy"}),
    "all, untied": Arm({**PRINCIPAL, **REFIT, "importance.selection": "greedy", "importance.untie": True}),
    "principal + refit": Arm({**PRINCIPAL, **REFIT}),
    "principal, untied + refit": Arm({**PRINCIPAL, **REFIT, "importance.untie": True}),
    "random init": Arm(fresh=True, trained_only=True),
    "cross-entropy": Arm(cross_entropy=True, trained_only=True),
    "rotated, no KD": Arm(PRINCIPAL, cross_entropy=True, trained_only=True),
}


def write_texts(teacher: Path, work: Path, documents: int) -> None:
    """documents.jsonl, calibration.jsonl and held_out.jsonl: sampled from the teacher, one document a line."""
    if (work / "held_out.jsonl").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    start = model.config.bos_token_id
    lines: list[str] = []
    while len(lines) < documents:
        torch.manual_seed(len(lines))
        ids = torch.full((SAMPLED_AT_ONCE, 1), int(start))
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=DOCUMENT_TOKENS - 1,
            pad_token_id=model.config.eos_token_id,
        )  # fmt: skip
        lines += [json.dumps({"text": text}) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        print(f"{len(lines)} documents", file=sys.stderr, flush=True)
    parts = {"calibration": lines[:300], "documents": lines[600:], "held_out": lines[300:600]}
    for name in ("calibration", "documents", "held_out"):
        write_text(work / f"{name}.jsonl", "\n".join(parts[name]) + "\n")


def spec_file(teacher: Path, work: Path, case: str, tokens: str | None, batch: int) -> Path:
    """The spec of one shape."""
    axes, _, percent = case.partition("-")
    document: dict[str, Any] = {
        "name": case,
        "teacher": {"model": str(teacher.resolve())},
        "student": dict.fromkeys(CASES[axes], f"{percent}%"),
        "importance": {"data": {"jsonl": ["calibration.jsonl"], "samples": 128, "sequence_length": 256}},
        "evaluate": {"held_out": {"jsonl": ["held_out.jsonl"]}, "max_tokens": 50000},
        "distill": {
            "data": {"jsonl": ["documents.jsonl"]},
            "tokens": tokens or "10K",
            "sequence_length": 256,
            "global_batch_size": batch,
            "optimizer": {"lr": 1e-3, "min_lr": 1e-5, "warmup_steps": 20},
        },
    }
    path = work / f"{case}-{tokens or 0}.yaml"
    write_text(path, yaml.safe_dump(document, sort_keys=False))
    return path


def compiled(spec: Path, arm: Arm, build: Path, seed: int, lr: float | None) -> None:
    """The pruned student of an arm, ready to be trained."""
    if (build / "training.yaml").exists():
        return
    values = [f"{path}={json.dumps(value)}" for path, value in arm.values.items()]
    values += [f"distill.optimizer.lr={lr}"] if lr else []
    with atomic_folder(build) as folder:
        compile_spec(load_spec(spec, values), folder, device="cpu", progress=Silent())
        if arm.fresh:
            fresh_weights(folder / "student", seed)
        edit_training(folder, seed, arm.cross_entropy)


def run(spec: Path, name: str, seed: int, lr: float | None) -> dict[str, Any]:
    """One arm, at one learning rate or only pruned."""
    build = spec.parent / f"{spec.stem}-{name.replace(' ', '_').replace(',', '')}-{lr or 'zero'}-{seed}"
    results = build / "results.json"
    if results.exists():
        return dict(json.loads(results.read_text(encoding="utf-8")))
    start = time.monotonic()
    compiled(spec, ARMS[name], build, seed, lr)
    if lr is not None:
        take_tokens(build)
        train(build, device="cpu", progress=Silent())
    measured: dict[str, Any] = evaluate(build, device="cpu", progress=Silent())
    final = loss_of(measured, "distilled" if lr else "pruned") - loss_of(measured, "teacher")
    print(f"{build.name}: {final:.4f} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
    return measured


def excess(results: dict[str, Any], model: str) -> float:
    """Held-out loss above the teacher's."""
    return loss_of(results, model) - loss_of(results, "teacher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument(
        "--case", action="append", help="such as hidden-75, ffn-50, heads-75, all-75; left out: all of them"
    )
    parser.add_argument("--arms", help="names of arms, with semicolons between")
    parser.add_argument("--tokens", action="append", help="tokens of the distillation; left out: only pruned")
    parser.add_argument("--rates", default="2e-3,4e-3,8e-3")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--work", type=Path, default=Path("/tmp/minitron-recovery"))
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    work = args.work / args.teacher.resolve().name
    write_texts(args.teacher, work, args.documents)
    cases = args.case or [f"{axes}-{percent}" for percent in (75, 50) for axes in CASES]
    chosen = (
        args.arms.split(";") if args.arms else [n for n, arm in ARMS.items() if args.tokens or not arm.trained_only]
    )
    rates = [float(rate) for rate in args.rates.split(",")]
    if not args.tokens:
        print(f"| excess loss, only pruned | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
        for name in chosen:
            found = [run(spec_file(args.teacher, work, case, None, args.batch), name, 0, None) for case in cases]
            print("| " + " | ".join([name, *(f"{excess(one, 'pruned'):.3f}" for one in found)]) + " |", flush=True)
        return
    for case in cases:
        for tokens in args.tokens:
            spec = spec_file(args.teacher, work, case, tokens, args.batch)
            columns = " | ".join(f"{rate:g}" for rate in rates)
            print(f"| {case}, {tokens} tokens | {columns} | best |\n|---|{'---|' * (len(rates) + 1)}")
            for name in chosen:
                means = [
                    statistics.mean(excess(run(spec, name, seed, rate), "distilled") for seed in range(args.seeds))
                    for rate in rates
                ]
                print(f"| {name} | {' | '.join(f'{mean:.4f}' for mean in means)} | {min(means):.4f} |", flush=True)


if __name__ == "__main__":
    main()
