"""The arguments of one attention call of transformers, read as regard's mask, bias and positions.

Enters: attention_mask (routed, bool, float or None), position_bias, indices, sequence lengths in keyword arguments.
Leaves: a Mask or None, a dense bias or a diagonal, a Frame with the offsets.
Floor 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from typing_extensions import override

from regard import masks
from regard.biases import Bias
from regard.huggingface.routed_mask import RoutedMask
from regard.mask_algebra import Mask
from regard.positions import Frame

EAGER = "Load the model with attn_implementation='eager'."


def who(module: nn.Module) -> str:
    """The start of every error about one attention module."""
    return f"regard.huggingface: {type(module).__name__}"


@dataclass(frozen=True, eq=False)
class DiagonalBias(Bias):
    """A bias that depends on key index − query index alone: `diagonal` (1, num_heads, seq_len_q + seq_len_kv − 1)."""

    diagonal: Tensor

    @override
    def tensors(self) -> list[Tensor]:
        return [self.diagonal]

    @override
    def needs_query_positions(self) -> bool:
        return False

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        assert self.diagonal.shape == (1, frame.num_heads, frame.seq_len_q + frame.seq_len_kv - 1), caller

    @override
    def resolve(self, frame: Frame, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        return None, self.diagonal.to(device=device, dtype=dtype)


def without_mask(
    module: nn.Module, frame: Frame, is_causal: bool | None, sliding_window: int | None, lengths: dict[str, Any]
) -> Mask | None:
    """The mask of a call that brings no attention_mask: causal or none, and none that has to be guessed."""
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None and frame.seq_len_q > 1:
        raise ValueError(
            f"{who(module)}: a call without attention_mask must say whether it is causal; got is_causal=None from a "
            "module without that attribute. Pass is_causal, or set it on the module."
        )
    causal = bool(causal) and frame.seq_len_q > 1
    if causal and frame.seq_len_q != frame.seq_len_kv:
        raise ValueError(
            f"{who(module)}: a causal call without attention_mask must have as many queries as keys; got "
            f"{frame.seq_len_q} and {frame.seq_len_kv}. Pass attention_mask, so that the positions are known."
        )
    if sliding_window is not None and frame.seq_len_kv > sliding_window:
        raise ValueError(
            f"{who(module)}: a call with sliding_window={sliding_window} must bring attention_mask; got None with "
            f"{frame.seq_len_kv} keys. Pass attention_mask, so that the positions are known."
        )
    mask = masks.causal() if causal else None
    starts_q, starts_k = lengths.get("cu_seq_lens_q"), lengths.get("cu_seq_lens_k")
    if starts_q is None or starts_k is None:
        return mask
    for starts, size in ((starts_q, frame.seq_len_q), (starts_k, frame.seq_len_kv)):
        if frame.batch != 1 or int(starts[-1]) != size:
            raise ValueError(
                f"{who(module)}: cu_seq_lens must cover one packed row; got {int(starts[-1])} tokens for a batch of "
                f"{frame.batch} rows of {size}. Pass position_ids or attention_mask instead."
            )
    ids = [
        torch.searchsorted(starts.long(), torch.arange(size, device=starts.device), right=True)[None]
        for starts, size in ((starts_q, frame.seq_len_q), (starts_k, frame.seq_len_kv))
    ]
    return both(mask, masks.documents(ids[0], ids[1]))


def read_mask(
    module: nn.Module, given: object, frame: Frame, dtype: torch.dtype
) -> tuple[Mask | None, Tensor | None, Frame]:
    """Mask, bias and offsets that an attention_mask stands for.

    A float mask is a bias; its entries at the dtype's minimum or −inf are what transformers writes for "masked", and
    are masked, so that a row of them is an empty row.
    """
    if isinstance(given, RoutedMask):
        scene = given.scene
        if (scene.seq_len_q, scene.seq_len_kv) != (frame.seq_len_q, frame.seq_len_kv):
            raise ValueError(
                f"{who(module)}: attention_mask must be made for this call's {frame.seq_len_q} queries and "
                f"{frame.seq_len_kv} keys; got one for {scene.seq_len_q} and {scene.seq_len_kv}. "
                "Make it with the cache that this layer uses."
            )
        return given.current(), None, replace(frame, query_offset=scene.query_offset, key_offset=scene.key_offset)
    if not isinstance(given, Tensor):
        raise TypeError(
            f"{who(module)}: attention_mask must be a tensor or None; got {type(given).__name__}. "
            "Make it with attn_implementation='regard'."
        )
    if given.dim() != 4:
        raise ValueError(
            f"{who(module)}: attention_mask must have 4 dimensions, (batch, num_heads, seq_len_q, seq_len_kv) or 1 of "
            f"each; got shape {tuple(given.shape)}. Unsqueeze it, or pass a 2-D padding mask to the model instead."
        )
    given = given[..., : frame.seq_len_kv]
    if given.dtype == torch.bool:
        return masks.from_tensor(given), None, frame
    if not given.is_floating_point():
        raise TypeError(
            f"{who(module)}: attention_mask with 4 dimensions must be bool or float; got {given.dtype}. "
            "Pass mask.bool() where True means may attend, or a float mask to add."
        )
    keep = given.detach() > torch.finfo(given.dtype).min / 2
    mask = None if bool(keep.all()) else masks.from_tensor(keep)
    if not given.requires_grad and not bool(given.masked_fill(~keep, 0).any()):
        return mask, None, frame
    return mask, given.masked_fill(~keep, 0).to(dtype), frame


def chosen(indices: Tensor, frame: Frame) -> Mask:
    """The mask of a sparse indexer's choice: indices (batch, seq_len_q, n); those outside the keys choose nothing."""
    valid = (indices >= 0) & (indices < frame.seq_len_kv)
    hits = torch.zeros(frame.batch, frame.seq_len_q, frame.seq_len_kv, dtype=torch.int32, device=indices.device)
    hits.scatter_add_(-1, indices.clamp(0, frame.seq_len_kv - 1).long(), valid.to(torch.int32))
    return masks.from_tensor(hits[:, None] > 0)


