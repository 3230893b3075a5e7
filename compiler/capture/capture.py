"""Captures a Hugging Face causal language model as an ATen graph, from its configuration alone.

The model is built on the meta device and exported without weights, with symbolic batch and sequence sizes. Parameters
keep the names that they have in the model's state dict.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from minitron.compiler.capture.inline_constants import inline
from minitron.compiler.capture.layer_config import with_layers
from minitron.compiler.capture.layer_kinds import Accounts, accounts
from minitron.compiler.capture.layer_lists import kinds_by_lists
from minitron.compiler.capture.models import (
    build_meta,
    build_model,
    canonical_names,
    find_layers,
    layer_count,
    modelling_line,
    quiet,
    uninitialised,
)
from minitron.compiler.capture.replicate_layers import repeat_layers
from minitron.compiler.capture.rotary import replace_overwritten
from minitron.compiler.graph.aten import PASS_THROUGH, RESHAPES, op_name
from minitron.compiler.graph.graph_module import empty_meta, fixed_length, rebuild
from minitron.compiler.graph.names import WRAPPER, module_path, strip_wrapper
from minitron.specs.errors import UsageError

# Export wants an upper bound for symbolic sizes; nothing of ours depends on it.
LONGEST = 1 << 20
SAMPLE = (2, 7)  # batch and sequence of the input that is traced
FIXED_LENGTH = 128  # the sequence length of a graph that cannot be exported with a dynamic one
# Words in an error of export:
OF_ONE_LENGTH = "(sequence)"  # the code depends on the number of tokens, the dimension of this name
DATA_DEPENDENT = ("data-dependent", "DataDependent")  # the code reads values of tensors, or sizes that follow from them
# Words in an error of transformers: the family does not have this attention, and the next one is tried.
NO_SUCH_ATTENTION = "does not support an attention implementation"
# Operators that read a number out of a tensor: without data, a size that follows from it is unknown.
TAKES_NUMBERS = {"item", "_local_scalar_dense"}
LEAST_LAYERS = 4  # a model of fewer is captured whole: finding out which layers are alike would take as long


class _Logits(torch.nn.Module):
    """input_ids [B, S] -> logits [B, S, V], without a cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.causal_lm = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.causal_lm(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    graph_module   the exported graph; parameters and buffers are `get_attr` nodes
    model          the Hugging Face module on the meta device that it was exported from
    config         its configuration
    attention      the attention implementation that could be exported (sdpa or eager)
    canonical      attribute name -> the one name of that parameter; tied parameters share one
    layers         the path of the module list that holds the layers (`model.layers`), and how many there are
    """

    graph_module: GraphModule
    model: torch.nn.Module
    config: Any
    attention: str
    dtype: torch.dtype
    canonical: dict[str, str]
    layer_path: str
    layer_count: int

    @property
    def length(self) -> int | None:
        """The fixed sequence length of the graph, where the model's own code depends on the length (a scan in chunks, a
        loop over positions); None where the length is dynamic."""
        return fixed_length(self.graph)

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    def module_of(self, node: Node) -> str:
        """The path of the innermost module that a node was traced in."""
        return module_path(node)

    def layer_of(self, node: Node) -> int | None:
        """The number of the layer that a node was traced in."""
        return self.layer_in_path(self.module_of(node))

    def layer_in_path(self, path: str) -> int | None:
        """The layer number in a module or parameter path."""
        prefix = self.layer_path + "."
        if not path.startswith(prefix):
            return None
        return int(path[len(prefix) :].split(".", 1)[0])

    def renumbered(self, name: str, numbers: Mapping[int, int]) -> str:
        """A parameter's name once its layer has its new number; `numbers` maps old to new."""
        layer = self.layer_in_path(name)
        if layer is None:
            return name
        prefix = f"{self.layer_path}.{layer}."
        return f"{self.layer_path}.{numbers[layer]}.{name.removeprefix(prefix)}"

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a stored tensor: the model's, or float32 where its code keeps that whatever it is loaded in."""
        kept = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        path, _, key = name.rpartition(".")
        value: torch.Tensor = getattr(self.model.get_submodule(path), key)
        if any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in kept) or not value.is_floating_point():
            return torch.float32 if value.is_floating_point() else value.dtype
        return torch.float32 if value.dtype == torch.float32 else self.dtype

    def token_embedding(self) -> str | None:
        """The canonical name of the parameter that token ids index, whatever views the ids are taken through."""
        ids = {next(node for node in self.graph.nodes if node.op == "placeholder")}
        for node in self.graph.nodes:
            name = op_name(node)
            if name in RESHAPES and node.args[0] in ids:
                ids.add(node)
            elif name == "embedding" and node.args[1] in ids:
                return self.parameter_behind(node.args[0])
        return None

    def parameter_behind(self, node: Any) -> str | None:
        """The canonical name of the parameter that a node reads, looked at through transposes and casts."""
        while isinstance(node, Node) and node.op == "call_function":
            name = op_name(node)
            if name not in PASS_THROUGH:
                return None
            node = node.args[0]
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        return self.canonical.get(strip_wrapper(str(node.target)))


