"""The `widths` check: the widths asked for are those of the configuration and of every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from minitron.compiler.capture.models import stored_tensors
from minitron.compiler.verify.checks import Check, exactly
from minitron.compiler.verify.hugging_face import NotRunnable
from minitron.compiler.verify.routes import Routes
from minitron.specs.builds import CONFIG, STUDENT

Shapes = Mapping[str, tuple[int, ...]]


def widths(routes: Routes) -> Check:
    """Compares with the model as it is loaded; with the configuration alone where it cannot be."""
    subject = routes.subject
    try:
        planned, got = (
            {name: tuple(value.shape) for name, value in stored_tensors(model).items()}
            for model in (subject.model, routes.model)
        )
    except NotRunnable:
        planned, got = {}, {}
    return exactly("widths", wrong_widths(subject.build / STUDENT, subject.config_widths, planned, got), "as asked for")


def wrong_widths(folder: Path, wanted: Mapping[str, int], planned: Shapes, got: Shapes) -> str | None:
    """The first few widths that are other ones, in words. `wanted`: configuration key -> width; shapes by tensor."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    wrong = [f"{key} is {config.get(key)}, not {width}" for key, width in wanted.items() if config.get(key) != width]
    wrong += [f"{name} is {got.get(name)}, not {shape}" for name, shape in planned.items() if got.get(name) != shape]
    return "; ".join(wrong[:3]) or None
