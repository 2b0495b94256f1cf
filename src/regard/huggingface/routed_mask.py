"""The mask implementation "regard" of transformers, and the tensor it returns.

Enters: what transformers hands to a mask implementation.
Leaves: a `RoutedMask`, a tensor (batch, 1, seq_len_q, seq_len_kv) that carries a regard mask and its offsets in O(n)
memory, and is filled in only for a model that computes with it.
Floor 5.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import masking_utils as hf

from regard import masks
from regard.huggingface.masks import IndexFunction, Scene, padding, translate
from regard.mask_algebra import Mask


@torch.compiler.disable()  # it reads the padding; a compiled model is two graphs around it
def regard_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    # transformers types its functions by their ints, and calls them with tensors.
    mask_function: IndexFunction = hf.causal_mask_function,  # type: ignore[assignment]
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,  # noqa: ARG001
) -> Tensor | None:
    """The mask implementation "regard" of transformers' AttentionMaskInterface.

    Args:
        batch_size: number of rows of the batch.
        q_length: number of queries of this call.
        kv_length: number of keys of this call, those of a static cache not yet filled included.
        q_offset: position of the first query.
        kv_offset: position of the first key; above 0 where a sliding cache dropped old keys.
        mask_function: f(batch, head, query position, key position) -> bool.
        attention_mask: bool (batch, positions), True = not padding; default None.
        allow_is_bidirectional_skip: whether None may be returned where nothing is excluded.
        use_vmap: whether `mask_function` must be given one index at a time.
        device: of the model's inputs.
        config: the model's config, named in error messages.
        **kwargs: what other implementations need.

    Returns:
        A `RoutedMask`, or None where nothing is excluded and None is allowed.
    """
    scene = Scene(batch_size, q_length, kv_length, int(q_offset), int(kv_offset), torch.device(device), use_vmap)
    mask = translate(mask_function, scene)
    padding_mask = hf.prepare_padding_mask(attention_mask, kv_length, scene.key_offset)
    if padding_mask is not None:
        keep = padding(padding_mask, scene)
        if isinstance(keep, Mask):
            mask = keep if mask is None else mask & keep
    if mask is None and allow_is_bidirectional_skip:
        return None
    return RoutedMask(mask, scene, getattr(config, "model_type", "this model"))


@dataclass(eq=False)
class _Held:
    """What a `RoutedMask` and its views share."""

    mask: Mask | None
    scene: Scene
    model_type: str
    filled: Tensor | None = None
    version: int = 0


class RoutedMask(Tensor):
    """A bool tensor (batch, 1, seq_len_q, seq_len_kv), True = may attend, that is not filled in until somebody looks.

    Models pass it through their layers, ask for its shape or dtype, slice or combine it. The attention function takes
    the regard mask out of it; any operation on it gives an ordinary bool tensor with the same meaning. Arithmetic is
    refused: only a model that applies its own mask, and so never reached the attention function, adds it to scores.
    """

    _held: _Held

    @staticmethod
    def __new__(cls, mask: Mask | None, scene: Scene, model_type: str = "this model") -> RoutedMask:  # noqa: D102
        return cls._view(_Held(mask, scene, model_type))

    def __init__(self, *args: Any) -> None:
        """Everything was set in `__new__`."""

    @classmethod
    def _view(cls, held: _Held) -> RoutedMask:
        scene = held.scene
        shape = (scene.batch, 1, scene.seq_len_q, scene.seq_len_kv)
        # What torch gives its subclasses is missing from its stubs.
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=scene.device)  # type: ignore[attr-defined]
        self._held = held
        return self

    @property
    def mask(self) -> Mask | None:
        """The mask as it was made; None where it excludes nothing."""
        return self._held.mask

    @property
    def scene(self) -> Scene:
        """The lengths and offsets that it was made for."""
        return self._held.scene

    @property
    def shared(self) -> object:
        """What this mask and its views have in common: one object as long as they mean the same."""
        return self._held

    def filled(self) -> Tensor:
        """The same mask as an ordinary bool tensor (batch, 1, seq_len_q, seq_len_kv)."""
        held = self._held
        if held.filled is None:
            with torch.inference_mode(False):  # so that the tensor counts what is written into it
                held.filled = _fill(held.mask, held.scene)
            held.version = held.filled._version
        return held.filled

    def is_filled(self) -> bool:
        """Whether somebody looked, so that the n² tensor exists."""
        return self._held.filled is not None

    def written(self) -> bool:
        """Whether somebody changed the filled-in tensor, which then is the mask."""
        return self._held.filled is not None and self._held.filled._version != self._held.version

    def is_causal(self) -> bool:
        """Whether the mask depends on where the queries stand, so that its offsets are known to be right."""
        return self.mask is not None and self.mask.needs_query_positions()

    def current(self) -> Mask | None:
        """The mask to attend with: the filled-in one where somebody wrote into it."""
        return masks.from_tensor(self.filled()) if self.written() else self.mask

    def __repr__(self, **kwargs: Any) -> str:
        return f"RoutedMask({self.mask!r}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        outer, _above.ready = _above.ready, True
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        except _Look:  # up here, unlike below autograd, the filled tensor counts what is written into it and its views
            with torch._C.DisableTorchFunctionSubclass():
                return func(*_filled(args), **_filled(kwargs))
        finally:
            _above.ready = outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet in _ARITHMETIC:
            owner = next(a for a in args if isinstance(a, RoutedMask))
            raise ValueError(  # Tensor.__add__ would turn a TypeError into "unsupported operand"
                f"regard.huggingface: the model must leave masking to the attention function; got {packet} on the mask "
                f"of {owner._held.model_type}, which computes attention by itself. "
                "Load it with attn_implementation='eager'."
            )
        first = args[0] if args else None
        if packet in _VIEWS and isinstance(first, RoutedMask) and not _changes(packet, first, args):
            return cls._view(first._held)
        if packet in _COPIES and isinstance(first, RoutedMask) and not first.written() and _stays(first, kwargs):
            return RoutedMask(first.mask, first.scene, first._held.model_type)
        if _above.ready:
            raise _Look
        return func(*_filled(args), **_filled(kwargs))


class _Look(Exception):
    """An operation needs the filled-in mask."""


class _Above(threading.local):
    """Whether `__torch_function__` of this thread waits for a `_Look`."""

    ready: bool = False


_above = _Above()


def _filled(given: Any) -> Any:
    return tree_map(lambda part: part.filled() if isinstance(part, RoutedMask) else part, given)


def _fill(mask: Mask | None, scene: Scene) -> Tensor:
    shape = (scene.batch, 1, scene.seq_len_q, scene.seq_len_kv)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=scene.device)
    index = [torch.arange(n, device=scene.device) for n in shape]
    batch, head, rows, cols = (
        indices.reshape([-1 if axis == own else 1 for axis in range(4)]) for own, indices in enumerate(index)
    )
    return (
        mask.visible(scene.frame(), batch, head, rows, cols).expand(shape).clone(memory_format=torch.contiguous_format)
    )


_aten = torch.ops.aten
_ARITHMETIC = {_aten.add, _aten.add_, _aten.sub, _aten.sub_, _aten.rsub, _aten.mul, _aten.mul_}
_VIEWS = {_aten.detach, _aten.alias, _aten.slice, _aten.expand}
_COPIES = {_aten._to_copy, _aten.clone}


def _changes(packet: Any, mask: RoutedMask, args: tuple) -> bool:
    """Whether a view of the mask differs from it."""
    if packet is _aten.slice:
        given: tuple[Any, ...] = args[1:]
        defaults: tuple[Any, ...] = (0, None, None, 1)
        dim, start, end, step = given + defaults[len(given) :]
        return not (step == 1 and start in (None, 0) and (end is None or end >= mask.shape[dim]))
    if packet is _aten.expand:
        return len(args[1]) != 4 or any(want not in (-1, have) for want, have in zip(args[1], mask.shape, strict=True))
    return False


def _stays(mask: RoutedMask, kwargs: dict) -> bool:
    """Whether a copy has the mask's dtype and device."""
    device = kwargs.get("device")
    return kwargs.get("dtype") in (None, torch.bool) and (device is None or torch.device(device) == mask.device)
