"""The student's configuration: the teacher's with the narrowed keys, and the proof that it describes the student."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.layer_config import with_layers
from minitron.compiler.capture.models import build_meta, stored_tensors
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.names import GROUPS, HEAD_DIM, HEADS, HIDDEN, SCAN_HEAD_DIM, SCAN_HEADS, SHARED
from minitron.compiler.student.config_keys import OTHER_KEYS, config_key
from minitron.compiler.student.shared_experts import find_tie
from minitron.specs.errors import UsageError, first_line

# A key of the configuration, or of a part of it: (the part's key or nothing, key).
Key = tuple[str, str]
MOST_GUESSES = 40


def open_key(config: Any, name: str) -> str | None:
    """The key of a width that the configuration leaves open, to follow from others."""
    if name == HEAD_DIM:
        return None
    keys = (name, *OTHER_KEYS.get(name, ()))
    return next((key for key in keys if hasattr(config, key) and getattr(config, key) is None), None)


def student_config(
    teacher: AnalysedTeacher,
    widths: Mapping[str, int],
    kept_layers: Sequence[int],
    also: Mapping[Key, int] | None = None,
) -> Any:
    """The configuration with new `widths` (by axis name) and per-layer lists that follow the kept layers.

    `also` are further keys that have to say a width, as `fit` finds them.
    """
    config = with_layers(teacher.captured.config, teacher.captured.layer_count, kept_layers)
    config.dtype = teacher.captured.dtype
    for name, width in widths.items():
        key = config_key(teacher.captured.config, name, teacher.widths[name])
        if key is not None:
            setattr(config, key, width)
    for name, old in teacher.widths.items():
        key = open_key(config, name)
        if widths and key is not None:
            # What would follow from other widths is written out, for it may not follow these.
            setattr(config, key, widths.get(name, old))
    if SHARED in widths and config_key(teacher.captured.config, SHARED, teacher.widths[SHARED]) is None:
        tie = find_tie(teacher.captured.config, teacher.widths)
        if tie is not None and tie.key is not None:
            setattr(config, tie.key, widths[SHARED] // widths.get(tie.unit, teacher.widths[tie.unit]))
    for (part, key), width in (also or {}).items():
        setattr(getattr(config, part) if part else config, key, width)
    head = head_width(teacher.captured.config)
    if head == teacher.widths.get(HEAD_DIM) and head != head_width(config) and not derives_head_dim(config):
        # Many modelling files read this key although their configuration does not declare it; the proof tells.
        config.head_dim = head
    return config


def fit(
    teacher: AnalysedTeacher,
    widths: Mapping[str, int],
    kept_layers: Sequence[int],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Mapping[Key, int], Any, torch.nn.Module]:
    """The student's configuration, the model that it describes, and the keys beside the axes' own that it needed.

    Where the axes' own keys do not make the wanted shapes, keys that have the same value as a narrowed width are tried,
    the fewest first: the shapes of the model that transformers builds decide, so each of those keys is one that they
    depend on. Raises UsageError where none do.
    """
    first: UsageError | None = None
    for also in _guesses(teacher.captured.config, widths, teacher.widths):
        config = student_config(teacher, widths, kept_layers, also)
        try:
            return also, config, prove(teacher.captured, config, shapes)
        except UsageError as error:
            first = first or error
    assert first is not None
    # Where another key has the value of a width it was tried, and what stands in the way may be another width.
    values = {value for value, _ in _values(teacher.captured.config)}
    unnamed = [
        name
        for name in widths
        if teacher.widths[name] not in values
        and not any(_own_keys(teacher.captured.config, name))
        and not _has_key(teacher.captured.config, name, teacher.widths)
    ]
    if unnamed:
        raise UsageError(f"{teacher.captured.config.model_type} has no configuration key for {unnamed[0]}")
    raise UsageError(str(first) + _mixer_tie(widths, teacher.widths))


def _mixer_tie(widths: Mapping[str, int], teacher: Mapping[str, int]) -> str:
    """Tells the remedy where a mixer's channels are always a fixed multiple of hidden_size and were not narrowed with
    it."""
    if SCAN_HEADS not in teacher:
        return ""
    student = {**teacher, **widths}
    times, rest = divmod(teacher[SCAN_HEADS] * teacher[SCAN_HEAD_DIM], teacher[HIDDEN])
    if rest or student[SCAN_HEADS] * student[SCAN_HEAD_DIM] == times * student[HIDDEN]:
        return ""
    return (
        f"; {SCAN_HEADS} x {SCAN_HEAD_DIM} is {times} x {HIDDEN} in this model, and has to be a whole number of times "
        f"{HIDDEN} in the student too: narrow them together"
    )


def _has_key(config: Any, name: str, teacher_widths: Mapping[str, int]) -> bool:
    if name == GROUPS and teacher_widths[HEADS] == teacher_widths[GROUPS]:  # the key of the heads says it
        name = HEADS
    if name == SHARED and find_tie(config, teacher_widths) is not None:
        return True
    return config_key(config, name, teacher_widths[name]) is not None or open_key(config, name) is not None


def _guesses(config: Any, widths: Mapping[str, int], teacher_widths: Mapping[str, int]) -> Iterator[dict[Key, int]]:
    """Nothing, then one, two and three keys that have in the teacher the value of a narrowed width, or of one that it
    makes; a width's own key that says another number, from which the model's code computes it, in the same proportion."""
    keys = {name: config_key(config, name, teacher_widths[name]) for name in widths}
    # Widths without a key of their own first: one of these keys has to say them, and there may be many others.
    order = sorted(widths, key=lambda name: keys[name] is not None)
    pairs = [(teacher_widths[name], widths[name]) for name in order]
    pairs += _made_of(widths, teacher_widths)
    found: dict[Key, int] = {}
    for old, new in pairs:
        for value, (part, key) in _values(config):
            if value == old and value != new and key not in keys.values():
                found.setdefault((part, key), new)
    for name in order:
        if keys[name] is None:
            for key, value in _own_keys(config, name):
                if key not in keys.values():
                    found.setdefault(("", key), -(-value * widths[name] // teacher_widths[name]))
    for count in range(4):
        yield from map(dict, itertools.islice(itertools.combinations(found.items(), count), MOST_GUESSES))
    # A class may hold a key against hidden_size that no tensor of this model follows, as the heads of mixers that it has not.
    for one in _in_proportion(config, widths, teacher_widths, {key for _, key in found}):
        for count in range(3):
            combinations = itertools.islice(itertools.combinations(found.items(), count), MOST_GUESSES)
            yield from (one | dict(others) for others in combinations)


def _own_keys(config: Any, name: str) -> Iterator[tuple[str, int]]:
    """Yields the keys that a width is known by, with the numbers that they say."""
    for key in (name, *OTHER_KEYS.get(name, ())):
        value = vars(config).get(config.attribute_map.get(key, key))
        if type(value) is int and value > 0:
            yield config.attribute_map.get(key, key), value


def _values(config: Any) -> Iterator[tuple[int, Key]]:
    """Yields the positive numbers that a configuration and its parts say, each with its key."""
    parts = {"": config} | {name: part for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
    for part, holder in parts.items():
        for key, value in vars(holder).items():
            if type(value) is int and value > 0 and not key.startswith("_"):
                yield value, (part, key)


def _in_proportion(
    config: Any, widths: Mapping[str, int], teacher: Mapping[str, int], known: Collection[str]
) -> Iterator[dict[Key, int]]:
    """Yields keys of mixers' heads that the model has none of, each in the proportion in which hidden_size is narrowed."""
    if HIDDEN not in widths or SCAN_HEADS in teacher:
        return
    for key in (*OTHER_KEYS[SCAN_HEADS], *OTHER_KEYS[SCAN_HEAD_DIM], SCAN_HEADS, SCAN_HEAD_DIM):
        value = vars(config).get(key)
        mixers = "mamba" in key or key.startswith("linear_")
        if not mixers or key in known or type(value) is not int or value * widths[HIDDEN] % teacher[HIDDEN]:
            continue
        yield {("", key): value * widths[HIDDEN] // teacher[HIDDEN]}


def _made_of(widths: Mapping[str, int], teacher: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    """Yields products of a mixer's widths in teacher and student: all channels, and their ratio to hidden_size."""
    if SCAN_HEADS not in teacher:
        return
    student = {**teacher, **widths}
    old, new = (side[SCAN_HEADS] * side[SCAN_HEAD_DIM] for side in (teacher, student))
    yield old, new
    if old % teacher[HIDDEN] == 0 and new % student[HIDDEN] == 0:
        yield old // teacher[HIDDEN], new // student[HIDDEN]


def head_width(config: Any) -> int | None:
    """The width of a head as a configuration says it, or as it follows where that is left open."""
    said: int | None = getattr(config, HEAD_DIM, None)
    hidden, heads = getattr(config, HIDDEN, None), getattr(config, HEADS, None)
    return said or (hidden // heads if hidden and heads else None)


def derives_head_dim(config: Any) -> bool:
    """Checks whether the configuration computes the width of a head, so that the width cannot be set."""
    return isinstance(getattr(type(config), HEAD_DIM, None), property)


def prove(captured: Captured, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
    """Builds the student on the meta device and compares every shape. Returns it; UsageError where one differs."""
    try:
        model = build_meta(config, captured.dtype, captured.attention)
    except Exception as error:  # a modelling file raises anything for widths that it cannot have
        raise _impossible(captured, config, error) from None
    got = {name: tuple(value.shape) for name, value in stored_tensors(model).items()}
    wrong = [name for name in shapes if got.get(name) != shapes[name]] + [name for name in got if name not in shapes]
    if wrong:
        name = wrong[0]
        raise UsageError(
            f"the configuration of {config.model_type} cannot express these widths: {name} would be "
            f"{_shape(got.get(name))} when it is loaded, and has to be {_shape(shapes.get(name))} "
            f"({len(wrong)} tensors differ)" + _explain_widths(captured, config, wrong)
        )
    try:
        config.validate()  # which loading the configuration does, and building a model of it does not
    except Exception as error:
        raise _impossible(captured, config, error.__cause__ or error) from None
    return model


def _impossible(captured: Captured, config: Any, error: BaseException) -> UsageError:
    said = first_line(error).rstrip(".")
    remedy = _proportion(captured.config, config)
    if not remedy and re.search("divi|multiple", said):
        remedy = _divisors(captured.config, config)
    return UsageError(f"transformers cannot build {config.model_type} with these widths: {said}{remedy}")


def _divisors(teacher: Any, student: Any) -> str:
    """Tells which widths would do where a configuration wants a number of heads that divides hidden_size: other heads where
    they were narrowed, another hidden_size where it alone was.
    """
    hidden, heads, most = (
        getattr(one, key, None) for one, key in ((student, HIDDEN), (student, HEADS), (teacher, HEADS))
    )
    if not (hidden and heads and most) or hidden % heads == 0:
        return ""
    if heads == most:
        whole = [
            size for size in (hidden // heads * heads, (hidden // heads + 1) * heads) if 0 < size <= teacher.hidden_size
        ]
        return f"; write {HIDDEN}: {' or '.join(map(str, whole))}"
    each = most // (getattr(teacher, GROUPS, None) or most)
    fits = [count for count in range(each, most + 1, each) if hidden % count == 0]
    near = [*[count for count in fits if count < heads][-1:], *[count for count in fits if count > heads][:1]]
    if not near:
        return ""
    groups = "" if each == 1 else f" ({GROUPS}: {' or '.join(str(count // each) for count in near)})"
    return f"; write {HEADS}: {' or '.join(map(str, near))}{groups}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _explain_widths(captured: Captured, config: Any, wrong: Sequence[str]) -> str:
    """Explains which widths a configuration ties together where it cannot express them, by the tensors that differ."""
    attention = any("attn" in name or "attention" in name for name in wrong)
    return _proportion(captured.config, config) if attention else ""


def _proportion(teacher: Any, student: Any) -> str:
    """Tells the remedy where a student's heads change width because the configuration has no key for that width."""
    hidden, heads = getattr(student, HIDDEN, None), getattr(student, HEADS, None)
    undeclared = getattr(teacher, HEAD_DIM, None) is None or derives_head_dim(teacher)
    if not (undeclared and hidden and heads) or head_width(teacher) in (None, hidden // heads):
        return ""
    return (
        "; this model's head width is always hidden_size / num_attention_heads, "
        f"{teacher.hidden_size} / {teacher.num_attention_heads}: narrow both in that proportion"
    )
