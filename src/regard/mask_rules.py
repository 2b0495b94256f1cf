"""The rules that masks are made of, one class each.

Enters: ints, tensors or a function, already checked by `masks`; later the `Frame` of a call.
Leaves: masks whose visible pairs are evaluated tile by tile, kept as ranges of keys where the rule allows, and else
written down as bits; all but a function's, without asking pair by pair.
Floor 0: pure, imports torch and numpy alone.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from regard import bits, ranges
from regard.check import on_cpu
from regard.mask_algebra import Mask
from regard.mask_arguments import array, check_batch, check_length, check_positions, offset, query_indices, row_of
from regard.positions import Frame, at

PairFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Causal(Mask):
    """key position ≤ query position."""

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return at(cols, frame.key_offset, batch) <= at(rows, frame.query_offset, batch)

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("causal")

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        return ranges.single(0, query_indices(frame) + 1, frame.seq_len_kv)


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """query − left ≤ key ≤ query + right; None leaves a side open."""

    left: int | None
    right: int | None

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        distance = at(cols, frame.key_offset, batch) - at(rows, frame.query_offset, batch)
        seen = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=cols.device)
        if self.left is not None:
            seen = seen & (distance >= -self.left)
        if self.right is not None:
            seen = seen & (distance <= self.right)
        return seen

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("window" + ("" if self.left is None else "_left") + ("" if self.right is None else "_right"))
        ints.extend(side for side in (self.left, self.right) if side is not None)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        own = query_indices(frame)
        lo = 0 if self.left is None else own - self.left
        hi = frame.seq_len_kv if self.right is None else own + self.right + 1
        return ranges.single(lo, hi, frame.seq_len_kv)


@dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """key position < lengths[batch]."""

    lengths: Tensor

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return at(cols, frame.key_offset, batch) < self.lengths[row_of(self.lengths, batch)]

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        check_batch(caller, "padding's lengths", self.lengths, frame)

    @override
    def extent(self) -> tuple[int, int]:
        return self.lengths.shape[0], 1

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("lengths")
        tensors.append(self.lengths)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        return ranges.single(0, array(self.lengths)[:, None] - offset(frame.key_offset), frame.seq_len_kv)


@dataclass(frozen=True, eq=False)
class Keep(Mask):
    """keep[batch, key index]."""

    keep: Tensor

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return self.keep[row_of(self.keep, batch), cols]

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        check_batch(caller, "padding's keep", self.keep, frame)
        check_length(caller, "padding's keep", self.keep, frame.seq_len_kv, "seq_len_kv")

    @override
    def extent(self) -> tuple[int, int]:
        return self.keep.shape[0], 1

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("keep")
        tensors.append(self.keep)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        return ranges.runs(array(self.keep)[:, None])[0]

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        return ranges.runs(array(self.keep)[:, None])[1]

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        return bits.of_bools(array(self.keep))[:, None, None]


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """ids at the query's position = ids at the key's position."""

    ids: Tensor  # (1 or batch, positions)

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        query, query_inside = self._look_up(at(rows, frame.query_offset, batch), batch)
        key, key_inside = self._look_up(at(cols, frame.key_offset, batch), batch)
        return (query == key) & query_inside & key_inside

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        check_batch(caller, "documents' ids", self.ids, frame)
        fix = "Give an id for each position, or use documents(query_ids, key_ids)."
        check_positions(caller, "documents' ids", "ids", self.ids.shape[1], frame, fix)

    @override
    def extent(self) -> tuple[int, int]:
        return self.ids.shape[0], 1

    def _look_up(self, position: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        inside = (position >= 0) & (position < self.ids.shape[1])
        if not self.ids.shape[1]:
            return position, inside
        return self.ids[row_of(self.ids, batch), position.clamp(0, self.ids.shape[1] - 1)], inside

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("documents")
        tensors.append(self.ids)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        return _grouped(self._at_positions(frame))[0]

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        return _grouped(self._at_positions(frame))[1]

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        return _grouped_words(self._at_positions(frame), frame.seq_len_kv)

    def _at_positions(self, frame: Frame) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        codes = _codes(array(self.ids))[0]
        query, key = array(frame.query_positions()), array(frame.key_positions())
        batch = max(len(codes), len(query), len(key))

        def at_positions(row: int, position: np.ndarray) -> np.ndarray:
            ids, own = codes[row % len(codes)], position[row % len(position)]
            inside = (own >= 0) & (own < len(ids))
            return np.where(inside, ids[np.clip(own, 0, len(ids) - 1)] if len(ids) else 0, -1)

        return ((at_positions(row, query), at_positions(row, key)) for row in range(batch))


@dataclass(frozen=True, eq=False)
class DocumentPairs(Mask):
    """query_ids[batch, query index] = key_ids[batch, key index]."""

    query_ids: Tensor  # (1 or batch, seq_len_q)
    key_ids: Tensor  # (1 or batch, seq_len_kv)

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        query = self.query_ids[row_of(self.query_ids, batch), rows]
        return query == self.key_ids[row_of(self.key_ids, batch), cols]

    @override
    def take_rows(self, rows: range) -> Mask:
        return DocumentPairs(self.query_ids[:, rows.start : rows.stop], self.key_ids)

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        check_batch(caller, "documents' query_ids", self.query_ids, frame)
        check_batch(caller, "documents' key_ids", self.key_ids, frame)
        check_length(caller, "documents' query_ids", self.query_ids, frame.seq_len_q, "seq_len_q")
        check_length(caller, "documents' key_ids", self.key_ids, frame.seq_len_kv, "seq_len_kv")

    @override
    def extent(self) -> tuple[int, int]:
        return max(self.query_ids.shape[0], self.key_ids.shape[0]), 1

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("document_pairs")
        tensors.extend([self.query_ids, self.key_ids])

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        return _grouped(self._by_index())[0]

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        return _grouped(self._by_index())[1]

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        return _grouped_words(self._by_index(), frame.seq_len_kv)

    def _by_index(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        query, key = _codes(array(self.query_ids), array(self.key_ids))
        pairs = range(max(len(query), len(key)))
        return ((query[row % len(query)], key[row % len(key)]) for row in pairs)


@dataclass(frozen=True)
class Prefix(Mask):
    """key position < length."""

    length: int

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return at(cols, frame.key_offset, batch) < self.length

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("prefix")
        ints.append(self.length)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        return ranges.single(0, self.length - offset(frame.key_offset), frame.seq_len_kv)


@dataclass(frozen=True, eq=False)
class FromTensor(Mask):
    """allowed[batch, head, query index, key index], each axis 1 or full."""

    allowed: Tensor

    @override
    def depends_on_head(self) -> bool:
        return self.allowed.shape[1] > 1

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        index = zip(self.allowed.shape, (batch, head, rows, cols), strict=True)
        return self.allowed[tuple(own if size > 1 else torch.zeros_like(own[:1, :1, :1, :1]) for size, own in index)]

    @override
    def take_rows(self, rows: range) -> Mask:
        return self if self.allowed.shape[2] == 1 else FromTensor(self.allowed[:, :, rows.start : rows.stop])

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        on_cpu(caller, "mask", self.allowed)
        whole = (frame.batch, frame.num_heads, frame.seq_len_q, frame.seq_len_kv)
        if any(own != 1 and own != full for own, full in zip(self.allowed.shape, whole, strict=True)):
            raise ValueError(
                f"{caller}: mask must be broadcastable to (batch, num_heads, seq_len_q, seq_len_kv) = {whole}; "
                f"got {tuple(self.allowed.shape)}. Give each axis its full length or 1."
            )

    @override
    def extent(self) -> tuple[int, int]:
        return self.allowed.shape[0], self.allowed.shape[1]

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("tensor")
        tensors.append(self.allowed)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        return None if self.depends_on_head() else ranges.runs(self._rows(frame))[0]

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        return ranges.runs(self._rows(frame))[1]

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        return bits.of_bools(array(self.allowed.expand(*self.allowed.shape[:3], frame.seq_len_kv)))

    def _rows(self, frame: Frame) -> np.ndarray:
        rows = array(self.allowed.any(1) if self.depends_on_head() else self.allowed[:, 0])
        return rows if rows.shape[2] == frame.seq_len_kv else np.broadcast_to(rows, (*rows.shape[:2], frame.seq_len_kv))


@dataclass(frozen=True)
class FromFunction(Mask):
    """function(batch, head, query position, key position)."""

    function: PairFunction
    number: int = field(compare=False)

    def __reduce__(self) -> tuple[Callable[[PairFunction], FromFunction], tuple[PairFunction]]:
        return numbered, (self.function,)  # another process has numbers of its own

    @override
    def needs_query_positions(self) -> bool:
        return True

    @override
    def depends_on_head(self) -> bool:
        return True

    @override
    def _asks(self) -> bool:
        return True

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        seen = self.function(batch, head, at(rows, frame.query_offset, batch), at(cols, frame.key_offset, batch))
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            got = str(seen.dtype) if isinstance(seen, Tensor) else type(seen).__name__
            raise TypeError(
                f"masks.from_function: the function must return a bool tensor; got {got}. "
                "Compare its index tensors, as in `lambda b, h, p, j: j <= p`."
            )
        whole = (batch.shape[0], head.shape[1], rows.shape[2], cols.shape[3])
        if seen.ndim > 4 or any(o != 1 and o != w for o, w in zip(seen.shape[::-1], whole[::-1], strict=False)):
            raise ValueError(
                "masks.from_function: the function's result must be broadcastable to its index tensors' joint shape "
                f"{whole}; got {tuple(seen.shape)}. Use elementwise operations on the index tensors."
            )
        return seen[(None,) * (4 - seen.ndim)]

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        words.append("function")
        ints.append(self.number)


_numbers = count(1)
_functions: weakref.WeakValueDictionary[int, FromFunction] = weakref.WeakValueDictionary()
_recent: deque[FromFunction] = deque(maxlen=1024)  # a backward pass may outlive its caller's mask


def numbered(function: PairFunction) -> FromFunction:
    """The mask of a function, under a number by which this process finds it again."""
    mask = FromFunction(function, next(_numbers))
    _functions[mask.number] = mask
    _recent.append(mask)
    return mask


def known(number: int) -> FromFunction | None:
    """The mask of that number, where it is still alive in this process."""
    return _functions.get(number)


def _grouped(rows: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[ranges.Ranges | None, ranges.Ranges]:
    parts = [ranges.groups(query, key) for query, key in rows]
    exact = [part[0] for part in parts]
    hull = ranges.stacked([part[1] for part in parts])
    return (None if any(part is None for part in exact) else hull), hull


def _grouped_words(rows: Iterator[tuple[np.ndarray, np.ndarray]], length: int) -> bits.Words:
    """Keys whose code equals a query's: one row of words a code, handed to each query that has it."""
    parts = []
    for query, key in rows:
        codes, own = np.unique(query, return_inverse=True)
        row = np.searchsorted(codes, key)
        seen = np.flatnonzero((key >= 0) & np.isin(key, codes))
        seen = seen[np.argsort(row[seen], kind="stable")]
        parts.append(bits.of_pairs(row[seen], seen, len(codes), length)[own])
    return bits.stacked(parts)[:, None]


def _codes(*ids: np.ndarray) -> list[np.ndarray]:
    """Ids as small ints from 0, the same id the same int in every array."""
    size = sum(own.size for own in ids)
    least = min((int(own.min()) for own in ids if own.size), default=0)
    most = max((int(own.max()) for own in ids if own.size), default=0)
    if most - least <= 4 * size + 64:
        return [own - least for own in ids]
    codes = np.unique(np.concatenate([own.ravel() for own in ids]), return_inverse=True)[1].astype(np.int64)
    ends = np.cumsum([own.size for own in ids])[:-1]
    return [part.reshape(own.shape) for part, own in zip(np.split(codes, ends), ids, strict=True)]
