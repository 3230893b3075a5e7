"""Names the axes for people, by where they stand in the graph.

hidden_size             the residual stream: what the token embedding yields, or a projection of that which the layers are given
num_attention_heads     the query heads of every attention: (key-value group, repeat within it)
num_key_value_heads     the part of the query heads that the values have too
head_dim                the widths of queries, keys and values
intermediate_size       what a projection back into the residual stream contracts, and no attention yields;
                        of stacked expert weights it is moe_intermediate_size where the config has that key, or where
                        other layers have no experts
num_experts             the stacked dimension of expert weights
mamba_num_heads         the heads of a state-space or linear-attention mixer (`ssm_heads`)
mamba_head_dim          the width of one of those
convolved_channels      what a mixer convolves position by position and takes back, where feed-forward layers stand beside
                        it: no spec can name it, and it follows hidden_size where the configuration has it so
num_hidden_layers       the list of layers; no axis of a tensor
vocab_size              the rows of the embedding; never narrowed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from minitron.compiler.axes.dims import Atom, Dim
from minitron.compiler.axes.table import AxisTable, Contraction
from minitron.compiler.capture.capture import Captured
from minitron.compiler.roles.experts import Mixture, find_mixture, is_stack, prunable_per_owner
from minitron.compiler.roles.names import (
    CONVOLVED,
    INTERMEDIATE,
    MOE_INTERMEDIATE,
    NUM_EXPERTS,
    SCAN_HEAD_DIM,
    SCAN_HEADS,
    SHARED,
)
from minitron.compiler.roles.residual_stream import layer_ends
from minitron.compiler.roles.ssm_heads import Scan, channels_apart, find_scans, heads_apart
from minitron.specs.errors import UsageError


@dataclass(frozen=True)
class Heads:
    """The heads of one attention. `group` is None where there is one group, `repeat` where groups have one query head."""

    group: Atom | None
    repeat: Atom | None
    groups: int
    repeats: int
    value: Dim
    readers: tuple[Contraction, ...]

    @property
    def uses(self) -> tuple[Contraction, ...]:
        """The readers whose inputs score the heads: several where layers share one attention."""
        return uses_of(self.readers)


@dataclass(frozen=True)
class Width:
    """One leaf that a width names, in one layer; `readers` contract it, and their input is what scores it.

    `parents`: what is kept may differ with the index of these. The width counts what is in `together` of them: all groups
    of experts make up their number, but each expert has the width of an expert.
    """

    leaf: Atom
    readers: tuple[Contraction, ...]
    parents: Dim = ()
    together: int = 1

    @property
    def size(self) -> int:
        return self.leaf.size.coefficient * self.together

    @property
    def uses(self) -> tuple[Contraction, ...]:
        """The readers whose inputs score the width: several where layers share one projection."""
        return uses_of(self.readers)


def uses_of(readers: tuple[Contraction, ...]) -> tuple[Contraction, ...]:
    """The first reader, and every other place where its weight is read."""
    return tuple(one for one in readers if one.weight == readers[0].weight)


@dataclass(frozen=True)
class Roles:
    """All named axes. Per-layer axes are mappings from the layer's number; layers without that axis are left out."""

    hidden: Width
    heads: dict[int, Heads]
    widths: dict[str, dict[int, Width]]
    refusals: dict[str, str] = field(default_factory=dict)
    mixtures: dict[int, Mixture] = field(default_factory=dict)
    scans: dict[int, Scan] = field(default_factory=dict)

    def sharing(self, layer: int) -> list[int]:
        """The layers whose attention has the key-value groups of this one, itself among them: a layer may read the keys and
        values that an earlier one has made."""
        group = self.heads[layer].group
        if group is None:
            return [layer]
        return [other for other, site in self.heads.items() if site.group is group]


