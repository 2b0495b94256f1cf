"""Maps of any size: one head's weights as tiles of 256 x 256 cells, at zoom levels by powers of two.

Enters: a look, then an attention, layer and head, and which tile.
Leaves: exact numbers: a cell of level z stands for 2^z x 2^z weights, by their sum ("mass") or their largest ("max").
Fine levels are computed when asked for; coarse ones come from one pass over the head, shown from its
first rows on and marked with the share that is done. What is kept is bounded; no map of queries by keys ever is.
Floor 6: stands on the statistics and tile kernels."""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard import op
from regard.lens.layers import Layer, Step, cut_bias
from regard.lens.look import Look
from regard.masks import Mask

CELLS = 256  # cells on a side of a tile
BLOCKS = 2048  # blocks on a side, at most, of the finest level that the pass over a head fills
STRIDES = (64, 16)  # one row of blocks in 64 makes the first picture, one in 16 the second; then every one is taken
AT_ONCE = 8  # sampled rows of blocks between which a tile may be asked for
BAND = 1 << 27  # weights that the pass computes at a time: a tile that is asked for waits no longer
KEPT = 256 << 20  # bytes of tiles and passes that are kept
KINDS = ("mass", "max")
POSITIONAL = {"causal", "window", "window_left", "window_right", "window_left_right", "and", "or", "not"}
KEY = re.compile(r"(tile|row|col|vectors)/(\d{1,4})/(\d{1,6})/(\d{1,4})/(?:(mass|max)/(\d{1,2})/)?(\d{1,9})/(\d{1,9})")


@dataclass(frozen=True)
class Tile:
    """Cells of one tile, float32 (rows, columns); `share` of the head's rows that it was made from, 1 where exact."""

    numbers: Tensor
    share: float = 1.0


