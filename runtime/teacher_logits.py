"""The teacher's samples on disk, in the order in which training reads them.

    teacher_logits/
        index.json                      what they were drawn from, how many samples are there, how many a shard holds
        shard-00000000.safetensors      of consecutive global samples:
            tokens   int32 [S]          predicted tokens of each sample
            entropy  float64 [S]        sum over them of the teacher's entropy in nats
            unique   uint8|16 [T]       different ids that were drawn for each token
            ids      uint16|32 [U]      these ids, one token after the other
            counts   uint8|16 [U]       how often each was drawn

A shard is written whole or not at all and carries a CRC, so that a capture goes on after any kill, and training never
reads what a disk has changed.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minitron.runtime.disk import writing
from minitron.runtime.loss import SampledTargets
from minitron.specs.atomic import atomic_path, remove_leftovers, write_text
from minitron.specs.errors import WorkError
from minitron.specs.progress import Progress

_INDEX = "index.json"
_FORMAT = 1

_SHARDS = 128
_SHARD_TOKENS = 1 << 15, 1 << 23
"""The approximate number of shards, and the bounds of each: they decide how much work a kill loses, and how many files
a large capture leaves.
"""

_AGAIN = "`minitron capture` makes again what is missing"

Array = np.ndarray[Any, np.dtype[Any]]
Identity = Mapping[str, Any]


@dataclass(frozen=True)
class Index:
    """The index of a capture: `identity` is what decides the samples, flat; `samples` is how many samples of the global
    order are stored, from the first on.
    """

    identity: dict[str, Any]
    samples: int
    shard_samples: int
    bytes: int

    @property
    def key(self) -> str:
        """Returns the hash that stands for the identity in each shard."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def shards(self, samples: int) -> list[range]:
        """Returns the global samples of each shard of a capture of `samples`; the last shard may hold fewer."""
        every = range(samples)
        return [every[start : start + self.shard_samples] for start in range(0, samples, self.shard_samples)]

    def number(self, shard: range) -> int:
        """Returns the number of the shard that holds these samples."""
        return shard.start // self.shard_samples


