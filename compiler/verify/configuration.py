"""The `configuration` check: every key of the student's configuration is the teacher's, unless the compile accounts for it.

Three comparisons, key by key, with the defaults of the configuration's class filled in:

    config.json  =  the configuration that was planned, of which the shapes and constants were proved
    the planned configuration  =  the teacher's, but for widths that were asked for or that shapes depend on, for lists with
                                  an entry for each layer that follow the layers that stay, and for rules over layers
    generation_config.json  =  the teacher's, without what contradicts itself

Keys that older loaders read (`rope_theta`, `torch_dtype`) say what the new ones beside them say.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.layer_config import RULES
from minitron.compiler.capture.layer_lists import TOKENS
from minitron.compiler.capture.models import build_meta, quiet, stored_tensors
from minitron.compiler.roles.names import LAYERS
from minitron.compiler.verify.checks import Check, exactly
from minitron.compiler.verify.routes import Routes
from minitron.specs.builds import CONFIG, STUDENT
from minitron.specs.errors import first_line
from minitron.specs.generation_settings import FILE as GENERATION
from minitron.specs.generation_settings import read_generation_settings
from minitron.specs.model_config import OLDER_ROTARY_KEYS, ROPE_SCALING

Document = Mapping[str, Any]
# Who wrote a folder and where it lay, and the class of the model, which is looked at by itself.
OF_THE_FOLDER = ("transformers_version", "_name_or_path", "architectures")
OLDER_DTYPE = "torch_dtype"
OLDER = (*OLDER_ROTARY_KEYS, ROPE_SCALING, OLDER_DTYPE)
# What transformers says of a generation_config.json that it makes up from the model's configuration.
MADE_UP = ("_from_model_config", "transformers_version")
# The key under which transformers writes NaN and infinity.
SPECIAL = "__float__"
LONGEST = 80  # characters of a value that are shown


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()


def configuration(routes: Routes) -> Check:
    """Compares the files of student/ with the plan and with the teacher's folder."""
    subject = routes.subject
    folder = subject.build / STUDENT
    planned = Planned(
        subject.teacher.captured, subject.config, subject.model, subject.selection[LAYERS][0], subject.config_widths
    )
    mistake = first_other_key(folder, planned) or first_other_setting(folder, subject.original.folder)
    return exactly("configuration", mistake, "every key is the teacher's, or the one that was planned")


def first_other_key(folder: Path, planned: Planned) -> str | None:
    """The first key of a folder's config.json that is not what it has to be, in words."""
    config, teacher = planned.config, planned.captured.config
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        written = as_read(config, document)
    except Exception as error:  # a configuration class raises anything
        return f"{CONFIG} cannot be read: {first_line(error)}"
    wanted = as_read(config, _document(config))
    # A class that still has one of the older keys for its own is held to it as to any other.
    older = [key for key in OLDER if key not in wanted]
    for key, old, new in differences(wanted, written, older):
        return f"{CONFIG}: {key} is {_shown(new)}, and the student was planned with {_shown(old)}"
    model = [type(planned.model).__name__]
    if document.get("architectures") != model:
        return f"{CONFIG}: architectures is {document.get('architectures')}, not {model}"
    for key, old, new in differences(as_read(teacher, _document(teacher)), wanted, older):
        if key.rpartition(".")[2] != "dtype" and not planned.explains(key, old, new):
            return f"{CONFIG}: {key} is {_shown(new)}, the teacher's is {_shown(old)}"
    return _other_older_key(document, older)


def first_other_setting(folder: Path, teacher: Path) -> str | None:
    """The first key of a folder's generation_config.json that is not the teacher's, in words."""
    wanted, path = read_generation_settings(teacher), folder / GENERATION
    try:
        written = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        return f"{GENERATION} cannot be read: {first_line(error)}"
    if wanted is None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        wanted = {key: config.get(key, value) for key, value in written.items()}
        wanted |= {key: written[key] for key in MADE_UP if key in written}
    for key, old, new in differences(wanted, written):
        return f"{GENERATION}: {key} is {_shown(new)}, the teacher's is {_shown(old)}"
    return None


