"""Keys and values as the decode kernel reads them: in one tensor or in pages, as numbers or as int8 codes.

Enters: the tensors of a cache, or k and v of a call.
Leaves: `Held`; the keys and values written out as ordinary tensors where another kernel is to read them.
Floor 0: pure, imports torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True, eq=False)
class Held:
    """All keys and values that one call attends to.

    Args:
        keys: `(batch, num_kv_heads, seq_len_kv, head_dim)`; or with a table `(pages, num_kv_heads, page_size,
            head_dim)`.
        values: likewise, head_dim_v.
        length: seq_len_kv.
        table: int32 `(batch, pages of a row)`, the page of each `page_size` keys; None: no pages.
        key_scales: float32, the keys' axes without the last; keys are then int8. None: keys are numbers.
        value_scales: likewise.
        dtype: of the numbers that codes stand for.
    """

    keys: Tensor
    values: Tensor
    length: int
    table: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    dtype: torch.dtype | None = None

    @property
    def num_kv_heads(self) -> int:
        """Number of key heads."""
        return self.keys.shape[1]

    @property
    def plain(self) -> bool:
        """Whether keys and values are ordinary tensors already."""
        return self.table is None and self.key_scales is None

    def written_out(self) -> tuple[Tensor, Tensor]:
        """Keys and values `(batch, num_kv_heads, seq_len_kv, ...)` as numbers: a copy, unless they are so."""
        return self._whole(self.keys, self.key_scales), self._whole(self.values, self.value_scales)

    def _whole(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        if self.table is not None:
            rows = self._in_order(rows)
            scales = None if scales is None else self._in_order(scales[..., None])[..., 0]
        return rows if scales is None else decoded(rows, scales, self.dtype or torch.float32)

    def _in_order(self, pool: Tensor) -> Tensor:
        assert self.table is not None
        batch, pages = self.table.shape
        found = pool[self.table.flatten().long()].unflatten(0, (batch, pages)).movedim(2, 1)
        return found.flatten(2, 3)[:, :, : self.length]


def coded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 codes and a float32 scale each: x ≈ code · scale, off by at most scale / 2 = max|x| / 254.

    A row with NaN or inf has the scale NaN: whoever sees it sees NaN.
    """
    wide = rows.float()
    scales = wide.abs().amax(-1) / 127
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    steps = torch.where(scales > 0, scales, 1.0)  # 0 and NaN divide by 1: their codes say nothing
    codes = (wide / steps[..., None]).nan_to_num_(0.0, 127.0, -127.0).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (codes.to(wide) * scales[..., None].to(wide)).to(dtype)


class HeldRows(Tensor):
    """Keys or values that a cache holds, as a tensor `(batch, num_kv_heads, seq_len_kv, columns)` not written out.

    `attention` reads the cache itself in its place; any other operation on it gets an ordinary tensor.
    """

    held: Held
    _values: bool

    @staticmethod
    def pair(held: Held) -> tuple[Tensor, Tensor]:
        """Keys and values, to be handed on as k and v."""
        return HeldRows._of(held, values=False), HeldRows._of(held, values=True)

    @staticmethod
    def _of(held: Held, *, values: bool) -> HeldRows:
        rows = held.values if values else held.keys
        batch = rows.shape[0] if held.table is None else held.table.shape[0]
        shape = (batch, rows.shape[1], held.length, rows.shape[3])
        dtype = held.dtype if held.key_scales is not None else rows.dtype
        self = Tensor._make_wrapper_subclass(HeldRows, shape, dtype=dtype, device=rows.device)  # type: ignore[attr-defined]
        self.held, self._values = held, values
        return self

    def written_out(self) -> Tensor:
        """The same as an ordinary tensor."""
        return self.held.written_out()[int(self._values)]

    def __repr__(self, **kwargs: Any) -> str:
        return f"HeldRows({'values' if self._values else 'keys'}, shape={tuple(self.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def plain(part: Any) -> Any:
            return part.written_out() if isinstance(part, HeldRows) else part

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))
