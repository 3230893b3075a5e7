"""Refuses weight files of another model than config.json describes, by the tensors that they have too many or too few."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.models import canonical_names, stored_tensors
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.specs.errors import UsageError

# Tables that older versions of transformers saved in every layer, and that are computed today.
OLD_TABLES = (
    re.compile(r"\.(inv_freq|causal_mask|masked_bias|position_ids)$"),
    re.compile(r"(attn|attention)\.bias$"),
)
# The key for layers behind the last one that predict further tokens, which no model of transformers runs.
FURTHER_LAYERS = "num_nextn_predict_layers"


def check_nothing_beside(captured: Captured, checkpoint: Checkpoint) -> None:
    """Raises UsageError where the files have tensors in modules of the model, or in further layers, that it has no parameter
    for: a bias that config.json does not speak of is left out of what the model computes.

    Tensors elsewhere (the head of another task, say) are nothing to the model, and neither are those that its class names as
    such, or layers that predict further tokens.
    """
    names = canonical_names(captured.model)
    modules = {name.rpartition(".")[0] for name in names}
    ignored = [*OLD_TABLES, *map(re.compile, _to_ignore(captured.model))]
    further = getattr(captured.config, FURTHER_LAYERS, None) or 0
    last = captured.layer_count + further if isinstance(further, int) else captured.layer_count
    predicting = range(captured.layer_count, last)
    found = [
        name
        for name in checkpoint.tensors
        if name not in names
        and (name.rpartition(".")[0] in modules or captured.layer_in_path(name) is not None)
        and captured.layer_in_path(name) not in predicting
        and not any(one.search(name) for one in ignored)
    ]
    if not found:
        return
    tensors = "a tensor" if len(found) == 1 else f"{len(found)} tensors, the first of them"
    raise UsageError(
        f"{checkpoint.folder}: the weight files have {tensors} {found[0]} ({checkpoint.tensors[found[0]].file.name}), which "
        "the model that config.json describes has not, so it would compute something else than the one that was saved; "
        "correct config.json (the number of layers, a key for biases), or take such tensors out of the files"
    )


def check_head(
    captured: Captured, checkpoint: Checkpoint, missing: Collection[str], *, converted: Callable[[str], bool]
) -> None:
    """Raises UsageError where the files hold all of the model but its head, under their own names or those that they have in
    the base model: a model saved without its head, or with that of another task.

    `converted` tells of a tensor of the files whether transformers makes one of the model's of it.
    """
    head = getattr(captured.model, "get_output_embeddings", lambda: None)()
    if head is None or not missing:
        return
    prefix = f"{getattr(captured.model, 'base_model_prefix', '')}."
    there = checkpoint.tensors
    absent = {name for name in missing if name.removeprefix(prefix) not in there}
    parameters = stored_tensors(captured.model)
    of_head = {name for name, value in parameters.items() if any(value is one for one in head.parameters())}
    if not absent or not absent <= of_head or len(absent) == len(parameters):
        return
    others = [name for name in there if name not in parameters and f"{prefix}{name}" not in parameters]
    if any(map(converted, others)):
        return
    instead = f"; it has {others[0]} in its place" if others else ""
    raise UsageError(
        f"{checkpoint.folder} was saved without the head of a language model: {min(absent)} is missing{instead}; name the "
        "checkpoint with it, as AutoModelForCausalLM saves it"
    )


def _to_ignore(model: Any) -> list[str]:
    """The patterns of tensors that a class of transformers expects in checkpoints and does not load."""
    return [
        pattern
        for module in model.modules()
        for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