@dataclass(frozen=True)
class Planned:
    """The configuration that was planned for the student, and what of it accounts for keys that are not the teacher's.

    captured       the teacher
    config, model  the student's configuration, and the model that it describes, without weights
    layers         the teacher's layers that stay
    widths         configuration key -> width that was asked for
    """

    captured: Captured
    config: Any
    model: torch.nn.Module
    layers: Sequence[int]
    widths: Mapping[str, int]

    def explains(self, key: str, old: Any, new: Any) -> bool:
        """Checks whether a key may say `new` where the teacher says `old`."""
        name = key.rpartition(".")[2]
        layers, count = self.layers, self.captured.layer_count
        if self.widths.get(key, MISSING) == new or dict(_paths(self._derived)).get(key, MISSING) == new:
            return True
        if len(layers) < count and name in RULES:
            return True
        if isinstance(old, list) and isinstance(new, list):
            follows = len(layers) < count <= len(old) and not name.endswith(TOKENS)
            return follows and new == [old[layer] for layer in layers]
        plain = type(new) is int and (old is MISSING or old is None or type(old) is int)
        return plain and self._model_depends_on(key.split("."), old)

    def _model_depends_on(self, path: Sequence[str], old: Any) -> bool:
        """Checks whether the student would have other tensors with the teacher's value of a key, or its configuration could
        not be loaded: its class may hold keys against each other that no tensor of this model follows."""
        config = copy.deepcopy(self.config)
        holder = config
        for part in path[:-1]:
            holder = holder[part] if isinstance(holder, dict) else getattr(holder, part)
        try:
            if isinstance(holder, dict):
                holder[path[-1]] = None if old is MISSING else old
            else:
                setattr(holder, path[-1], None if old is MISSING else old)
            config.validate()
            return shapes(build_meta(config, self.captured.dtype, self.captured.attention)) != self._shapes
        except Exception:  # a modelling file raises anything for widths that it cannot have
            return True

    @cached_property
    def _derived(self) -> Document:
        """The teacher's configuration with the widths that were asked for, as its class reads it: it may compute keys of a
        part from them."""
        teacher = self.captured.config
        try:
            return as_read(teacher, {**_document(teacher), **self.widths})
        except Exception:  # a configuration class raises anything for widths that it cannot have
            return {}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes(self.model)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in stored_tensors(model).items()}


def _other_older_key(document: Document, older: Sequence[str]) -> str | None:
    """The first key for older loaders that says another thing than the keys beside it, in words."""
    said = list(_leaves({key: value for key, value in document.items() if key not in older}))
    for key in older:
        value = document.get(key)
        if value is None:
            continue
        if key == OLDER_DTYPE:
            if value != document.get("dtype"):
                return f"{CONFIG}: {key} is {_shown(value)}, and dtype is {_shown(document.get('dtype'))}"
            continue
        for name, one in _leaves({key: value}):
            if not any(one == other and (key != ROPE_SCALING or name == at) for at, other in said):
                return f"{CONFIG}: {key} is {_shown(value)}, and no key that transformers reads says so"
    return None


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of everything that is not a mapping, however deep."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, str(key))
    else:
        yield at, value


def _paths(document: Document, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of everything in a document that is not a mapping."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _document(config: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return document


def as_read(like: Any, content: Document) -> dict[str, Any]:
    """All keys of a configuration of the class of `like`, with its defaults, as loading `content` gives them."""
    with quiet():
        read = type(like).from_dict(_numbers(dict(content)))
        return _document(read)


def _numbers(value: Any) -> Any:
    """A copy of a document with the numbers that JSON has no words for, as transformers writes them."""
    if isinstance(value, dict):
        if set(value) == {SPECIAL}:
            return float(value[SPECIAL])
        return {key: _numbers(one) for key, one in value.items()}
    return [_numbers(one) for one in value] if isinstance(value, list) else value


def differences(
    old: Document, new: Document, ignored: Sequence[str] = (), at: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(key, old, new) of all that differs between two documents, parts of them looked into."""
    for key in sorted({*map(str, old), *map(str, new)} - {*OF_THE_FOLDER, *ignored}):
        one, other = old.get(key, MISSING), new.get(key, MISSING)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, at=f"{at}{key}.")
        elif one != other or isinstance(one, bool) != isinstance(other, bool):
            yield at + key, one, other


def _shown(value: Any) -> str:
    return repr(value)[:LONGEST]
