"""Finds the names that a wrapper around the model gave its tensors: torch.compile, data parallelism, PEFT, the frame of
a multimodal model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

# What wrappers put into names, and what to do about each. They stand at the front, or where a part of the model was wrapped.
WRAPPERS = {
    "_orig_mod.": "the model was saved while torch.compile wrapped it: save its `_orig_mod`",
    "module.": "the model was saved inside a data-parallel wrapper: save its `module`",
    "_fsdp_wrapped_module.": "the model was saved inside FSDP: save the whole state dict of the unwrapped model",
    "_checkpoint_wrapped_module.": "the model was saved inside activation checkpointing: save the unwrapped model",
    "base_model.model.": "the model was saved inside PEFT: call merge_and_unload and save what it returns",
    "language_model.": "it is the language tower of a multimodal model: docs/checkpoints.md shows how to save it alone",
}
ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".base_layer.", ".lora_embedding_A.", ".modules_to_save.")
LEAST_SHARE = 0.5  # of the missing tensors that one prefix has to explain


@dataclass(frozen=True)
class ForeignName:
    """The part of a name that a wrapper added: `part` stands in the names of the file's tensors and not in the model's:
    `there` beside `wanted`."""

    part: str
    there: str
    wanted: str
    remedy: str


def find_foreign_name(missing: Collection[str], there: Mapping[str, object]) -> ForeignName | None:
    """Finds the extra part in front of, or inside, the names of a checkpoint. `missing` are names of the model that no
    file has, `there` those of the files."""
    wanted = set(missing)
    if not wanted:
        return None
    if (lora := next((name for name in there if any(part in name for part in ADAPTER_PARTS)), None)) is not None:
        part = next(part for part in ADAPTER_PARTS if part in lora)
        remedy = "the files hold the pieces of an adapter: call merge_and_unload and save what it returns"
        return ForeignName(part.strip("."), lora, min(wanted), remedy)
    for part, remedy in WRAPPERS.items():
        bare = {name.replace(part, ""): name for name in there if part in name}
        found = wanted & bare.keys()
        if len(found) >= LEAST_SHARE * len(wanted):
            first = min(found)
            return ForeignName(part, bare[first], first, remedy)
    endings: Counter[str] = Counter()
    example: dict[str, tuple[str, str]] = {}
    for name in there:
        for place in (index + 1 for index, character in enumerate(name) if character == "."):
            if name[place:] in wanted:
                endings[name[:place]] += 1
                example.setdefault(name[:place], (name, name[place:]))
    if not endings:
        return None
    part, count = endings.most_common(1)[0]
    if count < LEAST_SHARE * len(wanted):
        return None
    return ForeignName(part, *example[part], "rename the tensors without it")
