"""The order of the samples: pure functions of (seed, global sample index), so that no state is stored and no restart
can lose it.

A permutation of any size is computed for one index at a time, by a Feistel network on the next larger power of four
with cycle walking (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section 4), so that an epoch of a
billion samples costs no memory.
"""

from __future__ import annotations

from collections.abc import Sequence

_MASK = 2**64 - 1
_ROUNDS = 6
BLEND_BLOCK = 10_000
"""Within each block of this many samples every source of a blend has exactly its share, to one part in the block."""


def mix(*numbers: int) -> int:
    """Hashes several numbers to 64 well mixed bits. (The finaliser of SplitMix64, Steele et al. 2014, chained.)"""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """Returns the image of `index` in the permutation of range(size) that `key` identifies."""
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(key, number, right) & low)
        index = (left << half) | right
        if index < size:
            return index


def shuffled(index: int, size: int, seed: int) -> int:
    """Returns the sample at position `index` in the training order of a source of `size` samples; each epoch has an
    order of its own.
    """
    epoch, position = divmod(index, size)
    return permute(position, size, mix(seed, epoch))


def shuffled_in_blocks(index: int, size: int, block: int, seed: int) -> int:
    """Returns the sample at position `index` in an order whose first epoch shuffles within blocks of `block` samples, the
    last one shorter, one block after the other: it follows from the samples up to the end of the block. By the next epoch
    all samples are known, and their order is that of `shuffled`.

    `size` is the number of samples, or, in the first epoch, of those that are known: they reach to the block's end.
    """
    if index >= size:
        return shuffled(index, size, seed)
    first = index - index % block
    return first + permute(index - first, min(block, size - first), mix(seed, 0, first))


def blend_quotas(weights: Sequence[float]) -> list[int]:
    """Returns the number of samples of each source in a block: proportional to the weights, at least 1, together
    BLEND_BLOCK (largest remainder).
    """
    total = sum(weights)
    exact = [weight / total * BLEND_BLOCK for weight in weights]
    quotas = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in range(BLEND_BLOCK - sum(quotas)):
        quotas[by_remainder[i % len(quotas)]] += 1
    while sum(quotas) > BLEND_BLOCK:
        quotas[quotas.index(max(quotas))] -= 1
    return quotas


def blend_place(index: int, quotas: Sequence[int], seed: int) -> tuple[int, int]:
    """Returns the source of global sample `index`, and the number of samples of that source before it."""
    block, position = divmod(index, sum(quotas))
    slot = permute(position, sum(quotas), mix(seed, block, len(quotas)))
    for source, quota in enumerate(quotas):
        if slot < quota:
            return source, block * quota + slot
        slot -= quota
    raise AssertionError("a slot lies in one of the quotas")
