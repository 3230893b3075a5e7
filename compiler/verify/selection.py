"""The `selection` check: what plan.json keeps is what the scores rank highest.

Each list is held against the scores by a property, and nothing of `importance/select.py` is used: no index that is gone
outranks one that stays. Of equal scores the lower index stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron.compiler.importance.scores import ScoreTable
from minitron.compiler.roles.names import GROUPS, HEADS, HIDDEN, LAYERS
from minitron.compiler.roles.roles import Roles
from minitron.compiler.student.targets import Targets
from minitron.compiler.verify.checks import Check, exactly
from minitron.compiler.verify.kept import Kept, WrongSelection, flags_of, kept_leaves
from minitron.compiler.verify.routes import Routes
from minitron.compiler.verify.subject import Ranking

Numbers = npt.NDArray[Any]
Selection = Mapping[str, Sequence[Sequence[int]]]


def selection(routes: Routes) -> Check | None:
    """Compares plan.json with what the scores rank highest; None where another rule selects."""
    subject, ranking = routes.subject, routes.subject.ranking
    if ranking is None:
        return None
    teacher = subject.teacher
    found = first_mistake(subject.selection, ranking, teacher.roles, teacher.captured.layer_count)
    return exactly("selection", found, "plan.json keeps what the scores rank highest")


def first_mistake(selection: Selection, ranking: Ranking, roles: Roles, count: int) -> str | None:
    """The first list that is not what the scores ask for, in words; None where all are. `count` is the number of the
    teacher's layers."""
    scores, targets = ranking.scores, ranking.targets
    try:
        wanted = {LAYERS, *targets.widths}
        if {HEADS, GROUPS} & wanted:
            wanted |= {HEADS, GROUPS}
        if wanted != set(selection):
            return (
                f"plan.json selects {', '.join(sorted(selection))}, and the spec asks for {', '.join(sorted(wanted))}"
            )
        lists = [_layers(selection[LAYERS][0], ranking, count)]
        if HIDDEN in selection:
            lists.append(_hidden(selection[HIDDEN][0], scores, targets.widths[HIDDEN], roles, basis=ranking.basis))
        return next((found for found in (*lists, *_within_layers(selection, scores, targets, roles)) if found), None)
    except WrongSelection as error:
        return f"plan.json: {error}"


def outranked(where: str, scores: Numbers, flags: npt.NDArray[np.bool_], count: int) -> str | None:
    """Describes the mistake in one list of `count` indices, given as flags over `scores`; None where it is right."""
    if flags.shape != scores.shape:
        return f"{where} has {flags.size} indices, and scores for {scores.size}"
    if int(flags.sum()) != count:
        return f"{where} keeps {int(flags.sum())} indices, not {count}"
    if not np.isfinite(scores).all():
        return (
            f"{where}: the score at {int(np.argmin(np.isfinite(scores)))} is {float(scores[~np.isfinite(scores)][0])}"
        )
    order = np.lexsort((np.arange(scores.size), -scores))
    stays = flags[order]
    if stays[:count].all():
        return None
    worst, best = int(order[np.nonzero(stays)[0][-1]]), int(order[np.nonzero(~stays)[0][0]])
    return f"{where} keeps {worst}, scored {float(scores[worst]):g}, and drops {best}, scored {float(scores[best]):g}"


def _layers(kept: Sequence[int], ranking: Ranking, count: int) -> str | None:
    scores, targets = ranking.scores, ranking.targets
    flags = flags_of(kept, count, LAYERS)
    if targets.named_layers is not None or targets.layers == count:
        wanted = tuple(range(count)) if targets.named_layers is None else targets.named_layers
        return None if tuple(kept) == wanted else f"{LAYERS} keeps {list(kept)}, and the spec names {list(wanted)}"
    if scores.layers is None:
        return f"{LAYERS} is ranked, and there are no scores of layers"
    gone, length, exact = np.flatnonzero(~flags), count - targets.layers, scores.layers.astype(np.float64)
    if ranking.contiguous:
        if gone.size != length or int(gone[-1]) - int(gone[0]) != length - 1:
            return f"{LAYERS} drops {gone.tolist()}, which are not {length} neighbours"
        runs = [np.arange(start, start + length) for start in range(count - length + 1)]
    else:
        mistake = outranked(LAYERS, scores.layers, flags, targets.layers)
        if mistake is None or gone.size != length or not np.isfinite(exact).all():
            return mistake
        weakest = np.sort(np.lexsort((np.arange(count), -exact))[targets.layers :])
        if ranking.possible(tuple(i for i in range(count) if i not in weakest)):
            return mistake
        # All that exchange one of the highest-scored.
        runs = [np.sort([*np.delete(weakest, at), out]) for at in range(length) for out in range(count)]
        runs = [run for run in runs if len(set(run.tolist())) == length]
    tolerance = 1e-9 * (1 + float(np.abs(exact).sum()))  # sums of the same numbers in another order
    for run in runs:
        rest = tuple(i for i in range(count) if i not in run)
        if exact[run].sum() < exact[gone].sum() - tolerance and ranking.possible(rest):
            return f"{LAYERS} keeps {[int(i) for i in kept]}, and {list(rest)} score higher"
    return None


