"""Masks and biases over keys whose positions have a gap: the first tokens of a sequence, then a window of the last.

Enters: a mask or bias of the caller, and how many first keys are parted from the others.
Leaves: the same mask or bias, each key read at its true position.
Floor 0: pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from regard import ranges
from regard.biases import Bias, Dense
from regard.mask_algebra import And, Mask, Not, Or
from regard.mask_rules import DocumentPairs, FromTensor, Keep
from regard.positions import Frame

_BY_INDEX = (Keep, FromTensor, DocumentPairs)  # these go by the keys of the call, wherever they stand


def placed(mask: Mask, parted: int) -> Mask:
    """`mask` for keys of which the first `parted` stand at positions 0, 1, ...; the others as the frame says."""
    if isinstance(mask, _BY_INDEX):
        return mask
    if isinstance(mask, (And, Or)):
        return type(mask)(placed(mask.left, parted), placed(mask.right, parted))
    if isinstance(mask, Not):
        return Not(placed(mask.inner, parted))
    return Placed(mask, parted)


def _frames(frame: Frame, parted: int) -> tuple[Frame, Frame]:
    """The first keys, and the others."""
    return (
        replace(frame, seq_len_kv=parted, key_offset=0),
        replace(frame, seq_len_kv=frame.seq_len_kv - parted, key_offset=frame.key_offset + parted),
    )


@dataclass(frozen=True, eq=False)
class Placed(Mask):
    """A rule that goes by positions, over keys with a gap."""

    inner: Mask
    parted: int

    @override
    def visible(self, frame: Frame, batch: Tensor, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        first, last = _frames(frame, self.parted)
        early = self.inner.visible(first, batch, head, rows, cols.clamp(max=self.parted - 1))
        late = self.inner.visible(last, batch, head, rows, (cols - self.parted).clamp(min=0))
        return torch.where(cols < self.parted, early, late)

    @override
    def take_rows(self, rows: range) -> Mask:
        return Placed(self.inner.take_rows(rows), self.parted)

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        for part in _frames(frame, self.parted):
            self.inner.validate(caller, part)

    @override
    def _parts(self) -> tuple[Mask, ...]:
        return (self.inner,)

    @override
    def _write(self, words: list[str], ints: list[int], tensors: list[Tensor]) -> None:
        self.inner._write(words, ints, tensors)
        words.append("placed")
        ints.append(self.parted)

    @override
    def _ranges(self, frame: Frame) -> ranges.Ranges | None:
        first, last = _frames(frame, self.parted)
        early, late = self.inner._ranges(first), self.inner._ranges(last)
        if early is None or late is None or ranges.count(early) + ranges.count(late) > ranges.LIMIT:
            return None
        late = np.where(late[..., :1] < late[..., 1:], late + self.parted, 0)
        return ranges.union(early, late)


def placed_bias(bias: Bias, parted: int) -> Bias:
    """`bias` likewise; one given as a tensor goes by the keys of the call."""
    return bias if isinstance(bias, Dense) else PlacedBias(bias, parted)


@dataclass(frozen=True, eq=False)
class PlacedBias(Bias):
    """A bias that goes by positions, over keys with a gap: dense, of a row a query."""

    inner: Bias
    parted: int

    @override
    def tensors(self) -> list[Tensor]:
        return self.inner.tensors()

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        for part in _frames(frame, self.parted):
            self.inner.validate(caller, part)

    @override
    def resolve(self, frame: Frame, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        found = [_dense(self.inner, part, dtype, device) for part in _frames(frame, self.parted)]
        sizes = [max(sizes) for sizes in zip(*(t.shape[:3] for t in found), strict=True)]
        return torch.cat([t.expand(*sizes, -1) for t in found], -1), None


def _dense(bias: Bias, frame: Frame, dtype: torch.dtype, device: torch.device) -> Tensor:
    dense, diagonal = bias.resolve(frame, dtype, device)
    if dense is None:
        assert diagonal is not None
        dense = (
            diagonal.unfold(-1, frame.seq_len_kv, 1).flip(-2)[:, :, -frame.seq_len_q :]
            if frame.seq_len_q
            else (diagonal.new_zeros(1, 1, 0, frame.seq_len_kv))
        )
    return dense.expand(*dense.shape[:3], frame.seq_len_kv)
