"""Documents as the compiler and the runtime write them, small and by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

PLAN: dict[str, Any] = {
    "format_version": 1,
    "spec": {"name": "tiny", "path": "/specs/tiny.yaml", "sha256": "ab" * 32},
    "teacher": {
        "model_type": "llama",
        "parameters": 260_032,
        "non_embedding_parameters": 227_264,
        "active_parameters": 260_032,
        "weight_bytes": 1_040_128,
        "kv_cache_bytes_per_token": 1280,
        "flops_per_token": 520_064,
        "widths": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5},
    },
    "student": {
        "model_type": "llama",
        "parameters": 130_016,
        "non_embedding_parameters": 113_632,
        "active_parameters": 130_016,
        "weight_bytes": 520_064,
        "kv_cache_bytes_per_token": 1024,
        "flops_per_token": 260_032,
        "widths": {"hidden_size": 48, "intermediate_size": [128, 128, 96, 96], "num_hidden_layers": 4},
    },
    "axes": [
        {"axis": "hidden_size", "teacher": 64, "student": 48, "status": "approximate", "reason": "RMSNorm | see above"},
        {"axis": "intermediate_size", "teacher": 172, "student": [128, 128, 96, 96], "status": "exact", "reason": None},
        {
            "axis": "head_dim",
            "teacher": 8,
            "student": 8,
            "status": "refused",
            "reason": "cos and sin are a buffer",
        },
    ],
    "phases": [
        {
            "name": "calibrate",
            "tokens": 65_536,
            "flops": 3.4e10,
            "peak_memory_bytes": 12_582_912,
            "device_hours": 0.004,
        },
        {"name": "distill", "tokens": 3_000_000, "flops": 4.2e12, "peak_memory_bytes": None, "device_hours": None},
    ],
    "remarks": ["no weight files are there"],
    "selection": {"hidden_size": [list(range(48))], "intermediate_size": [[0, 3], [1, 2]]},
}

RESULTS: dict[str, Any] = {
    "format_version": 1,
    "models": {
        "distilled": {
            "parameters": 130_016,
            "weight_bytes": 520_064,
            "held_out": {"loss": 1.5, "perplexity": 4.4817, "tokens": 20_000},
            "tokens_per_second": 2100.4,
            "tasks": {"arc": {"metric": "acc", "value": 0.25, "stderr": 0.0125, "shots": 25, "of_teacher": 0.8333}},
            "continuation": "there was a [bold]girl[/bold]\x1b[31m",
        },
        "teacher": {
            "parameters": 260_032,
            "weight_bytes": 1_040_128,
            "held_out": {"loss": 1.25, "perplexity": 3.4903, "tokens": 20_000},
            "tokens_per_second": 1400.0,
            "tasks": {"arc": {"metric": "acc", "value": 0.3, "stderr": None, "shots": 25}},
            "continuation": "there was a little girl",
        },
        "pruned": {
            "parameters": 130_016,
            "weight_bytes": 520_064,
            "held_out": {"loss": 3.75, "perplexity": 42.5211, "tokens": 20_000},
            "tokens_per_second": 2100.0,
            "continuation": "the the the",
        },
    },
    "recovered": 0.9,
    "prompt": "Once upon a time",
}

VERIFICATION: dict[str, Any] = {
    "format_version": 1,
    "passed": True,
    "checks": [
        {"name": "widths", "passed": True, "exact": True, "max_error": 0.0, "tolerance": 0.0},
        {"name": "graph against student", "passed": True, "exact": False, "max_error": 3.1e-7, "tolerance": 1e-5},
    ],
}


@pytest.fixture
def plan() -> dict[str, Any]:
    return copy.deepcopy(PLAN)


@pytest.fixture
def results() -> dict[str, Any]:
    return copy.deepcopy(RESULTS)


@pytest.fixture
def verification() -> dict[str, Any]:
    return copy.deepcopy(VERIFICATION)


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A finished build folder, documents only."""
    folder = tmp_path / "build"
    (folder / "train").mkdir(parents=True)
    (folder / "model").mkdir()
    for name, content in (("plan.json", PLAN), ("results.json", RESULTS), ("verification.json", VERIFICATION)):
        (folder / name).write_text(json.dumps(content))
    (folder / "training.yaml").write_text("format_version: 1\ntokens: 3000000\n")
    steps = [
        {"step": n, "tokens": 4096 * n, "loss": 3.0 / n, "lr": 1e-4, "tokens_per_second": 1500.25} for n in (1, 2, 3)
    ]
    (folder / "train" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return folder
