"""What a mask is: a rule that says which keys a query may see, and how rules join.

Enters: other masks; later the `Frame` of a call.
Leaves: `Mask`, `And`, `Or`, `Not`: visible pairs of any tile, ranges of keys of each query (exact, or a superset), or
words of bits, density, picture, and the postfix program that can cross a `torch.library` operator.
Floor 0: pure, imports torch and numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from regard import bits, ranges
from regard.positions import Frame

# index tensors of `visible`: batch (B,1,1,1), head (1,H,1,1), rows (1,1,R,1), cols (1,1,1,C)
_BLOCK = 128  # queries for which a rule that only a function knows is evaluated at once
_EVALUATED = 1 << 23  # pairs that it is asked for at once
_BYTES = 1 << 25  # of the words that `density` counts at once


class Mask:
    """A rule that says which keys a query may see. Make one with the functions of `regard.masks`."""

    def needs_query_positions(self) -> bool:
        """Whether the rule depends on where the queries stand, so that unequal lengths need a `query_offset`."""
        return any(part.needs_query_positions() for part in self._parts())

    def depends_on_head(self) -> bool:
        """Whether the rule may differ between heads."""
        return any(part.depends_on_head() for part in self._parts())

    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Visible pairs of one tile, bool, broadcastable to (B, H, R, C).

        Args:
            frame: sizes and offsets of the call.
            batch: int64 (B, 1, 1, 1), batch rows.
            head: int64 (1, H, 1, 1), query heads.
            rows: int64 (1, 1, R, 1), query indices of this call.
            cols: int64 (1, 1, 1, C), key indices of this call.
        """
        raise NotImplementedError

    def intervals(self, frame: Frame) -> Tensor | None:
        """Visible keys of each query as half-open ranges of key indices.

        Returns:
            int32 `(1 or batch, seq_len_q, n, 2)`: sorted, disjoint, within [0, seq_len_kv]; unused ranges are 0, 0 at
            the end. None where the rule cannot be kept so: more than 16 ranges a row, heads that differ, a function.
        """
        return _as_tensor(self._ranges(frame), frame)

    def hull(self, frame: Frame) -> Tensor | None:
        """Like `intervals`, but a superset of what is visible; None stands for every key."""
        return _as_tensor(self._bounds(frame), frame)

    def words(self, frame: Frame, rows: range | None = None) -> Tensor:
        """Visible keys of each query as bits: bit j of word w is key index 64 w + j; bits past the last key are 0.

        Rules that know their pairs write them down, joined rules join words; only a function is evaluated pair by pair,
        and under `&` only where its partner leaves something.

        Args:
            frame: sizes and offsets of the call.
            rows: query indices wanted. Default all.

        Returns:
            int64 `(1 or batch, 1 or num_heads, len(rows), words)`.

        Example:
            >>> from regard.masks import strided
            >>> strided(2).words(Frame(1, 1, 2, 6)).tolist()  # 0b010101 and 0b101010
            [[[[21], [42]]]]
        """
        rows = range(frame.seq_len_q) if rows is None else rows
        held = torch.from_numpy(self.take_rows(rows)._words(frame.take_rows(rows), None).view(np.int64))
        return held if held.shape[2] == len(rows) else held.expand(-1, -1, len(rows), -1)

    def dense(self, frame: Frame) -> Tensor:
        """The whole rule, bool, broadcastable to `(batch, num_heads, seq_len_q, seq_len_kv)`: n² memory."""
        return self.visible(frame, *_indices(frame, range(frame.seq_len_q), range(frame.seq_len_kv)))

    def take_rows(self, rows: range) -> Mask:  # noqa: ARG002
        """The rule for the queries `rows` alone, to be used with `query_offset + rows.start`."""
        return self

    def validate(self, caller: str, frame: Frame) -> None:
        """Raise a ValueError, naming `caller`, where the rule's tensors do not fit the call."""
        for part in self._parts():
            part.validate(caller, frame)

    def extent(self) -> tuple[int, int]:
        """Batch rows and heads that the rule's tensors were made for, 1 where it serves any number."""
        extents = [part.extent() for part in self._parts()]
        return max((e[0] for e in extents), default=1), max((e[1] for e in extents), default=1)

    def encode(self) -> tuple[str, list[int], list[Tensor]]:
        """The rule as a postfix program: words, and the ints and tensors they take, in order of use."""
        words: list[str] = []
        ints: list[int] = []
        tensors: list[Tensor] = []
        self._write(words, ints, tensors)
        return " ".join(words), ints, tensors

    def density(
        self,
        seq_len_q: int,
        seq_len_kv: int | None = None,
        *,
        query_offset: int | Tensor = 0,
        key_offset: int | Tensor = 0,
        batch: int | None = None,
        num_heads: int | None = None,
    ) -> float:
        """Visible pairs over all pairs, from 0 to 1.

        Args:
            seq_len_q: queries.
            seq_len_kv: keys; default `seq_len_q`.
            query_offset: position of the first query. Default 0.
            key_offset: position of the first key. Default 0.
            batch: batch rows; default as many as the mask's tensors have.
            num_heads: query heads; default as many as the mask's tensors have.

        Example:
            >>> from regard.masks import causal
            >>> causal().density(4)
            0.625
        """
        frame = self._frame(seq_len_q, seq_len_kv, query_offset, key_offset, batch, num_heads)
        if not frame.batch * frame.num_heads * frame.seq_len_q * frame.seq_len_kv:
            return 0.0
        held = self.intervals(frame)
        if held is not None:
            return float((held[..., 1] - held[..., 0]).sum(-1, dtype=torch.int64).double().mean()) / frame.seq_len_kv
        step = max(1, _BYTES // (frame.batch * frame.num_heads * bits.words(frame.seq_len_kv) * 8))
        total = 0.0
        for rows in _parts(frame.seq_len_q, step):
            words = self.words(frame, rows)
            total += bits.total(words.numpy().view(np.uint64)) / (words.shape[0] * words.shape[1])
        return total / (frame.seq_len_q * frame.seq_len_kv)

    def draw(
        self,
        seq_len_q: int,
        seq_len_kv: int | None = None,
        *,
        query_offset: int | Tensor = 0,
        key_offset: int | Tensor = 0,
        batch: int = 0,
        head: int = 0,
    ) -> str:
        """A picture in text: a line a query, a column a key, `█` where the query may see the key.

        Args:
            seq_len_q: queries.
            seq_len_kv: keys; default `seq_len_q`.
            query_offset: position of the first query. Default 0.
            key_offset: position of the first key. Default 0.
            batch: the batch row drawn. Default 0.
            head: the query head drawn. Default 0.

        Example:
            >>> from regard.masks import causal
            >>> print(causal().draw(2, 5, query_offset=3))
            ████·
            █████
        """
        frame = self._frame(seq_len_q, seq_len_kv, query_offset, key_offset, None, None)
        frame = replace(frame, batch=max(frame.batch, batch + 1), num_heads=max(frame.num_heads, head + 1))
        rows, cols = _indices(frame, range(frame.seq_len_q), range(frame.seq_len_kv))[2:]
        own_batch, own_head = torch.full((1, 1, 1, 1), batch), torch.full((1, 1, 1, 1), head)
        seen = self.visible(frame, own_batch, own_head, rows, cols)
        picture = seen.expand(1, 1, frame.seq_len_q, frame.seq_len_kv)[0, 0].tolist()
        return "\n".join("".join("█" if pair else "·" for pair in line) for line in picture)

    def __and__(self, other: Mask) -> Mask:
        return And(self, _joinable(other, "&"))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _joinable(other, "|"))

    def __invert__(self) -> Mask:
        # torch.compile (2.13) cannot trace ~ on an object: inside a compiled function write masks.Not(mask)
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("masks: a mask has no truth value. Join masks with & | ~, and test for `mask is None`.")

    def _parts(self) -> tuple[Mask, ...]:
        return ()

    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        raise NotImplementedError

    def _ranges(self, frame: Frame) -> ranges.Ranges | None:  # noqa: ARG002
        return None

    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        return self._ranges(frame)

    def _asks(self) -> bool:
        """Whether some pairs are known only by asking a function."""
        return any(part._asks() for part in self._parts())

    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        """Words (1 or batch, 1 or num_heads, 1 or rows, words), a new array that the caller may change.

        Outside `within` a function's pairs may be left out.
        """
        held = self._ranges(frame)
        return self._evaluated(frame, within) if held is None else bits.of_ranges(held, frame.seq_len_kv)[:, None]

    def _evaluated(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        """The rule asked pair by pair, some rows at a time, between the first and the last key of `within`."""
        held: bits.Words | None = None
        for rows in _parts(frame.seq_len_q, _BLOCK):
            first, last = 0, frame.seq_len_kv
            if within is not None:
                first, last = ranges.span(within if within.shape[1] == 1 else within[:, rows.start : rows.stop])
            step = max(1, _EVALUATED // (frame.batch * frame.num_heads * len(rows)) // bits.KEYS) * bits.KEYS
            for start in range(first // bits.KEYS * bits.KEYS, last, step):
                cols = range(start, min(start + step, last))
                seen = self.visible(frame, *_indices(frame, rows, cols))
                found = bits.of_bools(seen.expand(*seen.shape[:2], len(rows), len(cols)).numpy())
                if held is None:
                    held = np.zeros((*found.shape[:2], frame.seq_len_q, bits.words(frame.seq_len_kv)), np.uint64)
                at = start // bits.KEYS
                held[:, :, rows.start : rows.stop, at : at + found.shape[-1]] = found
        return np.zeros((1, 1, 1, bits.words(frame.seq_len_kv)), np.uint64) if held is None else held

    def _frame(
        self, seq_len_q: int, seq_len_kv: int | None, query_offset: int | Tensor, key_offset: int | Tensor,
        batch: int | None, num_heads: int | None,
    ) -> Frame:  # fmt: skip
        extent = self.extent()
        offsets = [len(offset) for offset in (query_offset, key_offset) if isinstance(offset, Tensor)]
        return Frame(
            max([extent[0], *offsets]) if batch is None else batch,
            extent[1] if num_heads is None else num_heads,
            seq_len_q,
            seq_len_q if seq_len_kv is None else seq_len_kv,
            query_offset,
            key_offset,
        )


@dataclass(frozen=True)
class And(Mask):
    """Keys that both masks let through."""

    left: Mask
    right: Mask

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return self.left.visible(frame, batch, head, rows, cols) & self.right.visible(frame, batch, head, rows, cols)

    @override
    def take_rows(self, rows: range) -> Mask:
        return And(self.left.take_rows(rows), self.right.take_rows(rows))

    @override
    def _parts(self) -> tuple[Mask, ...]:
        return self.left, self.right

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        _write_parts(self, "and", words, ints, tensors)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        left, right = self.left._ranges(frame), self.right._ranges(frame)
        return None if left is None or right is None else _kept(ranges.intersection(left, right))

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        return _both(self.left._bounds(frame), self.right._bounds(frame))

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        if self._asks():  # outside the bounds one of the two is 0, however a function inside is left
            within = _both(within, self._bounds(frame))
        return bits.joined(np.bitwise_and, self.left._words(frame, within), self.right._words(frame, within))


@dataclass(frozen=True)
class Or(Mask):
    """Keys that at least one of two masks lets through."""

    left: Mask
    right: Mask

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return self.left.visible(frame, batch, head, rows, cols) | self.right.visible(frame, batch, head, rows, cols)

    @override
    def take_rows(self, rows: range) -> Mask:
        return Or(self.left.take_rows(rows), self.right.take_rows(rows))

    @override
    def _parts(self) -> tuple[Mask, ...]:
        return self.left, self.right

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        _write_parts(self, "or", words, ints, tensors)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        left, right = self.left._ranges(frame), self.right._ranges(frame)
        return None if left is None or right is None else _kept(ranges.union(left, right))

    @override
    def _bounds(self, frame: Frame) -> ranges.Ranges | None:
        left, right = self.left._bounds(frame), self.right._bounds(frame)
        return None if left is None or right is None else _hulled(ranges.union(left, right))

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        return bits.joined(np.bitwise_or, self.left._words(frame, within), self.right._words(frame, within))


@dataclass(frozen=True)
class Not(Mask):
    """Keys that a mask keeps out."""

    inner: Mask

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return ~self.inner.visible(frame, batch, head, rows, cols)

    @override
    def take_rows(self, rows: range) -> Mask:
        return Not(self.inner.take_rows(rows))

    @override
    def _parts(self) -> tuple[Mask, ...]:
        return (self.inner,)

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        _write_parts(self, "not", words, ints, tensors)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        inner = self.inner._ranges(frame)
        return None if inner is None else _kept(ranges.complement(inner, frame.seq_len_kv))

    @override
    def _words(self, frame: Frame, within: ranges.Ranges | None) -> bits.Words:
        return bits.complement(self.inner._words(frame, within), frame.seq_len_kv)


def _joinable(other: object, sign: str) -> Mask:
    if not isinstance(other, Mask):
        raise TypeError(
            f"masks: {sign} must join two masks; got {type(other).__name__}. Wrap a tensor with masks.from_tensor(...)."
        )
    return other


def _write_parts(mask: Mask, word: str, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
    for part in mask._parts():
        part._write(words, ints, tensors)
    words.append(word)


def _kept(held: ranges.Ranges) -> ranges.Ranges | None:
    return held if ranges.count(held) <= ranges.LIMIT else None


def _hulled(held: ranges.Ranges) -> ranges.Ranges:
    return held if ranges.count(held) <= ranges.LIMIT else ranges.bounding(held)


def _both(left: ranges.Ranges | None, right: ranges.Ranges | None) -> ranges.Ranges | None:
    """A superset of what lies in both; None stands for every key."""
    if left is None or right is None:
        return right if left is None else left
    return _hulled(ranges.intersection(left, right))


def _as_tensor(held: ranges.Ranges | None, frame: Frame) -> Tensor | None:
    if held is None:
        return None
    shape = (held.shape[0], frame.seq_len_q, *held.shape[2:])
    return torch.from_numpy(np.ascontiguousarray(np.broadcast_to(held, shape), dtype=np.int32))


def _indices(frame: Frame, rows: range, cols: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.arange(frame.batch)[:, None, None, None],
        torch.arange(frame.num_heads)[None, :, None, None],
        torch.arange(rows.start, rows.stop)[None, None, :, None],
        torch.arange(cols.start, cols.stop)[None, None, None, :],
    )


def _parts(length: int, step: int) -> Iterator[range]:
    return (range(start, min(start + step, length)) for start in range(0, length, step))
