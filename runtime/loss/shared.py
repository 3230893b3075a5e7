"""The teacher's product with its head, kept for several students that learn from the same tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from minitron.runtime.loss.head import Head
from minitron.runtime.loss.products import project
from minitron.specs.loss_chunks import SHARED_BYTES, logits_chunk


@torch.no_grad()
def shared_logits(teacher_TE: Tensor, teacher: Head, chunk_tokens: int) -> Tensor:
    """Multiplies the hidden states of the first S tokens with the teacher's head: [S, V] in fp32, as many whole chunks of the
    loss as SHARED_BYTES hold. The chunks are those that the loss would multiply itself, so that not a bit of it changes."""
    tokens, kind = teacher_TE.shape[0], teacher_TE.device.type
    chunk = logits_chunk(kind, tokens, teacher.vocabulary, chunk_tokens)
    kept = min(tokens, SHARED_BYTES[kind] // (4 * teacher.vocabulary) // chunk * chunk)
    logits_SV = torch.empty(kept, teacher.vocabulary, dtype=torch.float32, device=teacher_TE.device)
    with torch.autocast(kind, enabled=False):
        for start in range(0, kept, chunk):
            part = slice(start, min(start + chunk, kept))
            project(teacher_TE[part], teacher.weight_VD, logits_SV[part])
    return logits_SV
