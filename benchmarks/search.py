"""Measures a search: every candidate trained to the end, against successive halving and cheaper choices.

    python benchmarks/search.py                                   # the quickstart's teacher, 24 shapes, one seed
    python benchmarks/search.py --teacher ../shared/data/stories260K --parameters 143K   # on text that it writes itself
    python benchmarks/search.py --spec my.yaml --seeds 3          # any spec with a `search`
    python benchmarks/search.py --rates 1e-3,2e-3,4e-3 --rank-tokens 8000 --rungs 2      # one shape, the learning rate alone
    python benchmarks/search.py --together 8                      # 8 candidates on one pass of the teacher, beside one by one

All candidates of a grid are trained on `--tokens` tokens, as the rungs train them, and judged on the way on a branch whose rate
decays to zero (and on the trunk). From these figures follow, without another training, what successive halving with
`--rank-tokens` and `--rungs` chooses and costs, the rank correlation (Spearman) of every point with the end, and what others
choose at the same cost: random search (its mean over all draws of as many candidates as the same tokens train to the end) and
the candidates with the best zero-shot figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minitron.compiler import make_search, write_search
from minitron.runtime.interrupt import Interrupt
from minitron.runtime.plan import read_training_plan
from minitron.runtime.search.rungs import Rungs
from minitron.runtime.setup import Session
from minitron.runtime.world import join_world
from minitron.specs import load_spec
from minitron.specs.atomic import write_text
from minitron.specs.builds import SEARCH, WORK
from minitron.specs.cache import tokens_folder
from minitron.specs.halving import halving
from minitron.specs.progress import Silent
from minitron.specs.search_files import RungPlan, SearchFile, read_search

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.recovery import write_texts

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = 1000
TEXTS = ("calibration", "documents", "held_out")
Curve = dict[int, tuple[float, float]]
"""Tokens -> (divergence of the branch, of the trunk)."""


def spearman(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The rank correlation of two lists without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def halved(curves: dict[int, Curve], rank_tokens: int, rungs: int, which: int, points: list[int]) -> tuple[int, float]:
    """Returns what successive halving would choose of curves that are known, and its share of the exhaustive tokens; `which`
    figure ranks: 0 the branch, 1 the trunk."""
    field, cost, before = sorted(curves), 0.0, 0
    for rung in halving(len(curves), rank_tokens, rungs):
        at = min(points, key=lambda point: abs(math.log(point / rung.tokens)))
        cost += len(field) * (at - before) + (0.1 * at * len(field) if which == 0 else 0.0)
        field = sorted(field, key=lambda number: curves[number][at][which])[: rung.leave]
        before = at
    return field[0], cost / (len(curves) * points[-1])


def random_search(finals: dict[int, float], trained: int) -> float:
    """The mean, over all draws of `trained` candidates, of the best final figure among them."""
    values = sorted(finals.values())
    count = len(values)
    whole = math.comb(count, trained)
    return sum(value * math.comb(count - 1 - place, trained - 1) for place, value in enumerate(values)) / whole


@contextlib.contextmanager
def opened_rungs(build: Path, file: SearchFile) -> Iterator[Rungs]:
    """The rungs of a written search, on this process and its CPU."""
    loaded = read_training_plan(build / SEARCH)
    with join_world("cpu") as world:
        session = Session.open(loaded, tokens_folder(build, build / WORK), world, Interrupt(), Silent())
        yield Rungs.prepare(loaded, file, session, build)


def grown(build: Path, points: list[int]) -> tuple[dict[int, float], dict[int, Curve], float]:
    """Trains every candidate of a written search to the last point; returns zero-shot figures, curves, and tokens a second."""
    file = read_search(build)
    assert file is not None
    done = build / "curves.json"
    if done.exists():
        document = json.loads(done.read_text(encoding="utf-8"))
        curves = {int(n): {int(d): tuple(v) for d, v in of.items()} for n, of in document["curves"].items()}
        return {int(n): v for n, v in document["zero_shot"].items()}, curves, document["rate"]
    plan = read_training_plan(build / SEARCH).training()
    count = len(file.candidates)
    along = tuple(RungPlan(number=n, tokens=at, enter=count, leave=count) for n, at in enumerate(points, start=1))
    judged = plan.held_out.max_tokens if plan.held_out else 1
    file = file.model_copy(update={"judged_tokens": judged, "rungs": along})
    with opened_rungs(build, file) as rungs:
        numbers = [one.number for one in file.candidates]
        begun = time.monotonic()
        for rung, point in zip(along, points, strict=True):
            if not all(rungs.is_done(number, rung) for number in numbers):
                rungs.train([number for number in numbers if not rungs.is_done(number, rung)], rung)
            print(f"  {point} tokens after {time.monotonic() - begun:.0f} s", flush=True)
        ranking = rungs.ranking(len(points), None)
    zero_shot = {one.number: one.zero_shot.kl or math.inf for one in ranking.candidates}
    curves = {
        one.number: {
            point: (judged.kl or math.inf, judged.trunk_kl or math.inf)
            for point, judged in zip(points, one.rungs, strict=False)
        }
        for one in ranking.candidates
    }
    rate = len(numbers) * points[-1] / (time.monotonic() - begun)
    document = {"zero_shot": zero_shot, "curves": curves, "rate": rate}
    write_text(done, json.dumps(document, indent=1))
    return zero_shot, curves, rate


def report(zero_shot: dict[int, float], curves: dict[int, Curve], points: list[int], arguments: Any) -> dict[str, Any]:
    """The figures of one seed, printed."""
    alive = {number: of for number, of in curves.items() if len(of) == len(points)}
    finals = {number: of[points[-1]][0] for number, of in alive.items()}
    best = min(finals.values())
    end = np.array([finals[number] for number in sorted(alive)])
    print(f"  {len(alive)} candidates; at the end {best:.4f} to {max(finals.values()):.4f} nats a token")
    rows: dict[str, Any] = {"spearman": {}, "chosen": {}}
    zero = spearman(np.array([zero_shot[number] for number in sorted(alive)]), end)
    print(f"  Spearman with the end: zero-shot {zero:.2f}")
    rows["spearman"]["zero-shot"] = zero
    for point in points[:-1]:
        both = [spearman(np.array([alive[number][point][which] for number in sorted(alive)]), end) for which in (0, 1)]
        print(f"    {point / points[-1]:6.1%}   branch {both[0]:.2f}   trunk {both[1]:.2f}")
        rows["spearman"][point] = both
    cost = 0.0
    for which, name in enumerate(("successive halving, branch", "successive halving, trunk")):
        number, cost = halved(alive, arguments.rank_tokens, arguments.rungs, which, points)
        rows["chosen"][name] = (finals[number] / best - 1, cost)
        cost = rows["chosen"]["successive halving, branch"][1]
    trained = max(1, round(cost * len(alive)))
    rows["chosen"][f"random search, {trained} trained"] = (
        random_search(finals, trained) / best - 1,
        trained / len(alive),
    )
    first = sorted(alive, key=lambda number: zero_shot[number])[:trained]
    rows["chosen"][f"best {trained} by zero-shot"] = (
        min(finals[one] for one in first) / best - 1,
        trained / len(alive),
    )
    for name, (loss, share) in rows["chosen"].items():
        print(f"  {name:28} {loss:7.2%} worse than the best, {share:6.1%} of the exhaustive tokens")
    return rows


def three_quarters(config: dict[str, Any]) -> dict[str, int]:
    """The shape whose learning rate is searched: hidden_size and FFN at three quarters, rounded down to a multiple of 16."""
    return {key: int(config[key] * 0.75) // 16 * 16 for key in ("hidden_size", "intermediate_size")}


def spec_text(arguments: Any, seed: int) -> dict[str, Any]:
    """The spec of one seed: the given one, or the quickstart's teacher with a search."""
    path = arguments.spec or ROOT / "examples" / "quickstart" / "spec.yaml"
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["teacher"]["model"] = str((path.parent / document["teacher"]["model"]).resolve())
    if arguments.teacher is not None:
        write_texts(arguments.teacher, arguments.work, DOCUMENTS)
        texts = {name: {"jsonl": [str(arguments.work / f"{name}.jsonl")]} for name in TEXTS}
        document["teacher"] = {"model": str(arguments.teacher.resolve()), "dtype": "float32"}
        document["importance"] = {"data": texts["calibration"] | {"samples": 64, "sequence_length": 256}}
        document["distill"] |= {"data": texts["documents"]}
        document["distill"]["optimizer"] = {"lr": 4e-3, "min_lr": 1e-5, "warmup_steps": 20}
        document["evaluate"] = {"held_out": texts["held_out"]}
        document["student"] = three_quarters(
            json.loads((arguments.teacher / "config.json").read_text(encoding="utf-8"))
        )
    document["distill"] |= {"tokens": 10 * arguments.tokens, "seed": seed}
    document["evaluate"]["max_tokens"] = arguments.judged_tokens
    rates = [float(one) for one in arguments.rates.split(",")] if arguments.rates else None
    rank = {"tokens": arguments.tokens, "rungs": arguments.rungs}
    if arguments.spec is None:
        if rates is None:
            document |= {"student": {}, "search": {"budget": {"parameters": arguments.parameters}}}
        else:
            document["search"] = {}
        document["search"] |= {"candidates": arguments.candidates, "rank": rank}
    else:
        document["search"]["rank"] = rank
    if rates is not None:
        document["distill"]["optimizer"]["lr"] = rates
    return document


