"""The inputs that the result of a spec depends on beside the spec: teacher, tokenizer and data, as hashes and commits.

A lock file holds these, and so does plan.json: a build whose inputs have changed since is not up to date.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from minitron.compiler.teacher.checkpoint import SMALL_FILES
from minitron.compiler.teacher.hub import WrongRevision, commit_of, is_commit, is_path, snapshot
from minitron.compiler.teacher.other_formats import no_folder
from minitron.compiler.teacher.tokenizer import tokenizer_files
from minitron.specs.builds import CONFIG, PLAN, finished_note
from minitron.specs.chain import above
from minitron.specs.data import STDLIB_PREFIX, Source
from minitron.specs.data_files import data_file_hash, data_files, data_sources, files_hash, resolve_data, stdlib
from minitron.specs.errors import MinitronError, SpecInvalid, UsageError, placing
from minitron.specs.load import LoadedSpec
from minitron.specs.lockfile import Inputs, source_parts
from minitron.specs.weight_files import find_weight_files

MAX_FILES = 16  # of one source that are listed one by one; of more there is one hash of all


def observe(loaded: LoadedSpec, *, offline_will_do: bool = True) -> Inputs:
    """Returns `{teacher, tokenizer, data}` as they are now; reads configuration, tokenizer files, weights and data; of
    large files that have not changed since, the hash is remembered.

    The pins of `loaded` are followed: what is pinned to a commit is observed there. A data set of the Hub whose commit
    cannot be found out is left without one, or refused where `offline_will_do` is false. Raises SpecInvalid for a
    missing input.
    """
    teacher, folder = _teacher(loaded)
    inputs: Inputs = {"teacher": teacher}
    if folder is not None:
        inputs["tokenizer"] = {
            path.relative_to(folder).as_posix(): data_file_hash(path) for path in tokenizer_files(folder)
        }
    known = resolve_data(loaded)
    data: Inputs = {}
    for at, written in data_sources(loaded.written or loaded.spec):
        originals = source_parts(at, written)
        for (path, key, part), (_, _, original) in zip(source_parts(at, known[at]), originals, strict=True):
            try:
                data[key] = _source(part, original, loaded.folder, offline_will_do)
            except UsageError as error:
                raise SpecInvalid([loaded.error(path, str(error))]) from None
    evaluate = loaded.spec.evaluate
    if evaluate is not None and evaluate.data_dir is not None:
        data["evaluate.data_dir"] = _folder(loaded, evaluate.data_dir)
    if data:
        inputs["data"] = data
    return inputs


def at_commit(loaded: LoadedSpec, commit: str | None) -> LoadedSpec:
    """Returns the spec with its teacher pinned to the commit that it was found at, wherever its branch points by
    now."""
    return loaded if commit is None else loaded.pinned({**loaded.pins, "teacher.revision": commit})


def data_at_commits(loaded: LoadedSpec) -> LoadedSpec:
    """Returns the spec with every data set of the Hub pinned to the commit that its revision is at now: what is calibrated on,
    trained on and measured on is then of one commit, however long that takes. A data set whose commit cannot be found out is
    left as it is."""
    pins: dict[str, str] = {}
    known: dict[tuple[str, str | None], str | None] = {}
    for at, one in data_sources(loaded.spec):
        for path, _, part in source_parts(at, one):
            if part.dataset is None or is_commit(part.revision) or _is_folder(loaded.folder / part.dataset):
                continue
            name = part.dataset, part.revision
            if name not in known:
                try:
                    known[name] = commit_of(*name, "dataset")
                except UsageError:  # said by whoever reads it
                    known[name] = None
            if (commit := known[name]) is not None:
                pins[f"{path}.revision"] = commit
    return loaded.pinned({**loaded.pins, **pins})


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return True


def with_result(loaded: LoadedSpec, inputs: Inputs) -> Inputs:
    """Returns the inputs with the result of the spec above, where the teacher is the result of one: trained again, it is
    another teacher of the same shape."""
    upper = above(loaded)
    if upper is None:
        return inputs
    teacher = inputs["teacher"]
    assert isinstance(teacher, dict)
    return inputs | {"teacher": teacher | {"result": _result(upper)}}


def digest(inputs: Inputs) -> str:
    """Returns one hash of all inputs."""
    return _sha256(json.dumps(inputs, sort_keys=True).encode())


def _teacher(loaded: LoadedSpec) -> tuple[Inputs, Path | None]:
    """Returns the teacher's part of the inputs, and the folder of its tokenizer where that is known already."""
    upper = above(loaded)
    if upper is not None:
        name = loaded.spec.teacher.spec
        assert name is not None
        return {"spec": name, "sha256": upper.sha256, "inputs": digest(observe(upper))}, None
    model, revision = loaded.spec.teacher.model, loaded.spec.teacher.revision
    if model is None:
        raise SpecInvalid([loaded.error("teacher", "names no model", "write `model` or `spec`")])
    local = (loaded.folder / model).expanduser()
    part: Inputs = {"model": model}
    if local.is_dir():
        folder = local.resolve()
    else:
        if is_path(model, loaded.folder):
            raise SpecInvalid([loaded.error("teacher.model", *no_folder(local))])
        try:
            found = snapshot(model, revision, SMALL_FILES)
        except WrongRevision as error:
            raise SpecInvalid([loaded.error("teacher.revision", str(error))]) from None
        except UsageError as error:
            raise SpecInvalid([loaded.error("teacher.model", str(error))]) from None
        folder = found.folder
        asked = (loaded.written or loaded.spec).teacher.revision
        part |= ({} if asked is None else {"revision": asked}) | {"commit": found.commit}
    config = folder / CONFIG
    if not config.is_file():
        raise SpecInvalid([loaded.error("teacher.model", f"{folder} has no config.json", "name a Hugging Face model")])
    part["config"] = data_file_hash(config)
    generation = folder / "generation_config.json"
    if generation.is_file():
        part["generation_config"] = data_file_hash(generation)
    # Of a model on the Hub the commit says all of this, and the weights may not be here.
    if not local.is_dir():
        return part, folder
    with placing(loaded, "teacher.model", (MinitronError,)):
        files = find_weight_files(folder).paths
    if files:
        part["weights"] = files_hash(files)
    return part, folder


