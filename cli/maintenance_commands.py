"""The commands for maintenance: doctor, list, clean."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from minitron import __version__
from minitron.cli import builds, figures, options
from minitron.cli.render import document, say, show_sections, write
from minitron.cli.sections import Column, Document, Section, part
from minitron.specs.atomic import temporary_path
from minitron.specs.builds import (
    CHECKPOINTS,
    CORRECTION_WORK,
    DATA_CACHE,
    PARTIAL_ROUNDS,
    PARTIAL_SCORES,
    PARTIAL_STREAMS,
    PLAN,
    REFITTED,
    REFITTED_AGAIN,
    RESULTS,
    SEARCH,
    STAGED,
    STUDENT,
    VERIFICATION,
    WORK,
    read_document,
)
from minitron.specs.errors import MinitronError, UsageError
from minitron.specs.locks import only_one

# What a command needs beside the core: module, extra, what it is for.
_EXTRAS = (
    ("lm_eval", "eval", "benchmarks (evaluate.suite)"),
    ("tensorboard", "tensorboard", "curves of training"),
    ("wandb", "wandb", "distill.track: [wandb]"),
    ("mlflow", "mlflow", "distill.track: [mlflow]"),
    ("datasets", "datasets", "data sets of the Hub"),
    ("pyarrow", "datasets", "Parquet files"),
    ("torchao", "float8", "products in float8 (distill.compute)"),
    ("gguf", "gguf", "export --gguf"),
)
# Folders that hold no builds, and much else.
_PASSED_OVER = {"node_modules", "site-packages", "__pycache__", CHECKPOINTS, STUDENT}
# A disk with less than this is named: one checkpoint of a small training does not fit.
_LITTLE_DISK = 5 * 2**30


def doctor(as_json: options.Json = False) -> None:
    """Say what this machine has for minitron, what is missing, and what is slow and why."""
    found = list(_findings())
    advice = [one["advice"] for one in found if one["advice"]]
    rows = tuple((one["what"], one["found"]) for one in found)
    notes = tuple(advice) or ("nothing is missing",)
    show_sections(
        [Section("This machine", (Column(""), Column("")), rows), Section("Advice", notes=notes)],
        {"findings": found},
        as_json=as_json,
    )


def _finding(what: str, found: str, advice: str = "") -> dict[str, str]:
    return {"what": what, "found": found, "advice": advice}


def _findings() -> Iterator[dict[str, str]]:
    import torch

    yield _finding("minitron", __version__)
    yield _finding("Python", f"{platform.python_version()} ({sys.executable})")
    yield _finding("torch", torch.__version__)
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if gpus:
        names = ", ".join(f"{gpu.name} {figures.size(gpu.total_memory)}" for gpu in gpus)
        yield _finding("CUDA devices", names)
        if importlib.util.find_spec("triton") is None:
            yield _finding(
                "Triton", "missing", "the fused loss needs triton: pip install triton; without it training is slower"
            )
    else:
        driver = Path("/proc/driver/nvidia/version").exists()
        advice = "this machine has an NVIDIA driver and torch does not use it: install torch for CUDA" if driver else ""
        yield _finding("CUDA devices", "none, everything runs on the CPU", advice)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    slow = (
        f"torch uses {threads} of {cores} cores: OMP_NUM_THREADS or --threads says so" if threads < cores // 2 else ""
    )
    yield _finding("CPU threads", f"{threads} of {figures.plural(cores, 'core')}", slow)
    if not gpus and not _has_bf16():
        yield _finding(
            "bf16 on the CPU", "emulated", "bf16 is slow on this CPU; `teacher.dtype: float32` trains faster here"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield _finding("memory", figures.size(memory))
    free = shutil.disk_usage(Path.cwd()).free
    little = "less than 5 GiB are free here: checkpoints of a training may not fit" if free < _LITTLE_DISK else ""
    yield _finding("free on disk, here", figures.size(free), little)
    for module, extra, purpose in _EXTRAS:
        there = importlib.util.find_spec(module) is not None
        yield _finding(
            f"{module} ({purpose})",
            "installed" if there else "missing",
            "" if there else f"for {purpose}: pip install 'minitron[{extra}]'",
        )


def _has_bf16() -> bool:
    """Checks whether the CPU has instructions that multiply bf16."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def list_builds(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder to search; the current one by default.")
    ] = Path(),
    as_json: options.Json = False,
) -> None:
    """List the builds below a folder: their students, how far they are, and their loss."""
    require_folder(folder)
    found = [_entry(build) for build in sorted(_builds_below(folder))]
    if not found and not as_json:
        say(f"{folder}: no builds below it; `minitron compile SPEC` makes one")
    columns = (Column("build"), Column("parameters", right=True), Column("of teacher", right=True), Column("state"),
               Column("held-out loss", right=True))  # fmt: skip
    rows = tuple(
        (
            one["build"],
            figures.count(one["parameters"]),
            figures.percent(one["parameters"], one["teacher_parameters"]),
            one["state"],
            figures.decimal(one["held_out_loss"]),
        )
        for one in found
    )
    if found or as_json:
        show_sections([Section("Builds", columns, rows)], {"builds": found}, as_json=as_json)


