"""Prunes one family with one tool: benchmarks/zoo.py runs this file in a process under that tool's python.

    python zoo_tools.py minitron FOLDER          prunes FOLDER/teacher as FOLDER/request.json says
    python zoo_tools.py torch-pruning FOLDER     the same by Torch-Pruning, in whose environment minitron is not needed
    python zoo_tools.py reload FOLDER TOOL       loads what the tool has written, as any user would

The first two leave FOLDER/TOOL/student, a checkpoint, and memory.safetensors: token ids and the logits that the pruned model
gave before it was written. The last leaves reloaded.safetensors and reloaded.json. An error is left in words, in error.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

Shapes = dict[str, list[int]]
TOKENS = (2, 24)


def shapes_of(model: Any) -> Shapes:
    """Name -> sizes of everything that a checkpoint of the model holds."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def shapes_by(config: Any) -> Shapes:
    """Returns the tensors' shapes in a model of this configuration. Raises whatever its modelling code raises."""
    with torch.device("meta"):
        return shapes_of(AutoModelForCausalLM.from_config(config))


def changed(config: Any, keys: dict[str, Any]) -> Any:
    """A copy of a configuration in which these keys have other values."""
    config = copy.deepcopy(config)
    for key, value in keys.items():
        setattr(config, key, value)
    return config


def token_ids(vocabulary: int, length: int = TOKENS[1]) -> torch.Tensor:
    return torch.randint(3, vocabulary, (TOKENS[0], length), generator=torch.Generator().manual_seed(0))


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


# -- minitron -----------------------------------------------------------------------------------------------------------


def prune_with_minitron(folder: Path, request: dict[str, Any], attention: str) -> None:
    """A whole compile. The logits before writing are those of the rewritten graph on weights made from the teacher's."""
    del attention  # which the compiler chooses by itself
    import yaml

    from minitron.compiler import compile as driver
    from minitron.compiler import compile_spec
    from minitron.compiler.capture.models import build_meta
    from minitron.compiler.emit.student import student_weights
    from minitron.compiler.graph.executor import Executor, Settings
    from minitron.compiler.importance.scores import ScoreTable
    from minitron.compiler.importance.select import select
    from minitron.compiler.weights.buffers import load_buffers
    from minitron.compiler.weights.source import open_weights
    from minitron.specs import load_spec
    from minitron.specs.progress import Silent

    build = folder / "minitron"
    spec = {
        "name": "zoo",
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "student": request["widths"],
        "importance": {
            "data": {"text": [str(folder / "corpus.txt")], "document": "line", "samples": 6, "sequence_length": 48}
        },
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    plan = compile_spec(load_spec(folder / "spec.yaml"), build, device="cpu", progress=Silent())
    captured = plan.teacher.captured
    scores = ScoreTable.from_tensors(load_file(build / "scores.safetensors"))
    selection = select(plan.targets, plan.teacher.roles, scores, captured.layer_count, contiguous=False)
    buffers = load_buffers(build_meta(captured.config, torch.float32, captured.attention))
    student = driver.rewrite(plan, selection, buffers)
    fetch = student_weights(open_weights(captured, plan.checkpoint), student.recipes, captured.stored_dtype)
    settings = Settings("cpu", torch.float32, plan.dtype)
    executor = Executor(student.graph_module, captured.layer_of, fetch, student.buffers, settings)
    ids, found = token_ids(captured.config.vocab_size, captured.length or TOKENS[1]), []
    executor.run([ids], output=lambda logits, _: found.append(logits))
    save_file({"ids": ids, "logits": found[0].float().contiguous()}, build / "memory.safetensors")


# -- Torch-Pruning ------------------------------------------------------------------------------------------------------

FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")


def prune_with_peer(folder: Path, request: dict[str, Any], attention: str) -> None:
    """The way of its example for language models (examples/LLMs/prune_llm.py), spelled out for more families.

    As there: one ratio for widths and heads, whole heads within their key-value groups, gate and up of a fused projection
    together, no head dimensions, widths in multiples of four where what is asked for is one, the head ignored. Beyond it, in
    its favour: no cache is traced; what the request leaves as it is (routers, low ranks, state spaces) is ignored too; the
    dimension of stacked experts that belongs to the hidden size is named; the configuration is the one, among all that take
    each asked width or leave it, whose model has the pruned model's shapes, and numbers that modules keep are those of such
    a model.
    """
    import torch_pruning as tp

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "teacher", dtype=torch.float32, attn_implementation=attention
    ).eval()
    config, ratio = model.config, request["ratio"]
    config.use_cache = False  # the concatenations of a cache are not of channels
    ids = token_ids(config.vocab_size)
    heads, out_groups = {}, {}
    for module in model.modules():
        own = dict(module.named_children())
        query = own.get("q_proj", own.get("q_b_proj"))
        if isinstance(query, torch.nn.Linear):
            heads[query] = config.num_attention_heads
            groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            heads |= {own[name]: groups for name in ("k_proj", "v_proj", "kv_b_proj") if name in own}
        for name in FUSED:
            if isinstance(own.get(name), torch.nn.Linear):
                heads[own[name]] = config.num_attention_heads
        if isinstance(own.get("gate_up_proj"), torch.nn.Linear):
            out_groups[own["gate_up_proj"]] = 2
    expected, ignored = request["expected"], [model.get_output_embeddings()]
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv1d) or module in heads:
            continue
        if expected[f"{name}.weight"][0] == module.weight.shape[0]:
            ignored.append(module)
    old, new = request["keys"]["hidden_size"]
    stacked = [
        (parameter, dim)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        for dim in range(1, 3)
        if (parameter.shape[dim], expected[name][dim]) == (old, new)
    ]
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=ids[:1],
        importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        out_channel_groups=out_groups,
        unwrapped_parameters=stacked or None,
        output_transform=lambda output: output.logits,
        round_to=math.gcd(4, *request["widths"].values()),
    )
    for group in pruner.step(interactive=True):
        group.prune()
    settle(model, fitting(config, request["keys"], shapes_of(model)))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    save_file({"ids": ids, "logits": logits.contiguous()}, folder / "torch-pruning" / "memory.safetensors")
    model.save_pretrained(folder / "torch-pruning" / "student")