def _hidden(kept: Sequence[int], scores: ScoreTable, count: int, roles: Roles, *, basis: bool) -> str | None:
    flags = flags_of(kept, roles.hidden.size, HIDDEN)
    if basis:
        leading = np.arange(flags.size) < count
        return None if (flags == leading).all() else f"{HIDDEN} keeps others than the first {count} components"
    if scores.hidden is None:
        return f"{HIDDEN} is narrowed, and there are no scores of it"
    return outranked(HIDDEN, scores.hidden, flags, count)


def _within_layers(selection: Selection, scores: ScoreTable, targets: Targets, roles: Roles) -> Iterator[str | None]:
    """Yields the mistake in each list of each layer; None for one that is right."""
    kept = kept_leaves({name: lists for name, lists in selection.items() if name != HIDDEN}, roles, lambda leaf: leaf)
    for name, of_layer in roles.widths.items():
        if name not in selection:
            continue
        for layer, width in of_layer.items():
            if layer in selection[LAYERS][0]:
                where, ranked = f"{name} in layer {layer}", scores.widths.get(name, {}).get(layer)
                if ranked is None:
                    yield f"{where} is narrowed, and there are no scores of it"
                else:
                    yield _rows(where, ranked, kept[width.leaf], targets.widths[name] // width.together)
    if HEADS not in selection:
        return
    for layer in selection[LAYERS][0]:
        if layer in roles.heads:
            yield _attention(layer, selection, scores, targets, roles)


def _rows(where: str, scores: Numbers, kept: Kept, count: int) -> str | None:
    """A list, or one for each index of the parents; of parents that are gone nothing is kept."""
    if not kept.parents:
        return outranked(where, scores, kept.flags, count)
    flags = kept.flags.reshape(-1, kept.flags.shape[-1])
    rows = scores.reshape(-1, scores.shape[-1])
    if rows.shape != flags.shape:
        return f"{where} has scores of another shape, {list(scores.shape)}"
    each = (
        outranked(f"{where}, list {number},", row, stays, count)
        for number, (row, stays) in enumerate(zip(rows, flags, strict=True))
        if stays.any()
    )
    return next((found for found in each if found), None)


def _attention(layer: int, selection: Selection, scores: ScoreTable, targets: Targets, roles: Roles) -> str | None:
    site = roles.heads[layer]
    at = [i for i in selection[LAYERS][0] if i in roles.heads].index(layer)
    groups = flags_of(selection[GROUPS][at], site.groups, GROUPS)
    heads = flags_of(selection[HEADS][at], site.groups * site.repeats, HEADS).reshape(site.groups, site.repeats)
    if layer not in scores.heads or scores.heads[layer].shape != heads.shape:
        return f"{HEADS} in layer {layer} are narrowed, and there are no scores of them"
    of_heads = scores.heads[layer]
    # Layers that read the same keys and values keep the same groups of them.
    sharing = [one for one, other in roles.heads.items() if site.group is not None and other.group is site.group]
    joint = [scores.heads[one] for one in sharing if one in selection[LAYERS][0]] or [of_heads]
    of_groups = np.sqrt(sum(np.square(one.astype(np.float64)).sum(1) for one in joint)).astype(np.float32)
    count = targets.widths.get(GROUPS, site.groups)
    repeats = targets.widths.get(HEADS, count * site.repeats) // count
    found = outranked(f"{GROUPS} in layer {layer}", of_groups, groups, count)
    for group in np.nonzero(groups)[0]:
        found = found or outranked(f"{HEADS} in layer {layer}, group {group},", of_heads[group], heads[group], repeats)
    return found
