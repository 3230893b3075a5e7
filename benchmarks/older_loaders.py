"""Loads students with an older transformers, and compares logits with those of the installed one.

    python -m venv /tmp/older && /tmp/older/bin/pip install 'transformers==4.57.*' torch
    python benchmarks/older_loaders.py --python /tmp/older/bin/python [FAMILY ...]

A tiny teacher of each family, whose rotary embeddings are not at their defaults, is compiled; one layer is dropped, so that
lists over layers are shorter. Prints, for each student, the largest difference of the logits against the largest logit. Ends
with 1 where one is above 1e-4 or could not be loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TOLERANCE = 1e-4
THETA = 5e5
DEFAULT = {"rope_type": "default", "rope_theta": THETA}
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 32}
HALF = DEFAULT | {"partial_rotary_factor": 0.5}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LINEAR, "head_dim": 8},
    "mistral": {"rope_parameters": DEFAULT, "head_dim": 12, "sliding_window": 8},
    "qwen2": {"rope_parameters": DEFAULT, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"rope_parameters": YARN, "head_dim": 12, "tie_word_embeddings": True},
    "gemma2": {"rope_parameters": DEFAULT, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8},
    "gemma3_text": {
        "rope_parameters": {"sliding_attention": DEFAULT | {"rope_theta": 9e3}, "full_attention": LINEAR},
        "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"rope_parameters": DEFAULT},
    "gpt_neox": {"num_key_value_heads": None, "rope_parameters": HALF},
    "stablelm": {"rope_parameters": HALF},
    "smollm3": {"rope_parameters": DEFAULT, "no_rope_layers": [1, 0, 1]},
    "mixtral": {"rope_parameters": DEFAULT, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip

# What the older interpreter runs: folders and the file of logits are its arguments.
_LOAD = """\
import json, sys
import torch, transformers
ids = torch.arange(48).view(2, 24)
found = {"version": transformers.__version__}
for folder in sys.argv[2:]:
    try:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            found[folder] = model(input_ids=ids, use_cache=False).logits.tolist()
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
json.dump(found, open(sys.argv[1], "w"))
"""


def students(names: list[str], folder: Path) -> dict[str, Path]:
    """Family -> the folder of its student."""
    import torch
    from transformers import AutoConfig

    from tests.foundry import Apprentice, Foundry
    from tests.models import COMMON, save_teacher

    torch.set_num_threads(1)
    foundry = Foundry(folder, Apprentice())
    made = {}
    for name in names:
        known = AutoConfig.for_model(name)
        own = FAMILIES[name]
        keys = {key: value for key, value in (COMMON | own).items() if hasattr(known, key) or key in own}
        keys = {key: value for key, value in keys.items() if value is not None}
        teacher = save_teacher(folder / f"teacher-{name}", AutoConfig.for_model(name, **keys))
        made[name] = (
            foundry.build(teacher, {"intermediate_size": 24, "layers": {"drop": [0]}}, program=False).folder / "student"
        )
    return made


def logits(interpreter: str, folders: list[Path], output: Path) -> dict[str, Any]:
    """Returns the logits of each folder's model in an interpreter's transformers, and its version."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([interpreter, "-c", _LOAD, str(output), *map(str, folders)], check=True, env=environment)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description="students read by an older transformers")
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--python", required=True, help="interpreter that has the older transformers")
    args = parser.parse_args()
    import torch

    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        made = students(args.families, Path(name))
        old = logits(args.python, list(made.values()), Path(name) / "old.json")
        new = logits(sys.executable, list(made.values()), Path(name) / "new.json")
        print(
            f"transformers {old['version']} against {new['version']}: largest difference of logits, of the largest logit"
        )
        for family, folder in made.items():
            if isinstance(old[str(folder)], str):
                print(f"{family:12} {old[str(folder)][:160]}")
                wrong += 1
                continue
            ours, theirs = (torch.tensor(side[str(folder)]) for side in (new, old))
            difference = float((ours - theirs).abs().max() / ours.abs().max())
            wrong += difference > TOLERANCE
            print(f"{family:12} {difference:.1e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
