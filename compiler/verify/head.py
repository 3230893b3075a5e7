"""The `head` check: the description of the head in training.yaml yields the Hugging Face model's logits."""

from __future__ import annotations

from typing import Any

import torch

from minitron.compiler.verify.checks import Check
from minitron.compiler.verify.comparison import compare
from minitron.compiler.verify.hugging_face import in_float32
from minitron.compiler.verify.routes import Routes
from minitron.specs.training_plan import HeadPlan


def head(routes: Routes) -> Check:
    """Compares logits that are made of the last hidden states as the loss makes them."""
    subject, wanted = routes.subject, routes.loaded
    with in_float32(routes.model, subject.teacher.captured, subject.student.buffers):
        got = described_logits(routes.model, subject.teacher.head, routes.ids)
    return compare("head", got, wanted, "the head that the loss uses against the Hugging Face model", routes.floor)


def described_logits(model: Any, head: HeadPlan, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V]"""
    with torch.no_grad():
        hidden = model.get_submodule(head.backbone)(input_ids=ids, use_cache=False).last_hidden_state
        parameters = dict(model.named_parameters(remove_duplicate=False))
        z = hidden @ parameters[head.weight].T
        if head.bias is not None:
            z = z + parameters[head.bias]
        z = z * head.scale
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
