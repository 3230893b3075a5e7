"""Where the bytes of the teacher's parameters come from, and what the student's are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from minitron.compiler.axes.dims import Dims
from minitron.compiler.axes.narrowing import Indices, Narrowing
from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.models import quiet, stored_tensors
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.specs.errors import UsageError, WorkError


class WeightSource(Protocol):
    """The teacher's parameters by canonical name; `streamed` says that each is read from disk when it is asked for."""

    streamed: bool

    def get(self, name: str) -> torch.Tensor: ...


class StreamedWeights:
    """Reads one tensor at a time. For checkpoints whose tensors are named and shaped as the model's parameters are."""

    streamed = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def get(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        info = self._checkpoint.tensors[name]
        try:
            with safe_open(info.file, framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise WorkError(f"{info.file}: cannot read {name} ({error})") from None


class LoadedWeights:
    """A checkpoint that transformers converts while loading (experts that are stacked, say): the model is held whole."""

    streamed = False

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters

    def get(self, name: str) -> torch.Tensor:
        return self._parameters[name]


def check_headers(captured: Captured, checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint can be streamed. UsageError where headers contradict the configuration."""
    parameters = stored_tensors(captured.model)
    sizes = {name: tuple(parameter.shape) for name, parameter in parameters.items() if name in checkpoint.tensors}
    other = [name for name, shape in sizes.items() if checkpoint.tensors[name].shape != shape]
    if other:
        more = f" (and so with {len(other) - 1} more)" if len(other) > 1 else ""
        raise UsageError(
            f"{checkpoint.folder}: config.json says that {other[0]} is {list(sizes[other[0]])}, "
            f"the weight file has {list(checkpoint.tensors[other[0]].shape)}{more}; one of the two files belongs to "
            "another model"
        )
    missing = [name for name in parameters if name not in checkpoint.tensors]
    known = set(captured.canonical)
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
    """Streams where names and shapes allow it, else loads the model through transformers."""
    streamed = check_headers(captured, checkpoint)
    _check_tied(captured, checkpoint)
    if streamed:
        return StreamedWeights(checkpoint)
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder, dtype="auto", output_loading_info=True, trust_remote_code=False, use_safetensors=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # transformers raises anything for a broken checkpoint
        raise WorkError(f"{checkpoint.folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise WorkError(f"{checkpoint.folder} lacks {len(missing)} of the model's tensors, the first is {missing[0]}")
    for name, has, wants in sorted(info["mismatched_keys"]):  # named by us: transformers would point at its own log
        raise WorkError(
            f"{checkpoint.folder}: the files make {name} {list(has)}, and config.json says {list(wants)}; tensors are "
            "missing, or one of the files belongs to another model"
        )
    return LoadedWeights({name: value.detach() for name, value in stored_tensors(model).items()})


def _check_tied(captured: Captured, checkpoint: Checkpoint) -> None:
    """UsageError where tensors that the configuration ties are different ones: transformers does not tie them then."""
    both = {name: first for name, first in captured.canonical.items() if {name, first} <= checkpoint.tensors.keys()}
    source = StreamedWeights(checkpoint)
    for name, first in both.items():
        if name != first and not torch.equal(source.get(name), source.get(first)):
            raise UsageError(
                f"{checkpoint.folder}: config.json says that {name} is {first}, and the weight files have two different "
                'tensors; transformers keeps both, so write "tie_word_embeddings": false into config.json'
            )


def load_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tables that a model on the meta device computes for itself (rotary frequencies, embedding scales), by name.

    Uses the hook by which transformers restores them after loading, so they are what a loaded model has. The hook is called
    on every module, not only on those that hold a table: some fill those of the modules below them.
    """
    places = [
        (f"{path}.{name}" if path else name, module, name)
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    ]
    empty = {full: module._buffers[name] for full, module, name in places}
    for full, module, name in places:
        module._buffers[name] = torch.full_like(empty[full], 0, device="cpu")
    for value in stored_tensors(model).values():
        value._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.no_grad():
        model.initialize_weights()  # type: ignore[operator]
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # else a second call does nothing
    filled = {full: module._buffers[name] for full, module, name in places}
    for full, module, name in places:
        module._buffers[name] = empty[full]
    return {full: value for full, value in filled.items() if value is not None}


@dataclass(frozen=True)
class Recipe:
    """How one parameter of the student is made: `source` of the teacher, kept positions a dimension (None: all of them).

    Positions [k, n] differ with the k kept indices of the dimension `beside`: the channels of each expert.
    `scale` and `shift` are the repairs that a constant asked for: w -> (w + shift) * scale - shift.
    """

    source: str
    positions: tuple[Indices | None, ...]
    scale: float = 1.0
    shift: float = 0.0
    beside: int = 0

    def make(self, weight: torch.Tensor) -> torch.Tensor:
        """The student's parameter from the teacher's, in the teacher's dtype."""
        for axis, kept in enumerate(self.positions):
            if kept is not None and kept.ndim == 1:
                weight = weight.index_select(axis, _on(kept, weight))
        for axis, kept in self._apart():
            slices = [part.index_select(axis, _on(row, weight)) for part, row in self._slices(weight, kept)]
            weight = torch.cat(slices, self.beside)
        if self.scale != 1.0:
            exact = weight.double()
            weight = ((exact + self.shift) * self.scale - self.shift).to(weight.dtype)
        return weight.contiguous()

    def mask(self, weight: torch.Tensor) -> torch.Tensor:
        """The teacher's parameter with everything that is not kept set to zero."""
        weight = weight.clone()
        for axis, kept in enumerate(self.positions):
            if kept is not None and kept.ndim == 1:
                weight.index_fill_(axis, _on(_gone(kept, weight.shape[axis]), weight), 0)
        for axis, kept in self._apart():
            owners = self.positions[self.beside]
            for number, row in zip(range(len(kept)) if owners is None else owners, kept, strict=True):
                part = weight.narrow(self.beside, int(number), 1)
                part.index_fill_(axis, _on(_gone(row, weight.shape[axis]), weight), 0)
        return weight

    def _apart(self) -> list[tuple[int, Indices]]:
        return [(axis, kept) for axis, kept in enumerate(self.positions) if kept is not None and kept.ndim == 2]

    def _slices(self, weight: torch.Tensor, kept: Indices) -> list[tuple[torch.Tensor, Indices]]:
        return list(zip(torch.split(weight, 1, self.beside), kept, strict=True))


def _on(indices: Indices, weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(indices)).to(weight.device)


def _gone(kept: Indices, size: int) -> Indices:
    """The indices that are not kept."""
    return np.setdiff1d(np.arange(size, dtype=np.int64), kept)


def recipes(
    captured: Captured, parameters: Mapping[str, Dims], narrowing: Narrowing, kept_layers: Sequence[int]
) -> dict[str, Recipe]:
    """Student parameter name -> how it is made, for every parameter that the student has."""
    numbers = {old: new for new, old in enumerate(kept_layers)}
    result: dict[str, Recipe] = {}
    for name, dims in parameters.items():
        layer = captured.layer_in_path(name)
        if layer is not None and layer not in numbers:
            continue
        result[renumber(captured, name, numbers)] = _recipe(name, dims, narrowing)
    return result


def _recipe(name: str, dims: Dims, narrowing: Narrowing) -> Recipe:
    positions: list[Indices | None] = []
    beside = 0
    for dim in dims:
        owners = narrowing.elsewhere(dim)
        if not narrowing.touches(dim):
            positions.append(None)
        elif not owners:
            positions.append(narrowing.positions(dim))
        else:
            (beside,) = (i for i, other in enumerate(dims) if set(owners) <= set(narrowing.space.leaves(other)))
            positions.append(narrowing.positions_beside(dim, dims[beside]))
    return Recipe(name, tuple(positions), beside=beside)


def renumber(captured: Captured, name: str, numbers: Mapping[int, int]) -> str:
    """A parameter's name once its layer has its new number."""
    layer = captured.layer_in_path(name)
    if layer is None:
        return name
    prefix = f"{captured.layer_path}.{layer}."
    return f"{captured.layer_path}.{numbers[layer]}.{name.removeprefix(prefix)}"
