"""The routes to the teacher's function: its captured graph, and the model that transformers loads from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule

from minitron.compiler.graph.executor import Executor, Feeding
from minitron.compiler.graph.names import Fetch
from minitron.compiler.verify.comparison import Floor, measured
from minitron.compiler.verify.hugging_face import load_model, logits_of
from minitron.compiler.verify.perturbed import perturbed
from minitron.compiler.verify.subject import Original
from minitron.compiler.verify.widened import InFloat32, Say
from minitron.compiler.weights.source import LoadedWeights


class TeacherRoutes:
    """Logits [B, S, V] for the same token ids, each computed when it is first asked for. `say` is told what costs memory."""

    def __init__(self, original: Original, ids: torch.Tensor, say: Say) -> None:
        self.original, self.ids, self._say = original, ids, say

    def graph(
        self,
        graph_module: GraphModule,
        fetch: Fetch,
        buffers: Mapping[str, torch.Tensor],
        *others: torch.Tensor,
    ) -> list[torch.Tensor]:
        """A graph run layer by layer: its logits for the ids, and for `others` beside them."""
        found: dict[int, torch.Tensor] = {}
        captured = self.original.teacher.captured
        Executor(graph_module, captured.layer_of, fetch, buffers, self.original.settings, Feeding(apart=True)).run(
            [self.ids, *others],
            output=lambda logits, number: found.__setitem__(number, logits.float().cpu()),
        )
        return [found[number] for number in sorted(found)]

    def captured(self, fetch: Fetch, *others: torch.Tensor) -> list[torch.Tensor]:
        """The teacher's graph on any weights."""
        return self.graph(self.original.teacher.captured.graph_module, fetch, self.original.buffers, *others)

    @cached_property
    def whole(self) -> torch.Tensor:
        """The teacher's graph on its own weights."""
        return self.both[0]

    @cached_property
    def both(self) -> list[torch.Tensor]:
        """`whole`, and the same with another token at the end of each row: one reading of the weights does for both."""
        ids, size = self.ids.clone(), self.original.teacher.captured.config.vocab_size
        ids[:, -1] = (ids[:, -1] + max(1, size // 2)) % size
        return self.captured(self.original.held, ids)

    @cached_property
    def floor(self) -> Floor:
        """The changes that rounding makes to the teacher's logits."""
        return measured(self.captured(perturbed(self.original.held))[0], self.whole)

    @cached_property
    def model(self) -> Any:
        """The model that transformers loads from the folder, with the kernels that it chooses."""
        source = self.original.source
        if isinstance(source, LoadedWeights):
            return source.model
        return load_model(self.original.folder, None, self.original.stored, of_user=True)

    @cached_property
    def loaded(self) -> torch.Tensor:
        """The logits of `model`, run in float32 on weights in the dtype that the spec loads them in."""
        return self.wide.run(lambda _: logits_of(self.model, self.ids))

    @cached_property
    def wide(self) -> InFloat32:
        """`model`, ready to be run in float32."""
        original = self.original
        return InFloat32(self.model, original.teacher.captured, original.buffers, original.settings.device, self._say)
