"""Sets of keys as half-open ranges, many rows at once.

Enters: arrays of ranges `(batch, rows, n, 2)`, int64; a row's ranges are sorted and disjoint, unused ones are 0, 0 at
the end; the axes batch and rows may be 1 where all their entries agree.
Leaves: union, intersection, complement and bounding range of such arrays; runs of a bool array.
Floor 0: pure, imports numpy alone.
"""

from __future__ import annotations

import numpy as np

Ranges = np.ndarray
LIMIT = 16  # more ranges a row than this are kept as a bounding range (a hull), not exactly
_NONE = np.iinfo(np.int64).max


def single(lo: np.ndarray | int, hi: np.ndarray | int, length: int) -> Ranges:
    """One range a row, [lo, hi) clipped to [0, length); lo and hi broadcast to `(batch, rows)`."""
    lo, hi = np.broadcast_arrays(np.atleast_2d(np.clip(lo, 0, length)), np.clip(hi, 0, length))
    held = np.stack([lo, hi], -1)[:, :, None, :].astype(np.int64)
    held[lo >= hi] = 0
    return held


def union(a: Ranges, b: Ranges) -> Ranges:
    """Keys in a or in b."""
    return _swept(a, b, 1)


def intersection(a: Ranges, b: Ranges) -> Ranges:
    """Keys in a and in b."""
    if 1 not in (count(a), count(b)):
        return _swept(a, b, 2)
    lo, hi = np.maximum(a[..., 0], b[..., 0]), np.minimum(a[..., 1], b[..., 1])  # one range a row cuts the others
    if lo.shape[2] > 1:
        return _compact(lo, hi)
    held = np.stack([lo, hi], -1)
    held[lo >= hi] = 0
    return held


def complement(a: Ranges, length: int) -> Ranges:
    """Keys of [0, length) that are not in a."""
    padded = np.where((a[..., :1] == a[..., 1:]), length, a)
    edge = np.broadcast_to(np.int64(0), (*a.shape[:2], 1))
    return _compact(np.concatenate([edge, padded[..., 1]], -1), np.concatenate([padded[..., 0], edge + length], -1))


def bounding(a: Ranges) -> Ranges:
    """The smallest single range a row that holds all of a row's ranges."""
    empty = a[..., 0] == a[..., 1]
    lo = np.where(empty, _NONE, a[..., 0]).min(-1, initial=_NONE)
    hi = a[..., 1].max(-1, initial=0)
    return np.stack([np.where(hi == 0, 0, lo), hi], -1)[:, :, None, :]


def span(a: Ranges) -> tuple[int, int]:
    """The first key of all rows together, and the one after the last; 0, 0 where there is none."""
    used = a[..., 0] < a[..., 1]
    return (int(a[..., 0][used].min()), int(a[..., 1].max())) if used.any() else (0, 0)


def count(a: Ranges) -> int:
    """Largest number of ranges that a row may hold."""
    return a.shape[2]


def runs(dense: np.ndarray) -> tuple[Ranges | None, Ranges]:
    """Runs of True along the last axis of `(batch, rows, length)`: exact (None past `LIMIT` a row), and a superset."""
    batch, rows, length = dense.shape
    flat = dense.reshape(batch * rows, length)
    step = np.zeros((batch * rows, length + 1), bool)
    step[:, 0], step[:, length] = (flat[:, 0], flat[:, -1]) if length else (False, False)
    np.not_equal(flat[:, 1:], flat[:, :-1], out=step[:, 1:length])
    per_row = np.count_nonzero(step, axis=1) // 2
    most = int(per_row.max(initial=0))
    if most > LIMIT:
        lo, hi = flat.argmax(1), length - flat[:, ::-1].argmax(1)
        return None, single(lo.reshape(batch, rows), np.where(per_row > 0, hi, 0).reshape(batch, rows), length)
    row, edge = np.nonzero(step)
    row, lo, hi = row[::2], edge[::2], edge[1::2]
    first = np.cumsum(per_row) - per_row
    held = np.zeros((batch * rows, most, 2), np.int64)
    held[row, np.arange(len(row)) - first[row]] = np.stack([lo, hi], -1)
    held = held.reshape(batch, rows, most, 2)
    return held, held


