"""The loss that a training minimises, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.runtime.loss.divergence import DivergenceName


@dataclass(frozen=True)
class DistillationLoss:
    """The loss that is minimised: `weight * temperature^2 * divergence + cross_entropy * (-log p(label))`, averaged
    over tokens.

    The temperature divides the logits of both models in the divergence (not in the cross-entropy); its square keeps the
    gradient's size independent of it (Hinton et al., arXiv 1503.02531, section 2). `weight` 0 needs no teacher.
    `chunk_tokens` bounds a chunk from above; a large vocabulary makes it smaller.
    """

    divergence: DivergenceName = "forward_kl"
    temperature: float = 1.0
    weight: float = 1.0
    cross_entropy: float = 0.0
    chunk_tokens: int = 1024