def _result(upper: LoadedSpec) -> str:
    """Returns a hash of the result of the spec above: its student, its training and the shape of its model."""
    build, model = upper.build, upper.result
    texts = [path.read_bytes() for path in (finished_note(build), model / CONFIG) if path.is_file()]
    plan = build / PLAN
    if plan.is_file():
        document = json.loads(plan.read_text(encoding="utf-8"))
        texts.append(json.dumps([document.get("fingerprint"), document.get("inputs")], sort_keys=True).encode())
    return _sha256(b"".join(texts))


def _source(source: Source, written: Source, folder: Path, offline_will_do: bool) -> Inputs:
    if source.dataset is not None and not Path(source.dataset).is_absolute():
        part: Inputs = {"dataset": source.dataset}
        for key in ("subset", "split", "revision"):
            if (value := getattr(written, key)) is not None:
                part[key] = value
        try:
            revision = source.revision
            # A commit is looked up nowhere: it cannot have moved.
            known = revision if revision is not None and is_commit(revision) else None
            part["commit"] = known or commit_of(source.dataset, revision, "dataset")
        except UsageError:
            if not offline_will_do:
                raise
        return part
    if source.dataset is not None:
        files = data_files(source)
        return {"dataset": str(written.dataset), "files": str(len(files)), "all": files_hash(files)}
    entries: list[str] = list(getattr(source, source.kind))
    if len(entries) > MAX_FILES:
        return {"files": str(len(entries)), "all": files_hash(data_files(source))}
    part = {}
    for entry in entries:
        if entry.startswith(STDLIB_PREFIX):
            part[entry] = files_hash(stdlib(entry))
        else:
            part[Path(os.path.relpath(entry, folder)).as_posix()] = data_file_hash(Path(entry))
    return part


def _folder(loaded: LoadedSpec, name: str) -> Inputs:
    """Returns the inputs of a folder that a spec names: its files under one hash."""
    folder = loaded.folder / name
    if not folder.is_dir():
        hint = f"paths are relative to {loaded.folder.absolute()}"
        raise SpecInvalid([loaded.error("evaluate.data_dir", f"there is no folder `{name}`", hint)])
    files = sorted(one for one in folder.rglob("*") if one.is_file())
    return {"folder": name, "files": str(len(files)), "all": files_hash(files)}


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
