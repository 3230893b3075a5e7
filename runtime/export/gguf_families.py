"""The models that minitron can write as GGUF: their names in the format, and the layout of their weights in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minitron.specs.errors import UsageError

Metadata = Callable[[Any], None]


@dataclass(frozen=True)
class Family:
    """A model family as the format defines it."""

    architecture: str
    """The name of the family in the format."""

    interleaved: bool
    """The rows of query and key projections pair neighbouring channels for rotation; Hugging Face pairs a head's halves."""

    unsupported: tuple[str, ...] = ()
    """Keys of the configuration that the format cannot express."""


FAMILIES = {
    "llama": Family("llama", interleaved=True, unsupported=("mlp_bias", "attention_bias")),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2", interleaved=False),
    "qwen3": Family("qwen3", interleaved=False, unsupported=("attention_bias",)),
}
"""The families by `model_type`: those whose layout a test reads back with another program's reader."""


def family_of(config: Any) -> Family:
    """Returns the family of a model. UsageError with the reason where the model cannot be written."""
    import gguf

    kind = config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        known = set(gguf.MODEL_ARCH_NAMES.values())
        reason = (
            "the layout of its weights in the format has not been checked"
            if kind.removesuffix("_text").replace("_", "") in {name.replace("_", "").replace("-", "") for name in known}
            else "the format has no names for its parts"
        )
        raise UsageError(f"a {kind} model cannot be written as GGUF: {reason}; possible are {', '.join(FAMILIES)}")
    for key in family.unsupported:
        if getattr(config, key, None):
            raise UsageError(f"a {kind} model with `{key}` cannot be written as GGUF: the format has no names for it")
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    if window and uses and window < config.max_position_embeddings:
        raise UsageError(
            f"a {kind} model with a sliding window of {window} tokens cannot be written as GGUF: the format has no key for it "
            f"in {family.architecture}, and the model would see more than it was trained to"
        )
    return family


def rotary(config: Any) -> tuple[float, np.ndarray[Any, Any] | None]:
    """Returns the base of the rotary embedding and, for Llama 3.1's scaling, the factor of each frequency [head_dim /
    2]. UsageError for scalings that the format cannot express.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = config.rope_parameters
    base, kind = float(settings["rope_theta"]), settings.get("rope_type", "default")
    if kind == "default":
        return base, None
    if kind != "llama3":
        raise UsageError(
            f"rotary embeddings scaled as `{kind}` cannot be written as GGUF; possible are default and llama3"
        )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_width(config)
    plain = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    return base, (plain / frequencies.double()).float().numpy()


def head_width(config: Any) -> int:
    """Returns the number of channels of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def tensors(model: Any, config: Any, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name of every parameter in the format and its tensor in the format's layout. UsageError for a
    parameter that has no name there.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # tied ones once: the format takes the embedding for the head then
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise UsageError(
                f"{name} cannot be written as GGUF: the format has no name for it in {family.architecture}"
            )
        tensor = parameter.detach()
        if family.interleaved and (heads := _rotated_heads(name, config)):
            tensor = interleave(tensor, heads)
        yield ours, tensor


def _rotated_heads(name: str, config: Any) -> int | None:
    """Returns the number of heads of a projection with rotary positions; None for other tensors."""
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows [heads, 2, width / 2] of a projection, in which the halves of a head follow each other, to
    [heads, width / 2, 2].
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
