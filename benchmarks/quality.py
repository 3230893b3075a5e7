"""Measures what pruning and distilling are worth: four ways to one student of the quickstart's teacher, at equal tokens.

    python benchmarks/quality.py                       # three seeds of the quickstart as it stands; about half an hour
    python benchmarks/quality.py --tokens 200K         # the same, shorter
    python benchmarks/quality.py --workers 2           # two students at a time; OMP_NUM_THREADS=1 gives each a core
    python benchmarks/quality.py --spec my.yaml        # on another teacher

Held-out loss (nats a token) of
    random init + KD            the student's shape with fresh weights, distilled
    pruned + cross-entropy      the pruned student trained on the text itself, without the teacher
    random choice + KD          what is kept drawn at random (layers, channels, neurons, heads), distilled
    pruned + KD                 what minitron does
Shape, data, tokens, optimizer and learning rate are the same for all. A seed decides the order of the data, the fresh
weights and the random choice; calibration does not depend on it. The table shows mean and range over the seeds.
Everything goes through the compiler and the runtime as `minitron run` does; finished runs in `--work` are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from minitron.compiler import compile_spec
from minitron.compiler.importance.select import Selection
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS
from minitron.runtime import evaluate, train
from minitron.specs import load_spec
from minitron.specs.atomic import atomic_folder, write_text
from minitron.specs.progress import Silent

ROOT = Path(__file__).resolve().parent.parent
RANDOM_INIT, CROSS_ENTROPY, RANDOM_CHOICE, PRUNED = (
    "random init + KD",
    "pruned + cross-entropy",
    "random choice + KD",
    "pruned + KD",
)
METHODS = (RANDOM_INIT, CROSS_ENTROPY, RANDOM_CHOICE, PRUNED)

Results = dict[str, Any]


def random_selection(plan: dict[str, Any], seed: int) -> Selection:
    """A selection of the same sizes as the plan's, every list of it drawn at random. `plan`: plan.json's content."""
    rng = np.random.default_rng(seed)
    axes = {axis["axis"]: axis for axis in plan["axes"]}
    chosen: dict[str, list[list[int]]] = plan["selection"]

    def draw(teacher: int, student: int) -> Any:
        return np.sort(rng.choice(teacher, student, replace=False)).astype(np.int64)

    layers = tuple(int(i) for i in draw(axes[LAYERS]["teacher"], axes[LAYERS]["student"]))
    hidden = draw(axes[HIDDEN]["teacher"], axes[HIDDEN]["student"]) if HIDDEN in chosen else None
    widths = {
        name: {layer: draw(axes[name]["teacher"], axes[name]["student"]) for layer in layers}
        for name in chosen
        if name not in (LAYERS, HIDDEN, GROUPS, HEADS)
    }
    groups, heads = {}, {}
    if GROUPS in chosen:
        count, kept = axes[GROUPS]["teacher"], axes[GROUPS]["student"]
        repeats, kept_repeats = axes[HEADS]["teacher"] // count, axes[HEADS]["student"] // kept
        groups = {layer: draw(count, kept) for layer in layers}
        heads = {layer: tuple(draw(repeats, kept_repeats) for _ in range(kept)) for layer in layers}
    return Selection(layers, hidden, widths, groups, heads)


def fresh_weights(student: Path, seed: int) -> None:
    """Puts freshly initialised weights of the same shape in the place of a checkpoint's."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(student)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(student)


def edit_training(build: Path, seed: int, cross_entropy: bool) -> None:
    """Sets the seed in training.yaml and, where asked for, exchanges the teacher's distribution for the text itself."""
    path = build / "training.yaml"
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    plan["seed"] = seed
    if cross_entropy:
        plan["loss"]["logits"]["weight"], plan["loss"]["cross_entropy"] = 0.0, 1.0
    write_text(path, yaml.safe_dump(plan, sort_keys=False))