def find_roles(captured: Captured, table: AxisTable) -> Roles:
    """Reads the roles off the analysed graph."""
    hidden = _hidden(captured, table)
    heads = _heads(captured, table)
    taken = {hidden.leaf}
    for site in heads.values():
        taken |= {atom for atom in (site.group, site.repeat) if atom is not None}
        taken |= set(table.space.leaves(site.value))
    scans = find_scans(captured, table, hidden.leaf, taken)
    widths: dict[str, dict[int, Width]] = {}
    for layer, scan in scans.items():
        for name, width in _scan_widths(table, scan):
            widths.setdefault(name, {})[layer] = width
            taken.add(width.leaf)
    refusals: dict[str, str] = {}
    mixtures: dict[int, Mixture] = {}
    for name, layer, width in _widths(captured, table, hidden.leaf, taken, mixtures):
        of_layer = widths.setdefault(name, {})
        if layer in of_layer and of_layer[layer].leaf is not width.leaf:
            refusals[name] = f"layer {layer} has more than one axis of this kind"
        of_layer[layer] = width
    if any(layer in mixtures and not mixtures[layer].told_apart for layer in widths.get(NUM_EXPERTS, {})):
        refusals[NUM_EXPERTS] = "the graph does not show which rows each expert takes, so nothing ranks the experts"
    return Roles(hidden, heads, widths, refusals, mixtures, scans)


def _scan_widths(table: AxisTable, scan: Scan) -> Iterator[tuple[str, Width]]:
    owners = scan.heads[:-1] if heads_apart(table, scan) else ()
    yield SCAN_HEADS, Width(scan.heads[-1], (scan.reader,), owners, scan.groups)
    owners = scan.heads if channels_apart(table, scan) else ()
    yield SCAN_HEAD_DIM, Width(scan.channel, (scan.reader,), owners)


def _hidden(captured: Captured, table: AxisTable) -> Width:
    """The width of the residual stream: what the token embedding yields, or, where a projection stands between the embedding
    and the layers, what the first layer is given."""
    name = captured.token_embedding()
    leaves = list(table.space.leaves(table.parameters[name][1])) if name is not None else []
    try:
        nodes = {node.name: node for node in captured.graph.nodes}
        stream = list(table.space.leaves(table.dims(nodes[layer_ends(captured)[0].entry])[-1]))
    except UsageError:  # the layers are not a chain: no layer can be dropped, and the embedding tells
        stream = []
    if len(stream) == 1 and stream != leaves:
        leaves = stream
    if len(leaves) == 1:
        readers = tuple(c for c in table.contractions if list(table.space.leaves(c.dim)) == leaves)
        return Width(leaves[0], readers)
    raise UsageError(f"{captured.config.model_type}: the token embedding does not yield the residual stream directly")


def _heads(captured: Captured, table: AxisTable) -> dict[int, Heads]:
    space = table.space
    heads: dict[int, Heads] = {}
    for site in table.attentions:
        layer = captured.layer_of(site.node)
        atoms = space.flat(site.heads)
        values = set(space.leaves(site.value))
        if layer is None or not values:
            continue
        # A value projection that lacks an axis: the axis only repeats what a group shares.
        paths = list(_paths_with(captured, table, values, atoms))
        missing = {atom for atom in atoms for path in paths if atom not in path}
        groups = [atom for atom in atoms if atom not in missing]
        repeats = [atom for atom in atoms if atom in missing]
        if len(groups) > 1 or len(repeats) > 1 or list(atoms) != groups + repeats:
            continue
        wanted = set(values) | set(atoms)
        readers = tuple(c for c in table.contractions if c.weight is not None and set(space.leaves(c.dim)) == wanted)
        heads[layer] = Heads(
            groups[0] if groups else None,
            repeats[0] if repeats else None,
            groups[0].size.coefficient if groups else 1,
            repeats[0].size.coefficient if repeats else 1,
            site.value,
            readers,
        )
    return heads