def fitting(config: Any, keys: dict[str, list[Any]], shapes: Shapes) -> dict[str, Any]:
    """The values of the keys, each as asked or as it was, whose model has these shapes; all as asked where no such values
    fit."""
    for values in itertools.product(*(reversed(pair) for pair in keys.values())):
        chosen = dict(zip(keys, values, strict=True))
        try:
            if shapes_by(changed(config, chosen)) == shapes:
                return chosen
        except Exception:  # modelling code raises anything of numbers that do not go together
            continue
    return {key: new for key, (_, new) in keys.items()}


def settle(model: Any, chosen: dict[str, Any]) -> None:
    """Writes the widths into the configuration and into the numbers that modules have copied from it."""
    with torch.device("meta"):
        try:
            fresh = dict(AutoModelForCausalLM.from_config(changed(model.config, chosen)).named_modules())
        except Exception:  # no such model: its numbers stay as the pruning has left them
            fresh = {}
    for key, value in chosen.items():
        setattr(model.config, key, value)
    for name, module in model.named_modules():
        for key, value in vars(fresh.get(name, module)).items():
            if type(value) is int and not key.startswith("_"):
                setattr(module, key, value)


# -- both ---------------------------------------------------------------------------------------------------------------


def reload(folder: Path, tool: str) -> None:
    """The checkpoint as transformers loads it: what is missing, its shapes, its logits."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder / tool / "student", dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    problems = sorted([*info["missing_keys"], *info["unexpected_keys"], *(key[0] for key in info["mismatched_keys"])])
    document = {"problems": problems, "shapes": shapes_of(model)}
    (folder / tool / "reloaded.json").write_text(json.dumps(document), encoding="utf-8")
    ids = load_file(folder / tool / "memory.safetensors")["ids"]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    save_file({"logits": logits.contiguous()}, folder / tool / "reloaded.safetensors")


PRUNE = {"minitron": prune_with_minitron, "torch-pruning": prune_with_peer}


def run_step(step: str, folder: Path, tool: str, attention: str = "sdpa") -> int:
    """0, or 1 where it went wrong and error.json says how: what a tool does with a family is what is measured."""
    (folder / tool).mkdir(exist_ok=True)
    try:
        if step == "reload":
            reload(folder, tool)
        else:
            request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
            PRUNE[tool](folder, request, attention)
    except Exception as error:
        refused = type(error).__name__ in ("SpecInvalid", "UsageError")
        document = {"error": first_line(error), "refused": refused, "step": step}
        (folder / tool / "error.json").write_text(json.dumps(document), encoding="utf-8")
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="one step of benchmarks/zoo.py")
    parser.add_argument("step", choices=[*PRUNE, "reload"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tool", nargs="?", choices=list(PRUNE))
    parser.add_argument("--attention", default="sdpa")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return run_step(args.step, args.folder, args.tool or args.step, args.attention)


if __name__ == "__main__":
    sys.exit(main())
