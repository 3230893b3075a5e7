"""Block-local distillation, the first phase of an arm of benchmarks/recovery.py: every layer of the student learns its
teacher layer's output from the teacher's input, in the kept coordinates, all layers from one pass of the teacher (Puzzle, arXiv
2411.19146).

A hook gives each layer of the student what the teacher's layer was given, so that one forward and one backward train all of
them side by side: no gradient reaches another layer. The error is the relative one of `distill.loss.hidden_states`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def train_blocks(build: Path, teacher: Path, tokens: int, lr: float, seed: int) -> None:
    """Trains BUILD/student on `tokens` tokens and puts the result in its place. The optimizer is that of training.yaml."""
    plan = yaml.safe_load((build / "training.yaml").read_text(encoding="utf-8"))
    student = AutoModelForCausalLM.from_pretrained(build / "student", dtype=torch.float32).train()
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    kept = load_file(build / "coordinates.safetensors")
    pairs: list[tuple[int, int]] = plan["loss"]["hidden_states"]["pairs"]
    given: dict[int, Tensor] = {}
    yielded: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    for theirs, own in pairs:
        model.model.layers[theirs].register_forward_hook(_record(outputs, theirs))
        student.model.layers[own].register_forward_pre_hook(_replace(given, own), with_kwargs=True)
        student.model.layers[own].register_forward_hook(_record(yielded, own))
    parameters = list(student.model.layers.parameters())
    settings = plan["optimizer"]
    optimizer = torch.optim.AdamW(parameters, betas=tuple(settings["betas"]), weight_decay=settings["weight_decay"])
    batch, length = plan["global_batch_size"], plan["sequence_length"]
    steps = tokens // (batch * length)
    for step, ids in zip(range(steps), _batches(plan, build, batch, length, seed), strict=False):
        with torch.no_grad():
            inputs = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        for theirs, own in pairs:
            given[own] = _kept(kept, inputs[theirs])
        student.model(input_ids=ids, use_cache=False)
        losses = [_error(yielded[own], _kept(kept, outputs[theirs])) for theirs, own in pairs]
        torch.stack(losses).sum().backward()
        for _, own in pairs:
            torch.nn.utils.clip_grad_norm_(student.model.layers[own].parameters(), settings["clip_grad_norm"])
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, lr, settings["min_lr"])
        optimizer.step()
        optimizer.zero_grad()
    student.save_pretrained(build / "student")


def _replace(given: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((given[layer], *arguments[1:]), named) if arguments else ((), named | {"hidden_states": given[layer]})

    return hook


def _record(yielded: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: Any, _arguments: Any, result: Any) -> None:
        yielded[layer] = result[0] if isinstance(result, tuple) else result

    return hook


def _kept(coordinates: dict[str, Tensor], states: Tensor) -> Tensor:
    return states[..., coordinates["index"]] if "index" in coordinates else states @ coordinates["matrix"]


def _error(own: Tensor, wanted: Tensor) -> Tensor:
    return ((own - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def _rate(step: int, steps: int, lr: float, low: float) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return lr * (step + 1) / warm
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _batches(plan: dict[str, Any], build: Path, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """The training documents, packed one behind the other and cut, in an order that the seed decides."""
    tokenizer = AutoTokenizer.from_pretrained(build / "student")
    stream: list[int] = []
    for file in plan["data"]["jsonl"]:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            stream += tokenizer(json.loads(line)["text"])["input_ids"]
    rows = torch.tensor(stream[: len(stream) // length * length]).reshape(-1, length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(rows) - batch + 1, batch):
        yield rows[order[start : start + batch]]
