"""Prunes tiny models of many families by half, beside Torch-Pruning, and says what came out. One process a step.

    python benchmarks/zoo.py                                            # minitron alone
    python benchmarks/zoo.py --peer-python /tmp/peer/bin/python         # both; -o docs/zoo.md writes the page
    python benchmarks/zoo.py llama gpt2 --peer-python ...               # some families

The environment of the peer is its own (this project's is left as it is), with the same torch and transformers:

    python3 -m venv /tmp/peer && /tmp/peer/bin/pip install -c constraints.txt torch-pruning torch transformers

Asked for is half of the residual stream, of every feed-forward width and of the query heads, key-value groups as they are
(with one query head each, they go along); experts, layers and state space layers inside stay. What that is in shapes, the
modelling code itself says, built on the configuration with those numbers. The verdicts:

    as asked          every tensor has the shape that was asked for, and a fresh process that loads the checkpoint gets the
                      logits that the pruned model gave in memory, to 1e-5 of the largest
    under-pruned      reloaded right, but tensors are larger than asked for
    wrong on reload   the checkpoint does not load, loads with tensors missing, or gives other logits
    crashed           the tool or its pruned model raises, or runs into the time limit
    refused           the tool says beforehand that it cannot, and why
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for place in (ROOT, ROOT / "benchmarks"):
    sys.path.insert(0, str(place))

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3", "nemotron",
    "gpt_neox", "gpt2", "opt", "bloom", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "mamba2",
    "nemotron_h", "qwen3_next",
)  # fmt: skip
OURS, PEER = "minitron", "torch-pruning"
AS_ASKED, UNDER, WRONG, CRASHED, REFUSED = "as asked", "under-pruned", "wrong on reload", "crashed", "refused"
VERDICTS = (AS_ASKED, UNDER, WRONG, CRASHED, REFUSED)
EQUAL = 1e-5
RATIO = 0.5
HIDDEN, HEADS, GROUPS, FFN = "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"
# Keys of feed-forward widths, and the axis that a spec calls by another name.
FFN_KEYS = {
    FFN: FFN, "ffn_dim": FFN, "moe_intermediate_size": "moe_intermediate_size",
    "shared_expert_intermediate_size": "shared_expert_intermediate_size", "intermediate_size_mlp": FFN,
}  # fmt: skip
MISSING = """\
Torch-Pruning was not tried. To try it, make an environment of its own and name its python:
    python3 -m venv /tmp/peer
    /tmp/peer/bin/pip install -c constraints.txt torch-pruning torch transformers
    python benchmarks/zoo.py --peer-python /tmp/peer/bin/python"""

HEADER = """\
# Pruned by half, beside Torch-Pruning

Found by `python benchmarks/zoo.py --peer-python PYTHON -o docs/zoo.md`, or family by family with `--rows`: tiny models with
random weights, fp32, on a CPU; {versions}. Asked for is half of the residual stream, of every
feed-forward width and of the query heads, key-value groups as they are.

- **as asked**: every tensor has the shape that was asked for, and a fresh process that loads the checkpoint gets the
  logits that the pruned model gave in memory, to 1e-5 of the largest
- **under-pruned**: reloaded right, but tensors are larger than asked for, and nothing says so
- **wrong on reload**: the checkpoint does not load whole, or gives other logits
- **crashed**: an exception, or no end within the time limit
- **refused**: the tool says beforehand what it cannot do, and why

Torch-Pruning is used as its own example for language models uses it, with sdpa or eager attention, whichever ends better, and
with help: what is not to be narrowed is ignored by name, and the configuration is found for it. The shapes are those that
suit it: four query heads in a group (with two, 1.6.1 does not end on a Llama). Phi-3 has grouped heads here; with a key of
its own for each query head Torch-Pruning prunes it as asked. Not asked is whether the channels that stay belong together: a
compile of minitron checks that by itself. Other models and shapes may give other verdicts.

"""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one family under one tool: what went wrong, shapes, and logits (nested lists) in memory and reloaded.
    A field is None where the run got no further."""

    error: str = ""
    refused: bool = False
    pruned: bool = True  # the tool came through, and only the reload failed
    problems: tuple[str, ...] = ()
    shapes: Mapping[str, Sequence[int]] | None = None
    memory: Any = None
    reloaded: Any = None


@dataclass(frozen=True)
class Row:
    family: str
    verdict: str
    detail: str = ""


# -- what is asked for ----------------------------------------------------------------------------------------------------


