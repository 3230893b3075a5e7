"""Finds the share of a training's documents that `init` holds out, where no held-out text is named."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from minitron.specs.data import DataSource
from minitron.specs.data_files import resolve
from minitron.specs.documents import Tally
from minitron.specs.documents.readers import read_source
from minitron.specs.documents.shares import count_sides

SHARES = ("1%", "2%", "5%", "10%", "20%")
ENOUGH = (8, 2)
"""Documents whose mean loss is steady enough to tell two learning rates apart; and the fewest that tell anything."""


def held_out_share(source: Mapping[str, Sequence[str] | str], folder: Path) -> tuple[str, str | None] | None:
    """Returns the smallest share that holds out enough documents, and what a document of a text then is (None as it is):
    paragraphs where the files are too few. None where no share does. WorkError and Refused where the data cannot be read.
    """
    kinds = (None, "paragraph") if "text" in source else (None,)
    for enough, document, share in itertools.product(ENOUGH, kinds, SHARES):
        if _enough({**source, **({"document": document} if document else {})}, folder, share, enough):
            return share, document
    return None


def _enough(source: Mapping[str, Sequence[str] | str], folder: Path, share: str, enough: int) -> bool:
    pieces = read_source(resolve(DataSource.model_validate(source), folder), Tally())
    sides = count_sides(pieces, float(share.removesuffix("%")) / 100, enough)
    return min(sides.below, sides.above) >= enough
