"""Models as transformers loads them from a folder.

Loaded in the dtype of its files a model costs no memory: its weights are the files, read when a layer runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron.compiler.capture.models import quiet
from minitron.compiler.teacher.model_config import OF_CODE, load_config
from minitron.specs.errors import WorkError, first_line


class NotRunnable(WorkError):
    """Raised where transformers cannot load a model or cannot run it: no check looks at its logits then."""


def load_model(
    folder: Path, attention: str | None, dtype: torch.dtype = torch.float32, *, of_user: bool = False
) -> Any:
    """The model of a folder, as any user loads it; `attention` None: the implementation that transformers chooses.
    `of_user`: a folder that nobody here has written. Keys of its configuration that only change how it is called are left
    out, and tensors that its files have beside the model's are ignored, as transformers ignores them and a plan tells.

    NotRunnable with transformers' words.
    """
    from transformers import AutoModelForCausalLM

    chosen: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        if of_user:
            chosen["config"] = load_config(folder, without=OF_CODE)
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, **chosen
            )
    except Exception as error:  # transformers raises anything
        raise NotRunnable(f"{folder} cannot be loaded back by transformers: {first_line(error)}") from None
    beside = [] if of_user else info["unexpected_keys"]
    problems = [*info["missing_keys"], *beside, *info["mismatched_keys"]]
    if problems:
        raise NotRunnable(
            f"{folder} does not load back whole: {problems[0]} and {len(problems) - 1} more tensors are off"
        )
    return model.eval()


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V]. NotRunnable where the model, though it loads, does not run."""
    try:
        with torch.no_grad():
            return model(input_ids=ids.to(model.device), use_cache=False).logits.cpu()  # type: ignore[no-any-return]
    except torch.OutOfMemoryError:  # nothing of the model
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # what operators raise of shapes that do not fit
        raise NotRunnable(f"it loads, but does not run in transformers: {first_line(error)}") from None