def shaped(config: Any) -> Any:
    """Four query heads in a group, which is what the peer's example has (with two, Torch-Pruning 1.6.1 does not end)."""
    from zoo_tools import changed

    if getattr(config, HEADS, None) is None:
        return config
    keys = {HIDDEN: 64, HEADS: 8}
    if getattr(config, "word_embed_proj_dim", None):
        keys["word_embed_proj_dim"] = 64
    if groups := getattr(config, GROUPS, None):
        keys[GROUPS] = 2 if groups < getattr(config, HEADS) else 8
    return changed(config, keys)


def request_of(config: Any) -> dict[str, Any]:
    """Widths by the axes of a spec, configuration keys with their old and new values, and the shapes that follow."""
    from zoo_tools import changed, shapes_by

    def present(key: str) -> int:
        value = getattr(config, key, None)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    keys: dict[str, list[Any]] = {HIDDEN: [config.hidden_size, config.hidden_size // 2]}
    widths = {HIDDEN: config.hidden_size // 2}
    if present("word_embed_proj_dim"):  # a second key for the width of embeddings
        keys["word_embed_proj_dim"] = [config.word_embed_proj_dim, config.hidden_size // 2]
    if present("expand"):  # the inner width is a multiple of hidden_size, and stays
        keys["expand"] = [config.expand, config.expand * 2]
    if heads := present(HEADS):
        keys[HEADS], widths[HEADS] = [heads, heads // 2], heads // 2
        if present(GROUPS) == heads:
            keys[GROUPS] = keys[HEADS]
    before = shapes_by(config)
    ffn = [key for key in FFN_KEYS if present(key) and shapes_by(changed(config, {key: present(key) // 2})) != before]
    for key in ffn:
        keys[key] = [present(key), present(key) // 2]
        axis = "moe_intermediate_size" if key == FFN and "intermediate_size_mlp" in ffn else FFN_KEYS[key]
        widths[axis] = keys[key][1]
    if heads and not ffn:  # no key: always four times the hidden size
        widths[FFN] = 4 * config.hidden_size // 2
    expected = shapes_by(changed(config, {key: new for key, (_, new) in keys.items()}))
    return {"ratio": RATIO, "widths": widths, "keys": keys, "expected": expected}


# -- what came out ----------------------------------------------------------------------------------------------------------


def classify(expected: Mapping[str, Sequence[int]], outcome: Outcome) -> tuple[str, str]:
    """The verdict and what it rests on."""
    if outcome.refused:
        return REFUSED, outcome.error
    if outcome.error:
        return (WRONG if outcome.pruned else CRASHED), outcome.error
    if outcome.problems:
        return WRONG, f"{len(outcome.problems)} tensors do not load, {outcome.problems[0]} first"
    assert outcome.shapes is not None
    error = relative_error(outcome.memory, outcome.reloaded)
    if not error <= EQUAL:  # NaN is wrong as well
        return WRONG, f"logits differ by {error:.1e} of the largest"
    off = [name for name in expected if list(outcome.shapes.get(name, ())) != list(expected[name])]
    off += sorted(set(outcome.shapes) - set(expected))
    if off:
        found, wanted = outcome.shapes.get(off[0]), expected.get(off[0])
        return UNDER, f"{len(off)} of {len(expected)} tensors, {off[0]} is {found} and not {wanted}"
    return AS_ASKED, ""


def relative_error(a: Any, b: Any) -> float:
    """The largest difference of two tensors over the largest value of the first."""
    return float((a.double() - b.double()).abs().max() / a.abs().max()) if a.shape == b.shape else float("inf")


def read_outcome(folder: Path, tool: str) -> Outcome:
    """Reads what the processes of a tool have left in its folder."""
    from safetensors.torch import load_file

    if (folder / tool / "error.json").is_file():
        document = json.loads((folder / tool / "error.json").read_text(encoding="utf-8"))
        return Outcome(document["error"], document["refused"], pruned=document["step"] == "reload")
    document = json.loads((folder / tool / "reloaded.json").read_text(encoding="utf-8"))
    return Outcome(
        problems=tuple(document["problems"]),
        shapes=document["shapes"],
        memory=load_file(folder / tool / "memory.safetensors")["logits"],
        reloaded=load_file(folder / tool / "reloaded.safetensors")["logits"],
    )


def attempt(folder: Path, tool: str, python: str, timeout: float, attention: str = "sdpa") -> Outcome:
    """Prunes in one process and reloads in another."""
    tools = str(ROOT / "benchmarks" / "zoo_tools.py")
    for step in ([tool, str(folder), "--attention", attention], ["reload", str(folder), tool]):
        pruned = step[0] == "reload"
        try:
            done = subprocess.run([python, tools, *step], capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return Outcome(f"no end after {timeout:.0f} s", pruned=pruned)
        if done.returncode and not (folder / tool / "error.json").is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return Outcome(last, pruned=pruned)
        if done.returncode:
            break
    return read_outcome(folder, tool)


def examine(family: str, tool: str, python: str, timeout: float) -> Row:
    """One cell. The peer may have the attention that suits it: it is given eager attention where sdpa does not end well."""
    best: Row | None = None
    for attention in ("sdpa", "eager") if tool == PEER else ("sdpa",):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            expected = prepare(folder, family)["expected"]
            row = Row(family, *classify(expected, attempt(folder, tool, python, timeout, attention)))
            row = Row(family, row.verdict, row.detail.replace(f"{folder}/", ""))
        if best is None or VERDICTS.index(row.verdict) <= VERDICTS.index(best.verdict):
            best = row
        if best.verdict == AS_ASKED:
            break
    assert best is not None
    return best


def prepare(folder: Path, family: str) -> dict[str, Any]:
    """The teacher, texts to calibrate on and the request, as the tools find them."""
    from tests.models import save_teacher, text
    from tests.zoo.configs import config_of

    config = shaped(config_of(family))
    save_teacher(folder / "teacher", config)
    (folder / "corpus.txt").write_text(text(150), encoding="utf-8")
    request = request_of(config)
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    return request


# -- the table ----------------------------------------------------------------------------------------------------------------


def render(rows: Mapping[str, Sequence[Row]]) -> str:
    """A markdown table of families by tools, a line of sums for each tool, and the details as notes."""
    tools = list(rows)
    lines = ["| family | " + " | ".join(tools) + " |", "|---" * (len(tools) + 1) + "|"]
    notes: dict[str, int] = {}

    def cell(row: Row) -> str:
        return row.verdict + (f"<sup>{notes.setdefault(row.detail, len(notes) + 1)}</sup>" if row.detail else "")

    lines += [
        f"| {line[0].family} | " + " | ".join(map(cell, line)) + " |" for line in zip(*rows.values(), strict=True)
    ]
    lines += ["", *(f"- {summary(tool, rows[tool])}" for tool in tools), ""]
    lines += [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join(lines).rstrip() + "\n"


def summary(tool: str, rows: Sequence[Row]) -> str:
    counts = Counter(row.verdict for row in rows)
    found = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"{tool}: of {len(rows)} families {found}"


def versions(python: str) -> str:
    """Returns the versions, in the peer's environment, of the packages that decide the outcome."""
    names = ["torch-pruning", "torch", "transformers"]
    source = f"from importlib.metadata import version; print(*map(version, {names}))"
    done = subprocess.run([python, "-c", source], capture_output=True, text=True, check=True)
    return ", ".join(f"{name} {number}" for name, number in zip(names, done.stdout.split(), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description="many families, pruned by half, beside Torch-Pruning")
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--peer-python", help="the python of an environment that has torch-pruning")
    parser.add_argument("--only", choices=[OURS, PEER], help="one tool alone")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a process of ours may take (300)")
    parser.add_argument(
        "--peer-timeout", type=float, default=100, help="the same for the peer, which takes seconds (100)"
    )
    parser.add_argument("--rows", type=Path, help="keep what is found in this file, and do not try it again")
    parser.add_argument("-o", "--output", type=Path, help="write the page here: the table and what it means")
    args = parser.parse_args()
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    pythons = {OURS: sys.executable, PEER: args.peer_python}
    limits = {OURS: args.timeout, PEER: args.peer_timeout}
    kept = json.loads(args.rows.read_text(encoding="utf-8")) if args.rows and args.rows.is_file() else []
    rows: dict[str, list[Row]] = {tool: [] for tool, python in pythons.items() if python and args.only in (None, tool)}
    for family in args.families:
        for tool, found in rows.items():
            if [family, tool] not in [row[:2] for row in kept]:
                row = examine(family, tool, pythons[tool], limits[tool])
                kept.append([family, tool, row.verdict, row.detail])
                print(f"{family} {tool}: {row.verdict} {row.detail}", file=sys.stderr, flush=True)
                if args.rows:
                    args.rows.write_text(json.dumps(kept, indent=1), encoding="utf-8")
            found.extend(Row(*one[:1], *one[2:]) for one in kept if one[:2] == [family, tool])
    table = render(rows)
    print(table)
    if not args.peer_python:
        print(MISSING)
    if args.output:
        header = HEADER.format(versions=versions(args.peer_python)) if args.peer_python else ""
        args.output.write_text(header + table, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
