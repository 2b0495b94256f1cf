"""Sets of keys as words of 64 bits, many rows at once: bit j of word w is key 64 w + j.

Enters: ranges, pairs or bools of keys.
Leaves: uint64 arrays `(..., words)`, the bits past the last key 0; complement, shift and count of such arrays.
Floor 0: pure, imports numpy alone.
"""

from __future__ import annotations

import numpy as np

Words = np.ndarray
KEYS = 64  # of one word
_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_ONE = np.uint64(1)
_COUNTS = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(
    1, dtype=np.uint8
)


def words(length: int) -> int:
    """How many words hold `length` keys."""
    return -(-length // KEYS)


def of_bools(dense: np.ndarray) -> Words:
    """The True entries along the last axis of `(..., length)`."""
    packed = np.packbits(dense, axis=-1, bitorder="little")
    size = words(dense.shape[-1]) * 8
    if packed.shape[-1] != size:
        whole = np.zeros((*dense.shape[:-1], size), np.uint8)
        whole[..., : packed.shape[-1]] = packed
        packed = whole
    return packed.view(np.uint64) if size else np.zeros((*dense.shape[:-1], 0), np.uint64)


def of_ranges(held: np.ndarray, length: int) -> Words:
    """Keys inside half-open, disjoint ranges `(batch, rows, n, 2)` within [0, length], as `(batch, rows, words)`.

    Each end of a range flips all bits from it on: flip them in its own word, and let a running xor carry the rest.
    """
    batch, rows, most, _ = held.shape
    size = words(length) + 2
    flips = np.zeros(batch * rows * size, np.uint64)
    first = np.arange(batch * rows) * size
    ends = held.reshape(batch * rows, most * 2)
    for n in range(most * 2):
        end = ends[:, n]
        from_it = _ALL << (end & 63).astype(np.uint64)
        at = first + (end >> 6)
        flips[at] ^= from_it
        flips[at + 1] ^= ~from_it
    return np.bitwise_xor.accumulate(flips.reshape(batch, rows, size)[..., : size - 2], axis=-1)


def of_pairs(row: np.ndarray, key: np.ndarray, rows: int, length: int) -> Words:
    """Pairs sorted by row, then by key, repeats allowed, as `(rows, words)`: work in proportion to the pairs."""
    size = words(length)
    held = np.zeros((rows, size), np.uint64)
    if len(row):
        at = row * size + (key >> 6)
        starts = np.flatnonzero(np.concatenate([[True], at[1:] != at[:-1]]))
        held.reshape(-1)[at[starts]] = np.bitwise_or.reduceat(_ONE << (key & 63).astype(np.uint64), starts)
    return held


def joined(operation: np.ufunc, left: Words, right: Words) -> Words:
    """`operation(left, right)`, written into the one of them that is as large as the result."""
    shape = np.broadcast_shapes(left.shape, right.shape)
    whole = left if left.shape == shape else right if right.shape == shape else None
    return operation(left, right, out=whole)


def stacked(parts: list[Words]) -> Words:
    """Words of several batch rows as one array, without a copy where there is one."""
    return parts[0][None] if len(parts) == 1 else np.stack(parts)


def full(length: int) -> Words:
    """Every key, `(words,)`."""
    return inside(np.full(words(length), _ALL), length)


def complement(held: Words, length: int) -> Words:
    """Keys of [0, length) that are not in `held`, written into it."""
    return inside(np.invert(held, out=held), length)


def inside(held: Words, length: int) -> Words:
    """`held` itself, with the bits past the last key set to 0 in place."""
    if length % KEYS:
        held[..., -1] &= _ALL >> np.uint64(KEYS - length % KEYS)
    return held


def part(held: Words, start: int, length: int) -> Words:
    """Keys [start, start + length) of `held`, counted from start; keys outside `held` are not in it.

    May be a view of `held`, whose bits past the last key are then 0.
    """

    def shifted(first: int) -> Words:
        moved = np.zeros((*held.shape[:-1], words(length)), np.uint64)
        low, high = max(first, 0), min(first + words(length), held.shape[-1])
        if low < high:
            moved[..., low - first : high - first] = held[..., low:high]
        return moved

    first, rest = divmod(start, KEYS)
    if not rest:
        there = first >= 0 and first + words(length) <= held.shape[-1]
        return inside(held[..., first : first + words(length)] if there else shifted(first), length)
    return inside((shifted(first) >> np.uint64(rest)) | (shifted(first + 1) << np.uint64(KEYS - rest)), length)


def put(held: Words, row: np.ndarray, at: np.ndarray, pattern: Words) -> None:
    """Adds to each row `row[n]` of `held`, no row twice, the keys of `pattern[n]`, moved up by `at[n]` keys.

    `held (rows, words)` must have one word more than the last that a pattern reaches.
    """
    rest = (at & 63).astype(np.uint64)
    index = row * held.shape[-1] + (at >> 6)
    flat = held.reshape(-1)
    for n in range(pattern.shape[-1]):
        flat[index + n] |= pattern[:, n] << rest
        flat[index + n + 1] |= (pattern[:, n] >> _ONE) >> (np.uint64(63) - rest)


def total(held: Words) -> int:
    """How many keys there are in all rows together."""
    return int(_COUNTS[np.ascontiguousarray(held).view(np.uint16)].sum(dtype=np.int64))
