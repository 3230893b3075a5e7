"""The identity of a training: the content of the plan, the data, and the weights of the models.

A checkpoint, the note that a training is finished and stored teacher logits hold the identity; a training with another
identity is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron.runtime.models import weight_files
from minitron.specs.builds import CONFIG
from minitron.specs.errors import Problem, Refused
from minitron.specs.one_line import plain
from minitron.specs.training_plan import UNSAID, TrainingPlan, deciding_settings

_PIECES, _PIECE_BYTES = 256, 4096

WEIGHTS = "teacher.weights"
"""The key, in the identity of a training, of the weights and the configuration of the teacher (before it was
corrected).
"""

STUDENT, HELD_OUT = "student.weights", "held_out"
"""The keys of the pruned student's weights, and of the hash of the text that the training measures its held-out loss
on.
"""

COORDINATES = "kept_coordinates"
"""The key of the hash of what the student keeps of the teacher's hidden states."""


def weights_digest(folder: Path) -> str:
    """Returns a digest that tells two models apart without reading all of their weights: it covers the configuration,
    the headers, and pieces spread over the files. Training changes all weights, so that pieces suffice.
    """
    digest = hashlib.sha256((folder / CONFIG).read_bytes() if (folder / CONFIG).is_file() else b"")
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, size)))
            for piece in range(_PIECES):
                file.seek(size * piece // _PIECES)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def resume_identity(plan: TrainingPlan, data_hash: str) -> dict[str, Any]:
    """Returns what a training cannot change once it has begun, flat: its settings (`deciding_settings`) and its data."""
    return dict(deciding_settings(plan)) | {"data": data_hash}


_OF_LENGTH = ("tokens", "start", "start.step", "start.checkpoints")
"""The keys that a search does not share with the training that goes on from it."""


_CONTENTS = {
    "data": ("data", "the training data or its tokenizer"),
    "fingerprint": ("fingerprint", "the pruned student"),
    WEIGHTS: ("teacher.model", "the teacher"),
    STUDENT: ("student.model", "the pruned student"),
    COORDINATES: ("kept_coordinates", "what the student keeps of the teacher's hidden states"),
    HELD_OUT: ("held_out.data", "the held-out text or its tokenizer"),
}
"""Keys that stand for the contents of files: the key of training.yaml that names the files, and what they are."""

_WHERE_KNOWN = (WEIGHTS, HELD_OUT)
"""Keys that count only where both identities have them: a teacher need not be there, and held-out text may be left
out.
"""


def require_same_training(before: Mapping[str, Any], now: Mapping[str, Any], work: Path) -> None:
    """Checks that two identities are the same training. Refused with every value that decides the result and has
    changed since the training in `work` began. Weights of a teacher count where both identities have them.
    """
    if problems := list(_differences(before, now, f"or delete {work} to train from the beginning")):
        raise Refused(problems)


def require_same_start(before: Mapping[str, Any], now: Mapping[str, Any], hint: str) -> None:
    """Checks that the state that a search left is one of this training, which may be longer unless a weight of the loss falls
    to 0 over it. Refused where it is not."""

    falls = before.get("loss.hidden_states.schedule") == "linear"
    free = [key for key in _OF_LENGTH if not (falls and key == "tokens")]

    def kept(identity: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in identity.items() if key in before and key not in free}

    if problems := list(_differences(kept(before), kept(now), hint)):
        raise Refused(problems)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], begin_again: str) -> Iterator[Problem]:
    for key in sorted(before.keys() | now.keys()):
        old, new = (one.get(key, UNSAID.get(key)) for one in (before, now))
        if old == new or (key in _WHERE_KNOWN and None in (old, new)):
            continue
        path, what = _CONTENTS.get(key, (key, None))
        if what is not None:
            message, remedy = f"{what} changed since this training began", "bring back what was there"
        else:
            message = f"was {plain(old)} when this training began and is now {plain(new)}"
            remedy = f"write {plain(old)} again"
        yield Problem(path, message, f"{remedy}, {begin_again}")
