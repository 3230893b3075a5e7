"""One step of generation with a cache, on the meta device: a student must be able to do what its teacher did.

The graph has no cache. A family may hold a state of a width that its configuration takes from another key than the weights do;
then the student computes its logits and cannot generate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._export.utils import _compiling_state_context

from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.models import build_meta, modelling_line, quiet, without_grouped_products
from minitron.specs.errors import UsageError, first_line

# What transformers' models hand from one step to the next: (of the output, of the next call).
CACHES = ("past_key_values", "cache_params", "state")


def check_cached_step(captured: Captured, config: Any) -> None:
    """Raises UsageError where the model of `config` fails a step with a cache that its teacher does."""
    failure = _failure(captured, config)
    if failure is not None and _failure(captured, captured.config) is None:
        raise UsageError(f"a student of these widths could not generate with a cache: {failure}")


def _failure(captured: Captured, config: Any) -> str | None:
    """The error of two steps, with the line of the model's code that it comes from; None where both succeed."""
    model = without_grouped_products(build_meta(config, captured.dtype, captured.attention))
    try:
        with quiet(), torch.no_grad(), _compiling_state_context():
            first = model(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta"), use_cache=True)
            held = {key: first[key] for key in CACHES if key in first and first[key] is not None}
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), use_cache=True, **held)
    except Exception as error:  # whatever a modelling file raises; it is compared with what the teacher raises
        return first_line(error) + modelling_line(error)
    return None