def read_index(folder: Path) -> Index | None:
    """Reads the index of a capture; None where no capture was begun."""
    try:
        content = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if content["format_version"] != _FORMAT:
            return None
        return Index(content["identity"], content["samples"], content["shard_samples"], content["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_index(folder: Path, index: Index) -> None:
    document = {
        "format_version": _FORMAT,
        "samples": index.samples,
        "shard_samples": index.shard_samples,
        "bytes": index.bytes,
        "identity": index.identity,
    }
    with writing(str(folder)):
        write_text(folder / _INDEX, json.dumps(document, indent=1) + "\n")


def begin(folder: Path, identity: Identity, samples: int, length: int, progress: Progress) -> Index:
    """Begins or extends a capture of `samples` and returns its index. Samples of another identity are removed, samples
    of the same identity are kept and added to.
    """
    remove_leftovers(folder)
    old = read_index(folder)
    plain = json.loads(json.dumps(dict(identity)))
    if old is not None and old.identity == plain:
        return old
    if shards := list(folder.glob("shard-*.safetensors")):
        why = "" if old is None else f" ({', '.join(changes(old.identity, plain))} changed)"
        progress.message(f"the stored teacher logits are of another training{why}: they are made again")
        for shard in shards:
            shard.unlink()
    tokens = min(max(samples * length // _SHARDS, _SHARD_TOKENS[0]), _SHARD_TOKENS[1])
    index = Index(plain, 0, max(1, tokens // length), 0)
    write_index(folder, index)
    return index


def changes(before: Identity, now: Identity) -> list[str]:
    """Returns the keys that two identities differ in."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:08d}.safetensors"


@dataclass(frozen=True)
class Shard:
    """The samples drawn for some consecutive global samples, as they stand in the file."""

    tokens: Array
    entropy: Array
    unique: Array
    ids: Array
    counts: Array

    def arrays(self) -> dict[str, Array]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def crc(self) -> int:
        crc = 0
        for array in self.arrays().values():
            crc = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, crc)
        return crc


def write_shard(folder: Path, number: int, shard: Shard, key: str) -> None:
    """Writes one shard. WorkError where it cannot be written; other shards are untouched."""
    # One entry: several come out in any order, and equal captures would not be equal files.
    about = {"about": json.dumps({"format_version": _FORMAT, "key": key, "crc32": shard.crc()})}
    with writing(str(shard_path(folder, number))), atomic_path(shard_path(folder, number)) as temporary:
        save_file(shard.arrays(), temporary, metadata=about)


def read_shard(folder: Path, number: int, key: str) -> Shard:
    """Reads one shard. ValueError for a shard that is damaged or of another capture, OSError where it does not
    exist.
    """
    try:
        with safe_open(shard_path(folder, number), framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            shard = Shard(**{one.name: file.get_tensor(one.name) for one in fields(Shard)})
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if about.get("key") != key:
        raise ValueError("it is of another capture")
    if about.get("crc32") != shard.crc():
        raise ValueError("its contents are not what was written")
    return shard


def has_shard(folder: Path, number: int, key: str, samples: int) -> bool:
    """Checks whether there is an intact shard of at least `samples` samples."""
    try:
        return len(read_shard(folder, number, key).tokens) >= samples
    except (OSError, ValueError):
        return False


class StoredLogits:
    """Reads the samples of a finished capture. A shard stays in memory until another one is needed: training reads
    shards in order, and a batch spans at most two.
    """

    def __init__(self, folder: Path, index: Index, draws: int) -> None:
        self.folder, self.index, self.draws = folder, index, draws
        self._open: dict[int, _Opened] = {}

    def read(self, samples: Sequence[int]) -> SampledTargets:
        """Returns the targets of the valid tokens of these global samples, one sample after the other. WorkError for a
        shard that is damaged.
        """
        found = [self._sample(sample) for sample in samples]
        unique_T = np.concatenate([unique for unique, _, _, _ in found]).astype(np.int64)
        ids_TN = np.zeros((len(unique_T), self.draws), np.int64)
        weights_TN = np.zeros((len(unique_T), self.draws), np.float32)
        filled_TN = np.arange(self.draws) < unique_T[:, None]
        ids_TN[filled_TN] = np.concatenate([ids for _, ids, _, _ in found])
        weights_TN[filled_TN] = np.concatenate([counts for _, _, counts, _ in found]) / np.float32(self.draws)
        entropy = float(sum(entropy for _, _, _, entropy in found))
        return SampledTargets(torch.from_numpy(ids_TN), torch.from_numpy(weights_TN), entropy)

    def _sample(self, sample: int) -> tuple[Array, Array, Array, float]:
        number, place = divmod(sample, self.index.shard_samples)
        if number not in self._open:
            while len(self._open) > 1:
                del self._open[next(iter(self._open))]
            try:
                self._open[number] = _Opened(read_shard(self.folder, number, self.index.key))
            except FileNotFoundError:
                raise WorkError(f"{shard_path(self.folder, number)} is gone; {_AGAIN}") from None
            except (OSError, ValueError) as error:
                raise self._put_aside(shard_path(self.folder, number), error) from None
        return self._open[number].sample(place)

    def _put_aside(self, path: Path, error: Exception) -> WorkError:
        """Renames a damaged shard, so that the next capture finds it missing, and returns the error."""
        aside = path.with_name(f"damaged-{path.name}")
        try:
            path.rename(aside)
        except OSError:
            return WorkError(f"{path} is damaged ({error}); remove it, then {_AGAIN}")
        return WorkError(f"{path} is damaged ({error}) and was put aside as {aside.name}; {_AGAIN}")


class _Opened:
    """An open shard, and the start of each of its samples."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.token_ends = np.cumsum(shard.tokens, dtype=np.int64)
        self.id_ends = np.concatenate([[0], np.cumsum(shard.unique, dtype=np.int64)])

    def sample(self, place: int) -> tuple[Array, Array, Array, float]:
        end = int(self.token_ends[place])
        start = end - int(self.shard.tokens[place])
        part = slice(int(self.id_ends[start]), int(self.id_ends[end]))
        shard = self.shard
        return shard.unique[start:end], shard.ids[part], shard.counts[part], float(shard.entropy[place])