def _paths_with(captured: Captured, table: AxisTable, values: set[Atom], heads: Dim) -> Iterator[set[Atom]]:
    """Yields, for every parameter that holds the width of a value, the atoms that stand in one product with that width.

    Parameters of other layers than those that hold the heads do not count: rotary embeddings make the widths of all layers
    one axis, where queries, keys and values are one projection.
    """
    leaves = {
        name: {leaf for dim in dims for leaf in table.space.leaves(dim)} for name, dims in table.parameters.items()
    }
    owners = {captured.layer_in_path(name) for name, held in leaves.items() if held & set(heads)}
    for name, dims in table.parameters.items():
        if captured.layer_in_path(name) not in owners:
            continue
        for dim in dims:
            for path in table.space.ways(dim):
                if path & values:
                    yield path


def _widths(
    captured: Captured, table: AxisTable, hidden: Atom, taken: set[Atom], mixtures: dict[int, Mixture]
) -> Iterator[tuple[str, int, Width]]:
    """Every leaf that a weight contracts on its way back into the residual stream, and every stack of experts.

    What is learnt of the experts of each layer goes into `mixtures`.
    """
    space = table.space
    seen: set[Atom] = set()
    convolved = _convolved(captured, table, hidden)
    for contraction in table.contractions:
        if contraction.weight is None:
            continue
        layer = captured.layer_in_path(contraction.weight)
        dims = table.parameters[contraction.weight]
        leaves = list(space.leaves(contraction.dim))
        if layer is None or len(leaves) != 1 or leaves[0] in taken or leaves[0] in seen:
            continue
        if not any(list(space.leaves(dim)) == [hidden] for dim in dims):
            continue
        seen.add(leaves[0])
        readers = tuple(c for c in table.contractions if list(space.leaves(c.dim)) == leaves and c.weight is not None)
        name = (
            CONVOLVED
            if leaves[0] in convolved
            else _width_name(captured, is_stack(dims), layer, _expert_layers(captured, table, hidden))
        )
        experts = space.flat(dims[0]) if is_stack(dims) else ()
        if not experts or len(experts) > 2 or any(atom.parts is not None or atom in taken for atom in experts):
            yield name, layer, Width(leaves[0], readers)
            continue
        mixtures[layer] = find_mixture(table, contraction, experts, captured.length)
        apart = mixtures[layer].told_apart and prunable_per_owner(table, leaves[0], experts)
        yield name, layer, Width(leaves[0], readers, experts if apart else ())
        if experts[-1] not in seen and (len(experts) == 1 or prunable_per_owner(table, experts[-1], experts[:-1])):
            seen.add(experts[-1])
            yield NUM_EXPERTS, layer, Width(experts[-1], (), experts[:-1], mixtures[layer].groups)


def _convolved(captured: Captured, table: AxisTable, hidden: Atom) -> set[Atom]:
    """Leaves with a filter for each index, [C, 1, K], in models that have other widths too; else it is their only width."""
    space = table.space
    filters = {
        leaf for dims in table.parameters.values() if len(dims) == 3 and not dims[1] for leaf in space.leaves(dims[0])
    }
    back = {
        leaf
        for one in table.contractions
        if one.weight is not None
        and captured.layer_in_path(one.weight) is not None
        and any(list(space.leaves(dim)) == [hidden] for dim in table.parameters[one.weight])
        for leaf in space.leaves(one.dim)
    }
    return filters if back - filters - {hidden} else set()


def _expert_layers(captured: Captured, table: AxisTable, hidden: Atom) -> set[int]:
    """The layers with stacked matrices that read or write the residual stream."""
    return {
        layer
        for name, dims in table.parameters.items()
        if is_stack(dims) and any(list(table.space.leaves(dim)) == [hidden] for dim in dims)
        if (layer := captured.layer_in_path(name)) is not None
    }


def _width_name(captured: Captured, stacked: bool, layer: int, stacks: set[int]) -> str:
    """Returns the name of a width: where dense layers stand between layers of experts, the experts' width has its own
    name."""
    if stacked:
        own = hasattr(captured.config, MOE_INTERMEDIATE) or len(stacks) < captured.layer_count
        return MOE_INTERMEDIATE if own else INTERMEDIATE
    return SHARED if layer in stacks else INTERMEDIATE