def together(arguments: Any, work: Path) -> None:
    """Prints tokens a second of candidates on one pass of the teacher, and of the same one after the other."""
    build, count = work / "seed-0", arguments.together
    plan, file = read_training_plan(build / SEARCH).training(), read_search(build)
    assert file is not None
    file = file.model_copy(update={"judged_tokens": 2 * plan.sequence_length})
    with opened_rungs(build, file) as rungs:
        learners = [replace_state(rungs, one.number) for one in file.candidates[:count]]
        steps = arguments.steps
        sequences = {id(learner): learner.samples for learner in learners}

        def seconds_of(some: list[Any]) -> float:
            begun = time.perf_counter()
            rungs.shared_teacher.train(
                some, lambda learner: sequences[id(learner)] + steps * learner.plan.global_batch_size, lambda _: None
            )
            for learner in some:
                sequences[id(learner)] = learner.samples
            return time.perf_counter() - begun

        seconds_of(learners)  # warm-up
        # In turn, so that whatever else the machine does slows both.
        pairs = [(seconds_of(learners), sum(seconds_of([learner]) for learner in learners)) for _ in range(5)]
    tokens = count * steps * plan.global_batch_size * plan.sequence_length
    one, other = (tokens / min(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(alone / beside for beside, alone in pairs)
    print(
        f"{count} candidates: {one:.0f} tokens/s together, {other:.0f} one after the other: {ratio:.2f} times as many"
    )


def replace_state(rungs: Rungs, number: int) -> Any:
    """A learner at its beginning, whatever checkpoint the benchmark has left."""
    learner = rungs.learner(number)
    learner.samples = 0
    return learner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", type=Path)
    parser.add_argument("--teacher", type=Path, help="a model that writes its own text; with --parameters of its size")
    parser.add_argument("--parameters", default="1.2M")
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=160_000, help="that each candidate is trained on")
    parser.add_argument("--judged-tokens", type=int, default=10_000, help="of held-out text, at every point")
    parser.add_argument("--rank-tokens", type=int, help="of the search; half of --tokens by default")
    parser.add_argument("--rungs", type=int, default=3)
    parser.add_argument("--rates", help="search the learning rate alone")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--together", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("/tmp/minitron-search"))
    arguments = parser.parse_args()
    arguments.rank_tokens = arguments.rank_tokens or arguments.tokens // 2
    rungs = {rung.tokens for rung in halving(2, arguments.rank_tokens, arguments.rungs)}
    points = sorted(rungs | {max(1, round(arguments.tokens * share)) for share in (0.03, 0.06, 0.125, 0.25, 0.5, 1.0)})
    found = []
    for seed in range(arguments.seeds):
        build = arguments.work / f"seed-{seed}"
        build.mkdir(parents=True, exist_ok=True)
        path = arguments.work / f"seed-{seed}.yaml"
        write_text(path, yaml.safe_dump(spec_text(arguments, seed), sort_keys=False))
        search = make_search(load_spec(path), build=build, weights=True)
        write_search(search, device="cpu", progress=Silent())
        print(f"seed {seed}: {len(search.candidates.found)} candidates", flush=True)
        if arguments.together:
            together(arguments, arguments.work)
            return
        found.append(report(*grown(build, points)[:2], points, arguments))
        for folder in (build / SEARCH).glob("*/checkpoints"):
            shutil.rmtree(folder)
    write_text(arguments.work / "figures.json", json.dumps(found, indent=1))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
