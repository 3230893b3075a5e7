"""Taps on the values of a running graph, and the accumulators that they feed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node
from torch.nn.functional import cosine_similarity

from minitron.compiler.axes.dims import size_of
from minitron.compiler.axes.table import AxisTable
from minitron.compiler.capture.capture import Captured
from minitron.compiler.graph.aten import MOVES, is_op
from minitron.compiler.graph.executor import Tap
from minitron.compiler.graph.names import Fetch
from minitron.compiler.importance.covariance import Gram
from minitron.compiler.importance.elimination import Elimination
from minitron.compiler.importance.expert_elimination import ExpertGram, eliminate_experts
from minitron.compiler.importance.ranks import Ranks
from minitron.compiler.importance.row_blocks import row_blocks
from minitron.compiler.importance.sample_rows import Rows, SampleRows
from minitron.compiler.importance.scores import (
    Accumulator,
    Contributions,
    Scores,
    ScoreTable,
    Seen,
    WidthConfig,
    over_experts,
    over_owned_tokens,
    over_rows,
    over_tokens,
)
from minitron.compiler.roles.analysed import AnalysedTeacher
from minitron.compiler.roles.experts import Mixture
from minitron.compiler.roles.names import HEADS, HIDDEN, NUM_EXPERTS, SCAN_HEAD_DIM, SCAN_HEADS
from minitron.compiler.roles.residual_stream import LayerEnds
from minitron.compiler.roles.roles import Roles, Width
from minitron.compiler.roles.rotation import Site


@dataclass(frozen=True)
class DepthConfig:
    """The metric by which layers are ranked (Minitron, arXiv 2407.14679, section 2.3). `one_by_one`: how many are dropped one
    after the other, with the remaining ones scored again each time; 0: all are ranked at once."""

    metric: Literal["block_influence", "loss", "logit_mse"] = "block_influence"
    one_by_one: int = 0


@dataclass(frozen=True)
class CalibrationConfig:
    """The settings that decide the scores, besides teacher and samples.

    `sites` are the norm outputs whose covariance is taken, `head_site` that of the norm before a tied head, whose
    covariance is kept apart too. `greedy`: neurons, heads and experts are ranked by elimination. `experts`: what experts yield
    is kept beside their scores.
    """

    width: WidthConfig
    depth: DepthConfig
    sites: tuple[Site, ...] = ()
    head_site: Site | None = None
    greedy: bool = False
    experts: bool = False


class Taps:
    """All accumulators, and the nodes that feed them."""

    def __init__(self, teacher: AnalysedTeacher, config: CalibrationConfig, fetch: Fetch):
        table, roles, ends = teacher.table, teacher.roles, teacher.ends
        self.roles = roles
        self.space = table.space
        self.accumulators: dict[str, Accumulator] = {}
        self.contributions: dict[int, Contributions] = {}
        # Of each layer the sum over tokens of 1 - cos(x_in, x_out), and the tokens.
        self.turned = [torch.zeros((), dtype=torch.float64) for _ in ends]
        self.turned_tokens = [0 for _ in ends]
        self.by_node: dict[str, list[Tap]] = {}
        self.given: dict[str, Tap] = {}
        self._entered: torch.Tensor | None = None
        # Ends of experts' rows and indices, of the batch that is being run.
        self._integers: dict[str, torch.Tensor] = {}
        self._shapes: list[tuple[int, ...]] = []
        self._samples = SampleRows(teacher.captured, table)
        self.one_at_a_time = False
        """Samples are run one at a time: a value is scored in which those of a batch cannot be told apart."""
        self._config = config
        self.covariance = {"hidden": Gram(), "head": Gram()}
        for norm in config.sites:
            self._covariance(norm)
        self.elimination = Elimination(table, roles, fetch)
        for name, tap in self.elimination.taps() if config.greedy else []:
            self._add(name, tap)
        for ends_of in (one.ends for one in roles.mixtures.values()):
            if ends_of is not None:
                self._keep(ends_of)
        for node in norm_outputs(teacher.captured, roles):
            self._accumulate(node, f"{HIDDEN}.{node.name}")
        for layer, site in roles.heads.items():
            for reader in site.uses:
                self._accumulate(reader.value, f"{HEADS}.{layer}")
        for name, layers in roles.widths.items():
            for layer, width in layers.items():
                for reader in width.uses:
                    mixture = roles.mixtures.get(layer)
                    if mixture is not None and width.parents == mixture.experts:
                        self._accumulate_by_expert(table, reader.value, mixture, f"{name}.{layer}")
                    else:
                        self._accumulate(reader.value, f"{name}.{layer}")
        self.together: dict[int, ExpertGram] = {}
        for layer, mixture in roles.mixtures.items():
            if mixture.told_apart:
                self._contribution(table, layer, mixture)
                if config.greedy:
                    self._together(table, layer, mixture)
        if config.depth.metric == "block_influence":
            for layer, end in enumerate(ends):
                self._influence(layer, end)

    def _add(self, name: str, tap: Tap) -> None:
        self.by_node.setdefault(name, []).append(tap)

    def begin(self, batches: Sequence[torch.Tensor]) -> None:
        """Names the batches of token ids that are run next."""
        self._shapes = [tuple(batch.shape) for batch in batches]

    def _rows(self, node: Node) -> Rows | None:
        """The samples of a value's rows; taps the index that they are told by."""
        rows = self._samples.find(node)
        if rows is None:
            self.one_at_a_time = True
        elif rows.index is not None:
            self._keep(rows.index)
        return rows

    def _keep(self, node: Node) -> None:
        """Keeps the integers that a node yields until later taps of the same batch have read them."""

        def keep(value: torch.Tensor, number: int) -> None:
            self._integers[node.name] = value

        self._add(node.name, keep)

    def _members(self, rows: Rows | None, value: torch.Tensor, number: int) -> torch.Tensor:
        """1 where row n of a value [N, C] is of sample b, [B, N]."""
        batch = self._shapes[number][0]
        if rows is None:
            assert batch == 1, "samples that cannot be told apart are run one at a time"
            return value.new_ones(1, value.shape[0])
        sizes = self._samples.sizes_of(self._shapes[number])
        every = torch.arange(value.shape[0], device=value.device)
        index = every if rows.index is None else self._integers[rows.index.name]
        return rows.members(index, sizes, batch)

    def _samples_first(self, rows: Rows | None, value: torch.Tensor, number: int) -> torch.Tensor:
        """[B, ..] of a value whose rows stand sample by sample."""
        batch = self._shapes[number][0]
        if rows is None:
            assert batch == 1, "samples that cannot be told apart are run one at a time"
            return value.unsqueeze(0)
        return rows.split(value, self._samples.sizes_of(self._shapes[number]), batch)

    def _accumulate(self, node: Node, key: str) -> None:
        accumulator, rows = self.accumulators.setdefault(key, Accumulator(self._config.width)), self._rows(node)

        def tap(value: torch.Tensor, number: int) -> None:
            if rows is not None and rows.index is not None:
                members = self._members(rows, value, number)
                accumulator.add(over_rows(value.float().abs(), members, self._config.width.sequence))
                return
            value = self._samples_first(rows, value, number)
            accumulator.update(value.reshape(value.shape[0], -1, value.shape[-1]))

        self._add(node.name, tap)

    def _covariance(self, site: Site) -> None:
        grams = [self.covariance["hidden"]] + ([self.covariance["head"]] if site == self._config.head_site else [])

        def tap(value: torch.Tensor, number: int) -> None:
            rows = value.reshape(-1, value.shape[-1]).float()
            if not site.normalised:
                rows = rows * rows.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            for gram in grams:
                gram.add(rows)

        self._add(site.node, tap)

    def _accumulate_by_expert(self, table: AxisTable, node: Node, mixture: Mixture, key: str) -> None:
        """The channels of every expert, [experts, channels]."""
        accumulator, rows = self.accumulators.setdefault(key, Accumulator(self._config.width)), self._rows(node)
        how = self._config.width.sequence

        def tap(value: torch.Tensor, number: int) -> None:
            if mixture.ends is not None:
                ends, value = self._integers[mixture.ends.name], value.float().abs()
                score_BEC = over_owned_tokens(value, ends, self._members(rows, value, number), how)
            else:
                axis = experts_axis(table, node, mixture)
                if rows is not None and rows.axis > axis:
                    value = self._samples_first(rows, value, number).movedim(axis + 1, 1)
                else:  # the experts stand behind the rows, which `split` makes three of, the samples in front
                    value = self._samples_first(rows, value, number)
                    value = value.movedim(axis + (1 if rows is None else 2), 1)
                score_BEC = over_tokens(value.reshape(*value.shape[:2], -1, value.shape[-1]), how)
            accumulator.add(score_BEC)

        self._add(node.name, tap)

    def _contribution(self, table: AxisTable, layer: int, mixture: Mixture) -> None:
        """The norm of what every expert adds. Where all experts see all tokens, those not sent to one add nothing to it."""
        contributions, outputs = self.contributions.setdefault(layer, Contributions()), self._config.experts

        def tap(value: torch.Tensor, number: int) -> None:
            value = value.float()
            if mixture.ends is None:
                added_ENH = experts_first(table, mixture.contribution, mixture, value)
                norms_EN = added_ENH.norm(dim=-1)
                contributions.add(norms_EN.sum(-1), (norms_EN > 0).sum(-1), added_ENH.sum(1) if outputs else None)
            else:
                ends = self._integers[mixture.ends.name]
                sums_E = over_experts(value.norm(dim=-1, keepdim=True), ends)[:, 0]
                tokens_E = torch.diff(ends, prepend=ends.new_zeros(1))
                contributions.add(sums_E, tokens_E, over_experts(value, ends) if outputs else None)

        self._add(mixture.contribution.name, tap)

    def _together(self, table: AxisTable, layer: int, mixture: Mixture) -> None:
        """The products of what each pair of experts adds to a token."""
        rows = self._samples.find_tokens(mixture.contribution)
        if mixture.ends is not None and rows is None:
            return  # the plan has refused a spec that needs them
        count = size_of(mixture.experts).coefficient
        gram = self.together[layer] = ExpertGram(count)
        if mixture.ends is not None and rows is not None:
            self._keep(rows.index)

        def tap(value: torch.Tensor, number: int) -> None:
            value = value.float()
            if mixture.ends is None or rows is None:
                gram.add_dense(experts_first(table, mixture.contribution, mixture, value))
                return
            sizes = self._samples.sizes_of(self._shapes[number])
            gram.add_rows(value, self._integers[mixture.ends.name], rows.tokens(self._integers[rows.index.name], sizes))

        self._add(mixture.contribution.name, tap)

    def _influence(self, layer: int, end: LayerEnds) -> None:
        """Block influence: 1 - E[cos(x_in, x_out)] over all tokens."""

        def enter(value: torch.Tensor, number: int) -> None:
            self._entered = value

        def leave(value: torch.Tensor, number: int) -> None:
            before, self._entered = self._entered, None
            assert before is not None
            blocks = zip(*(row_blocks(one.flatten(0, -2)) for one in (before, value)), strict=True)
            turned = torch.stack(
                [(1 - cosine_similarity(one.float(), other.float(), dim=-1)).sum().double() for one, other in blocks]
            ).sum()
            self.turned[layer] = self.turned[layer].to(turned.device) + turned
            self.turned_tokens[layer] += value.shape[:-1].numel()

        self.given[end.entry] = enter
        self._add(end.leave, leave)

    def taps(self) -> dict[str, Tap]:
        def all_of(taps: list[Tap]) -> Tap:
            def call(value: torch.Tensor, number: int) -> None:
                for tap in taps:
                    tap(value, number)

            return call

        return {name: all_of(taps) for name, taps in self.by_node.items()}

    # -- what is kept of a calibration that was killed ------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        if self.turned:
            state["influence/turned"] = torch.stack([one.cpu() for one in self.turned])
            state["influence/tokens"] = torch.tensor(self.turned_tokens)
        for key, accumulator in self.accumulators.items():
            if accumulator.total is not None and accumulator.squares is not None:
                state[f"total/{key}"] = accumulator.total.cpu()
                state[f"squares/{key}"] = accumulator.squares.cpu()
                state[f"samples/{key}"] = torch.tensor(accumulator.samples)
        for key, gram in self.covariance.items():
            if gram.total is not None:
                state[f"covariance/{key}"] = gram.total.cpu()
                state[f"covered/{key}"] = torch.tensor(gram.tokens)
        for key, gram in self.elimination.grams.items():
            if gram.total is not None:
                state[f"gram/{key}"] = gram.total.cpu()
                state[f"grammed/{key}"] = torch.tensor(gram.tokens)
        for key, order in self.elimination.orders.items():
            state[f"eliminated/{key}"] = torch.from_numpy(order)
        for layer, together in self.together.items():
            if together.total is not None:
                state[f"together/{layer}"] = together.total.cpu()
        for layer, contributions in self.contributions.items():
            if contributions.total is not None:
                assert contributions.tokens is not None
                state[f"contributed/{layer}"] = contributions.total.cpu()
                state[f"received/{layer}"] = contributions.tokens.cpu()
                if contributions.outputs is not None:
                    state[f"outputs/{layer}"] = contributions.outputs.cpu()
        return state

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        if "influence/turned" in state:
            self.turned = list(state["influence/turned"].unbind())
            self.turned_tokens = state["influence/tokens"].tolist()
        for key, accumulator in self.accumulators.items():
            if f"total/{key}" in state:
                accumulator.total, accumulator.squares = state[f"total/{key}"], state[f"squares/{key}"]
                accumulator.samples = int(state[f"samples/{key}"])
        for key, gram in self.covariance.items():
            if f"covariance/{key}" in state:
                gram.total, gram.tokens = state[f"covariance/{key}"], int(state[f"covered/{key}"])
        for key, value in state.items():
            kind, _, which = key.partition("/")
            if kind == "eliminated":
                self.elimination.orders[which] = value.numpy()
            elif kind == "together":
                self.together[int(which)].total = value
            elif kind == "gram":
                self.elimination.grams[which] = Gram(value, int(state[f"grammed/{which}"]))
        for layer, contributions in self.contributions.items():
            if f"contributed/{layer}" in state:
                contributions.total, contributions.tokens = state[f"contributed/{layer}"], state[f"received/{layer}"]
                contributions.outputs = state.get(f"outputs/{layer}")

    def reduce(self, ranks: Ranks) -> None:
        """Sums what all processes have accumulated; each has the same afterwards."""
        if ranks.size == 1:
            return
        for layer, turned in enumerate(self.turned):
            self.turned[layer] = ranks.sum(turned)
            self.turned_tokens[layer] = int(ranks.sum(torch.tensor(self.turned_tokens[layer])))
        for accumulator in self.accumulators.values():
            assert accumulator.total is not None and accumulator.squares is not None
            accumulator.total, accumulator.squares = ranks.sum(accumulator.total), ranks.sum(accumulator.squares)
            accumulator.samples = int(ranks.sum(torch.tensor(accumulator.samples)))
        for gram in self.covariance.values():
            if gram.total is not None:
                gram.total, gram.tokens = ranks.sum(gram.total), int(ranks.sum(torch.tensor(gram.tokens)))
        for together in self.together.values():
            assert together.total is not None
            together.total = ranks.sum(together.total)
        for one in self.contributions.values():
            assert one.total is not None and one.tokens is not None
            one.total, one.tokens = ranks.sum(one.total), ranks.sum(one.tokens)
            if one.outputs is not None:
                one.outputs = ranks.sum(one.outputs)

    # -- the end ------------------------------------------------------------------------------------------------------

    def table(self) -> ScoreTable:
        hidden: Scores | None = None
        for key, accumulator in self.accumulators.items():
            if key.startswith(f"{HIDDEN}."):
                score = accumulator.result().numpy()
                hidden = score if hidden is None else hidden + score
        heads = {}
        for layer, site in self.roles.heads.items():
            key = f"{HEADS}.{layer}"
            if key in self.accumulators:
                channels = self.accumulators[key].result().reshape(site.groups, site.repeats, -1)
                heads[layer] = channels.norm(dim=-1).numpy()  # L2 over the width of a head
        widths = {
            name: {layer: self._width_scores(name, layer, width) for layer, width in layers.items() if width.readers}
            for name, layers in self.roles.widths.items()
            if any(width.readers for width in layers.values())
        }
        if self.contributions:
            widths[NUM_EXPERTS] = {
                layer: one.result().reshape(self.roles.mixtures[layer].groups, -1).squeeze(0).numpy()
                for layer, one in self.contributions.items()
            }
        for layer, together in self.together.items():
            assert together.total is not None
            widths[NUM_EXPERTS][layer] = eliminate_experts(together.total, self.roles.mixtures[layer].groups)
        for key, order in self.elimination.orders.items():
            name, _, number = key.partition(".")
            if name == HEADS:
                heads[int(number)] = order
            else:
                widths[name][int(number)] = order
        layers = None
        if self._config.depth.metric == "block_influence" and self.turned:
            turned = torch.stack([one.cpu() for one in self.turned])
            layers = (turned / torch.tensor(self.turned_tokens, dtype=torch.float64)).float().numpy()
        covariance = {key: gram.mean().cpu().numpy() for key, gram in self.covariance.items() if gram.total is not None}
        return ScoreTable(hidden, heads, widths, layers, covariance, self._seen() if self._config.experts else {})

    def _seen(self) -> dict[int, Seen]:
        return {
            layer: Seen(one.tokens.float().cpu().numpy(), one.mean_outputs().numpy())
            for layer, one in self.contributions.items()
            if one.tokens is not None
        }

    def _width_scores(self, name: str, layer: int, width: Width) -> Scores:
        score = self.accumulators[f"{name}.{layer}"].result()
        if name in (SCAN_HEADS, SCAN_HEAD_DIM):
            score = self.roles.scans[layer].scores(name, score, apart=bool(width.parents))
        return score.numpy()


def experts_axis(table: AxisTable, node: Node, mixture: Mixture) -> int:
    """The dimension of a value that is the experts'."""
    (axis,) = (i for i, dim in enumerate(table.dims(node)) if table.space.flat(dim) == mixture.experts)
    return axis


def experts_first(table: AxisTable, node: Node, mixture: Mixture, value: torch.Tensor) -> torch.Tensor:
    """[experts, rows, channels] of a value that has the experts in a dimension of their own."""
    axis = experts_axis(table, node, mixture)
    return value.movedim(axis, 0).reshape(value.shape[axis], -1, value.shape[-1])


def norm_outputs(captured: Captured, roles: Roles) -> list[Node]:
    """The values of the residual stream's width that projections inside the layers read: outputs of the input norms."""
    result: list[Node] = []
    for reader in roles.hidden.readers:
        if reader.weight is None or captured.layer_in_path(reader.weight) is None:
            continue
        node = reader.value
        while is_op(node, MOVES) and isinstance(node.args[0], Node):
            node = node.args[0]
        if node not in result and node.meta["val"].dim() == 3:
            result.append(node)
    return result
