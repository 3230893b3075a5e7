"""Checks a spec against its teacher and its data before anything is narrowed."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

from minitron.compiler.capture.capture import Captured
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.compiler.teacher.tokenizer import lacking_tokens, load_tokenizer, tokenizer_files
from minitron.compiler.towers.whole_config import projector_of
from minitron.specs.blocks.distill import Distill, DistillPhase
from minitron.specs.blocks.importance import CalibrationData
from minitron.specs.data import DataSource, Source, are_apart
from minitron.specs.data_files import data_files, data_sources, resolve
from minitron.specs.documents import check_readable, check_share
from minitron.specs.errors import Problem, Refused, UsageError, WorkError
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import source_parts
from minitron.specs.model_config import positions_of
from minitron.specs.training_consistency import pairs_exist


def teacher_key(loaded: LoadedSpec) -> str:
    """The dotted path of the spec's value that names the teacher."""
    return "teacher.model" if loaded.spec.teacher.spec is None else "teacher.spec"


def check_lengths(loaded: LoadedSpec, captured: Captured) -> list[Problem]:
    """Checks that no sequence is longer than the teacher's positions."""
    longest = positions_of(captured.config)
    errors = []
    spec = loaded.spec
    blocks: list[tuple[str, CalibrationData | Distill | DistillPhase | None]]
    blocks = [("importance.data", spec.importance.data), ("distill", spec.distill)]
    blocks += [(f"distill.phases.{n}", one) for n, one in enumerate(spec.distill.phases if spec.distill else ())]
    for path, block in blocks:
        length = None if block is None else block.sequence_length
        if length is not None and longest is not None and length > longest:
            errors.append(
                Problem(
                    f"{path}.sequence_length",
                    f"{length} is more than the teacher's {longest} positions",
                    f"write at most {longest}",
                )
            )
    return errors


def check_documents(loaded: LoadedSpec) -> list[Problem]:
    """Checks that the files hold text in the form that the spec says. Names without a file are reported elsewhere."""
    errors = []
    for source_at, source in data_sources(loaded.spec):
        for path, _, part in source_parts(source_at, source):
            try:
                # Alone: what is wrong with one part must not hide what is wrong with another.
                check_readable(resolve(part, loaded.folder))
            except Refused:
                continue
            except WorkError as error:
                errors.append(Problem(path, str(error)))
    return [*_check_apart(loaded), *(errors or _check_held_out(loaded))]


def _check_apart(loaded: LoadedSpec) -> Iterator[Problem]:
    """Yields a problem where a file of the held-out text is trained on as well: patterns that are written otherwise may match
    the same file."""
    read = {at: [*_files_of(loaded, at, source)] for at, source in data_sources(loaded.spec)}
    for at in (one for one in read if one.startswith("distill.")):
        pairs = itertools.product(read[at], read.get("evaluate.held_out", ()))
        shared = sorted(
            {file for (one, own), (other, held) in pairs if not are_apart(one, other) for file in own & held}
        )
        if shared:
            name = os.path.relpath(shared[0], loaded.folder)
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            message = f"`{name}`{more} is trained on as well, under `{at}`"
            yield Problem("evaluate.held_out", message, "name documents that nothing is trained on")
            return


def _files_of(loaded: LoadedSpec, at: str, source: DataSource) -> Iterator[tuple[Source, set[str]]]:
    """Yields each part of a source with the files that it reads; none of the folder of a data set, which holds several splits,
    and none where a file is not there, which is reported elsewhere."""
    for _, _, part in source_parts(at, source):
        with contextlib.suppress(Refused):
            if part.dataset is None:
                yield part, {os.path.normpath(file) for file in data_files(resolve(part, loaded.folder))}


