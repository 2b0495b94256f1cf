"""From the masks of transformers to the masks of regard.

Enters: an index function f(batch, head, query position, key position), a padding tensor, lengths and offsets.
Leaves: a regard mask: intervals for the functions that transformers itself makes, `from_function` for any other.
Floor 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import masking_utils as hf

from regard import masks
from regard.mask_algebra import Mask
from regard.positions import Frame

IndexFunction = Callable[..., Tensor]

# Every closure made by one factory shares one code object, so the code says which factory made a function.
_IDS = torch.zeros(1, 1, dtype=torch.int64)
_AND = hf.and_masks(hf.causal_mask_function).__code__
_OR = hf.or_masks(hf.causal_mask_function).__code__
_WINDOW = hf.sliding_window_overlay(1).__code__
_TWO_SIDED_WINDOW = hf.sliding_window_bidirectional_overlay(1).__code__
_CHUNKED = hf.chunked_overlay(1, _IDS[0]).__code__
_BLOCKWISE = hf.blockwise_overlay(_IDS).__code__
_PADDING = hf.padding_mask_function(_IDS).__code__
_PACKED = hf.packed_sequence_mask_function(_IDS).__code__
_REMAPPED = hf.remap_positions_for_packed_sequence(hf.causal_mask_function, _IDS).__code__


class _Unknown(Exception):
    """An index function that transformers' masking_utils did not make."""


@dataclass(frozen=True)
class _Everything:
    """A function that excludes nothing; not a Mask, because no mask is the cheaper way to say so."""


EVERYTHING = _Everything()


@dataclass(frozen=True)
class Scene:
    """Where one index function is looked at: lengths, offsets, and the positions of queries and keys."""

    batch: int
    seq_len_q: int
    seq_len_kv: int
    query_offset: int
    key_offset: int
    device: torch.device
    use_vmap: bool = False
    query_positions: Tensor | None = None  # int64 (batch, seq_len_q), where packing renumbers them; else None
    key_positions: Tensor | None = None
    consecutive: bool = True  # renumbered positions differ from the call's by a constant per document

    def positions(self) -> tuple[Tensor, Tensor]:
        """int64 (1 or batch, seq_len_q) and (1 or batch, seq_len_kv)."""
        if self.query_positions is not None and self.key_positions is not None:
            return self.query_positions, self.key_positions
        rows = torch.arange(self.seq_len_q, device=self.device) + self.query_offset
        cols = torch.arange(self.seq_len_kv, device=self.device) + self.key_offset
        return rows[None], cols[None]

    def frame(self, num_heads: int = 1) -> Frame:
        """The same for regard."""
        return Frame(self.batch, num_heads, self.seq_len_q, self.seq_len_kv, self.query_offset, self.key_offset)


def translate(function: IndexFunction, scene: Scene) -> Mask | None:
    """The regard mask of one index function of transformers; None where it excludes nothing.

    Functions made by `transformers.masking_utils` are recognised by their code and turned into interval masks; any
    other is kept as `masks.from_function` and evaluated tile by tile.

    Args:
        function: f(batch, head, query position, key position) -> bool.
        scene: lengths and offsets of the call.

    Returns:
        A mask, or None.
    """
    found = _translate(function, scene)
    return None if isinstance(found, _Everything) else found


def _translate(function: IndexFunction, scene: Scene) -> Mask | _Everything:
    try:
        return _known(function, scene)
    except _Unknown:
        if scene.query_positions is not None:
            raise  # the renumbering itself must be evaluated, by the caller
        return masks.from_function(_index_function(function, scene.use_vmap))


