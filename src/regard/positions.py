"""Where the queries and keys of one call stand.

Enters: the sizes of a call and the offsets of its queries and keys.
Leaves: `Frame`, which turns indices of the call into positions in the sequence.
Floor 0: pure, imports torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """Sizes and offsets of one call: query i stands at `i + query_offset`, key j at `j + key_offset`.

    Args:
        batch: number of batch rows.
        num_heads: number of query heads.
        seq_len_q: queries of this call.
        seq_len_kv: keys of this call.
        query_offset: position of the first query, an int or an int64 tensor `(batch,)`. Default 0.
        key_offset: position of the first key, an int or an int64 tensor `(batch,)`. Default 0.

    Example:
        >>> Frame(1, 1, seq_len_q=2, seq_len_kv=5, query_offset=3).query_positions()
        tensor([[3, 4]])
    """

    batch: int
    num_heads: int
    seq_len_q: int
    seq_len_kv: int
    query_offset: int | Tensor = 0
    key_offset: int | Tensor = 0

    def query_positions(self) -> Tensor:
        """Positions of the queries, int64 `(1 or batch, seq_len_q)`."""
        return _positions(self.seq_len_q, self.query_offset)

    def key_positions(self) -> Tensor:
        """Positions of the keys, int64 `(1 or batch, seq_len_kv)`."""
        return _positions(self.seq_len_kv, self.key_offset)

    def take_rows(self, rows: range) -> Frame:
        """The frame of the queries `rows` alone."""
        return replace(self, seq_len_q=len(rows), query_offset=self.query_offset + rows.start)

    def relative_positions(self) -> Tensor:
        """Key position − query position along the diagonals of the score matrix, int64 `(1 or batch, n)`.

        n = seq_len_q + seq_len_kv − 1; entry `j − i + seq_len_q − 1` belongs to query index i and key index j.
        """
        diagonals = torch.arange(max(self.seq_len_q + self.seq_len_kv - 1, 0))[None] - (self.seq_len_q - 1)
        shift = self.key_offset - self.query_offset
        return diagonals + (shift[:, None] if isinstance(shift, Tensor) else shift)


def at(index: Tensor, offset: int | Tensor, batch: Tensor) -> Tensor:
    """Positions of the indices `index` for the batch rows `batch`, which must broadcast against each other."""
    return index + (offset[batch] if isinstance(offset, Tensor) else offset)


def _positions(length: int, offset: int | Tensor) -> Tensor:
    index = torch.arange(length)[None]
    return index + (offset[:, None] if isinstance(offset, Tensor) else offset)
