"""Writes the multimodal model of a build whose teacher is a language tower: `minitron export BUILD --whole`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron.compiler.capture.models import quiet
from minitron.compiler.roles.names import HIDDEN
from minitron.compiler.teacher.checkpoint import fetch_weights
from minitron.compiler.teacher.model_config import load_config
from minitron.compiler.teacher.open_teacher import open_teacher
from minitron.compiler.towers.language_tower import language_tower
from minitron.compiler.towers.whole_config import projector_of, whole_class
from minitron.compiler.towers.whole_on_disk import write_whole
from minitron.compiler.verify_build import spec_of_build
from minitron.specs.builds import MODEL, PLAN, STUDENT, WHOLE, finished_note, read_document
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.load import LoadedSpec
from minitron.specs.progress import Progress

TOKENS = 32  # of the sequence that both models read
# As a share of the largest logit: the two classes run the same operators, in another order at most.
TOLERANCE = 1e-5


def export_whole(build: Path, target: Path | None, *, progress: Progress) -> Path:
    """Writes the teacher's whole model around the distilled student, or the pruned one where there is no other, and returns
    its folder.

    The written model is loaded and must give the student's logits for text. Raises UsageError for a build whose teacher is
    not a language tower, WorkError where the model cannot be written or is another function.
    """
    document = read_document(build / PLAN)
    if document is None or "selection" not in document:
        raise UsageError(f"{build} was not compiled to its end; compile it first")
    loaded = spec_of_build(build, document)
    if loaded.spec.teacher.tower is None:
        raise UsageError(
            f"the teacher of {build} is a model of one tower; take {build / MODEL} or {build / STUDENT} as it is"
        )
    checkpoint = language_tower(fetch_weights(open_teacher(loaded, weights=True, planned=_no_chain)))
    student = build / (MODEL if finished_note(build).is_file() else STUDENT)
    config = load_config(student)
    kept = document["selection"].get(HIDDEN, [list(range(config.hidden_size))])[0]
    target = target or build / WHOLE
    write_whole(checkpoint, student, target, kept, projector_of(checkpoint, config), progress)
    assert checkpoint.tower is not None
    _compare(target, student, checkpoint.tower.config)
    return target


def _no_chain(upper: LoadedSpec, build: Path) -> object:
    raise AssertionError("a rule of the language: a tower goes with a model, not with the result of a spec")


def _compare(target: Path, student: Path, whole: Any) -> None:
    """Loads the written model and compares its logits for text with the student's."""
    from transformers import AutoModelForCausalLM

    ids = _text_tokens(whole)
    alone = _logits(AutoModelForCausalLM, student, ids)
    found = _logits(whole_class(whole), target, ids)
    difference = float((alone - found).abs().max())
    if not difference <= TOLERANCE * float(alone.abs().max()):
        raise WorkError(f"{target} gives other logits than {student} ({difference:.1e}); please report this")


def _logits(cls: Any, folder: Path, ids_BL: torch.Tensor) -> torch.Tensor:
    """The logits [B, L, V] of the model in a folder, of which every tensor must be the model's."""
    with quiet(), torch.no_grad():
        model, report = cls.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
        wrong = sorted([*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]], key=str)
        if wrong:
            raise WorkError(f"{folder}: {wrong[0]} does not fit the model's configuration; please report this")
        logits: torch.Tensor = model.eval()(input_ids=ids_BL).logits.float()
    return logits


def _text_tokens(whole: Any) -> torch.Tensor:
    """Random token ids [1, L] without those that stand for an image or a sound."""
    special = {value for key, value in vars(whole).items() if key.endswith(("token_id", "token_index"))}
    drawn = torch.randint(0, whole.get_text_config().vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return torch.tensor([[int(one) for one in drawn if int(one) not in special]])
