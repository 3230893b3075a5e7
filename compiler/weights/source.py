"""Reads the bytes of the teacher's parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minitron.compiler.axes.narrowing import Indices
from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.load_effects import written_on_load
from minitron.compiler.capture.models import quiet, stored_tensors
from minitron.compiler.storage.stored import read_stored
from minitron.compiler.storage.tensors import worth_picking
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.compiler.teacher.model_config import OF_CODE, in_one_line, load_config
from minitron.compiler.teacher.refusals import check_tensors_not_quantised
from minitron.compiler.weights.foreign_names import find_foreign_name
from minitron.compiler.weights.other_models import check_head, check_nothing_beside
from minitron.specs.errors import UsageError, WorkError

# Elements of a tensor that are checked for NaN and infinity at a time.
_PIECE = 1 << 24


class WeightSource(Protocol):
    """The teacher's parameters by canonical name; `streamed` says that each is read from disk when it is asked for."""

    streamed: bool

    def get(self, name: str) -> torch.Tensor: ...


Kind = TypeVar("Kind")


def find_source(source: WeightSource, kind: type[Kind]) -> Kind | None:
    """Returns the weights of a `kind` among those that `source` is made of, each by its `source` from the next; None where it
    has none of them."""
    found: Any = source
    while found is not None and not isinstance(found, kind):
        found = getattr(found, "source", None)
    return found


class StreamedWeights:
    """Reads one tensor at a time. For checkpoints whose tensors are named and shaped as the model's parameters are.

    `dtypes` say what each is held in. A tensor that holds NaN or infinity, or would in its dtype, is an error when it is first
    read, and so is a file that is not the one whose header was read. `names` are those of the file where a tied parameter
    stands there under its other name.
    """

    streamed = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype_of: Callable[[str], torch.dtype] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype_of = dtype_of
        self._names = names or {}
        self._seen: set[str] = set()

    def get(self, name: str) -> torch.Tensor:
        return self._read(name, None)

    def rows(self, name: str, kept: Indices) -> torch.Tensor:
        """Returns rows of a parameter, ascending; only these are read where a row is long enough to be worth it."""
        if worth_picking(self._checkpoint.tensors[self._names.get(name, name)]):
            return self._read(name, kept)
        return self.get(name).index_select(0, torch.from_numpy(kept))

    def order(self, name: str) -> tuple[str, int]:
        """The place of a parameter in the files: sorted by it, they are read from front to back."""
        info = self._checkpoint.tensors[self._names.get(name, name)]
        return str(info.file), info.start

    def _read(self, name: str, kept: Indices | None) -> torch.Tensor:
        stored = self._names.get(name, name)
        info = self._checkpoint.tensors[stored]
        tensor = read_stored(stored, info, kept)
        key = name if kept is None else f"{name}, rows"
        if name not in self._seen and key not in self._seen:
            check_finite(tensor, stored, str(info.file), None if self._dtype_of is None else self._dtype_of(name))
            self._seen.add(key)
        return tensor


