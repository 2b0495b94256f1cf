"""Keys and values in one buffer a kind, row after row: preallocated, doubled when full, rolling where old ones go.

Enters: what `KVCache` has checked: tensors (batch, num_kv_heads, new, columns) of one or more kinds.
Leaves: the same of all held tokens, as views.
Floor 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST = 64  # tokens that the first buffer has room for, at least


class Strip:
    """Slots [begin, stop) of each buffer are held: the `first` tokens of the sequence, then those of the window."""

    def __init__(self, first: int) -> None:
        self.buffers: list[Tensor] = []
        self.begin = self.stop = 0
        self.first = first
        self._kept_first: list[Tensor] = []  # copies of the first tokens, once the others follow them no more

    def __len__(self) -> int:
        return self.stop - self.begin

    @property
    def room(self) -> int:
        """Slots of the buffers."""
        return self.buffers[0].shape[2] if self.buffers else 0

    @property
    def broken(self) -> bool:
        """Whether tokens between the first ones and the window were let go."""
        return bool(self._kept_first)

    def views(self) -> list[Tensor]:
        """All that is held, of each kind."""
        return [buffer[:, :, self.begin : self.stop] for buffer in self.buffers]

    def drop(self, window: int) -> None:
        """Let go of all but the first tokens and the last `window`."""
        start = self.stop - window
        if self.first:
            if not self._kept_first:
                self._kept_first = [view[:, :, : self.first].clone() for view in self.views()]
            self.begin = start - self.first
            for buffer, rows in zip(self.buffers, self._kept_first, strict=True):
                buffer[:, :, self.begin : start] = rows  # over tokens that were let go
        else:
            self.begin = start

    def append(self, new: Sequence[Tensor]) -> None:
        """Put tokens behind the last one of every row."""
        count = new[0].shape[2]
        self._make_room(new, count)
        for buffer, rows in zip(self.buffers, new, strict=True):
            buffer[:, :, self.stop : self.stop + count] = rows
        self.stop += count

    def append_ragged(self, new: Sequence[Tensor], lengths: Tensor, counts: Tensor) -> None:
        """Put the first counts[b] tokens of row b behind its lengths[b]."""
        longest = int((lengths + counts).max()) if len(counts) else 0
        self._make_room(new, longest - len(self))
        row, token = (torch.arange(new[0].shape[2]) < counts[:, None]).nonzero().unbind(1)
        slot = lengths[row] + token
        for buffer, rows in zip(self.buffers, new, strict=True):
            buffer.transpose(1, 2)[row, slot] = rows.transpose(1, 2)[row, token]
        self.stop = self.begin + longest

    def crop(self, count: int) -> None:
        """Let go of the last `count` tokens."""
        self.stop -= count

    def select(self, rows: Tensor) -> Strip:
        """A strip of its own with the batch rows `rows`."""
        strip = Strip(self.first)
        with torch.inference_mode(False):
            strip.buffers = [buffer.index_select(0, rows) for buffer in self.buffers]
            strip._kept_first = [part.index_select(0, rows) for part in self._kept_first]
        strip.begin, strip.stop = self.begin, self.stop
        return strip

    def _make_room(self, new: Sequence[Tensor], count: int) -> None:
        """Buffers with room for `count` more behind the held ones; moved to twice the need where they have none."""
        if self.buffers and self.stop + count <= self.room:
            return
        held = len(self)
        capacity = max(_FIRST, 2 * (held + count))
        with torch.inference_mode(False):  # buffers that outlive an inference_mode block can still be written
            buffers = [
                torch.empty(*rows.shape[:2], capacity, rows.shape[3], dtype=rows.dtype, device=rows.device)
                for rows in new
            ]
        for buffer, view in zip(buffers, self.views(), strict=False):
            buffer[:, :, :held] = view
        self.buffers = buffers
        self.begin, self.stop = 0, held