def capture(config: Any, dtype: torch.dtype = torch.float32, otherwise: int = FIXED_LENGTH) -> Captured:
    """Exports the model of `config` in `dtype`. Raises UsageError where it cannot be exported, with torch's reason.

    A model whose code depends on the sequence length is captured at the length `otherwise`.
    """
    reasons: list[tuple[str, str]] = []
    for length in (None, otherwise):
        for attention in ("sdpa", "eager"):
            try:
                made = _export_once(config, dtype, attention, length) or _export(config, dtype, attention, length)
            except Exception as error:  # whatever a modelling file or export raises decides only whether we can go on
                of_one_length = OF_ONE_LENGTH in _first_line(error)
                if NO_SUCH_ATTENTION not in str(error):
                    reasons.append((attention, in_words(error)))
                if of_one_length:
                    break  # with every attention alike
                continue
            finally:
                # Each export leaves some MB of operators' results for fake tensors behind, in a cache of the process.
                FakeTensorMode.cache_clear()
            model, graph_module = made
            path, count = find_layers(model, config)
            names = canonical_names(model)
            return Captured(graph_module, model, config, attention, dtype, names, path, count)
        if not of_one_length:
            break
    raise UsageError(f"{getattr(config, 'model_type', 'this model')} cannot be traced to a graph; {_told(reasons)}")


def _told(reasons: Sequence[tuple[str, str]]) -> str:
    """The reasons of all attempts; one that is the same with every attention is told once."""
    if len({reason for _, reason in reasons}) == 1:
        return reasons[0][1]
    return "; ".join(f"with {attention} attention: {reason}" for attention, reason in reasons)


def in_words(error: Exception) -> str:
    """The reason that a model cannot be exported, and the line of its code where one is known."""
    place = modelling_line(error)
    if isinstance(error, UsageError):
        return str(error)
    text = _first_line(error)
    if any(mark in text for mark in DATA_DEPENDENT):
        return "its code decides by the values of tensors what it computes, which a graph cannot hold" + place
    return text + place


def _export_once(
    config: Any, dtype: torch.dtype, attention: str, length: int | None
) -> tuple[torch.nn.Module, GraphModule] | None:
    """Returns the result of `_export`, made from an export of a few layers, one for each group of layers that are
    alike.

    None where the layers of this model cannot be compared, or where the shortcut saves nothing.
    """
    count = layer_count(config)
    if count < LEAST_LAYERS:
        return None
    try:
        few = _representatives(config, dtype, attention, count, length or SAMPLE[1])
        if few is None or 2 * len(few.layers) > count:
            return None
        small, graph_module = _export(few.config, dtype, attention, length)
        path = few.path
        captured = Captured(graph_module, small, few.config, attention, dtype, {}, path, len(few.layers))
        model = build_meta(config, dtype, attention)
        return model, repeat_layers(graph_module, model, captured.layer_of, WRAPPER, path, few.stands_in)
    except Exception as error:  # its model may not take a configuration of few layers: all are exported then
        if OF_ONE_LENGTH in _first_line(error):
            raise
        return None


