"""The same attention on PyTorch's own kernels: FlexAttention and scaled_dot_product_attention, on any device.

Enters: a checked call whose tensors stand on one device; its mask and resolved bias.
Leaves: out and lse (`flex`), or out (`sdpa`); and for each backend what of a call it cannot do, in words. Neither keeps
NaN or inf of masked keys out of the result, and neither promises the same bits from one batch or device to the next.
Floor 3: above masks and biases, below the public functions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.mask_algebra import And, Mask, Not, Or
from regard.mask_rules import Causal, FromFunction
from regard.masks import decode
from regard.positions import Frame, at

_FLEX_DEVICES = ("cpu", "cuda", "xpu", "hpu")  # those on which PyTorch 2.13 gives lse as well
_CPU = torch.device("cpu")
_LEAST_HEAD_DIM = 16  # of FlexAttention's compiled kernels


class Refusal(NamedTuple):
    """What a backend cannot do of a call, and what to do instead."""

    why: str
    fix: str


def refusal(
    backend: str,
    q: Tensor,
    v: Tensor,
    *,
    gradient: bool,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    wanted: str,
) -> Refusal | None:
    """Why a backend cannot do a call; None where it can.

    Args:
        backend: "native", "reference", "flex" or "sdpa".
        q: the queries.
        v: the values.
        gradient: whether a gradient will be asked for.
        softcap: bound of the scores, or None.
        sinks: or None.
        dropout: probability.
        wanted: what is asked for: "out", "lse" (beside it), "statistics" or "weights".
    """
    device = q.device.type
    if backend in ("native", "reference"):
        if device == "cpu":
            return None
        return Refusal(f"it runs on the CPU and q is on {q.device}", "Move q, k and v with .cpu().")
    ours = "Use backend='native' or 'reference' on the CPU."
    if wanted in ("statistics", "weights"):
        return Refusal(f"it gives no {wanted}", ours)
    if backend == "sdpa":
        for has, what in ((softcap is not None, "softcap"), (sinks is not None, "sinks"), (wanted == "lse", "lse")):
            if has:
                return Refusal(f"it has no {what}", "Use backend='flex', or 'native' on the CPU.")
        return None
    if device not in _FLEX_DEVICES:
        return Refusal(f"it does not run on {device}", "Use backend='sdpa', or move q, k and v with .cpu().")
    if dropout:
        return Refusal("it has no dropout", "Use backend='sdpa', or 'native' on the CPU.")
    if device == "cpu" and gradient:
        return Refusal("on the CPU it gives no gradient", "Use backend='native' or 'sdpa', or torch.no_grad().")
    if device != "cpu" and q.dtype == torch.float64:
        return Refusal(f"it has no float64 on {device}", "Use float32, or backend='sdpa'.")
    if device != "cpu" and min(q.shape[3], v.shape[3]) < _LEAST_HEAD_DIM:
        return Refusal(f"on {device} it needs head_dim and head_dim_v of at least {_LEAST_HEAD_DIM}",
                       "Use backend='sdpa'.")  # fmt: skip
    return None


def suffices(mask: Mask | None, bias: Tensor | None, diagonal: Tensor | None, frame: Frame) -> bool:
    """Whether SDPA does a call without building a mask of its own: no more memory than the caller has given."""
    return diagonal is None and (mask is None or (bias is None and _is_causal(mask, frame)))


def on_device(mask: Mask, device: torch.device) -> Mask:
    """The same mask, its tensors on a device."""
    ops, ints, tensors = mask.encode()
    return decode(ops, ints, [tensor.to(device) for tensor in tensors])


def validate(caller: str, mask: Mask, frame: Frame, device: torch.device) -> None:
    """Raise a ValueError, naming `caller`, where a mask's tensors do not fit a call off the CPU."""
    ops, ints, tensors = mask.encode()
    for tensor in tensors:
        if not tensor.is_cpu and tensor.device != device:
            raise ValueError(
                f"{caller}: mask must be on q's device, {device}, or on the CPU; got {tensor.device}. "
                "Move it with .to(q.device)."
            )
    # Rules look at shapes: zeros of those shapes stand in, so that nothing waits for the device.
    decode(ops, ints, [torch.zeros((), dtype=t.dtype).expand(t.shape) for t in tensors]).validate(caller, frame)