def _check_held_out(loaded: LoadedSpec) -> Iterator[Problem]:
    """Yields a problem where a held-out share of the training data, or what is left of it, has no document. The data of
    phases is left out of in the same way, and nothing of it alone is held out.
    """
    distill, evaluate = loaded.spec.distill, loaded.spec.evaluate
    share = evaluate.held_out.fraction if evaluate is not None and evaluate.held_out is not None else None
    if distill is None or share is None:
        return
    for at, data in data_sources(loaded.spec):
        if not at.startswith("distill."):
            continue
        for path, _, part in source_parts(at, data):
            try:
                check_share(resolve(part, loaded.folder), share, held_out=data is distill.data)
            except Refused:
                continue
            except UsageError as error:
                yield Problem("evaluate.held_out.fraction", str(error))
            except WorkError as error:  # a record that a sample of them did not show
                yield Problem(path, str(error))


def check_tokenizer(loaded: LoadedSpec, checkpoint: Checkpoint) -> tuple[list[Problem], list[str]]:
    """Checks that the tokenizer yields only tokens that the teacher has. Returns errors, and remarks on tokens that
    only some documents would need; both are empty where no tokenizer could be read."""
    sources = list(data_sources(loaded.spec))
    if not sources or not any(tokenizer_files(checkpoint.folder)):
        return [], []
    at = teacher_key(loaded)
    try:
        tokenizer = load_tokenizer(checkpoint.folder)
    except UsageError as error:
        return [Problem(at, str(error))], []
    errors, remarks = [], []
    size = int(checkpoint.config.vocab_size)
    lacking = lacking_tokens(tokenizer, size)
    if lacking.ordinary:
        message = f"its tokenizer knows {lacking.ordinary}, and the model has a vocabulary of {size}"
        errors.append(Problem(at, message, "copy the tokenizer files that belong to this model"))
    if lacking.added:
        remarks.append(
            f"the tokenizer knows {lacking.added}, and the model has a vocabulary of {size}: a document that holds such a "
            "token is refused when it is read"
        )
    if lacking.framing:
        message = f"its tokenizer puts {lacking.framing} around documents, and the model has a vocabulary of {size}"
        errors.append(Problem(at, message, "name another token in tokenizer_config.json"))
    if not getattr(tokenizer, "chat_template", None):
        errors += [
            Problem(f"{path}.messages_field", "the teacher's tokenizer has no chat template", "name text_field")
            for source_at, source in sources
            for path, _, part in source_parts(source_at, source)
            if part.messages_field is not None  # pairs do without a template
        ]
    return errors, remarks


def check_padding(loaded: LoadedSpec, checkpoint: Checkpoint) -> list[Problem]:
    """Checks that the padding token is in the vocabulary: no embedding can be built otherwise."""
    padding, size = getattr(checkpoint.config, "pad_token_id", None), getattr(checkpoint.config, "vocab_size", None)
    if not isinstance(padding, int) or not isinstance(size, int) or -size <= padding < size:
        return []
    at = teacher_key(loaded)
    message = f"`pad_token_id` in its config.json is {padding}, and the model has a vocabulary of {size}"
    return [Problem(at, message, "write null, or a token of the vocabulary, as `pad_token_id`")]


def check_pairs(loaded: LoadedSpec, teacher_layers: int, student_layers: int) -> list[Problem]:
    """Checks that the layers whose hidden states are compared exist."""
    distill = loaded.spec.distill
    hidden = distill.loss.hidden_states if distill is not None else None
    if hidden is None:
        return []
    return list(pairs_exist(hidden, teacher_layers, student_layers, "distill.loss.hidden_states"))


def check_towers(loaded: LoadedSpec, checkpoint: Checkpoint, config: Any) -> None:
    """Checks that the other towers of a multimodal teacher fit a student of configuration `config`. Raises Refused where they
    do not."""
    if checkpoint.tower is None:
        return
    importance = loaded.spec.importance
    if importance.untie:
        message = "the whole model has one matrix for embedding and head"
        raise Refused([Problem("importance.untie", message, "leave it out where `teacher.tower` is written")])
    if importance.hidden_basis == "principal" and config.hidden_size != checkpoint.config.hidden_size:
        message = "the projector of the other towers writes into the residual stream, which would be rotated"
        raise Refused(
            [Problem("importance.hidden_basis", message, "write `channels` where `teacher.tower` is written")]
        )
    if checkpoint.tower.others:
        projector_of(checkpoint, config)