@dataclass(frozen=True)
class _Few:
    """A configuration of the layers that stand for all. `stands_in`: for each layer of the whole its number there."""

    config: Any
    path: str
    layers: list[int]
    stands_in: list[int]


def _representatives(config: Any, dtype: torch.dtype, attention: str, count: int, length: int) -> _Few | None:
    """The first layer, and of the others the first of each kind. None where these do not do what they stand for."""
    whole, path = _accounts(config, dtype, attention, length)
    if whole is None:
        return None
    kinds = list(zip(whole.layers, kinds_by_lists(config, count), strict=True))
    layers, known = [0], dict[Any, int]()
    for number, kind in enumerate(kinds[1:], start=1):
        if kind not in known:
            known[kind] = len(layers)
            layers.append(number)
    reduced = with_layers(config, count, layers)
    part, same_path = _accounts(reduced, dtype, attention, length, path)
    if part != Accounts(whole.outside, tuple(whole.layers[i] for i in layers)) or path != same_path:
        return None
    return _Few(reduced, path, layers, [0, *(known[kind] for kind in kinds[1:])])


def _accounts(
    config: Any, dtype: torch.dtype, attention: str, length: int, path: str = ""
) -> tuple[Accounts | None, str]:
    """Returns the accounts of a model's layers, and the path of their module list."""
    with quiet(), uninitialised(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = build_model(config, dtype, attention)
        path = path or find_layers(fake, config)[0]
        sample = torch.zeros(SAMPLE[0], length, dtype=torch.long)
        return accounts(fake, path, _Logits(fake), sample), path


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def _is_noop_cast(node: Node) -> bool:
    """Checks whether a node yields its input unchanged: a conversion to the dtype and device that the input has.

    Such casts chain a buffer that all layers share through the layers, so that each seems to read the previous one.
    """
    if op_name(node) not in ("to", "alias", "detach") or not isinstance(node.args[0], Node):
        return False
    old, new = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    return (old.dtype, old.device, old.layout) == (new.dtype, new.device, new.layout)


def _export(config: Any, dtype: torch.dtype, attention: str, length: int | None) -> tuple[torch.nn.Module, GraphModule]:
    """Returns the model on the meta device and its graph, of `length` tokens or with a dynamic length.

    Export sees fake tensors of the CPU: modelling files choose other operators on the meta device, which then refuse
    real weights.
    """
    batch = torch.export.Dim("batch", min=1, max=LONGEST)
    sequence = torch.export.Dim("sequence", min=1, max=LONGEST) if length is None else torch.export.Dim.STATIC
    # Export prints the graph so far to the standard error where the code decides by the values of tensors.
    with quiet(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        with uninitialised(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            fake = build_model(config, dtype, attention)
            sample = torch.zeros(SAMPLE[0], length or SAMPLE[1], dtype=torch.long)
        program = torch.export.export(_Logits(fake), (sample,), dynamic_shapes=({0: batch, 1: sequence},), strict=False)
        module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    names = canonical_names(fake)

    def canonical(target: str) -> str:
        name = strip_wrapper(target)
        return f"{WRAPPER}.{names[name]}" if name in names else target

    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            # The node's only use is to catch a retrace with other dtypes; it would pin the device.
            module.graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:
            # Export's fake tensors may lie in memory as those of another kernel do, where a view needs no copy.
            node.target = torch.ops.aten.reshape.default
        elif _is_noop_cast(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    _refuse_numbers(module.graph)
    replace_overwritten(module.graph)
    inline(module, {*names, *(name for name, _ in fake.named_buffers(remove_duplicate=False))}, WRAPPER)
    return build_meta(config, dtype, attention), rebuild(module, canonical, empty_meta)


def _refuse_numbers(graph: Graph) -> None:
    """Raises UsageError where the code takes sizes out of the values of tensors, as one expert after another does with the
    number of tokens that each is sent: the narrowed graph could not be proved without data."""
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) in TAKES_NUMBERS:
            stack = node.meta.get("nn_module_stack") or {}
            path = strip_wrapper(str(next(reversed(stack.values()))[0])) if stack else "the model"
            raise UsageError(f"its code takes sizes out of the values of tensors ({op_name(node)} in {path})")