class Maps:
    """The maps of one look.

    Args:
        look: the recording and its words.
        kept: bytes of tiles and passes to keep. Default 256 MiB.
    """

    def __init__(self, look: Look, kept: int = KEPT) -> None:
        self.look = look
        self._kept = kept
        self._tiles: OrderedDict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._passes: OrderedDict[tuple[int, int, int], _Pass] = OrderedDict()
        self._bytes = 0
        self._turn = threading.Condition()
        self._kernel = threading.Lock()
        self._asked = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def answer(self, key: str) -> Tile | None:
        """The numbers behind a key of the page; None where there is no such layer or key.

        Keys: tile/attention/layer/head/kind/level/row/column; row and col/attention/layer/head/first/stop, the mean of
        some rows or the sum of some columns; vectors/attention/layer/head/query/key, q above k.

        Raises:
            ValueError: a head, level, tile or token that there is not.
        """
        match = KEY.fullmatch(key)
        if match is None or int(match[2]) >= len(self.look.attentions) or (match[5] is None) != (match[1] != "tile"):
            return None
        index, number, head, first, second = (int(match[at]) for at in (2, 3, 4, 7, 8))
        if number not in self.look.attentions[index].numbers:
            return None
        if match[1] == "tile":
            return self.tile(index, number, head, match[5], int(match[6]), first, second)
        one = self._head(index, number, head)
        if match[1] == "vectors":
            _within("map: query", first, one.rows)
            _within("map: key", second, one.cols)
            return Tile(torch.stack([one.q[0, one.at, first], one.k[0, one.at_k, second]]).float())
        size = one.rows if match[1] == "row" else one.cols
        if not 0 <= first < second <= size or second - first > CELLS:
            raise ValueError(
                f"map: {match[1]} must be a range of at most {CELLS} tokens below {size}; got {first} to {second}. "
                "Ask for less."
            )
        with self._first():
            if match[1] == "row":
                return Tile(one.weights(range(first, second), range(one.cols)).mean(0))
            return Tile(one.weights(range(one.rows), range(first, second)).sum(1))

    def tile(self, index: int, number: int, head: int, kind: str, level: int, row: int, col: int) -> Tile:
        """One tile.

        Args:
            index: which attention of the look.
            number: layer number.
            head: query head.
            kind: "mass" or "max".
            level: 0 for the weights themselves; each level halves the number of cells on a side.
            row: which tile down.
            col: which tile across.

        Raises:
            ValueError: a head, kind, level or tile that there is not.
        """
        one = self._head(index, number, head)
        top = level_of(max(one.rows, one.cols), CELLS)
        if kind not in KINDS:
            raise ValueError(f'map: kind must be "mass" or "max"; got {kind!r}. Choose one of them.')
        _within("map: level", level, top + 1)
        side = CELLS << level
        _within("map: row of tiles", row, -(-one.rows // side))
        _within("map: column of tiles", col, -(-one.cols // side))
        rows = range(row * side, min(one.rows, (row + 1) * side))
        cols = range(col * side, min(one.cols, (col + 1) * side))
        if level < one.base:
            found, share = self._fine((index, number, head, level, row, col), one, rows, cols), 1.0
        else:
            found, share = self._coarse((index, number, head), one, level, rows, cols)
        return Tile(torch.from_numpy(found[KINDS.index(kind)]), share)

    def close(self) -> None:
        """End the pass that runs, if one does."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def _head(self, index: int, number: int, head: int) -> _Head:
        attention = self.look.attentions[index]
        _within("map: head", head, attention.num_heads)
        layer = next(one for one in attention.layers if one.number == number)
        return _Head(layer, layer.steps[0], head)

    def _fine(self, key: tuple[int, ...], one: _Head, rows: range, cols: range) -> tuple[np.ndarray, np.ndarray]:
        with self._turn:
            if key in self._tiles:
                self._tiles.move_to_end(key)
                return self._tiles[key]
        with self._first():
            if key[3] == 0:
                weights = one.weights(rows, cols).numpy()
                found = (weights, weights)
            else:
                found = one.blocks(rows, cols, 1 << key[3])
        with self._turn:
            if key not in self._tiles:
                self._tiles[key] = found
                self._bytes += _size(found)
                self._forget()
        return found

    def _coarse(
        self, key: tuple[int, int, int], one: _Head, level: int, rows: range, cols: range
    ) -> tuple[tuple[np.ndarray, np.ndarray], float]:
        with self._turn:
            whole = self._passes.get(key)
            if whole is None:
                whole = self._passes[key] = _Pass(one)
                self._bytes += whole.bytes
                self._forget()
            self._passes.move_to_end(key)
        with self._first():  # the first picture at once, or all of it where that is little
            while whole.share == 0 or (whole.share < 1 and one.rows * one.cols <= BAND):
                whole.step()
        with self._turn:
            if whole.share < 1 and self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="regard-map", daemon=True)
                self._thread.start()
            if whole.failed is not None:
                raise RuntimeError("map: the pass over this head failed") from whole.failed
            return whole.cells(level, rows, cols), whole.share

    def _forget(self) -> None:
        while self._bytes > self._kept and self._tiles:
            self._bytes -= _size(self._tiles.popitem(last=False)[1])
        while self._bytes > self._kept and len(self._passes) > 1:
            self._bytes -= self._passes.popitem(last=False)[1].bytes

    def _first(self) -> _Turn:
        return _Turn(self)

    def _run(self) -> None:
        """Finish the passes that were begun, the one asked for last first, a band at a time."""
        while True:
            with self._turn:
                while self._asked and not self._closed:
                    self._turn.wait()
                open_ = [one for one in self._passes.values() if one.share < 1 and one.failed is None]
                if self._closed or not open_:
                    self._thread = None
                    return
            with self._kernel:
                try:
                    open_[-1].step()
                except Exception as failed:  # whoever asks for the tile is told
                    open_[-1].failed = failed


class _Turn:
    """The kernels, ahead of the pass that runs behind."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps

    def __enter__(self) -> None:
        with self.maps._turn:
            self.maps._asked += 1
        self.maps._kernel.acquire()

    def __exit__(self, *_: object) -> None:
        self.maps._kernel.release()
        with self.maps._turn:
            self.maps._asked -= 1
            self.maps._turn.notify_all()


class _Head:
    """One head's queries, keys and terms; a mask that differs from head to head keeps all heads beside it."""

    def __init__(self, layer: Layer, step: Step, head: int) -> None:
        group = layer.num_heads // layer.num_kv_heads
        self.q, self.k, self.lse, bias = step.q, step.k, step.lse, step.bias
        self.at, self.at_k, self.mask, self.step = head, head // group, step.mask, step
        if step.mask is None or not step.mask.depends_on_head():
            one, kv = slice(head, head + 1), slice(head // group, head // group + 1)
            self.q, self.lse, self.k = self.q[:, one], self.lse[:, one], self.k[:, kv]
            bias = None if bias is None else bias.heads(one)
            self.at = self.at_k = 0
        self.bias, self.diagonal = (None, None) if bias is None else (bias.bias, bias.diagonal)
        self.rows, self.cols = step.seq_len_q, step.seq_len_kv
        self.base = max(3, level_of(max(self.rows, self.cols), BLOCKS))

    def weights(self, rows: range, cols: range) -> Tensor:
        """Exact weights, float32 (rows, columns)."""
        part, keys = self._cut(rows, cols)
        inside = cols if keys.start == 0 and len(keys) == self.cols else range(len(cols))
        return op.tile(*part[:3], **part[3], rows=range(len(rows)), cols=inside, stage="weights")[0, self.at].float()

    def blocks(self, rows: range, cols: range, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Sums and maxima of blocks of weights, float32 (row blocks, column blocks)."""
        part, keys = self._cut(rows, cols)
        if keys == cols:
            found = op.statistics(*part[:3], **part[3], block=(size, size))
            return tuple(found[name][0, self.at].float().numpy() for name in ("block_mass", "block_max"))  # type: ignore[return-value]
        down, across = range(0, len(rows), size), range(0, len(cols), size)
        mass, most = (np.empty((len(down), len(across)), np.float32) for _ in KINDS)
        many = max(1, BAND // size // max(len(cols), 1))
        for first in range(0, len(down), many):
            some = range(rows.start + first * size, min(rows.stop, rows.start + (first + many) * size))
            weights = self.weights(some, cols).numpy()
            own = slice(first, first + many)
            mass[own], most[own] = (pooled(weights, size, kind) for kind in KINDS)
        return mass, most

    def _cut(self, rows: range, cols: range) -> tuple[tuple[Any, ...], range]:
        """q, k, lse and terms for some rows; for their columns alone where the mask goes by positions."""
        step, own = self.step, slice(rows.start, rows.stop)
        bias, diagonal = self.bias, self.diagonal
        keys = cols if bias is None and diagonal is None and _positional(self.mask) else range(self.cols)
        terms = {
            "mask": None if self.mask is None else self.mask.take_rows(rows),
            **cut_bias(bias, diagonal, rows, self.rows, self.cols),
            "scale": step.scale,
            "softcap": step.softcap,
            "query_offset": step.query_offset + rows.start,
            "key_offset": step.key_offset + keys.start,
        }
        return (self.q[:, :, own], self.k[:, :, keys.start : keys.stop], self.lse[:, :, own].contiguous(), terms), keys


class _Pass:
    """Blocks of a whole head, filled a little at a time: rows of blocks that stand for their neighbours, then all."""

    def __init__(self, one: _Head) -> None:
        self.one, self.size = one, 1 << one.base
        shape = -(-one.rows // self.size), -(-one.cols // self.size)
        self.mass, self.most = (np.zeros(shape, np.float32) for _ in KINDS)
        self.bytes = self.mass.nbytes + self.most.nbytes
        self.share, self.stage, self.next = 0.0, 0, 0
        self.failed: Exception | None = None
        if one.rows * one.cols <= BAND:
            self.stage = len(STRIDES)

    def step(self) -> None:
        """The next rows of blocks; `share` is what the picture is made from, 1 when every block is exact."""
        count = self.mass.shape[0]
        if self.stage < len(STRIDES):
            stride = STRIDES[self.stage]
            for first in range(self.next, min(count, self.next + AT_ONCE * stride), stride):
                middle = min(first + stride // 2, count - 1)
                mass, most = self._band(range(middle, middle + 1))
                self.mass[first : first + stride], self.most[first : first + stride] = mass, most
            self.next += AT_ONCE * stride
            if self.next >= count:
                self.stage, self.next, self.share = self.stage + 1, 0, 1 / stride
            return
        many = max(1, BAND // self.size // max(self.one.cols, 1))
        own = range(self.next, min(count, self.next + many))
        self.mass[own.start : own.stop], self.most[own.start : own.stop] = self._band(own)
        self.next = own.stop
        self.share = 1.0 if own.stop == count else max(self.share, own.stop / count)

    def cells(self, level: int, rows: range, cols: range) -> tuple[np.ndarray, np.ndarray]:
        """The cells of one tile, from its blocks."""
        own = slice(rows.start // self.size, -(-rows.stop // self.size))
        across = slice(cols.start // self.size, -(-cols.stop // self.size))
        factor = (1 << level) // self.size
        parts = zip((self.mass, self.most), KINDS, strict=True)
        return tuple(pooled(blocks[own, across], factor, kind) for blocks, kind in parts)  # type: ignore[return-value]

    def _band(self, blocks: range) -> tuple[np.ndarray, np.ndarray]:
        rows = range(blocks.start * self.size, min(self.one.rows, blocks.stop * self.size))
        return self.one.blocks(rows, range(self.one.cols), self.size)


def level_of(length: int, cells: int) -> int:
    """The first level at which a length fits into so many cells.

    Example:
        >>> level_of(131_072, 256), level_of(13, 256)
        (9, 0)
    """
    return max(0, math.ceil(math.log2(max(1, -(-length // cells)))))


def pooled(cells: np.ndarray, factor: int, kind: str) -> np.ndarray:
    """Sums or maxima of factor x factor cells, a power of two, ragged edges counted.

    Example:
        >>> pooled(np.array([[1, 2, 3], [4, 5, 6]], np.float32), 2, "mass")
        array([[12.,  9.]], dtype=float32)
    """
    join = np.add if kind == "mass" else np.maximum
    cells = np.ascontiguousarray(cells)
    while factor > 1:  # by halves: long runs of neighbours are what vectors are good at
        factor //= 2
        for axis in (0, 1):
            length = cells.shape[axis]
            even, odd = (cells[first::2] if axis == 0 else cells[:, first::2] for first in (0, 1))
            if length % 2:
                last = cells[-1:] if axis == 0 else cells[:, -1:]
                even = even[:-1] if axis == 0 else even[:, :-1]
                cells = np.concatenate([join(even, odd), last], axis)
            else:
                cells = join(even, odd)
    return cells


def _positional(mask: Mask | None) -> bool:
    return mask is None or set(mask.encode()[0].split()) <= POSITIONAL


def _size(found: tuple[np.ndarray, np.ndarray]) -> int:
    return found[0].nbytes if found[0] is found[1] else found[0].nbytes + found[1].nbytes


def _within(what: str, value: int, end: int) -> None:
    if not 0 <= value < end:
        raise ValueError(f"{what} must be from 0 to {end - 1}; got {value}. Choose one of those.")