def take_tokens(build: Path) -> None:
    """Copies the tokenised text from a finished build beside this one: it is the same for all."""
    finished = (one.parent / "train" / "data" for one in sorted(build.parent.glob("*/results.json")))
    cached = next((folder for folder in finished if folder.is_dir()), None)
    if cached is not None and not (build / "train").exists():
        with atomic_folder(build / "train") as copy:
            shutil.copytree(cached, copy / "data")


def run(method: str, seed: int, spec: Path, overrides: list[str], pruned: Path, build: Path, device: str) -> Results:
    """One student from its start to its evaluation; what a build holds already is not done again."""
    start = time.monotonic()
    results = build / "results.json"
    if results.exists():
        return dict(json.loads(results.read_text(encoding="utf-8")))
    if not (build / "training.yaml").exists():
        if method == RANDOM_CHOICE:
            plan = json.loads((pruned / "plan.json").read_text(encoding="utf-8"))
            selection = random_selection(plan, seed)
            compile_spec(load_spec(spec, overrides), build, device=device, progress=Silent(), selection=selection)
            edit_training(build, seed, cross_entropy=False)
        else:
            with atomic_folder(build) as copy:
                shutil.copytree(pruned, copy, dirs_exist_ok=True)
                if method == RANDOM_INIT:
                    fresh_weights(copy / "student", seed)
                edit_training(copy, seed, method == CROSS_ENTROPY)
    take_tokens(build)
    train(build, device=device, progress=Silent())
    measured = evaluate(build, device=device, progress=Silent())
    print(
        f"seed {seed}, {method}: {loss_of(measured, 'pruned'):.4f} -> {loss_of(measured, 'distilled'):.4f} "
        f"({time.monotonic() - start:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    return measured


def loss_of(results: Results, model: str) -> float:
    return float(results["models"][model]["held_out"]["loss"])


def spread(values: list[float]) -> str:
    """Mean and range, or the one value that all share."""
    if max(values) - min(values) < 5e-4:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(results: dict[str, list[Results]], tokens: int) -> str:
    """The figures as a markdown table."""
    teacher = loss_of(results[PRUNED][0], "teacher")
    head = f"| student | before training | after {tokens:,} tokens | above the teacher |"
    lines = [head, "|---|---|---|---|", f"| the teacher itself | {teacher:.3f} | | |"]
    for method in METHODS:
        before = [loss_of(one, "pruned") for one in results[method]]
        after = [loss_of(one, "distilled") for one in results[method]]
        lines.append(f"| {method} | {spread(before)} | {spread(after)} | {statistics.mean(after) - teacher:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path, default=ROOT / "examples" / "quickstart" / "spec.yaml")
    parser.add_argument("--tokens", help="tokens of each training, such as 200K; left out: what the spec says")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a student of its own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("/tmp/minitron-quality"), help="builds; can be removed after")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in `minitron run`")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    overrides = [*args.set, *([f"distill.tokens={args.tokens}"] if args.tokens else [])]
    loaded = load_spec(args.spec, overrides)
    assert loaded.spec.distill is not None, "the spec must have a `distill` block"
    work: Path = args.work / loaded.sha256[:12]

    pruned = work / "pruned"
    if not (pruned / "verification.json").exists():
        compile_spec(loaded, pruned, device=args.device, progress=Silent())
    jobs = [(method, seed) for seed in range(args.seeds) for method in METHODS]
    # Spawned and not forked: torch's threads do not survive a fork.
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [
            pool.submit(
                run,
                method,
                seed,
                args.spec,
                overrides,
                pruned,
                work / f"{method.replace(' ', '-')}-{seed}",
                args.device,
            )
            for method, seed in jobs
        ]
        finished = [one.result() for one in waiting]
    results: dict[str, list[Results]] = {method: [] for method in METHODS}
    for (method, _), one in zip(jobs, finished, strict=True):
        results[method].append(one)
    print(table(results, loaded.spec.distill.tokens))


if __name__ == "__main__":
    main()
