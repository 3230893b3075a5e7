"""Fetches from repositories of the Hugging Face Hub: from an id and a revision to a commit and the files of it.

The cache comes first in the sense of huggingface_hub: what it holds whole is not fetched again, and offline it is all that
there is. Every way in which the Hub can say no has a sentence of its own, because each needs another remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minitron.specs.errors import UsageError, first_line

Kind = Literal["model", "dataset"]


class WrongRevision(UsageError):
    """The error for a repository without the branch, tag or commit that is asked for."""


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit; `folder` holds those that were asked for, and maybe others."""

    folder: Path
    commit: str


def snapshot(repo: str, revision: str | None, patterns: Sequence[str], *, enough: Sequence[str] = ()) -> Snapshot:
    """Fetches the files of a model that match one of `patterns`, or finds them in the cache; offline a cache that holds
    the files `enough` will do.

    Raises WrongRevision or UsageError, with the remedy, where the files could not be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except IncompleteSnapshotError as error:
        folder = Path(error.snapshot_path)
        if not enough or not all((folder / name).is_file() for name in enough):
            raise refusal(repo, revision, error) from None
    except Exception as error:  # a dozen kinds from two libraries
        raise refusal(repo, revision, error) from None
    return Snapshot(folder, folder.name)


def commit_of(repo: str, revision: str | None, kind: Kind) -> str:
    """Returns the commit that a revision is at now; offline the one that the cache has for it. Errors as for
    `snapshot`."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().repo_info(repo, revision=revision, repo_type=kind).sha
    except Exception as error:  # as above
        cached = _cached_commit(repo, revision or "main", kind)
        if cached is None:
            raise refusal(repo, revision, error, kind) from None
        return cached
    assert found is not None, "the Hub gives every revision a commit"
    return str(found)


def is_path(model: str, base: Path) -> bool:
    """Checks whether a name without a folder was meant as a path, and not as an id of the Hub: it begins like a path, is not
    owner/name, or its first part is a folder beside the spec."""
    return model.startswith((".", "/", "~")) or model.count("/") != 1 or (base / model).parent.is_dir()


def is_commit(revision: str | None) -> bool:
    """Checks whether a revision is a full commit hash, which never points anywhere else."""
    return revision is not None and len(revision) == 40 and all(one in "0123456789abcdef" for one in revision)


def refusal(repo: str, revision: str | None, error: Exception, kind: Kind = "model") -> UsageError:
    """Returns the error for a user to whom the Hub, the network or the cache refused a repository."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        IncompleteSnapshotError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = repo if kind == "model" else f"the data set {repo}"
    at = f" --revision {revision}" if revision is not None else ""
    download = f"`hf download {repo}{at}{'' if kind == 'model' else ' --repo-type dataset'}`"
    if isinstance(error, GatedRepoError):
        return UsageError(
            f"{what} is gated on the Hugging Face Hub; ask for access on its page, then log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return WrongRevision(
            f"{what} has no revision {revision} on the Hugging Face Hub; write a branch, a tag or a commit of it"
        )
    if isinstance(error, RepositoryNotFoundError):
        beside = "no folder beside the spec and " if kind == "model" else ""
        return UsageError(
            f"{what} is {beside}not on the Hugging Face Hub, or private; check the name, or log in with `hf auth login`"
        )
    if isinstance(error, HFValidationError):
        return UsageError(f"{what} is neither a folder beside the spec nor a Hugging Face id; write owner/name")
    if isinstance(error, IncompleteSnapshotError):
        return UsageError(
            f"the local cache holds only a part of {what} and the Hugging Face Hub cannot be reached; "
            f"run {download} where there is a network"
        )
    reason = error.__cause__ if error.__cause__ is not None else error
    if isinstance(reason, OfflineModeIsEnabled):
        return UsageError(
            f"{what} is not in the local cache{_of(revision)} and HF_HUB_OFFLINE is set; unset it, or run {download} "
            "where there is a network"
        )
    return UsageError(
        f"{what} is not in the local cache{_of(revision)} and the Hugging Face Hub cannot be reached "
        f"({first_line(reason)}); run {download} where there is a network, "
        "or write a folder"
    )


def _of(revision: str | None) -> str:
    return f" at {revision}" if revision is not None else ""


def _cached_commit(repo: str, revision: str, kind: Kind) -> str | None:
    """Returns the commit that a branch or tag was at when last fetched, according to the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    if is_commit(revision):
        return revision if (folder / "snapshots" / revision).is_dir() else None
    refs = folder / "refs"
    try:
        inside = (refs / revision).resolve().is_relative_to(refs.resolve())
        commit = (refs / revision).read_text(encoding="utf-8").strip() if inside else None
    except (OSError, ValueError):
        return None
    return commit if is_commit(commit) else None
