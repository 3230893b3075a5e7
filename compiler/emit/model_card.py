"""The model card of the pruned student."""

from __future__ import annotations

from typing import Any


def model_card(plan: dict[str, Any]) -> str:
    """Returns the card as Markdown with the front matter that model hubs read, from a plan document."""
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
    base = (
        f"base_model: {teacher['model']}\n"
        if teacher["model"].count("/") == 1 and not teacher["model"].startswith(".")
        else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [minitron, pruned]
{base}---

# {spec["name"]} (pruned, not yet distilled)

Made by minitron from `{teacher["model"]}`: the method of Minitron (arXiv 2407.14679, 2408.11796), activation-based pruning of
width and depth. This is the starting point of distillation; on its own it is worse than it will be.

| | teacher | student |
|---|---|---|
{chr(10).join(rows)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
