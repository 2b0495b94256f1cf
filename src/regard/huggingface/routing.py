"""One attention call of a transformers model, computed by regard.

Enters: what transformers hands to an attention implementation: module, rotated query, un-repeated key and value, mask.
Leaves: (out (batch, seq_len_q, num_heads, head_dim_v), None), and a `Call` for everyone who observes.
Keyword arguments are used, known to be harmless, or refused by name.
Floor 5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.attention import attention, attention_with_stats
from regard.huggingface.arguments import (
    EAGER,
    DiagonalBias,
    both,
    chosen,
    diagonal_of,
    fit,
    read_mask,
    who,
    without_mask,
)
from regard.huggingface.routed_mask import RoutedMask
from regard.huggingface.step import step
from regard.mask_algebra import Mask
from regard.observe import Call, changes, is_cross, layer_index, name_of, observers
from regard.positions import Frame

# Names that change a result and that regard cannot honour: better an error than another model's answer.
REFUSED = {
    "block_indices": "block-sparse attention chooses its keys by a kernel of its own",
    "cache": "a paged cache is written by the attention function",
    "alibi": "ALiBi arrives as position_bias",
    "alibi_slopes": "ALiBi arrives as position_bias",
    "attention_bias": "a bias arrives as position_bias",
    "attn_bias": "a bias arrives as position_bias",
    "head_mask": "regard has no head mask",
    "layer_head_mask": "regard has no head mask",
}


@torch.compiler.disable()  # callbacks and offsets are Python's: a compiled model calls it between two graphs
def regard_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    indices: Tensor | None = None,
    own_mask: Mask | None = None,
    own_offset: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention implementation "regard" of transformers' AttentionInterface.

    Args:
        module: the attention module, asked for `training`, `is_causal`, `layer_idx`.
        query: (batch, num_heads, seq_len_q, head_dim), rotated.
        key: (batch, num_kv_heads, seq_len_kv, head_dim), rotated, not repeated.
        value: (batch, num_kv_heads, seq_len_kv, head_dim_v).
        attention_mask: a `RoutedMask`; a bool tensor, True = may attend; a float tensor to add; or None.
        scaling: of the scores; default 1/√head_dim.
        dropout: of the weights, applied in training only.
        softcap: scores become softcap · tanh(scores / softcap).
        s_aux: (num_heads,) sinks, in the denominator only.
        sinks: (batch, num_heads, seq_len_q, 1), sinks of each query.
        position_bias: added to the scores, broadcastable to (batch, num_heads, seq_len_q, seq_len_kv).
        is_causal: read where there is no mask; default the module's.
        sliding_window: read where there is no mask, and refused there if it would exclude keys.
        indices: (batch, seq_len_q, n) keys that a sparse indexer chose; the others are masked.
        own_mask: what the module masks besides attention_mask; families with a table of their own say it.
        own_offset: position of the first query under `own_mask`, where attention_mask does not know it.
        **kwargs: what other implementations need; names that would change the result are refused.

    Returns:
        (out (batch, seq_len_q, num_heads, head_dim_v) contiguous, None).
    """
    for name, why in REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{who(module)}: {name} must be None; got {type(kwargs[name]).__name__}, but {why}. {EAGER}"
            )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{who(module)}: output_attentions must be False; got True, but regard never holds all weights. "
            "Record them with regard.lens.record, or load the model with attn_implementation='eager'."
        )
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (t if t.shape[0] == batch else t.expand(batch, *t.shape[1:]) for t in (query, key, value))
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)

    if (
        type(attention_mask) is RoutedMask
        and position_bias is None
        and indices is None
        and own_mask is None
        and own_offset is None
        and s_aux is None
        and sinks is None
        and not (dropout and module.training)
        and not (observers() or changes())
        and (out := step(query, key, value, attention_mask, scale, softcap)) is not None
    ):
        return out, None

    frame, added = Frame(batch, query.shape[1], query.shape[2], key.shape[2]), None
    if attention_mask is None and own_mask is not None:
        mask = None
    elif attention_mask is None:
        mask = without_mask(module, frame, is_causal, sliding_window, kwargs)
    else:
        mask, added, frame = read_mask(module, attention_mask, frame, query.dtype)
    if indices is not None:
        mask = both(mask, chosen(indices, frame))
    if own_mask is not None:
        mask = both(mask, own_mask)
    if own_offset is not None:
        frame = replace(frame, query_offset=own_offset, key_offset=0)
    diagonal = diagonal_of(position_bias, frame, query.dtype) if added is None else None
    bias = None
    if diagonal is None and position_bias is not None:
        bias = fit(module, position_bias, frame, query.dtype)
    if added is not None:
        bias = added if bias is None else bias + added
    per_query = sinks if sinks is not None and sinks.dim() == 4 else None
    per_head = s_aux if sinks is None or per_query is not None else sinks
    per_head = None if per_head is None else per_head.reshape(-1).to(query.dtype)

    out, lse = _compute(
        query,
        key,
        value,
        wants_lse=bool(observers() or changes()) or per_query is not None,
        mask=mask,
        bias=bias if diagonal is None else DiagonalBias(diagonal),
        scale=scale,
        softcap=softcap,
        sinks=per_head,
        dropout=float(dropout) if module.training else 0.0,
        query_offset=frame.query_offset,
        key_offset=frame.key_offset,
    )
    if per_query is not None and lse is not None:  # softmax with a sink = softmax without · sigmoid(lse − sink)
        out = out * torch.sigmoid(lse[..., None] - per_query.to(lse.dtype)).to(out.dtype)
        lse = torch.logaddexp(lse, per_query[..., 0].to(lse.dtype))
    if observers() or changes():
        assert lse is not None
        call = Call(
            module=module,
            name=name_of(module),
            layer_index=layer_index(module),
            is_cross=is_cross(module),
            q=query,
            k=key,
            v=value,
            mask=mask,
            bias=bias,
            diagonal=diagonal,
            sinks=per_head,
            scale=scale,
            softcap=softcap,
            query_offset=int(frame.query_offset),
            key_offset=int(frame.key_offset),
            out=out,
            lse=lse,
        )
        for change in changes():
            call = replace(call, out=change(call))
        out, seen = call.out, call.detached()
        for callback in observers():
            callback(seen)
    return out.transpose(1, 2).contiguous(), None


def _compute(q: Tensor, k: Tensor, v: Tensor, *, wants_lse: bool, **named: Any) -> tuple[Tensor, Tensor | None]:
    if wants_lse:
        stats = attention_with_stats(q, k, v, **named)
        return stats.out, stats.lse
    return attention(q, k, v, **named), None
