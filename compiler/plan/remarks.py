"""Remarks of a plan: facts for the user that no axis reports."""

from __future__ import annotations

from collections.abc import Iterator

from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.load_effects import written_on_load
from minitron.compiler.graph.names import dtype_of
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.compiler.teacher.tokenizer import tokenizer_files
from minitron.specs.builds import TOWER
from minitron.specs.data_files import data_sources
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import source_parts
from minitron.specs.spec import Spec


def remarks_on(checkpoint: Checkpoint, captured: Captured) -> tuple[str, ...]:
    """Sentences on the checkpoint's files, and on a graph that is of one sequence length."""
    remarks = [checkpoint.remark] if checkpoint.remark else []
    if checkpoint.folder.is_dir() and not any(tokenizer_files(checkpoint.folder)):
        remarks.append("no tokenizer files are there: they could not be compared with the vocabulary")
    if checkpoint.tower is not None:
        size = sum(info.nbytes for info in checkpoint.tensors.values())
        remarks.append(
            f"the teacher is the language tower of a {checkpoint.tower.config.model_type} model: a compile writes it to "
            f"{TOWER}/ ({size / 2**30:.1f} GiB), and `minitron export BUILD --whole` puts the student in its place"
        )
    own = dtype_of(checkpoint.dtype)
    if checkpoint.tensors and captured.dtype != own:
        old, new = (str(one).removeprefix("torch.") for one in (own, captured.dtype))
        remarks.append(f"the teacher's weights are {old} and are held as {new}, as the student's are (teacher.dtype)")
    if written := sorted(written_on_load(captured.model)):
        remarks.append(
            f"the code of {captured.config.model_type} writes to {written[0]} each time it is loaded: teacher and student have "
            "it as it is then, and a compile holds the whole teacher in memory"
        )
    if captured.length is not None:
        remarks.append(
            f"the code of {captured.config.model_type} depends on the number of tokens: its graph is of {captured.length}, "
            f"calibration samples are read in pieces of {captured.length}, and student.pt2 runs on {captured.length} only"
        )
    if checkpoint.tensors:
        known = set(captured.canonical)
        extra = [name for name in checkpoint.tensors if name not in known]
        if extra and all(name in checkpoint.tensors for name in set(captured.canonical.values())):
            remarks.append(
                f"{len(extra)} tensors of the checkpoint are not the model's and are ignored, such as {extra[0]}"
            )
    return tuple(remarks)


def data_remarks(loaded: LoadedSpec) -> Iterator[str]:
    """Yields a sentence on each data set of the Hub that is read at a commit which the spec does not write."""
    written = loaded.written or loaded.spec
    said = set()
    for (at, one), (_, before) in zip(data_sources(loaded.spec), data_sources(written), strict=True):
        parts = zip(source_parts(at, one), source_parts(at, before), strict=True)
        for (_, _, part), (_, _, original) in parts:
            if part.revision != original.revision and (key := (part.dataset, part.revision)) not in said:
                said.add(key)
                yield (
                    f"the data set {part.dataset} is read at commit {part.revision}, where its revision "
                    f"`{original.revision or 'main'}` is: the build stays with it"
                )


def folder_remarks(loaded: LoadedSpec) -> Iterator[str]:
    """Yields a sentence on each revision of what is a folder, which has none."""
    teacher = loaded.spec.teacher
    named = [("teacher", teacher.model, teacher.revision)]
    parts = (part for at, one in data_sources(loaded.spec) for part in source_parts(at, one))
    named += [(path, part.dataset, part.revision) for path, _, part in parts]
    for path, name, revision in named:
        if name is not None and revision is not None and (loaded.folder / name).expanduser().is_dir():
            yield f"{path}.revision: changes nothing here: {name} is a folder, as it lies there; leave it out"


def float8_remarks(spec: Spec) -> tuple[str, ...]:
    """A sentence on a training in float8 that nothing makes fast."""
    if spec.distill is None or spec.distill.compile or "float8" not in (spec.distill.compute, spec.teacher.compute):
        return ()
    return (
        "float8 without `distill.compile: true`: values are rounded in passes of their own, and training may be no faster than "
        "in bfloat16",
    )