def of_pairs(row: np.ndarray, key: np.ndarray, rows: int) -> Ranges | None:
    """Pairs sorted by row, then by key, repeats allowed, as `(1, rows, n, 2)`; None past `LIMIT` a row."""
    new = np.ones(len(row) + 1, bool)
    new[1:-1] = (row[1:] != row[:-1]) | (key[1:] > key[:-1] + 1)
    starts = np.flatnonzero(new)
    own = row[starts[:-1]]
    per_row = np.bincount(own, minlength=rows)
    most = int(per_row.max(initial=0))
    if most > LIMIT:
        return None
    lo, hi = key[starts[:-1]], key[starts[1:] - 1] + 1
    held = np.zeros((1, rows, most, 2), np.int64)
    held[0, own, np.arange(len(own)) - (np.cumsum(per_row) - per_row)[own]] = np.stack([lo, hi], -1)
    return held


def groups(query_codes: np.ndarray, key_codes: np.ndarray) -> tuple[Ranges | None, Ranges]:
    """Keys `(length,)` whose code equals a query's `(rows,)`, as `(1, rows, n, 2)`: exact (or None), and a superset.

    Negative key codes are in no group; codes are small non-negative ints otherwise.
    """
    length, rows = len(key_codes), len(query_codes)
    size = int(max(key_codes.max(initial=-1), query_codes.max(initial=-1))) + 1
    wanted = np.where(query_codes < 0, size, query_codes)  # the last row of the table has no keys
    change = np.flatnonzero(np.diff(key_codes)) + 1
    lo = np.concatenate([[0], change]) if length else np.zeros(0, np.int64)
    hi = np.concatenate([change, [length]]) if length else lo
    code = key_codes[lo]
    used = (code >= 0) & np.isin(code, wanted)
    order = np.flatnonzero(used)[np.argsort(code[used], kind="stable")]
    lo, hi, code = lo[order], hi[order], code[order]
    per_code = np.bincount(code, minlength=size + 1)
    first = np.cumsum(per_code) - per_code
    most = int(per_code.max(initial=0))
    if most <= LIMIT:
        table = np.zeros((size + 1, most, 2), np.int64)
        table[code, np.arange(len(code)) - first[code]] = np.stack([lo, hi], -1)
        held = table[wanted].reshape(1, rows, most, 2)
        return held, held
    hull = np.zeros((size + 1, 1, 2), np.int64)
    some = per_code > 0
    hull[some, 0, 0] = lo[first[some]]
    hull[some, 0, 1] = hi[(first + per_code - 1)[some]]
    return None, hull[wanted].reshape(1, rows, 1, 2)


def stacked(parts: list[Ranges]) -> Ranges:
    """Ranges of several batch rows, each `(1, rows, n, 2)`, as one array."""
    most = max(part.shape[2] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, 0), (0, most - part.shape[2]), (0, 0))) for part in parts])


def _swept(a: Ranges, b: Ranges, depth: int) -> Ranges:
    """Where at least `depth` of a and b hold: one sweep over sorted edges, openings before closings on a tie."""
    batch, rows = np.broadcast_shapes(a.shape[:2], b.shape[:2])
    a, b = np.broadcast_to(a, (batch, rows, *a.shape[2:])), np.broadcast_to(b, (batch, rows, *b.shape[2:]))
    both = np.concatenate([a, b], 2)
    edges = np.sort(np.concatenate([both[..., 0] * 2, both[..., 1] * 2 + 1], -1), -1)
    inside = np.cumsum(1 - 2 * (edges & 1), -1) >= depth
    before = np.concatenate([np.zeros((batch, rows, 1), bool), inside[..., :-1]], -1)
    lo = np.sort(np.where(inside & ~before, edges >> 1, _NONE), -1)
    hi = np.sort(np.where(before & ~inside, edges >> 1, _NONE), -1)
    return _compact(lo, hi)


def _compact(lo: np.ndarray, hi: np.ndarray) -> Ranges:
    """Ranges in order, the empty ones taken out, as few columns as the fullest row needs."""
    empty = lo >= hi
    most = int((~empty).sum(-1).max(initial=0))
    lo = np.sort(np.where(empty, _NONE, lo), -1)[..., :most]
    hi = np.sort(np.where(empty, _NONE, hi), -1)[..., :most]
    held = np.stack([lo, hi], -1)
    held[held == _NONE] = 0
    return held
