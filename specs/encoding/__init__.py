"""Turns documents into token ids: the same framing, chat template and tokenizer for calibration, training and held-out
text."""

from __future__ import annotations

from minitron.specs.encoding.encoder import Encoded, Encoder
from minitron.specs.encoding.recipe import EncodingRecipe, recipe_of

__all__ = ["Encoded", "Encoder", "EncodingRecipe", "recipe_of"]