# ---- scaled_dot_product_attention ----


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    bias: Tensor | None,
    diagonal: Tensor | None,
    scale: float,
    dropout: float,
    query_offset: int | Tensor,
    key_offset: int | Tensor,
) -> Tensor:
    """Attention by PyTorch's scaled_dot_product_attention, differentiable in q, k, v, bias and diagonal.

    A mask other than `causal()` becomes a dense one, bool or float: n² memory. A query without keys gives 0. NaN or inf
    in a masked key or value may reach every output: PyTorch multiplies it by 0.

    Returns:
        out `(batch, num_heads, seq_len_q, head_dim_v)`.
    """
    frame = Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset, key_offset)
    terms: dict[str, Any] = {"dropout_p": dropout, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if bias is None and diagonal is None and (mask is None or _is_causal(mask, frame)):
        return scaled_dot_product_attention(q, k, v, is_causal=mask is not None, **terms)
    allowed = None
    if mask is not None:
        allowed = on_device(mask, _CPU).dense(frame).to(q.device)
    if diagonal is not None:
        index = torch.arange(frame.seq_len_kv) - torch.arange(frame.seq_len_q)[:, None] + frame.seq_len_q - 1
        bias = diagonal[..., index.to(q.device)].to(q.dtype)
    if bias is None:
        assert allowed is not None
        empty = ~allowed.any(-1, keepdim=True)
        dense = allowed | empty
    else:
        dense = bias if allowed is None else torch.where(allowed, bias, -math.inf)
        empty = (dense == -math.inf).all(-1, keepdim=True)
        dense = torch.where(empty, 0.0, dense)
    whole = (frame.batch, frame.num_heads, frame.seq_len_q, frame.seq_len_kv)
    out = scaled_dot_product_attention(q, k, v, attn_mask=dense.expand(whole), **terms)
    return torch.where(empty, 0.0, out)


def _is_causal(mask: Mask, frame: Frame) -> bool:
    """Whether the mask is SDPA's own causal one: query i sees the keys up to index i."""
    first, first_key = frame.query_offset, frame.key_offset
    return isinstance(mask, Causal) and isinstance(first, int) and isinstance(first_key, int) and first == first_key


# ---- FlexAttention ----

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    bias: Tensor | None,
    diagonal: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    query_offset: int | Tensor,
    key_offset: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention by PyTorch's FlexAttention: a block mask from the mask, a score function from the rest.

    sinks: out · exp(lse − lse′), lse′ = ln(exp(lse) + exp(sink)).

    Off the CPU it is compiled, on first use of each kind of mask, and differentiable in q, k, v, bias, diagonal and
    sinks. On the CPU it runs uncompiled, with n² memory and without gradients: there to be checked, not to be fast.
    Building a block mask takes n² bools for a moment; masks without tensors are kept. A query without keys gives 0.
    NaN or inf in a masked key may reach the outputs of other queries of its block.

    Returns:
        out `(batch, num_heads, seq_len_q, head_dim_v)` and lse `(batch, num_heads, seq_len_q)`, float32 (float64 for
        float64).

    Source: Dong et al. 2024.
    """
    frame = Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset, key_offset)
    if not torch.is_grad_enabled():  # it looks at requires_grad alone
        q, k, v = q.detach(), k.detach(), v.detach()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not (frame.batch * frame.seq_len_q * frame.seq_len_kv):
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)
    else:
        from torch.nn.attention.flex_attention import AuxRequest

        out, found = _flex_attention(q.device.type)(
            q, k, v, score_mod=_score(bias, diagonal, softcap, frame.seq_len_q), scale=scale,
            block_mask=None if mask is None else _block_mask(mask, frame, q.device),
            enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        lse = found.lse.to(wide)
        out = torch.where((lse == -math.inf)[..., None], 0.0, out)
    if sinks is None:
        return out, lse
    whole = torch.logaddexp(lse, sinks.to(wide)[:, None])
    return (out * torch.exp(lse - whole)[..., None]).to(q.dtype), whole


@cache
def _flex_attention(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if device != "cpu":
        return torch.compile(flex_attention)

    def uncompiled(*tensors: Any, **terms: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(*tensors, **terms)

    return uncompiled


def _score(
    bias: Tensor | None, diagonal: Tensor | None, softcap: float | None, seq_len_q: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """score, and the indices of its batch row, head, query and key -> the score capped and biased."""
    if bias is None and diagonal is None and softcap is None:
        return None

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + _picked(bias, batch, head, row, col)
        if diagonal is not None:
            score = score + _picked(diagonal, batch, head, col - row + (seq_len_q - 1))
        return score

    return score_mod


def _block_mask(mask: Mask, frame: Frame, device: torch.device) -> Any:
    ops, ints, tensors = mask.encode()
    plain = isinstance(frame.query_offset, int) and isinstance(frame.key_offset, int)
    if plain and not tensors and "function" not in ops and not torch.compiler.is_compiling():
        sizes = (frame.seq_len_q, frame.seq_len_kv)
        return _kept_block_mask(ops, tuple(ints), sizes, frame.query_offset, frame.key_offset, device)
    return _made_block_mask(mask, frame, device)


@lru_cache(maxsize=32)
def _kept_block_mask(
    ops: str, ints: tuple[int, ...], sizes: tuple[int, int], query_offset: Any, key_offset: Any, device: torch.device
) -> Any:
    """The block mask of a rule that only numbers decide."""
    return _made_block_mask(decode(ops, list(ints), []), Frame(1, 1, *sizes, query_offset, key_offset), device)


def _made_block_mask(mask: Mask, frame: Frame, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    offsets = isinstance(frame.query_offset, Tensor) or isinstance(frame.key_offset, Tensor)
    by_batch = frame.batch > 1 and (offsets or mask.extent()[0] > 1 or mask.depends_on_head())  # a function may, too
    return create_block_mask(
        _mask_function(on_device(mask, _CPU), frame, device),
        frame.batch if by_batch else None,
        frame.num_heads if mask.depends_on_head() else None,
        frame.seq_len_q,
        frame.seq_len_kv,
        device=device,
    )


def _mask_function(mask: Mask, frame: Frame, device: torch.device) -> MaskFunction:
    """The rule on single indices, which is all that FlexAttention's compiler takes: by ranges of keys where the mask
    has them, by the user's function, by a dense tensor otherwise."""
    held = mask.intervals(frame)
    if held is not None:
        return _by_ranges(held.to(device))
    if isinstance(mask, And | Or):
        left, right = _mask_function(mask.left, frame, device), _mask_function(mask.right, frame, device)
        both = isinstance(mask, And)
        return lambda b, h, i, j: left(b, h, i, j) & right(b, h, i, j) if both else left(b, h, i, j) | right(b, h, i, j)
    if isinstance(mask, Not):
        inner = _mask_function(mask.inner, frame, device)
        return lambda b, h, i, j: ~inner(b, h, i, j)
    if isinstance(mask, FromFunction):
        function = mask.function
        offsets = (frame.query_offset, frame.key_offset)
        first, first_key = (o.to(device) if isinstance(o, Tensor) else o for o in offsets)
        return lambda b, h, i, j: function(b, h, at(i, first, b), at(j, first_key, b))
    allowed = mask.dense(frame).to(device)
    return lambda b, h, i, j: _picked(allowed, b, h, i, j)


def _by_ranges(held: Tensor) -> MaskFunction:
    ends = [(low.contiguous(), high.contiguous()) for low, high in (own.unbind(-1) for own in held.unbind(-2))]

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:  # noqa: ARG001
        seen = col < 0
        for low, high in ends:
            seen = seen | ((col >= _picked(low, batch, row)) & (col < _picked(high, batch, row)))
        return seen

    return mask_mod


def _picked(table: Tensor, *index: Tensor) -> Tensor:
    """One number of a table; an axis of size 1 serves every index."""
    sizes = zip(table.shape, index, strict=True)
    return table[tuple(own if size > 1 else torch.zeros_like(own) for size, own in sizes)]
