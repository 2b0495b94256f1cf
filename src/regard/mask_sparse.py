"""The rules of sparse attention, one class each: every one knows its pairs and writes them down without asking for all.

Enters: ints and tensors, already checked by `mask_shapes`; later the `Frame` of a call.
Leaves: masks with ranges of keys where a row has few, and words of bits at a cost that follows what is kept.
Floor 0: pure, imports torch and numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from regard import bits, ranges
from regard.check import on_cpu
from regard.mask_algebra import Mask
from regard.mask_arguments import check_batch, check_positions, offset, offsets, query_indices, row_of
from regard.positions import Frame, at

_BOOLS = 1 << 24  # bytes of bools unpacked at once


@dataclass(frozen=True, eq=False)
class GlobalTokens(Mask):
    """query position or key position is one of `positions`."""

    positions: Tensor  # (1 or batch, n)

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        own = self.positions[row_of(self.positions, batch)[:, 0, 0, 0], None, None]
        query = (at(rows, frame.query_offset, batch) == own).any(-1, keepdim=True)
        key = (at(cols, frame.key_offset, batch).transpose(2, 3) == own).any(-1, keepdim=True)
        return query | key.transpose(2, 3)

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        check_batch(caller, "global_tokens' positions", self.positions, frame)

    @override
    def extent(self) -> tuple[int, int]:
        return self.positions.shape[0], 1

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("global_tokens")
        tensors.append(self.positions)

    def _are_global(self, positions: np.ndarray) -> np.ndarray:
        own = self.positions.numpy()
        batch = max(len(own), len(positions))
        return np.stack([np.isin(positions[b % len(positions)], own[b % len(own)]) for b in range(batch)])

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        keys = ranges.runs(self._are_global(frame.key_positions().numpy())[:, None])[0]
        return None if keys is None else self._with_queries(frame, keys)

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        return self._with_queries(frame, ranges.runs(self._are_global(frame.key_positions().numpy())[:, None])[1])

    def _with_queries(self, frame: Frame, keys: ranges.Ranges) -> ranges.Ranges:
        query = self._are_global(frame.query_positions().numpy())[:, :, None, None]
        if not query.any():
            return keys
        every = np.zeros((1, 1, max(1, keys.shape[2]), 2), np.int64)
        every[..., 0, 1] = frame.seq_len_kv
        return np.where(query, every, keys if keys.shape[2] else 0)

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        query = self._are_global(frame.query_positions().numpy())
        keys = bits.of_bools(self._are_global(frame.key_positions().numpy()))
        batch = max(len(query), len(keys))
        held = np.repeat(keys[:, None, None], frame.seq_len_q, axis=2)
        held = held if len(held) == batch else np.repeat(held, batch, axis=0)
        held[np.broadcast_to(query[:, None], held.shape[:3])] = bits.full(frame.seq_len_kv)
        return held


@dataclass(frozen=True)
class Strided(Mask):
    """(query position − key position) mod stride = 0."""

    stride: int

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return (at(rows, frame.query_offset, batch) - at(cols, frame.key_offset, batch)) % self.stride == 0

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("strided")
        ints.append(self.stride)

    def _first(self, frame: Frame) -> np.ndarray:
        """Index of the first key that each query sees, below the stride; (1 or batch, rows)."""
        return query_indices(frame) % self.stride

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        length = frame.seq_len_kv
        if self.stride == 1:
            return ranges.single(0, length, length)
        most = -(-length // self.stride)
        if most > ranges.LIMIT:
            return None
        first = self._first(frame)[:, :, None] + self.stride * np.arange(most)
        return np.where((first < length)[..., None], np.stack([first, first + 1], -1), 0)

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        first = self._first(frame)
        last = first + (frame.seq_len_kv - 1 - first) // self.stride * self.stride
        return ranges.single(first, last + 1, frame.seq_len_kv)

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        first = self._first(frame)
        starts, own = np.unique(first, return_inverse=True)
        keys = starts[:, None] + self.stride * np.arange(-(-frame.seq_len_kv // self.stride))
        row, n = np.nonzero(keys < frame.seq_len_kv)
        table = bits.of_pairs(row, keys[row, n], len(starts), frame.seq_len_kv)
        return table[own.reshape(first.shape)][:, None]


@dataclass(frozen=True)
class Chunk(Mask):
    """Query and key stand in the same chunk of `size` positions."""

    size: int

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return at(rows, frame.query_offset, batch) // self.size == at(cols, frame.key_offset, batch) // self.size

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("chunk")
        ints.append(self.size)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        first = frame.query_positions().numpy() // self.size * self.size - offset(frame.key_offset)
        return ranges.single(first, first + self.size, frame.seq_len_kv)


@dataclass(frozen=True)
class ChunkEnds(Mask):
    """The key is one of the last `count` positions of its chunk of `size`."""

    size: int
    count: int

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return at(cols, frame.key_offset, batch) % self.size >= self.size - self.count

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("chunk_ends")
        ints.extend((self.size, self.count))

    def _keys(self, frame: Frame) -> np.ndarray:
        return (frame.key_positions().numpy() % self.size >= self.size - self.count)[:, None]

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        return ranges.runs(self._keys(frame))[0]

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        return ranges.runs(self._keys(frame))[1]

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        return bits.of_bools(self._keys(frame))[:, None]


@dataclass(frozen=True)
class Neighborhood(Mask):
    """On each axis, query and key are a multiple of `dilation` apart, at most window // 2 times."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    dilation: tuple[int, ...]

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        query, key = at(rows, frame.query_offset, batch), at(cols, frame.key_offset, batch)
        size = prod(self.grid)
        seen = (query >= 0) & (query < size) & (key >= 0) & (key < size)
        for length, window, dilation in zip(self.grid[::-1], self.window[::-1], self.dilation[::-1], strict=True):
            apart = query % length - key % length
            seen = seen & (apart.abs() <= window // 2 * dilation) & (apart % dilation == 0)
            query, key = query // length, key // length
        return seen

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        fix = "Give the grid of all tokens; those before it stand at negative positions."
        before = -(1 << 62)
        check_positions(caller, "neighborhood's grid", "places", prod(self.grid), frame, fix, first=before)

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append(f"neighborhood_{len(self.grid)}")
        ints.extend((*self.grid, *self.window, *self.dilation))

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        steps = self._steps()
        single = self.dilation[-1] == 1
        if prod(len(axis) for axis in (steps[:-1] if single else steps)) > ranges.LIMIT:
            return None
        query = frame.query_positions().numpy()
        found = []
        for row, lowest, highest in self._lines(query, steps[:-1]):
            if single:
                found.append((row + lowest, row + highest + 1))
            else:
                for key in query % self.grid[-1] + steps[-1][:, None, None]:
                    found.append((row + key, row + key + ((lowest <= key) & (key <= highest))))
        lo, hi = (np.stack([pair[n] for pair in found], -1) - offset(frame.key_offset)[..., None] for n in (0, 1))
        held = np.stack([np.clip(lo, 0, frame.seq_len_kv), np.clip(hi, 0, frame.seq_len_kv)], -1)
        held[held[..., 0] >= held[..., 1]] = 0
        return ranges.union(held, held[:, :, :0])

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        position = frame.query_positions().numpy()
        lowest = highest = np.zeros_like(position)
        unit = 1
        rest = position
        for length, window, dilation in zip(self.grid[::-1], self.window[::-1], self.dilation[::-1], strict=True):
            here, rest = rest % length, rest // length
            lowest = lowest + unit * (here - np.minimum(window // 2, here // dilation) * dilation)
            highest = highest + unit * (here + np.minimum(window // 2, (length - 1 - here) // dilation) * dilation)
            unit *= length
        outside = (position < 0) | (position >= unit)
        shift = offset(frame.key_offset)
        return ranges.single(lowest - shift, np.where(outside, -1, highest + 1 - shift), frame.seq_len_kv)

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        steps = self._steps()
        positions, dilation = frame.query_positions().numpy(), self.dilation[-1]
        # The keys of one line of the grid, counted from the first: they depend on their number alone.
        line = np.arange((len(steps[-1]) - 1) * dilation + 1)
        table = bits.of_bools((line % dilation == 0) & (line // dilation < np.arange(len(steps[-1]) + 1)[:, None]))
        parts = []
        for b, (_, key_offset) in enumerate(offsets(frame)):
            held = np.zeros((frame.seq_len_q, bits.words(prod(self.grid)) + table.shape[1] + 1), np.uint64)
            for start, lowest, highest in self._lines(positions[[b % len(positions)]], steps[:-1]):
                row = np.flatnonzero(highest[0] >= lowest[0])
                first, last = lowest[0, row], highest[0, row]
                bits.put(held, row, start[0, row] + first, table[(last - first) // dilation + 1])
            parts.append(bits.part(held, key_offset, frame.seq_len_kv))
        return bits.stacked(parts)[:, None]

    def _steps(self) -> list[np.ndarray]:
        """Offsets to the neighbors along each axis, no more than the axis is long."""
        return [
            np.arange(-(reach := min(window // 2, (length - 1) // dilation)), reach + 1) * dilation
            for length, window, dilation in zip(self.grid, self.window, self.dilation, strict=True)
        ]

    def _lines(
        self, position: np.ndarray, steps: list[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each line of the grid that a query's neighbors lie on: the line's first position, and the first and last
        neighbor counted from there (last < first: none)."""
        size, reach = self.grid[-1], self.window[-1] // 2
        inside = (position >= 0) & (position < prod(self.grid))
        x = position % size
        lowest = x - np.minimum(reach, x // self.dilation[-1]) * self.dilation[-1]
        highest = x + np.minimum(reach, (size - 1 - x) // self.dilation[-1]) * self.dilation[-1]
        outer = np.unravel_index(np.where(inside, position, 0) // size, self.grid[:-1]) if steps else ()
        for step in product(*steps):
            line, here = np.zeros_like(position), inside
            for own, length, apart in zip(outer, self.grid, step, strict=False):
                here = here & (own + apart >= 0) & (own + apart < length)
                line = line * length + own + apart
            yield line * size, lowest, np.where(here, highest, lowest - self.dilation[-1])


@dataclass(frozen=True, eq=False)
class Blocks(Mask):
    """allowed[batch, head, query position // size, key position // size]."""

    allowed: Tensor  # (1 or batch, 1 or num_heads, query blocks, key blocks)
    size: int

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def depends_on_head(self) -> bool:
        return self.allowed.shape[1] > 1

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        query, key = at(rows, frame.query_offset, batch) // self.size, at(cols, frame.key_offset, batch) // self.size
        most_q, most_kv = self.allowed.shape[2:]
        inside = (query >= 0) & (query < most_q) & (key >= 0) & (key < most_kv)
        if not most_q * most_kv:
            return inside
        own_batch = row_of(self.allowed, batch)
        own_head = head if self.allowed.shape[1] > 1 else torch.zeros_like(head[:, :1])
        return self.allowed[own_batch, own_head, query.clamp(0, most_q - 1), key.clamp(0, most_kv - 1)] & inside

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        on_cpu(caller, "blocks' allowed", self.allowed)
        for name, own, whole in zip(("batch", "num_heads"), self.extent(), (frame.batch, frame.num_heads), strict=True):
            if own not in (1, whole):
                raise ValueError(
                    f"{caller}: blocks' allowed must have {name} = {whole} or 1 on its axis; "
                    f"got {tuple(self.allowed.shape)}. Give (batch, num_heads, query blocks, key blocks)."
                )
        for side, count in zip(("query", "key"), self.allowed.shape[2:], strict=True):
            fix = f"Allow or forbid every {side} block."
            check_positions(caller, "blocks' allowed", f"{side} places", count * self.size, frame, fix, side)

    @override
    def extent(self) -> tuple[int, int]:
        return self.allowed.shape[0], self.allowed.shape[1]

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("blocks")
        ints.append(self.size)
        tensors.append(self.allowed)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        return None if self.depends_on_head() else self._spread(frame, ranges.runs(self.allowed[:, 0].numpy())[0])

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        return self._spread(frame, ranges.runs(self.allowed.any(1).numpy())[1])

    def _spread(self, frame: Frame, held: ranges.Ranges | None) -> ranges.Ranges | None:
        """Ranges of blocks as the ranges of keys of each query."""
        if held is None:
            return None
        block, inside = self._of_queries(frame)
        if not held.shape[1]:
            return np.zeros((1, frame.seq_len_q, 0, 2), np.int64)
        batch = np.arange(max(len(block), len(held)))[:, None]
        keys = held[batch % len(held), block[batch[:, 0] % len(block)]] * self.size
        keys = np.clip(keys - offset(frame.key_offset)[..., None, None], 0, frame.seq_len_kv)
        keys = np.where((keys[..., 0] < keys[..., 1])[..., None] & inside[..., None, None], keys, 0)
        return ranges.union(keys, keys[:, :, :0])

    def _of_queries(self, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
        """Each query's block, and whether there is one; (1 or batch, rows)."""
        block = frame.query_positions().numpy() // self.size
        inside = (block >= 0) & (block < self.allowed.shape[2])
        return np.where(inside, block, 0), inside

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        block, inside = self._of_queries(frame)
        allowed = self.allowed.numpy()
        parts = []
        keys = offset(frame.key_offset)[:, 0]
        for b in range(max(len(block), len(allowed), len(keys))):
            used, own = np.unique(block[b % len(block)], return_inverse=True)
            table = self._table(allowed[b % len(allowed)], used)
            table = bits.part(table, int(keys[b % len(keys)]), frame.seq_len_kv)
            held = table[:, own]
            held[:, ~inside[b % len(block)]] = 0
            parts.append(held)
        return bits.stacked(parts)

    def _table(self, allowed: np.ndarray, rows: np.ndarray) -> bits.Words:
        """Keys from position 0 on that the given block rows of `allowed` (heads, rows, columns) let through."""
        length = allowed.shape[2] * self.size
        held = np.zeros((len(allowed), len(rows), bits.words(length)), np.uint64)
        step = max(1, _BOOLS // max(1, len(allowed) * length))
        for start in range(0, len(rows) if allowed.shape[1] else 0, step):
            some = np.repeat(allowed[:, rows[start : start + step]], self.size, axis=-1)
            held[:, start : start + step] = bits.of_bools(some)
        return held


@dataclass(frozen=True, eq=False)
class Edges(Mask):
    """(query position, key position) is a column of `index`."""

    index: Tensor  # int64 (2, num_edges), sorted by query, then by key

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        query, key = at(rows, frame.query_offset, batch), at(cols, frame.key_offset, batch)
        query, key = torch.broadcast_tensors(query, key)
        seen = torch.zeros(query.shape, dtype=torch.bool)
        if not seen.numel():
            return seen
        for b in range(len(seen)):
            own_q, own_kv = query[b, 0, :, 0], key[b, 0, 0]
            p, j = self.index
            order_q, order_kv = own_q.argsort(), own_kv.argsort()
            row = torch.searchsorted(own_q, p, sorter=order_q).clamp(max=len(own_q) - 1)
            col = torch.searchsorted(own_kv, j, sorter=order_kv).clamp(max=len(own_kv) - 1)
            row, col = order_q[row], order_kv[col]
            here = (own_q[row] == p) & (own_kv[col] == j)
            seen[b, 0, row[here], col[here]] = True
        return seen

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        on_cpu(caller, "edges' index", self.index)

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("edges")
        tensors.append(self.index)

    def _pairs(self, frame: Frame) -> list[tuple[np.ndarray, np.ndarray]]:
        """Indices of the call's query and key of each edge, sorted; one pair of arrays a batch row that differs."""
        query, key = self.index.numpy()
        found = []
        for first_q, first_kv in offsets(frame):
            own = slice(*np.searchsorted(query, [first_q, first_q + frame.seq_len_q]))
            row, col = query[own] - first_q, key[own] - first_kv
            here = (col >= 0) & (col < frame.seq_len_kv)
            found.append((row, col) if here.all() else (row[here], col[here]))
        return found

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        found = [ranges.of_pairs(row, col, frame.seq_len_q) for row, col in self._pairs(frame)]
        exact = [held for held in found if held is not None]
        return ranges.stacked(exact) if len(exact) == len(found) else None

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        held = []
        for row, col in self._pairs(frame):
            hull = np.zeros((1, frame.seq_len_q, 1, 2), np.int64)
            hull[0, row[::-1], 0, 0] = col[::-1]  # of a row's keys the one written last stays: the first
            hull[0, row, 0, 1] = col + 1
            held.append(hull)
        return np.concatenate(held)

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        parts = [bits.of_pairs(row, col, frame.seq_len_q, frame.seq_len_kv) for row, col in self._pairs(frame)]
        return bits.stacked(parts)[:, None]
