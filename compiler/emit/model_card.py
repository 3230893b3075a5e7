"""The model card of the pruned student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from minitron.specs.builds import CARD
from minitron.specs.model_card import TAGS, UNDISTILLED

# What a student inherits: the terms of use, and the languages.
KEPT = ("license", "license_name", "license_link", "language")
LARGEST_CARD = 1_000_000  # bytes


def model_card(plan: dict[str, Any], folder: Path) -> str:
    """Returns the card as Markdown with the front matter that model hubs read, from a plan document; `folder` is the
    teacher's, whose own card says under which licence the model may be used."""
    teacher, student, spec = plan["teacher"], plan["student"], plan["spec"]
    rows = [f"| {key} | {old} | {student['widths'].get(key, old)} |" for key, old in teacher["widths"].items()]
    rows += [
        f"| {label} | {teacher[key]:,} | {student[key]:,} |"
        for label, key in (
            ("parameters", "parameters"),
            ("weight bytes", "weight_bytes"),
            ("KV cache bytes per token", "kv_cache_bytes_per_token"),
        )
    ]
    return f"""---
{_front_matter(teacher, folder)}---

# {spec["name"]} (pruned, not yet distilled)

Made by minitron from `{teacher["model"]}`: the method of Minitron (arXiv 2407.14679, 2408.11796), activation-based pruning of
width and depth. {UNDISTILLED}

| | teacher | student |
|---|---|---|
{chr(10).join(rows)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def _front_matter(teacher: dict[str, Any], folder: Path) -> str:
    """The front matter as YAML. Only a model of the Hub is a `base_model`: a path means nothing elsewhere."""
    kept = {key: value for key, value in _front_matter_of(folder / CARD).items() if key in KEPT}
    base = {"base_model": teacher["model"]} if teacher["commit"] is not None else {}
    shared: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    text: str = yaml.safe_dump(shared | kept | base, sort_keys=False, allow_unicode=True, width=1000)
    return f"{text}{TAGS}\n"


def _front_matter_of(card: Path) -> dict[str, Any]:
    """The front matter of a card; empty where it cannot be read: a teacher may have any card."""
    try:
        if card.stat().st_size > LARGEST_CARD:
            return {}
        parts = card.read_text(encoding="utf-8-sig").split("---\n", 2)
        document = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return document if isinstance(document, dict) else {}
