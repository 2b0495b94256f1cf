"""From a mask to what the kernel reads: a table of key ranges, or panels of bits.

Enters: a mask and the frame of a call.
Leaves: `Panel`s, each with rows of queries and their table; tile counts for `explain`. Ranges serve the whole call at
O(n) memory; a mask that has none gives its words a panel of rows at a time, so that memory stays bounded.
Floor 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from . import masks
from .native import KEYS, LANES
from .positions import Frame

MaskArgument = tuple[int, int, int, int, int, int]
_PANEL_BYTES = 1 << 23  # bits of one panel: what caches hold, and malloc gives back without new pages


@dataclass(frozen=True)
class Panel:
    """Rows of queries and what each may see.

    Attributes:
        rows: query indices of the call.
        ranges: int32 (1 or batch, len(rows), n, 2), half-open key ranges; or None.
        bits: int64 (1 or batch, 1 or num_heads, len(rows), words), bit j of word w is key 64 w + j; or None.
            Neither: every key is visible.
    """

    rows: range
    ranges: Tensor | None = None
    bits: Tensor | None = None

    def argument(self) -> MaskArgument:
        """Kind, address, strides and count, as kernels/view.h has them."""
        if self.ranges is not None:
            t = self.ranges
            return (1, t.data_ptr(), t.stride(0) // 2 if t.shape[0] > 1 else 0, 0, t.stride(1) // 2, t.shape[2])
        if self.bits is not None:
            t = self.bits
            return (
                2,
                t.data_ptr(),
                t.stride(0) if t.shape[0] > 1 else 0,
                t.stride(1) if t.shape[1] > 1 else 0,
                t.stride(2),
                t.shape[3],
            )
        return (0, 0, 0, 0, 0, 0)

    def columns(self, seq_len_kv: int) -> range:
        """A span of keys outside which no query of the panel sees any."""
        if self.ranges is None:
            return range(seq_len_kv)
        low, high = self.ranges[..., 0], self.ranges[..., 1]
        used = low < high
        if not bool(used.any()):
            return range(0)
        return range(int(low[used].min()), int(high[used].max()))

    def visible(self, columns: range) -> Tensor | None:
        """Bool (1 or batch, 1 or num_heads, len(rows), len(columns)); None where every pair is visible."""
        if self.ranges is not None:
            keys = torch.arange(columns.start, columns.stop, dtype=torch.int32)
            low, high = self.ranges.unsqueeze(1).unsqueeze(-2).unbind(-1)  # (b, 1, rows, n, 1)
            seen = None
            for n in range(low.shape[-2]):
                inside = (keys >= low[..., n, :]) & (keys < high[..., n, :])
                seen = inside if seen is None else seen | inside
            return seen
        if self.bits is not None:
            first = columns.start // 8
            packed = self.bits.contiguous().numpy().view(np.uint8)[..., first : -(-columns.stop // 8)]
            pairs = np.unpackbits(packed, axis=-1, bitorder="little")
            pairs = pairs[..., columns.start - 8 * first : columns.stop - 8 * first]
            return torch.from_numpy(pairs).view(torch.bool)
        return None


def panels(
    mask: masks.Mask | None, frame: Frame, rows: range | None = None, *, most: int | None = None, align: int = 1
) -> Iterator[Panel]:
    """The rows of a call, in order, in as few panels as memory allows.

    Args:
        mask: the mask, or None.
        frame: sizes and offsets of the call.
        rows: the query indices wanted. Default all.
        most: the most rows of one panel. Default as many as there are.
        align: panels begin at a multiple of so many rows, counted from the first. Default 1.
    """
    rows = range(frame.seq_len_q) if rows is None else rows
    step = max(1, min(len(rows), most or len(rows)))
    table = None if mask is None else _ranges(mask, frame)
    if mask is not None and table is None:
        heads = frame.num_heads if mask.depends_on_head() else 1
        words = -(-frame.seq_len_kv // KEYS)
        fits = _PANEL_BYTES // max(1, frame.batch * heads * words * 8) // LANES * LANES
        step = min(step, -(-max(LANES, fits) // align) * align)
        for part in _parts(rows, step):
            yield Panel(part, bits=_words(mask, frame, part))
        return
    for part in _parts(rows, step):
        yield Panel(part, ranges=None if table is None else table[:, part.start : part.stop])


def _parts(rows: range, step: int) -> Iterator[range]:
    for start in range(rows.start, rows.stop, step):
        yield range(start, min(start + step, rows.stop))


def _ranges(mask: masks.Mask, frame: Frame) -> Tensor | None:
    """Key ranges of all rows; kept between calls where only numbers decide them, as for causal masks and windows."""
    ops, ints, tensors = mask.encode()
    if tensors or isinstance(frame.query_offset, Tensor) or isinstance(frame.key_offset, Tensor):
        return mask.intervals(frame)
    return _kept_ranges(ops, tuple(ints), frame.seq_len_q, frame.seq_len_kv, frame.query_offset, frame.key_offset)


@lru_cache(maxsize=32)
def _kept_ranges(
    ops: str, ints: tuple[int, ...], seq_len_q: int, seq_len_kv: int, query_offset: int, key_offset: int
) -> Tensor | None:
    return masks.decode(ops, list(ints), []).intervals(Frame(1, 1, seq_len_q, seq_len_kv, query_offset, key_offset))


def _words(mask: masks.Mask, frame: Frame, rows: range) -> Tensor:
    """One panel's words; small ones are kept between calls where only numbers decide them, as for strides and grids."""
    ops, ints, tensors = mask.encode()
    fixed = not (tensors or isinstance(frame.query_offset, Tensor) or isinstance(frame.key_offset, Tensor))
    if not fixed or "function" in ops or len(rows) * frame.seq_len_kv > 8 * _PANEL_BYTES:
        return mask.words(frame, rows)
    offset = frame.query_offset + rows.start
    return _kept_words(ops, tuple(ints), len(rows), frame.seq_len_kv, offset, frame.key_offset)


