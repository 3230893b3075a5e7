"""The `head` check: the description of the head in training.yaml yields the Hugging Face model's logits."""

from __future__ import annotations

from typing import Any

import torch

from minitron.compiler.graph.names import Fetch
from minitron.compiler.verify.checks import Check
from minitron.compiler.verify.comparison import compare
from minitron.compiler.verify.routes import Routes
from minitron.specs.training_plan import HeadPlan


def head(routes: Routes) -> Check:
    """Compares logits that are made of the last hidden states as the loss makes them."""
    subject, wanted = routes.subject, routes.loaded
    got = routes.wide.run(lambda parameter: described_logits(routes.model, parameter, subject.teacher.head, routes.ids))
    return compare("head", got, wanted, "the head that the loss uses against the Hugging Face model", routes.floor)


def described_logits(model: Any, parameter: Fetch, head: HeadPlan, ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V]"""
    with torch.no_grad():
        hidden = model.get_submodule(head.backbone)(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        z = hidden @ parameter(head.weight).T
        if head.bias is not None:
            z = z + parameter(head.bias)
        z = z * head.scale
        return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)).cpu()
