"""Finds the share of a training's documents that `init` holds out, where no held-out text is named."""

from __future__ import annotations

import itertools
from pathlib import Path

from minitron.specs.data import DataSource
from minitron.specs.data_files import resolve
from minitron.specs.documents import Tally
from minitron.specs.documents.readers import read_source
from minitron.specs.documents.shares import count_sides, places

SHARES = ("1%", "2%", "5%", "10%", "20%")
ENOUGH = (8, 2)
"""Documents whose mean loss is steady enough to tell two learning rates apart; and the fewest that tell anything."""


MOST = 2000
"""The most documents that are read: with as many, even the smallest share holds out enough."""

Source = dict[str, list[str] | str]


def held_out_share(source: Source, folder: Path) -> tuple[str, str | None] | None:
    """Returns the smallest share that holds out enough documents, and what a document of a text then is (None as it is):
    paragraphs where the files are too few. None where no share does. WorkError and Refused where the data cannot be read.
    """
    kinds = (None, "paragraph") if "text" in source else (None,)
    found = {kind: _places(source | ({"document": kind} if kind else {}), folder) for kind in kinds}
    for enough, kind, share in itertools.product(ENOUGH, kinds, SHARES):
        sides = count_sides(found[kind], float(share.removesuffix("%")) / 100, enough)
        if min(sides.below, sides.above) >= enough:
            return share, kind
    return None


def _places(source: Source, folder: Path) -> list[float | None]:
    pieces = read_source(resolve(DataSource.model_validate(source), folder), Tally())
    return list(itertools.islice(places(pieces), MOST))
