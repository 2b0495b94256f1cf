"""Masks and frames of every kind, drawn by hypothesis, and what they spell out pair by pair.

Enters: sizes. Leaves: strategies, a dense picture, a painted table of ranges. Floor: below the tests of masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from regard import masks
from regard.masks import Mask
from regard.positions import Frame

BATCH, HEADS = 2, 2


@dataclass
class Case:
    mask: Mask
    frame: Frame


def bools(draw: st.DrawFn, *shape: int) -> Tensor:
    size = int(np.prod(shape))
    if size > 100:  # hypothesis draws no large array quickly
        return torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) > 0.5
    return torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool).reshape(shape)


def integers(draw: st.DrawFn, low: int, high: int, *shape: int) -> Tensor:
    size = int(np.prod(shape))
    if size > 100:
        return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return torch.tensor(
        draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), dtype=torch.int64
    ).reshape(shape)


@st.composite
def frames(draw: st.DrawFn, scale: int = 1) -> Frame:
    """Up to 7 queries and 9 keys, offsets up to 6, times `scale`."""

    def offset() -> int | Tensor:
        most = 6 * scale
        return draw(st.integers(-most, most)) if draw(st.booleans()) else integers(draw, -most, most, BATCH)

    queries, keys = draw(st.integers(0, 7 * scale)), draw(st.integers(0, 9 * scale))
    return Frame(BATCH, HEADS, queries, keys, offset(), offset())


def atom(draw: st.DrawFn, frame: Frame, scale: int = 1) -> Mask:
    q, kv = frame.seq_len_q, frame.seq_len_kv
    batch = draw(st.sampled_from([1, BATCH]))
    side = st.none() | st.integers(0, 5 * scale)
    few = 9 * scale
    match draw(st.integers(0, 16)):
        case 0:
            return masks.causal()
        case 1:
            return masks.sliding_window(draw(side), draw(side))
        case 2:
            return masks.padding(integers(draw, 0, few, batch))
        case 3:
            return masks.padding(bools(draw, batch, kv))
        case 4:
            return masks.documents(integers(draw, -1, 2, batch, draw(st.integers(0, few))))
        case 5:
            return masks.documents(integers(draw, -1, 2, batch, q), integers(draw, -1, 2, batch, kv))
        case 6:
            return masks.prefix(draw(st.integers(-2, few)))
        case 7:
            return masks.prefix(integers(draw, -2, few, BATCH))
        case 8:
            shape = [draw(st.sampled_from([1, full])) for full in (BATCH, HEADS, q, kv)]
            return masks.from_tensor(bools(draw, *shape))
        case 9:
            return masks.from_function(lambda b, h, p, j: (p + 2 * j + b + h) % 3 == 0)
        case 10:
            return masks.global_tokens(integers(draw, -2, few, batch, draw(st.integers(0, 4 * scale))))
        case 11:
            return masks.strided(draw(st.integers(1, few)))
        case 12 | 13:
            axes = draw(st.integers(1, 3))
            longest = {1: 12, 2: 4, 3: 3}[axes] * (1 if scale == 1 else {1: 20, 2: 4, 3: 2}[axes])

            def per_axis(most: int) -> list[int]:
                return [draw(st.integers(1, most)) for _ in range(axes)]

            return masks.neighborhood(per_axis(longest), per_axis(6), per_axis(3))
        case 14:
            size = draw(st.integers(1, 3 * scale))
            shape = (batch, draw(st.sampled_from([1, HEADS])), draw(st.integers(0, 6)), draw(st.integers(0, 6)))
            return masks.blocks(bools(draw, *shape), size)
        case 15:
            return masks.edges(integers(draw, -3, few, 2, draw(st.integers(0, 8 * scale))))
        case _:
            size = draw(st.integers(1, 4 * scale))
            return masks.Chunk(size) if draw(st.booleans()) else masks.ChunkEnds(size, draw(st.integers(1, size)))


def joined(draw: st.DrawFn, frame: Frame, depth: int, scale: int = 1) -> Mask:
    kind = draw(st.integers(0, 3)) if depth else 0
    if kind == 0:
        return atom(draw, frame, scale)
    if kind == 1:
        return ~joined(draw, frame, depth - 1, scale)
    left, right = joined(draw, frame, depth - 1, scale), joined(draw, frame, depth - 1, scale)
    return left & right if kind == 2 else left | right


@st.composite
def cases(draw: st.DrawFn, depth: int = 3, scale: int = 1) -> Case:
    frame = draw(frames(scale))
    return Case(joined(draw, frame, depth, scale), frame)


def spelt_out(mask: Mask, frame: Frame) -> Tensor:
    return mask.dense(frame).expand(frame.batch, frame.num_heads, frame.seq_len_q, frame.seq_len_kv)


def painted(intervals: Tensor, frame: Frame) -> Tensor:
    """Ranges as bools, checking their form on the way."""
    assert intervals.dtype == torch.int32 and intervals.is_contiguous()
    assert intervals.shape[0] in (1, frame.batch) and intervals.shape[1] == frame.seq_len_q and intervals.shape[3] == 2
    assert intervals.shape[2] <= 16
    seen = torch.zeros(frame.batch, frame.seq_len_q, frame.seq_len_kv, dtype=torch.bool)
    for b in range(frame.batch):
        for i in range(frame.seq_len_q):
            last, ended = -1, False
            for lo, hi in intervals[b % intervals.shape[0], i].tolist():
                if lo == hi:
                    assert (lo, hi) == (0, 0)
                    ended = True
                    continue
                assert not ended and last < lo < hi <= frame.seq_len_kv
                seen[b, i, lo:hi] = True
                last = hi
    return seen


def unpacked(words: Tensor, frame: Frame) -> Tensor:
    """Words as bools, checking their form and that nothing lies past the last key."""
    size = -(-frame.seq_len_kv // 64)
    assert words.dtype == torch.int64
    assert words.shape[0] in (1, frame.batch) and words.shape[1] in (1, frame.num_heads)
    assert words.shape[2:] == (frame.seq_len_q, size)
    seen = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little").astype(bool)
    assert not seen[..., frame.seq_len_kv :].any()
    whole = (frame.batch, frame.num_heads, frame.seq_len_q, frame.seq_len_kv)
    return torch.from_numpy(seen[..., : frame.seq_len_kv].copy()).expand(whole)
