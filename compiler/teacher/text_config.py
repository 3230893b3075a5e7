"""The configuration of the language tower in that of a multimodal model."""

from __future__ import annotations

import copy
from typing import Any

from minitron.specs.errors import UsageError

TIE = "tie_word_embeddings"
# What the whole model's configuration may say for its language tower.
SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype")


def text_config(model: str, config: Any) -> Any | None:
    """The configuration of the language tower of `model`; None for a model that has one tower. Raises UsageError where
    transformers has no class that is this tower alone."""
    from transformers import AutoModelForCausalLM

    if isinstance(getattr(config, "num_hidden_layers", None), int) or not hasattr(config, "text_config"):
        return None
    text = config.get_text_config(decoder=True)
    if type(text) is type(config) or type(text) not in AutoModelForCausalLM._model_mapping:
        raise UsageError(
            f"{model} is a {config.model_type} model of several towers, and transformers has no text-only class for its "
            f"language tower ({text.model_type}); name a decoder-only text model"
        )
    text = copy.deepcopy(text)
    for key in SHARED:
        if getattr(text, key, None) is None and getattr(config, key, None) is not None:
            setattr(text, key, getattr(config, key))
    text._name_or_path = config._name_or_path
    return text
