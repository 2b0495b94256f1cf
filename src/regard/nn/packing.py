"""Sentences of many lengths in one row without padding: what no token computes costs nothing.

Enters: ids or embeddings `(batch, seq_len, ...)` padded on the right, and lengths.
Leaves: the same tokens as one row `(1, total, ...)`, their positions, and masks that keep sentences apart.
Floor 5. Exact: masked means absent, so a packed row gives what the padded batch gives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard import check, masks
from regard.mask_algebra import Mask


class Packing:
    """Which tokens of a padded batch are real, and how they lie side by side.

    Args:
        lengths: int64 `(batch,)`, real tokens of each row.
        seq_len: length of the padded rows.
        multiple: the row is filled up to a multiple of so many with stand-ins, a sentence of their own. In bfloat16 on
            a CPU each new length of a matrix product is compiled first: lengths that come again save that. Default 1.

    Raises:
        ValueError: where a length is negative or above seq_len.

    Example:
        >>> packing = Packing(torch.tensor([2, 3]), 3)
        >>> packing.pack(torch.tensor([[5, 6, 0], [7, 8, 9]]))
        tensor([[5, 6, 7, 8, 9]])
        >>> print(packing.mask().draw(5))
        ██···
        ██···
        ··███
        ··███
        ··███

    Source: Krell et al. 2021, section 3.2.
    """

    def __init__(self, lengths: Tensor, seq_len: int, *, multiple: int = 1) -> None:
        if lengths.ndim != 1 or (lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= seq_len):
            raise ValueError(
                f"Packing: lengths must be (batch,), each from 0 to seq_len = {seq_len}; got {tuple(lengths.shape)} "
                f"{lengths.tolist()[:8]}. Count the real tokens of each row."
            )
        index = torch.arange(seq_len, device=lengths.device)
        self.keep = index < lengths[:, None]  # (batch, seq_len)
        where = self.keep.flatten().nonzero()[:, 0]  # in the flattened batch
        ids = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        self.total = len(where)
        more = (0, -self.total % check.count("Packing", "multiple", multiple, 1))
        self.where = nn.functional.pad(where, more)  # a stand-in is a copy of the batch's first token
        self.ids = nn.functional.pad(ids, more, value=-1)[None]
        self.positions = (self.where % max(seq_len, 1))[None]

    def pack(self, x: Tensor) -> Tensor:
        """`(batch, seq_len, ...)` → `(1, total, ...)`."""
        return x.flatten(0, 1).index_select(0, self.where)[None]

    def pack_wanted(self, labels: Tensor, ignore: int = -100) -> Tensor:
        """Labels `(batch, seq_len)` → `(1, total)`, `ignore` for stand-ins."""
        return self.pack(labels).masked_fill(self.ids < 0, ignore)

    def unpack(self, x: Tensor) -> Tensor:
        """`(1, total, ...)` → `(batch, seq_len, ...)`, zeros where there was padding."""
        padded = x.new_zeros(self.keep.numel(), *x.shape[2:])
        return padded.index_copy(0, self.where[: self.total], x[0, : self.total]).unflatten(0, self.keep.shape)

    def mask(self) -> Mask:
        """A token sees those of its own sentence."""
        return masks.documents(self.ids)

    def mask_onto(self, other: Packing) -> Mask:
        """A token of these sentences sees those of the same row of another packing, as in cross-attention."""
        return masks.documents(self.ids, other.ids)
