"""Index lists: what is kept of a dimension follows from what is kept of its leaves, and fits everything it was told of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitron.compiler.axes.dims import Atom, Dim, Size, Space
from minitron.compiler.axes.narrowing import Dependent, Indices, Narrowing
from tests.compiler.programs import Program, number, product, programs
from tests.compiler.toys import kept_positions

MANY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def indices(*values: int) -> Indices:
    return np.array(values, dtype=np.int64)


@pytest.fixture
def space() -> Space:
    return Space()


class TestPositions:
    def test_a_leaf_that_is_not_named_is_kept_whole(self, space: Space) -> None:
        dim = space.fresh(Size(5))
        narrowing = Narrowing(space)
        assert narrowing.positions(dim).tolist() == [0, 1, 2, 3, 4]
        assert narrowing.count(dim) == 5 and not narrowing.touches(dim)

    def test_a_size_of_one_has_one_index(self, space: Space) -> None:
        assert Narrowing(space).positions(()).tolist() == [0] and Narrowing(space).count(()) == 1

    def test_a_product_counts_the_fast_factor_first(self, space: Space) -> None:
        """Heads 0 and 2 of three, channels 1 and 3 of four."""
        heads, width = space.fresh(Size(3)), space.fresh(Size(4))
        narrowing = Narrowing(space, {heads[0]: indices(0, 2), width[0]: indices(1, 3)})
        assert narrowing.positions((*heads, *width)).tolist() == [1, 3, 9, 11]
        assert narrowing.positions((*width, *heads)).tolist() == [3, 5, 9, 11]

    def test_a_concatenation_keeps_its_parts_in_their_places(self, space: Space) -> None:
        """A fused gate and up projection: one atom twice."""
        width = space.fresh(Size(4))
        narrowing = Narrowing(space, {width[0]: indices(1, 3)})
        assert narrowing.positions(space.cat([width, width])).tolist() == [1, 3, 5, 7]
        assert narrowing.count(space.cat([width, width, space.fresh(Size(2))])) == 6

    def test_a_symbolic_size_keeps_its_symbols(self, space: Space) -> None:
        rows, width = space.fresh(Size(1, ("s0",))), space.fresh(Size(4))
        narrowing = Narrowing(space, {width[0]: indices(1, 3)})
        assert narrowing.size((*rows, *width)) == Size(2, ("s0",))
        assert narrowing.touches((*rows, *width)) and not narrowing.touches(rows)

    def test_merged_axes_are_narrowed_by_one_list(self, space: Space) -> None:
        a, b = space.fresh(Size(4)), space.fresh(Size(4))
        space.unify(a, b, "add")
        narrowing = Narrowing(space, {space.find(b[0]): indices(0, 3)})
        assert narrowing.positions(a).tolist() == narrowing.positions(b).tolist() == [0, 3]


class TestDependentLists:
    """Query heads: what is kept of the repeats may differ from one key-value group to the next."""

    @pytest.fixture
    def site(self, space: Space) -> Iterator[tuple[Dim, Dim, Dim]]:
        yield space.fresh(Size(3)), space.fresh(Size(4)), space.fresh(Size(2))

    def test_every_kept_group_has_its_own_list(self, space: Space, site: tuple[Dim, Dim, Dim]) -> None:
        group, repeat, width = site
        lists = (indices(0, 1), indices(9, 9), indices(2, 3))  # group 1 is gone: its list is never read
        narrowing = Narrowing(space, {group[0]: indices(0, 2)}, {repeat[0]: Dependent(group, lists, 2)})
        assert narrowing.positions((*group, *repeat)).tolist() == [0, 1, 10, 11]
        assert narrowing.positions((*group, *repeat, *width)).tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
        assert narrowing.count((*group, *repeat, *width)) == 8
        assert narrowing.positions((*group, *width)).tolist() == [0, 1, 4, 5]

    def test_within_a_fused_projection(self, space: Space, site: tuple[Dim, Dim, Dim]) -> None:
        """Queries, keys and values stacked: the queries follow the groups that they belong to."""
        group, repeat, width = site
        fused = space.cat([(*group, *repeat, *width), (*group, *width), (*group, *width)])
        lists = (indices(1), indices(3), indices(0))
        narrowing = Narrowing(space, {}, {repeat[0]: Dependent(group, lists, 1)})
        assert narrowing.positions(fused).tolist() == [2, 3, 14, 15, 16, 17, *range(24, 36)]

    def test_interleaved_groups(self, space: Space, site: tuple[Dim, Dim, Dim]) -> None:
        """GPT-NeoX: every group holds its queries, its key and its value."""
        group, repeat, width = site
        fused = (*group, *space.cat([repeat, (), ()]), *width)
        lists = (indices(1), indices(3), indices(0))
        narrowing = Narrowing(space, {}, {repeat[0]: Dependent(group, lists, 1)})
        heads = [1, 4, 5, 9, 10, 11, 12, 16, 17]
        assert narrowing.positions(fused).tolist() == [2 * head + channel for head in heads for channel in (0, 1)]

    def test_it_cannot_stand_without_its_groups(self, space: Space, site: tuple[Dim, Dim, Dim]) -> None:
        group, repeat, _ = site
        narrowing = Narrowing(space, {}, {repeat[0]: Dependent(group, (indices(0),) * 3, 1)})
        with pytest.raises(AssertionError, match="without the axis that it depends on"):
            narrowing.positions(repeat)

    def test_equal_lists_are_as_good_as_one(self, space: Space, site: tuple[Dim, Dim, Dim]) -> None:
        group, repeat, width = site
        kept, dim = {group[0]: indices(0, 2)}, (*group, *repeat, *width)
        one = Narrowing(space, {**kept, repeat[0]: indices(1, 3)})
        many = Narrowing(space, kept, {repeat[0]: Dependent(group, (indices(1, 3),) * 3, 2)})
        assert one.positions(dim).tolist() == many.positions(dim).tolist()


# -- properties -------------------------------------------------------------------------------------------------------


def free_leaves(program: Program) -> list[Atom]:
    leaves = {leaf: None for dim in program.dims for leaf in program.space.leaves(dim)}
    return [leaf for leaf in leaves if not leaf.pins]


@st.composite
def narrowed(draw: st.DrawFn, *, ordered: bool) -> tuple[Program, Narrowing]:
    """A program and any choice of what is kept of its free leaves; with `ordered` the lists ascend."""
    program = draw(programs())
    kept: dict[Atom, Indices] = {}
    for leaf in free_leaves(program):
        every = draw(st.permutations(range(leaf.size.coefficient)))
        some = every[: draw(st.integers(1, len(every)))]
        kept[leaf] = np.array(sorted(some) if ordered else some, dtype=np.int64)
    return program, Narrowing(program.space, kept)


def acyclic(space: Space, dim: Dim, above: frozenset[Atom] = frozenset()) -> bool:
    for atom in dim:
        root = space.find(atom)
        if root in above:
            return False
        below = [root.factors] if root.factors is not None else list(root.parts or ())
        if not all(acyclic(space, part, above | {root}) for part in below):
            return False
    return True


@MANY
@given(narrowed(ordered=True))
def test_positions_are_as_many_as_counted_sorted_and_within_the_axis(case: tuple[Program, Narrowing]) -> None:
    program, narrowing = case
    for dim in program.dims:
        positions = narrowing.positions(dim)
        assert len(positions) == narrowing.count(dim)
        assert (np.diff(positions) > 0).all()
        assert positions[0] >= 0 and positions[-1] < number(dim)


@MANY
@given(narrowed(ordered=False))
def test_everything_that_was_said_holds_for_any_choice(case: tuple[Program, Narrowing]) -> None:
    """The soundness of the algebra: unified axes keep the same indices, a slice those of the whole in its bounds, a
    concatenation those of its pieces, a view those that it was made of; whatever the free leaves keep, in any order."""
    program, narrowing = case
    for relation in program.relations:
        assert relation.holds(lambda dim: narrowing.positions(dim).tolist()), relation


@MANY
@given(narrowed(ordered=False))
def test_index_lists_are_those_of_plain_index_arithmetic(case: tuple[Program, Narrowing]) -> None:
    program, narrowing = case
    for dim in program.dims:
        expected = kept_positions(program.space, dim, narrowing.kept, {})
        assert narrowing.positions(dim).tolist() == expected.tolist()


@MANY
@given(programs(longest=14))
def test_no_axis_is_ever_made_of_itself(program: Program) -> None:
    for dim in program.dims:
        assert acyclic(program.space, dim)
        assert program.space.describe(dim)


@MANY
@given(programs())
def test_leaves_of_one_dimension_add_up_to_its_size(program: Program) -> None:
    whole = Narrowing(program.space)
    for dim in program.dims:
        assert whole.positions(dim).tolist() == list(range(number(dim)))


@MANY
@given(programs(), st.data())
def test_a_view_there_and_back_leaves_the_same_leaves(program: Program, data: st.DataObject) -> None:
    dim = data.draw(st.sampled_from(program.dims))
    size = number(dim)
    slow = data.draw(st.sampled_from([k for k in range(1, size + 1) if size % k == 0]))
    split = program.space.reshape([dim], [Size(slow), Size(size // slow)], "view")
    (again,) = program.space.reshape(split, [Size(size)], "view")
    program.space.settle()
    if not any(leaf.pins for leaf in program.space.leaves(again)):
        assert list(program.space.leaves(again)) == list(program.space.leaves(dim))


@MANY
@given(programs(), st.data())
def test_all_pieces_together_are_the_whole(program: Program, data: st.DataObject) -> None:
    dim = data.draw(st.sampled_from(program.dims))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, number(dim) - 1)), max_size=3)) | {0, number(dim)})
    pieces = [program.space.slice(dim, a, b, "slice") for a, b in itertools.pairwise(cuts)]
    joined = program.space.cat(pieces)
    program.space.settle()
    kept = {leaf: np.arange(leaf.size.coefficient)[::2] for leaf in program.space.leaves(dim) if not leaf.pins}
    narrowing = Narrowing(program.space, kept)
    assert narrowing.positions(joined).tolist() == narrowing.positions(dim).tolist()


def freedom(program: Program) -> set[tuple[frozenset[tuple[int, int]], ...]]:
    """What is known apart from how it is written: for every free leaf, where each of its indices stands."""
    found = set()
    for leaf in free_leaves(program):
        places = []
        for index in range(leaf.size.coefficient):
            only = Narrowing(program.space, {leaf: indices(index)})
            places.append(
                frozenset((number, int(i)) for number, dim in enumerate(program.dims) for i in only.positions(dim))
            )
        found.add(tuple(places))
    return found


@MANY
@given(st.data())
def test_unify_concludes_the_same_either_way_round(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=2, max_size=4))
    seeds: Mapping[str, list[tuple[int, ...]]] = {
        side: data.draw(_structure(number_of(sizes)), label=side) for side in ("left", "right")
    }
    outcomes = []
    for swap in (False, True):
        program = Program()
        a, b = (_build(program.space, seeds[side]) for side in ("left", "right"))
        program.space.unify(*((b, a) if swap else (a, b)), "add")
        program.space.settle()
        program.add(a, b)
        outcomes.append(freedom(program))
    assert outcomes[0] == outcomes[1]


def number_of(sizes: list[int]) -> int:
    return min(int(np.prod(sizes)), 48)


@st.composite
def _structure(draw: st.DrawFn, size: int) -> list[tuple[int, ...]]:
    """A dimension of `size`: pieces that are joined, each a product of factors."""
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=2)) | {0, size})
    pieces = []
    for start, stop in itertools.pairwise(cuts):
        length = stop - start
        fast = draw(st.sampled_from([k for k in range(1, length + 1) if length % k == 0]))
        pieces.append((length // fast, fast))
    return pieces


def _build(space: Space, pieces: list[tuple[int, ...]]) -> Dim:
    return space.cat([product([space.fresh(Size(size)) for size in factors]) for factors in pieces])