@lru_cache(maxsize=4)
def _kept_words(
    ops: str, ints: tuple[int, ...], seq_len_q: int, seq_len_kv: int, query_offset: int, key_offset: int
) -> Tensor:
    return masks.decode(ops, list(ints), []).words(Frame(1, 1, seq_len_q, seq_len_kv, query_offset, key_offset))


def summary(
    frame: Frame, mask: masks.Mask | None, num_kv_heads: int, head_dim: int, head_dim_v: int, dtype: torch.dtype
) -> dict[str, float]:
    """What a forward call will do.

    Returns:
        tiles: score tiles of 64 x 64 that are computed, over all batch rows and heads; tiles_total: all there are;
        density: the share of pairs that are visible; flops: multiplications and additions of both products over the
        tiles computed; bytes: of q, k, v read once and out written once.
    """
    total = -(-frame.seq_len_q // LANES) * -(-frame.seq_len_kv // KEYS) * frame.batch * frame.num_heads
    computed = 0
    seen = 0
    for panel in panels(mask, frame, most=64 * LANES):
        if panel.ranges is None and panel.bits is None:
            computed, seen = total, frame.batch * frame.num_heads * frame.seq_len_q * frame.seq_len_kv
            break
        kept, count = _touched(panel, frame.seq_len_kv)
        repeats = frame.batch * frame.num_heads // (kept.shape[0] * kept.shape[1])
        computed += int(kept.sum()) * repeats
        seen += count * repeats
    pairs = frame.batch * frame.num_heads * frame.seq_len_q * frame.seq_len_kv
    moved = frame.batch * frame.num_heads * frame.seq_len_q * (head_dim + head_dim_v)
    moved += frame.batch * num_kv_heads * frame.seq_len_kv * (head_dim + head_dim_v)
    return {
        "tiles": computed,
        "tiles_total": total,
        "density": seen / pairs if pairs else 0.0,
        "flops": 2 * computed * LANES * KEYS * (head_dim + head_dim_v),
        "bytes": moved * dtype.itemsize,
    }


def _touched(panel: Panel, seq_len_kv: int) -> tuple[np.ndarray, int]:
    """Bool (b, h, row tiles, key tiles): which hold a visible pair; and how many pairs are visible in all."""
    if panel.bits is not None:
        words = panel.bits.numpy()
        some = words != 0
        visible = int(np.unpackbits(words.view(np.uint8)).sum())
    else:
        assert panel.ranges is not None
        low, high = panel.ranges.numpy()[..., 0].astype(np.int64), panel.ranges.numpy()[..., 1].astype(np.int64)
        used = low < high
        b, r, _ = np.nonzero(used)
        steps = np.zeros((low.shape[0], low.shape[1], -(-seq_len_kv // KEYS) + 1), np.int32)
        np.add.at(steps, (b, r, low[used] // KEYS), 1)
        np.add.at(steps, (b, r, (high[used] - 1) // KEYS + 1), -1)
        some = (steps.cumsum(-1)[..., :-1] > 0)[:, None]
        visible = int((high - low)[used].sum())
    starts = np.arange(0, some.shape[2], LANES)
    return np.logical_or.reduceat(some, starts, axis=2), visible
