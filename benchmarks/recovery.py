"""Measures basis, selection and recovery: one teacher, one shape, equal tokens, each arm at its best learning rate.

    python benchmarks/recovery.py TEACHER                    # hidden, FFN, heads and all at 75% and 50%, only pruned
    python benchmarks/recovery.py TEACHER --case all-75 --tokens 200K --tokens 800K        # and distilled
    python benchmarks/recovery.py TEACHER --case all-75 --tokens 200K --seeds 3 --arms "channels;principal"

TEACHER is a Hugging Face folder; ../shared/data/stories260K is the one that docs/method.md quotes. The text is written by the
teacher itself, sampled from its own distribution, so no arm gains by knowing the text. Calibration, training and held-out
text are different documents. The figure is the KL divergence from teacher to student on held-out text, in nats a token: what
the student's loss exceeds the teacher's by.

Each arm (benchmarks/recovery_arms.py) is trained at `--rates`, and beyond their ends as long as the best of them is at an
end: a comparison at one rate shows the rate. Everything goes through the compiler and the runtime as `minitron run` does.
Every figure is a file under `--work`, and what is there is not measured again: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from minitron.compiler import compile_spec
from minitron.compiler.compile import Stages
from minitron.runtime import train
from minitron.specs import load_spec
from minitron.specs.atomic import atomic_folder, write_text
from minitron.specs.progress import Silent
from minitron.specs.units import COUNT_UNITS, parse_quantity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.block_local import train_blocks
from benchmarks.quality import fresh_weights
from benchmarks.recovery_arms import ARMS, Arm, overrides, weight_norms

DOCUMENT_TOKENS = 256
SAMPLED_AT_ONCE = 250
HELD_OUT_DOCUMENTS = 200
MOST_RATES = 6
CASES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size",),
    "ffn": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "experts": ("num_experts",),
    "all": ("hidden_size", "intermediate_size", "num_attention_heads"),
}

Figures = dict[str, float]


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


def held_out_ids(teacher: Path, work: Path) -> torch.Tensor:
    """The beginnings of held-out documents, all of one length: [documents, tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    lines = (work / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    length = sorted(len(row) for row in rows)[len(rows) // 4]
    return torch.tensor([row[:length] for row in rows if len(row) >= length][:HELD_OUT_DOCUMENTS])


@torch.no_grad()
def measure(folder: Path, teacher: Path, ids: torch.Tensor) -> Figures:
    """`excess`: KL(teacher || student) in nats a token; `effective_rank`: that of what the head reads, the exponential of the
    entropy of its covariance's spectrum (Roy and Vetterli 2007)."""
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    total, count, rows = 0.0, 0, []
    for part in ids.split(16):
        theirs = model(input_ids=part, use_cache=False).logits.log_softmax(-1)
        own = student(input_ids=part, use_cache=False, output_hidden_states=True)
        total += float((theirs.exp() * (theirs - own.logits.log_softmax(-1))).sum(dtype=torch.float64))
        count += part.numel()
        rows.append(own.hidden_states[-1].flatten(0, 1).double())
    spectrum = torch.linalg.eigvalsh(torch.cov(torch.cat(rows).T)).clamp_min(0)
    shares = spectrum / spectrum.sum()
    return {"excess": total / count, "effective_rank": float(torch.special.entr(shares).sum().exp())}


class Bench:
    """One teacher's texts, builds and figures, in a folder."""

    def __init__(self, teacher: Path, work: Path, batch: int) -> None:
        self.teacher, self.work, self.batch = teacher.resolve(), work, batch
        self.ids = held_out_ids(teacher, work)

    def pruned(self, case: str, name: str) -> Figures:
        """The figures of an arm's student before training."""
        file = self.work / "figures" / f"{case}-{slug(name)}.json"
        if not file.exists():
            write_text(file, json.dumps(measure(self.build(case, name) / "student", self.teacher, self.ids)))
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def build(self, case: str, name: str) -> Path:
        """The pruned student of an arm. Arms that differ in their training only share one."""
        arm, build = ARMS[name], self.work / "builds" / f"{case}-{slug(name)}"
        if not build.exists():
            values = [*overrides(arm)]
            stages = replace(Stages(), score=weight_norms) if arm.weight_norms else Stages()
            working = build.with_name(f"{build.name}.working")
            shutil.rmtree(working, ignore_errors=True)
            loaded = load_spec(self.spec(case), values)
            compile_spec(loaded, working, device="cpu", progress=Silent(), stages=stages)
            working.rename(build)
        return build

    def spec(self, case: str) -> Path:
        """The spec of one shape."""
        axes, _, percent = case.partition("-")
        document: dict[str, Any] = {
            "name": case,
            "teacher": {"model": str(self.teacher)},
            "student": dict.fromkeys(CASES[axes], f"{percent}%"),
            "importance": {"data": {"jsonl": ["calibration.jsonl"], "samples": 128, "sequence_length": 256}},
            "distill": {
                "data": {"jsonl": ["documents.jsonl"]},
                "tokens": "10K",
                "sequence_length": 256,
                "global_batch_size": self.batch,
                "optimizer": {"min_lr": 1e-5},
            },
        }
        path = self.work / f"{case}.yaml"
        write_text(path, yaml.safe_dump(document, sort_keys=False))
        return path

    def trained(self, case: str, name: str, tokens: int, lr: float, seed: int) -> Figures:
        """The figures of an arm's student after training at one rate."""
        file = self.work / "figures" / f"{case}-{slug(name)}-{tokens}-{lr:g}-{seed}.json"
        if file.exists():
            return dict(json.loads(file.read_text(encoding="utf-8")))
        start, build = time.monotonic(), self.build(case, name)
        running = self.work / f"running-{os.getpid()}"
        shutil.rmtree(running, ignore_errors=True)
        with atomic_folder(running) as folder:
            shutil.copytree(build, folder, dirs_exist_ok=True)
            if ARMS[name].fresh:
                fresh_weights(folder / "student", seed)
            local = int(tokens * ARMS[name].blocks)
            self._edit(folder / "training.yaml", ARMS[name], tokens - local, lr, seed)
            if local:
                train_blocks(folder, self.teacher, local, lr, seed)
                if not ARMS[name].aligned:
                    _without_alignment(folder / "training.yaml")
        cached = self.work / "tokens"
        if cached.is_dir():  # the text's tokens, which are the same for all
            with atomic_folder(running / "train") as folder:
                shutil.copytree(cached, folder / "data")
        train(running, device="cpu", progress=Silent(), unverified=True, outside=True)
        figures = measure(running / "model", self.teacher, self.ids) | {"seconds": time.monotonic() - start}
        write_text(file, json.dumps(figures))
        if (
            not cached.is_dir() and (running / "train" / "data").is_dir()
        ):  # else they lie in the cache beside the builds
            (running / "train" / "data").rename(cached)
        shutil.rmtree(running)
        print(f"{file.stem}: {figures['excess']:.4f} ({figures['seconds']:.0f} s)", file=sys.stderr, flush=True)
        return figures

    def _edit(self, path: Path, arm: Arm, tokens: int, lr: float, seed: int) -> None:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        plan |= {"tokens": tokens, "seed": seed, "held_out": None}
        plan["teacher"]["model"] = str(self.teacher)
        plan["checkpoint"] |= {"every_tokens": tokens}
        steps = tokens // (plan["sequence_length"] * plan["global_batch_size"])
        plan["optimizer"] |= {"lr": lr, "warmup_steps": max(1, steps // 10)}
        if arm.cross_entropy:
            plan["loss"]["logits"]["weight"], plan["loss"]["cross_entropy"] = 0.0, 1.0
        write_text(path, yaml.safe_dump(plan, sort_keys=False))

    def best(self, case: str, name: str, tokens: int, rates: Sequence[float], seeds: int) -> dict[float, list[Figures]]:
        """The figures at every rate that was tried, the best rate's first. The search for a rate is that of the first seed;
        the other seeds are trained at the best and its neighbours."""
        tried = {rate: [self.trained(case, name, tokens, rate, 0)] for rate in rates}
        while len(tried) < MOST_RATES:
            best = min(tried, key=lambda rate: tried[rate][0]["excess"])
            beyond = {min(tried): best / 2, max(tried): best * 2}.get(best)
            if beyond is None:
                break
            tried[beyond] = [self.trained(case, name, tokens, beyond, 0)]
        ranked = sorted(tried, key=lambda rate: tried[rate][0]["excess"])
        for rate in ranked[:2] if seeds > 1 else []:
            tried[rate] += [self.trained(case, name, tokens, rate, seed) for seed in range(1, seeds)]
        ranked.sort(key=lambda rate: mean(tried[rate]) if len(tried[rate]) == seeds else math.inf)
        return {rate: tried[rate] for rate in ranked}


def _without_alignment(path: Path) -> None:
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    plan["loss"]["hidden_states"] = plan["kept_coordinates"] = None
    write_text(path, yaml.safe_dump(plan, sort_keys=False))


def mean(figures: Sequence[Figures], key: str = "excess") -> float:
    """The mean over seeds."""
    return statistics.mean(one[key] for one in figures)


def slug(name: str) -> str:
    """An arm's name as part of a file's."""
    return name.replace(" ", "_").replace(",", "")


def tokens_to_reach(curve: Mapping[int, float], wanted: float) -> float | None:
    """The tokens after which a curve (tokens -> excess) has fallen to `wanted`, None where it does not: a straight line in the
    logarithms of both between the points that were measured."""
    points = sorted(curve.items())
    if points and points[0][1] <= wanted:
        return float(points[0][0])  # at most
    for (before, high), (after, low) in pairwise(points):
        if low <= wanted < high:
            share = (math.log(high) - math.log(wanted)) / (math.log(high) - math.log(low))
            return math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return None


def report_pruned(bench: Bench, cases: Sequence[str], names: Sequence[str]) -> None:
    """Prints the table of students that are only pruned."""
    print(f"| excess, only pruned | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
    for name in names:
        if not ARMS[name].trained:
            cells = [f"{bench.pruned(case, name)['excess']:.3f}" for case in cases]
            print(f"| {' | '.join([name, *cells])} |", flush=True)


def report_trained(
    bench: Bench, case: str, names: Sequence[str], tokens: Sequence[int], rates: Sequence[float], seeds: int
) -> None:
    """Prints one table for each number of tokens, and that of the tokens that each arm needs."""
    curves: dict[str, dict[int, float]] = {name: {} for name in names}
    for count in tokens:
        print(
            f"| {case}, {count:,} tokens | excess | range | rate | other rates | effective rank |\n|---|---|---|---|---|---|"
        )
        for name in names:
            (rate, figures), *others = bench.best(case, name, count, rates, seeds).items()
            curves[name][count] = mean(figures)
            every = [one["excess"] for one in figures]
            spread = f"{min(every):.3f} to {max(every):.3f}" if seeds > 1 else ""
            rest = ", ".join(f"{other:g}: {one[0]['excess']:.3f}" for other, one in sorted(others))
            rank = f"{mean(figures, 'effective_rank'):.1f}"
            print(f"| {name} | {mean(figures):.4f} | {spread} | {rate:g} | {rest} | {rank} |", flush=True)
        print()
    if len(tokens) > 1:
        print(f"| tokens to reach channels' figure at | {' | '.join(f'{count:,}' for count in tokens)} |")
        print(f"|---|{'---|' * len(tokens)}")
        for name in names:
            cells = []
            for count in tokens:
                need = tokens_to_reach(curves[name], curves[names[0]][count])
                least = need is not None and need == min(tokens) and curves[name][min(tokens)] < curves[names[0]][count]
                cells.append("more" if need is None else f"{'under ' if least else ''}{need / count:.2f}x")
            print(f"| {' | '.join([name, *cells])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument(
        "--case",
        action="append",
        help="such as hidden-75, ffn-50, heads-75, all-75, experts-50; left out: all but experts",
    )
    parser.add_argument(
        "--arms", help="names of arms, with semicolons between; the first is what others are compared with"
    )
    parser.add_argument("--tokens", action="append", help="tokens of the distillation; left out: only pruned")
    parser.add_argument("--rates", default="4e-3,8e-3,1.6e-2")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--work", type=Path, default=Path("/tmp/minitron-recovery"))
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    work = args.work / args.teacher.resolve().name
    write_texts(args.teacher, work, args.documents)
    bench = Bench(args.teacher, work, args.batch)
    cases = args.case or [f"{axes}-{percent}" for percent in (75, 50) for axes in CASES if axes != "experts"]
    names = args.arms.split(";") if args.arms else list(ARMS)
    if not args.tokens:
        report_pruned(bench, cases, names)
    for case in cases if args.tokens else ():
        tokens = [parse_quantity(one, COUNT_UNITS) for one in args.tokens]
        report_trained(bench, case, names, tokens, [float(rate) for rate in args.rates.split(",")], args.seeds)


if __name__ == "__main__":
    main()