def check_finite(tensor: torch.Tensor, name: str, file: str, held: torch.dtype | None) -> None:
    """Raises WorkError where a tensor holds NaN or infinity, or would once it is held in `held`, with the place of the
    first."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    flat, most = tensor.reshape(-1), 0.0
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        if piece.dtype.itemsize == 1:
            piece = piece.float()
        low, high = (float(value) for value in torch.aminmax(piece))
        if low != low or high != high or abs(low) == float("inf") or abs(high) == float("inf"):
            found = start + int((~torch.isfinite(piece)).nonzero()[0, 0])
            index = [int(one) for one in torch.unravel_index(torch.tensor(found), tensor.shape)]
            raise WorkError(
                f"{file}: {name} holds {float(flat[found])} at {index}; the weights are damaged, or their training had "
                "diverged: take another checkpoint of this model"
            )
        most = max(most, abs(low), abs(high))
    if held is not None and most > torch.finfo(held).max:
        raise WorkError(
            f"{file}: {name} holds {most:.3g}, which {held} cannot; write `teacher.dtype: float32` into the spec"
        )


class LoadedWeights:
    """Holds a whole `model` in memory, for a checkpoint that transformers converts while loading it (experts that are
    stacked, say)."""

    streamed = False

    def __init__(self, parameters: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
        self._parameters, self.model = parameters, model

    def get(self, name: str) -> torch.Tensor:
        return self._parameters[name]


def check_headers(captured: Captured, checkpoint: Checkpoint) -> bool:
    """Checks whether the checkpoint can be streamed. Raises UsageError where headers contradict the configuration."""
    parameters = stored_tensors(captured.model)
    known = set(captured.canonical)
    floating = {name for name, first in captured.canonical.items() if parameters[first].is_floating_point()}
    check_tensors_not_quantised(checkpoint.folder, checkpoint.tensors, floating, known)
    sizes = {name: tuple(parameter.shape) for name, parameter in parameters.items() if name in checkpoint.tensors}
    other = [name for name, shape in sizes.items() if checkpoint.tensors[name].shape != shape]
    if other:
        more = f" (and so with {len(other) - 1} more)" if len(other) > 1 else ""
        raise UsageError(
            f"{checkpoint.folder}: config.json says that {other[0]} is {list(sizes[other[0]])}, "
            f"the weight file has {list(checkpoint.tensors[other[0]].shape)}{more}; one of the two files belongs to "
            "another model"
        )
    other_names = _tied_names(captured, checkpoint)
    missing = [name for name in parameters if name not in checkpoint.tensors and name not in other_names]
    if not missing:
        check_nothing_beside(captured, checkpoint)
    check_head(captured, checkpoint, missing, converted=partial(_converted_by_transformers, captured, checkpoint))
    foreign = find_foreign_name(missing, checkpoint.tensors)
    if foreign is not None and not _converted_by_transformers(captured, checkpoint, foreign.there):
        raise UsageError(
            f"{checkpoint.folder}: {len(missing)} of the model's tensors are missing, and the files have "
            f"`{foreign.part}` in their names ({foreign.there} in place of {foreign.wanted}); {foreign.remedy}"
        )
    whole = checkpoint.commit is None  # of a model from the Hub some files may not be on this machine
    if missing and whole and checkpoint.tensors and known.issuperset(checkpoint.tensors):
        # Nothing that transformers could make them of: where tensors have names of their own, it may convert them.
        tensors = "tensor" if len(missing) == 1 else "tensors"
        raise UsageError(
            f"{checkpoint.folder}: config.json describes {len(missing)} {tensors} that the weight files have not, the first "
            f"is {missing[0]}; one of the two belongs to another model, or a file is missing"
        )
    return not missing


def open_weights(captured: Captured, checkpoint: Checkpoint) -> WeightSource:
    """Opens the weights: streams where names and shapes allow that, and where loading changes none of them, else loads the
    model through transformers."""
    streamed = check_headers(captured, checkpoint) and not written_on_load(captured.model)
    _check_tied(captured, checkpoint)
    if streamed:
        return StreamedWeights(checkpoint, captured.stored_dtype, _tied_names(captured, checkpoint))
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, dtype="auto", output_loading_info=True, trust_remote_code=False, use_safetensors=True,
                ignore_mismatched_sizes=True, config=load_config(checkpoint.folder, without=OF_CODE),
            )  # fmt: skip
    except Exception as error:  # transformers raises anything for a broken checkpoint
        raise WorkError(f"{checkpoint.folder} cannot be loaded: {in_one_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise WorkError(
            f"{checkpoint.folder} lacks {len(missing)} of the model's tensors, the first is {missing[0]}"
            + _unexpected(sorted(info["unexpected_keys"]))
        )
    for name, has, wants in sorted(info["mismatched_keys"]):  # named by us: transformers would point at its own log
        raise WorkError(
            f"{checkpoint.folder}: the files make {name} {list(has)}, and config.json says {list(wants)}; tensors are "
            "missing, or one of the files belongs to another model"
        )
    loaded = {name: value.detach() for name, value in stored_tensors(model).items()}
    for name, value in loaded.items():
        check_finite(value, name, str(checkpoint.folder), captured.stored_dtype(name))
    return LoadedWeights(loaded | {name: loaded[stored] for name, stored in checkpoint.aliases.items()}, model)


def _unexpected(names: list[str]) -> str:
    return f"; the files have {len(names)} that the model has not, the first is {names[0]}" if names else ""


def _tied_names(captured: Captured, checkpoint: Checkpoint) -> dict[str, str]:
    """Maps canonical names to names in the files, where these hold a tied parameter under another of its names only, or
    where parameters that the files tie are to be two."""
    there = checkpoint.tensors
    names = {
        first: name
        for name, first in captured.canonical.items()
        if name != first and name in there and first not in there
    }
    for name, stored in checkpoint.aliases.items():
        if name not in there and stored in there:
            names[name] = stored
        elif stored not in there and name in there:
            names[stored] = name
    return names


def _converted_by_transformers(captured: Captured, checkpoint: Checkpoint, name: str) -> bool:
    """Checks whether transformers maps a tensor of the files to one of the model, by giving it that one alone, without its
    bytes."""
    info = checkpoint.tensors[name]
    with quiet(), _one_thread(), FakeTensorMode(allow_non_fake_inputs=True):
        tensor = torch.empty(info.shape)
        try:
            _, found = type(captured.model).from_pretrained(  # type: ignore[attr-defined]
                None, config=captured.config, state_dict={name: tensor}, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
        except Exception:  # it knows the name, and wants more than the one tensor
            return True
    return name not in found["unexpected_keys"]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Makes transformers load in this thread: the fake tensors of another one are real ones."""
    key = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _check_tied(captured: Captured, checkpoint: Checkpoint) -> None:
    """Raises UsageError where tensors that the configuration ties are different ones: transformers does not tie them
    then."""
    both = {name: first for name, first in captured.canonical.items() if {name, first} <= checkpoint.tensors.keys()}
    source = StreamedWeights(checkpoint)
    for name, first in both.items():
        if name != first and not torch.equal(source.get(name), source.get(first)):
            raise UsageError(
                f"{checkpoint.folder}: config.json says that {name} is {first}, and the weight files have two different "
                'tensors; transformers keeps both, so write "tie_word_embeddings": false into config.json'
            )
