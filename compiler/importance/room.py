"""The memory that a calibration takes: how many samples go through the graph together, and where the others wait.

    scores    covariances and sums for all axes stay from the first batch to the last; Gram matrices are those of one layer
    weights   all of them stay where they fit and more than one pass reads them; else those of one layer, and the next one's as
              they are stored
    batches   as many samples as half of the rest holds at their widest; on a CPU no more than BATCH_TOKENS, where more is
              not faster
    streams   the values of each batch between two layers wait on the device, else in host memory, else in files

None of it decides the scores beyond the order of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minitron.compiler.importance.accumulated import Accumulated
from minitron.compiler.importance.batches import batch_size

# Tokens that go through a GPU together: matrix products of more rows are not faster.
DEVICE_TOKENS = 16384
# Of the budget, what allocators lose between tensors of different sizes.
SLACK = 0.05

Where = Literal["device", "host", "files"]


@dataclass(frozen=True)
class Room:
    """The division of a calibration's memory.

    batch     samples that go through the graph at a time; None: `batches.batch_size`
    block     batches that a pass takes through all layers together; None: all
    lanes     the same of the pass in which every layer is left out once
    resident  weights stay in memory from pass to pass
    ahead     the next layer's weights are read while one computes
    streams   where batches wait between two layers
    """

    batch: int | None = None
    block: int | None = None
    lanes: int | None = None
    resident: bool = False
    ahead: bool = False
    streams: Where = "device"


# Logits of the whole teacher, those without a layer, and what comparing them makes.
LOGIT_COPIES = 4


@dataclass(frozen=True)
class Sizes:
    """The sizes that decide it, in bytes on the device but for counts.

    weights   all parameters in the dtype that graphs run in
    embedding, layer, head  the parts that are there one after the other; a tied embedding counts with the others
    stored    the largest tensor as it is stored where that is another dtype, `layer_stored` a layer
    sample    one sample at its widest, inside a layer; `stream` between two layers; `logits` its logits, where they
              are compared
    scores    what the scores accumulate
    """

    weights: int
    embedding: int
    layer: int
    head: int
    stored: int
    layer_stored: int
    sample: int
    stream: int
    logits: int
    samples: int
    length: int
    layers: int
    scores: Accumulated


def divide(budget: int, sizes: Sizes, kind: str, *, host: int = 0, compared: bool = False, whole: bool = False) -> Room:
    """Divides `budget` bytes of a device of `kind` cpu or cuda, with `host` bytes beside it.

    compared  layers are ranked by the logits without each
    whole     all batches must go through a layer before any goes through the next
    """
    budget = int(budget * (1 - SLACK)) - sizes.scores.kept
    usual = batch_size(sizes.length) if kind == "cpu" else max(1, DEVICE_TOKENS // sizes.length)
    widest = max(sizes.sample + sizes.stream, LOGIT_COPIES * sizes.logits if compared else 0)
    passing = max(sizes.embedding, sizes.layer + sizes.scores.grams, sizes.head if compared else 0) + sizes.stored
    beside = max(sizes.scores.adding, sizes.scores.covering)
    batch = max(1, min(usual, sizes.samples, (budget - passing - beside) // 2 // widest))
    count = -(-sizes.samples // batch)
    # A layer's matrices become orders on the CPU, once no batch runs any more.
    running = max(batch * widest + beside, sizes.scores.settling if kind == "cpu" else 0)
    rest = budget - passing - running
    stream = batch * sizes.stream
    lanes = stream * (sizes.layers + 1) if compared else 0
    several = rest < count * stream or (compared and rest < count * lanes)
    left = budget - sizes.weights - sizes.scores.grams - running - sizes.stored
    resident = several and not whole and left >= max(stream, lanes)
    if resident:
        rest = left
    ahead = not resident and rest - sizes.layer_stored >= min(count, 2) * max(stream, lanes)
    if ahead:
        rest -= sizes.layer_stored
    fits = max(rest, 0) // stream
    block, where = (None, "device") if fits >= count else (max(1, fits), "device")
    if fits < count and not resident:
        block, where = None, "host" if kind == "cuda" and host >= 2 * count * stream else "files"
    together = None
    if compared:
        together = max(1, min(count, max(rest, 0) // lanes))
        if max(rest, 0) < lanes and where == "device":
            where = "files"
    return Room(batch, block, together, resident, ahead, where)  # type: ignore[arg-type]
