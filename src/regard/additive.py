"""Additive attention: scores by a small network, weightᵀ tanh(q + k), instead of a product.

Enters: q, k, v as torch tensors or DLPack arrays, the network's weight, a mask.
Leaves: the answer, in kind; the operator behind it, for autograd and `torch.compile`, and the formula spelt out.
Floor 4: beside `attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regard import arrays, check, library, masks, native, op, plan
from regard.additive_twice import second_gradients
from regard.mask_algebra import Mask
from regard.positions import Frame

# letters of shapes: B all leading axes flattened, N seq_len_q, M seq_len_kv, D dim, E dim_v
_NAME = "additive_attention"
_AXES = {"q": "(..., seq_len_q, dim)", "k": "(..., seq_len_kv, dim)", "v": "(..., seq_len_kv, dim_v)"}


def additive_attention(q: Any, k: Any, v: Any, weight: Any, *, mask: Mask | Tensor | None = None) -> Any:
    """Additive attention, of the first attention model.

    out_i = Σ_j softmax_j(weightᵀ tanh(q_i + k_j)) v_j

    q and k are the paper's W_a s and U_a h, projected already. A query that sees no key gives 0.

    Args:
        q: float32, bfloat16, float16 or float64 `(..., seq_len_q, dim)`, any strides; a torch tensor, or anything on
            the CPU that speaks DLPack.
        k: `(..., seq_len_kv, dim)`, same dtype and leading axes.
        v: `(..., seq_len_kv, dim_v)`, likewise.
        weight: `(dim,)`, the paper's v_a, same dtype.
        mask: bool, broadcastable to `(..., seq_len_q, seq_len_kv)`, True = may attend; or a mask of `regard.masks`, for
            which the leading axes, flattened, are the batch, and there is one head. Default None: every query sees
            every key.

    Returns:
        `(..., seq_len_q, dim_v)`, in q's dtype and kind. Differentiable twice in q, k, v and weight. Memory is that of
        the inputs: the seq_len_q · seq_len_kv · dim values of tanh are never kept.

    Raises:
        ValueError, TypeError: where an argument breaks one of the conditions above, or where a positional mask meets
            seq_len_q ≠ seq_len_kv.

    Example:
        >>> import regard
        >>> decoder, encoder = torch.randn(3, 1, 16), torch.randn(3, 7, 16)  # one step, seven words, three sentences
        >>> words = regard.masks.padding(torch.tensor([7, 5, 2]))
        >>> additive_attention(decoder, encoder, encoder, torch.ones(16), mask=words).shape
        torch.Size([3, 1, 16])

    Source: Bahdanau et al. 2015, equations 5 and 6 and appendix A.1.2.
    """
    give = None
    if not all(isinstance(t, Tensor) for t in (q, k, v, weight)):
        (q, k, v, weight), give = arrays.taken(_NAME, {"q": q, "k": k, "v": v, "weight": weight})
    _check(q, k, v, weight)
    lead = tuple(q.shape[:-2])
    q_BND, k_BMD, v_BME = (t.reshape(math.prod(lead), *t.shape[-2:]) for t in (q, k, v))
    if mask is not None:
        mask = _mask(mask, lead, q.shape[-2], k.shape[-2])
    out = _attended(q_BND, k_BMD, v_BME, weight.contiguous(), mask)[0].reshape(*lead, q.shape[-2], v.shape[-1])
    return out if give is None else give(out)


def spelt_out(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, visible: Tensor | None = None) -> Tensor:
    """The formula in float64 by plain torch operations: the oracle of the kernel, n · m · dim memory.

    Args:
        q, k, v, weight: as in `additive_attention`.
        visible: bool, broadcastable to `(..., seq_len_q, seq_len_kv)`; None = all.
    """
    q, k, v, weight = (t.double() for t in (q, k, v, weight))
    scores = torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ weight
    if visible is None:
        return torch.softmax(scores, -1) @ v
    visible = visible.expand(scores.shape)
    scores = torch.where(visible, scores, -math.inf)
    scores = torch.where(visible.any(-1, keepdim=True), scores, 0.0)
    weights = torch.where(visible, torch.softmax(scores, -1), 0.0)
    seen = visible.any(-2)[..., None]
    return weights @ torch.where(seen, v, 0.0)


def _check(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> None:
    named = {"q": q, "k": k, "v": v}
    for name, t in named.items():
        if t.dim() < 2:
            raise ValueError(f"{_NAME}: {name} must have the axes {_AXES[name]}; got {tuple(t.shape)}. Reshape it.")
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise ValueError(
            f"{_NAME}: q, k and v must have the same leading axes; got {tuple(q.shape[:-2])}, {tuple(k.shape[:-2])} "
            f"and {tuple(v.shape[:-2])}. Expand the smaller ones."
        )
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"{_NAME}: k and v must have one seq_len_kv; got {k.shape[-2]} and {v.shape[-2]}. Give a value for each "
            "key."
        )
    if not q.shape[-1] == k.shape[-1]:
        raise ValueError(
            f"{_NAME}: q and k must have one dim; got {q.shape[-1]} and {k.shape[-1]}. Project them alike."
        )
    if q.shape[-1] < 1 or v.shape[-1] < 1:
        raise ValueError(
            f"{_NAME}: dim and dim_v must be at least 1; got {q.shape[-1]} and {v.shape[-1]}. Give each some numbers."
        )
    if weight.shape != q.shape[-1:]:
        raise ValueError(
            f"{_NAME}: weight must be (dim,) = ({q.shape[-1]},); got {tuple(weight.shape)}. Give one number for each "
            "column of q."
        )
    for name, t in {**named, "weight": weight}.items():
        if t.dtype not in check.DTYPES:
            raise TypeError(
                f"{_NAME}: {name} must be float32, bfloat16, float16 or float64; got {t.dtype}. Convert it with "
                ".float()."
            )
        if t.dtype != q.dtype:
            raise TypeError(
                f"{_NAME}: {name} must be in q's dtype, {q.dtype}; got {t.dtype}. Convert it with .to(q.dtype)."
            )
        check.on_cpu(_NAME, name, t)


def _mask(mask: Any, lead: tuple[int, ...], seq_len_q: int, seq_len_kv: int) -> Mask:
    """The mask for (B, 1, N, M)."""
    mask = arrays.tensor(_NAME, "mask", mask)
    if isinstance(mask, Tensor):
        whole = (*lead, seq_len_q, seq_len_kv)
        own = (1,) * (len(whole) - mask.dim()) + tuple(mask.shape)
        if len(own) > len(whole) or any(a not in (1, b) for a, b in zip(own, whole, strict=True)):
            raise ValueError(
                f"{_NAME}: mask must be broadcastable to (..., seq_len_q, seq_len_kv) = {whole}; got "
                f"{tuple(mask.shape)}. Give each axis its full length or 1."
            )
        mask = mask.reshape(own)
        if math.prod(own[:-2]) != 1:
            mask = mask.expand(*lead, *own[-2:])
        mask = mask.reshape(math.prod(mask.shape[:-2]), 1, *own[-2:])
    mask = masks.as_mask(mask, _NAME)
    if seq_len_q != seq_len_kv and mask.needs_query_positions():
        raise ValueError(
            f"{_NAME}: a positional mask must meet seq_len_q = seq_len_kv; got {seq_len_q} and {seq_len_kv}. Pass the "
            "mask as a bool tensor."
        )
    mask.validate(_NAME, Frame(math.prod(lead), 1, seq_len_q, seq_len_kv))
    return mask


# ---- the operator: leading axes flattened, weight contiguous ----


def _attended(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor]:
    if op._plain([q, k, v, weight]):
        return _forward(q, k, v, weight, mask)
    ops, ints, tensors = ("", [], []) if mask is None else mask.encode()
    return torch.ops.regard.additive_attention(q, k, v, weight, ops, ints, tensors)


def _forward(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor]:
    out, lse = _results(q, v)
    for panel in plan.panels(mask, Frame(q.shape[0], 1, q.shape[1], k.shape[1])):
        own = slice(panel.rows.start, panel.rows.stop)
        native.kernels().additive_forward(
            *_call(q[:, own], k, v, weight, out[:, own], lse[:, own]), panel.argument(), _threads(q, k)
        )
    return out, lse


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=wide)


def _call(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    shape = (q.shape[0], 1, 1, q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    q_view, k_view, v_view, out_view = (_view(t) for t in (q, k, v, out))
    return (
        native.isa_number(), native.DTYPES[q.dtype], shape, q_view, k_view, v_view, weight.data_ptr(), out_view,
        _view(lse[..., None]),
    )  # fmt: skip


def _view(t: Tensor) -> native.View:
    return native.operand(t[:, None])


def _threads(q: Tensor, k: Tensor) -> int:
    return native.threads(q.numel() * k.shape[1] * 16)  # a tanh is worth so many multiplications


# ---- torch.library ----

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor weight"
_GRADS = f"Tensor grad_out, Tensor grad_lse, {_INPUTS}, Tensor out, Tensor lse, {library.MASK}"


def _decoded(ops: str, ints: Sequence[int], tensors: Sequence[Tensor]) -> Mask | None:
    return masks.decode(ops, ints, tensors) if ops else None


def _additive_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, ops: str, ints: Sequence[int], tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, weight, _decoded(ops, ints, tensors))


def _fake(q: Tensor, _k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _results(q, v)


def _gradient(saved: library.Saved, grad_out: Tensor, grad_lse: Tensor) -> list[Tensor | None]:
    q, k, v, weight, *mask = saved.inputs
    found = torch.ops.regard.additive_attention_backward(grad_out, grad_lse, q, k, v, weight, *saved.outputs, *mask)
    return [t if need else None for t, need in zip(found, saved.needs[:4], strict=True)]


def _additive_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, out: Tensor, lse: Tensor,
    ops: str, ints: Sequence[int], tensors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mask = _decoded(ops, ints, tensors)
    # Parts of the keys, each with its own sums: by the number of keys alone, so that no bit depends on threads.
    part_keys = max(512, -(-k.shape[1] // (4 * native.KEYS)) * native.KEYS)
    parts = -(-k.shape[1] // part_keys)
    grad_q = torch.zeros(parts, *q.shape, dtype=lse.dtype)
    grad_k, grad_v = torch.zeros(k.shape, dtype=lse.dtype), torch.zeros(v.shape, dtype=lse.dtype)
    weight_parts = torch.zeros(parts * q.shape[0], q.shape[2], dtype=torch.float64)
    for panel in plan.panels(mask, Frame(q.shape[0], 1, q.shape[1], k.shape[1])):
        own = slice(panel.rows.start, panel.rows.stop)
        native.kernels().additive_backward(
            *_call(q[:, own], k, v, weight, out[:, own], lse[:, own]), panel.argument(), _view(grad_out[:, own]),
            _view(grad_lse[:, own, None]), (grad_q[:, :, own].data_ptr(), *grad_q.stride()), grad_k.data_ptr(),
            grad_v.data_ptr(), weight_parts.data_ptr(), part_keys, _threads(q, k),
        )  # fmt: skip
    grad_weight = torch.from_numpy(weight_parts.numpy().sum(0))  # torch's sum may depend on the number of threads
    return grad_q.sum(0).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_weight.to(weight.dtype)


def _second_gradient(saved: library.Saved, *upstream: Tensor | None) -> list[Tensor]:
    return torch.ops.regard.additive_attention_twice(upstream, *saved.inputs)


def _additive_attention_twice(upstream: Sequence[Tensor | None], *inputs: Any) -> list[Tensor]:
    given, mask = inputs[:8], _decoded(*inputs[8:])
    return second_gradients(upstream, *given, mask=mask)


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


library.operator(
    "additive_attention", f"({_INPUTS}, {library.MASK}) -> (Tensor, Tensor)", _additive_attention, fake=_fake,
    gradient=_gradient, with_outputs=True,
)  # fmt: skip
library.operator(
    "additive_attention_backward", f"({_GRADS}) -> (Tensor, Tensor, Tensor, Tensor)", _additive_attention_backward,
    fake=lambda *inputs: tuple(_like(*inputs[2:6])), gradient=_second_gradient, zeros=False,
)  # fmt: skip
library.operator(
    "additive_attention_twice", f"(Tensor?[] upstream, {_GRADS}) -> Tensor[]", _additive_attention_twice,
    fake=lambda _upstream, *inputs: _like(*inputs[:8]),
    gradient=library.none_further("additive_attention", "of order 1 or 2", "Take fewer."),
)  # fmt: skip