def _known(function: IndexFunction, scene: Scene) -> Mask | _Everything:
    code, cells = _closure(function)
    if code is _AND:
        return _conjunction(cells["mask_functions"], scene)
    if code is _OR:
        return _disjunction(cells["mask_functions"], scene)
    if code is _PADDING:
        return padding(cells["padding_mask"], scene)
    if code is _PACKED:
        ids = cells["packed_sequence_mask"]
        return masks.documents(_at_positions(ids, scene, "query"), _at_positions(ids, scene, "key"))
    if code is _REMAPPED:
        position_ids = cells["position_ids"]
        renumbered = replace(
            scene,
            query_positions=_at_positions(position_ids, scene, "query"),
            key_positions=_at_positions(position_ids, scene, "key"),
            consecutive=False,
        )
        return _renumbered(function, cells["mask_function"], renumbered)
    if function is hf.bidirectional_mask_function:
        return EVERYTHING
    if code is _CHUNKED:
        size, start = int(cells["chunk_size"]), cells["left_padding"].to(scene.device).reshape(-1, 1)
        rows, cols = scene.positions()
        return masks.documents((rows - start) // size, (cols - start) // size)
    if code is _BLOCKWISE:
        ids = cells["block_sequence_ids"]
        rows, cols = _at_positions(ids, scene, "query"), _at_positions(ids, scene, "key")
        return masks.documents(rows.clamp(min=-1), torch.where(cols < 0, -2, cols))  # -1: text, in no block
    if not scene.consecutive:
        raise _Unknown
    if function is hf.causal_mask_function:
        return masks.causal()
    if code is _WINDOW and cells["sliding_window"] > 0:
        return masks.sliding_window(int(cells["sliding_window"]) - 1, None)
    if code is _TWO_SIDED_WINDOW:
        return masks.sliding_window(int(cells["sliding_window"]), int(cells["sliding_window"]))
    raise _Unknown


def _closure(function: IndexFunction) -> tuple[object, dict[str, Any]]:
    code = getattr(function, "__code__", None)
    closure = getattr(function, "__closure__", None) or ()
    if code is None:
        return None, {}
    return code, {name: cell.cell_contents for name, cell in zip(code.co_freevars, closure, strict=True)}


def _conjunction(functions: tuple[IndexFunction, ...], scene: Scene) -> Mask | _Everything:
    packed = [cells["packed_sequence_mask"] for code, cells in map(_closure, functions) if code is _PACKED]
    found: list[Mask] = []
    for function in functions:
        code, cells = _closure(function)
        if code is _REMAPPED and packed and _counts_up(cells["position_ids"], packed[0]):
            # In a document the new positions differ from the old by a constant: causal and windows stay as they are.
            renumbered = replace(
                scene,
                query_positions=_at_positions(cells["position_ids"], scene, "query"),
                key_positions=_at_positions(cells["position_ids"], scene, "key"),
            )
            part = _renumbered(function, cells["mask_function"], renumbered)
        else:
            part = _translate(function, scene)
        if isinstance(part, Mask):
            found.append(part)
    return _joined(found, lambda left, right: left & right)


def _disjunction(functions: tuple[IndexFunction, ...], scene: Scene) -> Mask | _Everything:
    parts = [_translate(function, scene) for function in functions]
    if any(isinstance(part, _Everything) for part in parts):
        return EVERYTHING
    return _joined([part for part in parts if isinstance(part, Mask)], lambda left, right: left | right)


def _joined(parts: list[Mask], join: Callable[[Mask, Mask], Mask]) -> Mask | _Everything:
    if not parts:
        return EVERYTHING
    whole = parts[0]
    for part in parts[1:]:
        whole = join(whole, part)
    return whole


def _renumbered(whole: IndexFunction, inner: IndexFunction, scene: Scene) -> Mask | _Everything:
    try:
        return _translate(inner, scene)
    except _Unknown:
        return masks.from_function(_index_function(whole, scene.use_vmap))


def _counts_up(position_ids: Tensor, ids: Tensor) -> bool:
    same = ids[:, 1:] == ids[:, :-1]
    return bool(((position_ids.diff(dim=-1) == 1) | ~same).all())


def _at_positions(values: Tensor, scene: Scene, side: str) -> Tensor:
    start, length = (scene.query_offset, scene.seq_len_q) if side == "query" else (scene.key_offset, scene.seq_len_kv)
    return values.to(scene.device)[:, start : start + length].expand(scene.batch, -1)


def padding(keep: Tensor, scene: Scene) -> Mask | _Everything:
    """The mask of a padding tensor (1 or batch, positions), True = may be attended to."""
    keep = _at_positions(keep.to(torch.bool), scene, "key")
    return EVERYTHING if bool(keep.all()) else masks.padding(keep)


def _index_function(function: IndexFunction, use_vmap: bool) -> IndexFunction:
    """f(batch, head, p, j) as regard calls it; transformers always asks for head 0."""

    def evaluate(batch: Tensor, head: Tensor, p: Tensor, j: Tensor) -> Tensor:
        first = head.reshape(-1)[:1] * 0
        if use_vmap and batch.numel() * p.numel() * j.numel() == batch.shape[0] * p.shape[2] * j.shape[3]:
            # A function of the user's may want one index at a time: transformers promises it vmap.
            mapped = function
            for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
                mapped = torch.vmap(mapped, in_dims=dims, out_dims=0)
            with TransformGetItemToIndex():
                return mapped(batch.reshape(-1), first, p.reshape(-1), j.reshape(-1))
        return function(batch, first.reshape(1, 1, 1, 1), p, j)

    return evaluate
