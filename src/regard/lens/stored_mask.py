"""Masks on disk.

Enters: a mask and the frame of the call it served; later the words, ints and tensors that were written.
Leaves: JSON-ready words and ints with tensors beside them; later the same mask again.
A mask made of a Python function cannot be written: what it lets through is, tile by tile, mixed tiles as bits.
Floor 5: stands on Mask.encode, Mask.visible and masks.decode."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard import masks
from regard.masks import Mask
from regard.positions import Frame

TILE = 128
NOTE = "A mask made by a Python function is kept as what it let through: tiles of 128 x 128, those in part as bits."


def write_mask(mask: Mask, frame: Frame) -> tuple[dict[str, Any], list[Tensor]]:
    """A mask as JSON and tensors.

    Args:
        mask: the mask.
        frame: the call it served; read only for masks that hold a function.
    """
    program, ints, tensors = mask.encode()
    if "function" not in program.split():
        return {"program": program, "ints": [int(number) for number in ints]}, list(tensors)
    table, bits = _tiles(mask, frame)
    return {"tiles": TILE}, [table, bits]


def read_mask(entry: dict[str, Any], tensors: list[Tensor], frame: Frame) -> Mask:
    """The mask that `write_mask` wrote.

    Raises:
        ValueError: where the entry and its tensors do not fit together.
    """
    if "program" in entry:
        return masks.decode(entry["program"], entry["ints"], tensors)
    table, bits = tensors
    blocks = (-(-frame.seq_len_q // TILE), -(-frame.seq_len_kv // TILE))
    if entry["tiles"] != TILE or tuple(table.shape[2:]) != blocks or tuple(bits.shape[1:]) != (TILE, TILE // 8):
        raise ValueError("its tiles do not fit the call")
    if int(table.max()) > len(bits) + 1 or int(table.min()) < 0:
        raise ValueError("its tile table points past its bits")

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows, cols = query - _per_row(frame.query_offset, batch), key - _per_row(frame.key_offset, batch)
        state = table[batch % table.shape[0], head % table.shape[1], rows // TILE, cols // TILE].to(torch.int64)
        byte = bits[(state - 2).clamp(min=0), rows % TILE, (cols % TILE) // 8] if len(bits) else torch.zeros_like(state)
        bit = (byte.to(torch.int64) >> (7 - cols % 8)) & 1
        return (state == 1) | ((state > 1) & (bit == 1))

    return masks.from_function(seen)


def _tiles(mask: Mask, frame: Frame) -> tuple[Tensor, Tensor]:
    """What a mask lets through: int32 table (batch|1, heads|1, row tiles, col tiles), uint8 bits (mixed, 128, 16).

    In the table 0 is nothing, 1 everything, 2 + m the mixed tile m.
    """
    batch = torch.arange(frame.batch)[:, None, None, None]
    heads = torch.arange(frame.num_heads)[None, :, None, None]
    hull = mask.hull(frame)
    found: dict[tuple[int, int], np.ndarray] = {}
    widest = (1, 1)
    for r in range(0, frame.seq_len_q, TILE):
        rows = torch.arange(r, min(r + TILE, frame.seq_len_q))[None, None, :, None]
        first, last = 0, frame.seq_len_kv
        if hull is not None:
            own = hull[:, r : r + TILE].reshape(-1, 2)
            own = own[own[:, 1] > own[:, 0]]
            first, last = (int(own[:, 0].min()), int(own[:, 1].max())) if len(own) else (0, 0)
        for c in range(first // TILE * TILE, last, TILE):
            cols = torch.arange(c, min(c + TILE, frame.seq_len_kv))[None, None, None, :]
            tile = mask.visible(frame, batch, heads, rows, cols)
            tile = tile.expand(*tile.shape[:2], rows.shape[2], cols.shape[3]).numpy()
            if tile.any():
                found[r // TILE, c // TILE] = tile
                widest = max(widest[0], tile.shape[0]), max(widest[1], tile.shape[1])
    blocks = (-(-frame.seq_len_q // TILE), -(-frame.seq_len_kv // TILE))
    table = np.zeros((*widest, *blocks), dtype=np.int32)
    mixed: list[np.ndarray] = []
    for (r, c), tile in found.items():
        for b, h in np.ndindex(*widest):
            part = tile[b % tile.shape[0], h % tile.shape[1]]
            if part.all():
                table[b, h, r, c] = 1
            elif part.any():
                table[b, h, r, c] = 2 + len(mixed)
                whole = np.zeros((TILE, TILE), dtype=bool)
                whole[: part.shape[0], : part.shape[1]] = part
                mixed.append(np.packbits(whole, axis=1))
    bits = np.stack(mixed) if mixed else np.zeros((0, TILE, TILE // 8), dtype=np.uint8)
    return torch.from_numpy(table), torch.from_numpy(bits)


def _per_row(offset: int | Tensor, batch: Tensor) -> int | Tensor:
    return offset[batch] if isinstance(offset, Tensor) else offset
