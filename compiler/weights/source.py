"""Where the bytes of the teacher's parameters come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from minitron.compiler.capture.capture import Captured
from minitron.compiler.capture.models import quiet, stored_tensors
from minitron.compiler.teacher.checkpoint import Checkpoint
from minitron.specs.errors import UsageError, WorkError, first_line


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
        raise WorkError(f"{checkpoint.folder} cannot be loaded: {first_line(error)}") from None
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
