"""Rotary frequencies that depend on the length of the sequence: one set for short sequences, another for long ones.

Modelling code makes the second set at its first call, as a tensor of its own, and writes the active set over the buffer
of the first. Here the second set is a buffer of the model before it is run, so that it is computed as all other buffers
are (`load_buffers`), and in the graph the overwritten buffer is replaced by the value that was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

LENGTHS = "longrope"  # transformers' rope_type of frequencies in two sets


def _sets(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, str | None]]:
    """Yields (module, prefix of its buffers, kind of layer) for each rotary embedding with two sets of frequencies."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds == LENGTHS:
            yield module, "", None
        elif isinstance(kinds, dict):
            for kind, one in kinds.items():
                if one == LENGTHS:
                    yield module, f"{kind}_", kind


def hold_long_frequencies(model: torch.nn.Module) -> None:
    """Registers the set for long sequences as a buffer that no checkpoint holds, of the shape of the other."""
    for module, prefix, _ in _sets(model):
        short = getattr(module, f"{prefix}inv_freq")
        module.register_buffer(f"{prefix}long_inv_freq", torch.empty_like(short), persistent=False)


def fill_long_frequencies(model: torch.nn.Module) -> None:
    """Computes these buffers as transformers does at the first call."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module, prefix, kind in _sets(model):
        config: Any = module.config
        parameters = config.rope_parameters if kind is None else config.rope_parameters[kind]
        length = parameters["original_max_position_embeddings"] + 1
        table, _ = ROPE_INIT_FUNCTIONS[LENGTHS](config, torch.device("cpu"), seq_len=length, layer_type=kind)
        getattr(module, f"{prefix}long_inv_freq").copy_(table)


def replace_overwritten(graph: Graph) -> None:
    """Replaces a buffer that is overwritten whole by the value that was written, where nothing reads the buffer
    before."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for write in [node for node in graph.nodes if node.target is torch.ops.aten.copy_.default]:
        table, value = write.args[0], write.args[1]
        if not isinstance(table, Node) or table.op != "get_attr" or not isinstance(value, Node):
            continue
        readers = [user for user in table.users if user is not write]
        same = _same_kind(table, value)
        if not same or any(order[user] < order[write] for user in readers):
            continue
        write.replace_all_uses_with(value)
        for user in readers:
            user.replace_input_with(table, value)
        graph.erase_node(write)


def _same_kind(one: Node, other: Node) -> bool:
    """Checks whether two nodes yield tensors of one shape and dtype, so that writing one into the other changes
    neither."""
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.shape == b.shape and a.dtype == b.dtype
