"""What a mask is: a rule that says which keys a query may see, and how rules join.

Enters: other masks; later the `Frame` of a call.
Leaves: `Mask`, `And`, `Or`, `Not`: visible pairs of any tile, ranges of keys of each query (exact, or a superset),
density, picture, and the postfix program that can cross a `torch.library` operator.
Floor 0: pure, imports torch and numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from regard import ranges
from regard.positions import Frame

# index tensors of `visible`: batch (B,1,1,1), head (1,H,1,1), rows (1,1,R,1), cols (1,1,1,C)
_TILE = 512


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
        total = 0.0
        for rows in _tiles(frame.seq_len_q):
            for cols in _tiles(frame.seq_len_kv):
                total += (
                    float(self.visible(frame, *_indices(frame, rows, cols)).double().mean()) * len(rows) * len(cols)
                )
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
        left, right = self.left._bounds(frame), self.right._bounds(frame)
        if left is None or right is None:
            return right if left is None else left
        return _hulled(ranges.intersection(left, right))


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


def _tiles(length: int) -> Iterator[range]:
    return (range(start, min(start + _TILE, length)) for start in range(0, length, _TILE))