def require_folder(folder: Path) -> None:
    """Raises UsageError where there is no such folder."""
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: {'is a file' if folder.exists() else 'there is no such folder'}; name one that holds builds"
        )


def _builds_below(folder: Path) -> Iterator[Path]:
    """Yields the folders that hold a plan; folders inside a build are not searched, and links are not followed."""
    for place, folders, files in os.walk(folder):
        if PLAN in files:
            folders.clear()
            yield Path(place)
        folders[:] = [name for name in folders if name not in _PASSED_OVER and not name.startswith(".")]


def _entry(build: Path) -> Document:
    plan, results, state = {}, {}, ""
    try:
        plan = read_document(build / PLAN) or {}
        results = read_document(build / RESULTS) or {}
        state = _state(build, results)
    except MinitronError:
        state = "damaged"
    models = part(results, "models")
    last = next((part(models, name) for name in ("distilled", "pruned") if name in models), {})
    return {
        "build": str(build),
        "parameters": part(plan, "student").get("parameters"),
        "teacher_parameters": part(plan, "teacher").get("parameters"),
        "state": state,
        "held_out_loss": part(last, "held_out").get("loss"),
    }


def _state(build: Path, results: Document) -> str:
    verification = read_document(build / VERIFICATION)
    if verification is None:
        return "not compiled to its end"
    if verification.get("passed") is not True:
        return "verification FAILED"
    if builds.is_trained(build):
        return "trained and measured" if "distilled" in part(results, "models") else "trained"
    progress = builds.training_progress(build)
    if progress is None:
        return "compiled"
    return f"training, {figures.percent(part(progress, 'last').get('tokens'), progress['total_tokens'])}"


def clean(
    build: options.BuildFolder,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, what would go is listed.")] = False,
    as_json: options.Json = False,
) -> None:
    """Remove what a build no longer needs: token caches, what an interrupted compile left beside a whole one, and the
    checkpoints of a training that is complete.

    Models, plans, scores, figures and curves stay, and so do the checkpoints of a training that can go on."""
    builds.require_build(build)
    with only_one(build, "cleaning"):
        found = [(path, _bytes(path)) for path in _needless(build)]
        if yes:
            for path, _ in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if as_json:
        write(document({"removed": yes, "paths": [{"path": str(path), "bytes": size} for path, size in found]}))
        return
    if not found:
        write(f"{build}: there is nothing to remove")
        return
    rows = tuple((str(path), figures.size(size)) for path, size in found)
    total = figures.size(sum(size for _, size in found))
    note = f"{total} removed" if yes else f"{total} could go; the same with --yes removes it"
    show_sections([Section("Clean", (Column("path"), Column("size", right=True)), rows, (note,))], {})


def _needless(build: Path) -> Iterator[Path]:
    """Yields the files that may be removed: only those that minitron writes under these very names, and no links, whose
    targets belong to somebody else.
    """
    paths = [build / work / DATA_CACHE for work in (WORK, CORRECTION_WORK)]
    if builds.is_trained(build):
        paths += [build / work / CHECKPOINTS for work in (WORK, CORRECTION_WORK)]
        # What a search left of the student that went on from it; its ranking stays.
        paths += [one / name for one in sorted((build / SEARCH).glob("[0-9]*")) for name in (CHECKPOINTS, STUDENT)]
    if (build / VERIFICATION).is_file():
        # What a later compile left that was interrupted: the one before it is whole.
        paths += [build / name for name in (PARTIAL_SCORES, PARTIAL_STREAMS, PARTIAL_ROUNDS)]
        paths += [temporary_path(build / name) for name in (STAGED, REFITTED, REFITTED_AGAIN, SEARCH)]
    for path in paths:
        if path.exists() and not path.is_symlink() and path.resolve().is_relative_to(build.resolve()):
            yield path


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)
