"""Unties a teacher: its head gets a matrix of its own, where its configuration ties the head to the embedding."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.compiler.teacher.text_config import TIE
from minitron.specs.errors import UsageError


def untied_config(config: Any) -> Any:
    """Returns the configuration without the tie. Raises UsageError where nothing is tied."""
    if not getattr(config, TIE, False):
        raise UsageError(f"the head of this {config.model_type} has a matrix of its own already: {TIE} is false")
    changed = copy.deepcopy(config)
    setattr(changed, TIE, False)
    return changed


def untie(checkpoint: Checkpoint, config: Any, aliases: Mapping[str, str]) -> Checkpoint:
    """Returns the checkpoint as one of `config`, whose model has parameters that the files hold under another name.

    `aliases`: parameter -> the stored one that it equals.
    """
    return replace(checkpoint, config=config, tied_config=checkpoint.config, aliases=dict(aliases))