def both(left: Mask | None, right: Mask | None) -> Mask | None:
    """left & right, None meaning that nothing is excluded."""
    return left & right if left is not None and right is not None else left if left is not None else right


def fit(module: nn.Module, bias: Tensor, frame: Frame, dtype: torch.dtype) -> Tensor:
    """A bias in q's dtype with 4 dimensions, cut to the call's keys."""
    bias = bias if bias.dim() == 4 else bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    if bias.shape[-1] > frame.seq_len_kv:
        bias = bias[..., : frame.seq_len_kv]
    wanted = (frame.batch, frame.num_heads, frame.seq_len_q, frame.seq_len_kv)
    if any(have not in (1, want) for have, want in zip(bias.shape, wanted, strict=True)):
        raise ValueError(
            f"{who(module)}: position_bias must broadcast to (batch, num_heads, seq_len_q, seq_len_kv) = {wanted}; got "
            f"{tuple(bias.shape)}. {EAGER}"
        )
    return bias.to(dtype)


# T5 computes its bias once and passes it through all layers: the last answer is kept, for as long as the tensor lives.
_last: tuple[ref[Tensor], int, Tensor | None] | None = None


def diagonal_of(bias: Tensor | None, frame: Frame, dtype: torch.dtype) -> Tensor | None:
    """(1, num_heads, seq_len_q + seq_len_kv − 1) where a bias depends on key index − query index alone, else None.

    A bias that carries a gradient stays dense: equal numbers do not prove that they come from one parameter.
    """
    global _last
    size = (frame.seq_len_q, frame.seq_len_kv)
    if bias is None or bias.requires_grad or bias.dim() != 4 or bias.shape[0] != 1 or tuple(bias.shape[2:]) != size:
        return None
    if bias.shape[1] not in (1, frame.num_heads):
        return None
    version = -1 if bias.is_inference() else bias._version  # an inference tensor does not count its changes
    last = _last
    if last is not None and last[0]() is bias and last[1] == version >= 0:
        return None if last[2] is None else last[2].to(dtype)
    diagonal = None
    if all(torch.equal(head[1:, 1:], head[:-1, :-1]) for head in bias[0]):
        diagonal = torch.cat((bias[:, :, :, 0].flip(-1), bias[:, :, 0, 1:]), dim=-1).expand(1, frame.num_heads, -1)
    _last = (ref(bias), version, diagonal)
    return None if diagonal is None else diagonal.to(dtype)
