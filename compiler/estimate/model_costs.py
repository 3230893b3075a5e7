"""The costs of a model, from shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import Captured
from minitron.compiler.estimate.kv_cache import CacheLayer
from minitron.compiler.graph.aten import op_name
from minitron.compiler.roles.experts import is_stack
from minitron.compiler.roles.roles import Roles


@dataclass(frozen=True)
class ModelCosts:
    """The costs of a model as integers: bytes in the checkpoint's dtype, FLOPs of one token's forward pass.

    `flops_per_token` counts two for every weight that a token meets; `attention_flops_per_pair` is what attention adds
    for each earlier position that the token looks at. `cache` has bytes for elements: what each layer keeps of a token.
    """

    parameters: int
    non_embedding_parameters: int
    active_parameters: int
    weight_bytes: int
    cache: Sequence[CacheLayer]
    flops_per_token: int
    attention_flops_per_pair: int

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """The KV cache in bytes per token while no window is full."""
        return sum(layer.elements for layer in self.cache)

    def kv_cache_bytes(self, tokens: int) -> int:
        """The KV cache in bytes of a sequence of `tokens` tokens."""
        return sum(layer.of(tokens) for layer in self.cache)

    def forward_flops_per_token(self, length: int) -> int:
        """The FLOPs with attention, averaged over the positions of a sequence of `length`: a token sees half of it."""
        return self.flops_per_token + (length // 2) * self.attention_flops_per_pair

    def to_json(self) -> dict[str, int]:
        return {
            "parameters": self.parameters,
            "non_embedding_parameters": self.non_embedding_parameters,
            "active_parameters": self.active_parameters,
            "weight_bytes": self.weight_bytes,
            "kv_cache_bytes_per_token": self.kv_cache_bytes_per_token,
            "flops_per_token": self.flops_per_token,
            "attention_flops_per_pair": self.attention_flops_per_pair,
        }


@dataclass(frozen=True)
class HeadCounts:
    """The head counts of one attention layer: key-value groups, query heads, and the widths of a key and a value."""

    groups: int
    heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class Parts:
    """The parameters of a model that cost otherwise than others, by name.

    `embedding` is looked up and `head` multiplied; `stacked` hold the weights of experts, of which a token meets `chosen`.
    """

    embedding: str
    head: str
    stacked: Collection[str]
    chosen: int | None


def chosen_experts(roles: Roles) -> int | None:
    """Returns the number of experts that a token is sent to."""
    return max((mixture.picked for mixture in roles.mixtures.values()), default=None)


def model_costs(
    model: torch.nn.Module,
    parts: Parts,
    attention: Sequence[HeadCounts],
    cache: Sequence[CacheLayer] | None,
    bytes_per_weight: int,
) -> ModelCosts:
    """The costs of a model from its shapes. `attention` has one entry a layer that attends; `cache` counts elements, and is
    None where it is as wide as keys and values."""
    stacked, chosen, embedding, head = parts.stacked, parts.chosen, parts.embedding, parts.head
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    total = sum(sizes.values())
    active = sum(
        size * chosen // shapes[name][0] if name in stacked and chosen is not None else size
        for name, size in sizes.items()
    )
    ends = {embedding, head}
    non_embedding = total - sum(size for name, size in sizes.items() if name in ends)
    # An embedding is looked up, not multiplied; tied to the head it is both.
    multiplied = active - (sizes[embedding] if embedding != head else 0)
    if cache is None:
        cache = [CacheLayer(one.groups * (one.key_width + one.value_width)) for one in attention]
    kept = tuple(CacheLayer(layer.elements * bytes_per_weight, layer.window) for layer in cache)
    pairs = sum(2 * one.heads * (one.key_width + one.value_width) for one in attention)
    return ModelCosts(total, non_embedding, active, total * bytes_per_weight, kept, 2 * multiplied, pairs)


def embedding_name(captured: Captured) -> str:
    """The parameter that token ids index."""
    name = captured.token_embedding()
    assert name is not None, "roles are only found of a model that reads its token ids through an embedding"
    return name


def attention_counts(captured: Captured, roles: Roles, table: AxisTable) -> dict[int, HeadCounts]:
    """Layer -> the teacher's attention."""
    counts = {}
    for site in table.attentions:
        layer = captured.layer_of(site.node)
        if layer is None or layer not in roles.heads:
            continue
        heads = roles.heads[layer]
        value = site.node.meta["val"].shape[-1]
        query: Any = site.node.args[0]
        key = query.meta["val"].shape[-1] if op_name(site.node).startswith("scaled") else value
        counts[layer] = HeadCounts(heads.groups, heads.groups * heads.repeats, int(key), int(value))
    return counts


def stacked_parameters(captured: Captured, table: AxisTable, roles: Roles) -> set[str]:
    """Parameters that stack the weights of experts, or their biases; not a router's rows, which all tokens meet."""
    contracted = {contraction.weight for contraction in table.contractions}
    found = set()
    for name, dims in table.parameters.items():
        mixture = roles.mixtures.get(layer) if (layer := captured.layer_in_path(name)) is not None else None
        owned = mixture is not None and len(dims) > 1 and table.space.flat(dims[0]) == mixture.experts
        if owned and (is_stack(dims) or name not in contracted):
            found.add(name)
    return found


def sampled_logits_bytes(tokens: int, draws: int, vocabulary: int) -> int:
    """Bytes on disk of the teacher's samples, at most: every draw another token. A sure teacher, whose draws are often the
    same token, takes less."""
    token_id = 2 if vocabulary <= 1 << 16 else 4
    count = 1 if draws < 1 << 8 else 2
    return tokens * (draws * (token_id + count) + count)
