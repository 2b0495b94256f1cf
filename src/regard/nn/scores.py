"""One attention call of a layer, by any of three ways to score a key: softmax of a product, additive, linear.

Enters: q, k, v of the heads, a mask, a bias, a cache, offsets.
Leaves: out `(batch, num_heads, seq_len_q, head_dim_v)`; for those who observe, a `Call`.
Floor 5. Each is one public function of regard: `attention`, `additive_attention`, `linear_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from regard.additive import additive_attention
from regard.attention import attention, attention_with_stats
from regard.biases import Bias, as_bias
from regard.cache import KVCache
from regard.linear import elu_plus_one, linear_attention
from regard.mask_algebra import And, Mask
from regard.mask_rules import Causal
from regard.masks import as_mask
from regard.observe import Call, changes, layer_index, name_of, observers
from regard.positions import Frame

# letters of shapes: B batch, H num_heads, K num_kv_heads, G heads of a group, N seq_len_q, M seq_len_kv, D head_dim
_NAME = "MultiHeadAttention"


@dataclass(frozen=True)
class Terms:
    """What a call has beside q, k and v; see `regard.attention`."""

    mask: Mask | Tensor | None = None
    bias: Bias | Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    cache: KVCache | None = None
    query_offset: int | Tensor | None = None
    key_offset: int | Tensor = 0


def softmax(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, terms: Terms, *, is_cross: bool) -> Tensor:
    """softmax(scale · q kᵀ + bias under the mask) v, told to whoever observes or changes it."""
    named = {
        "mask": terms.mask, "bias": terms.bias, "scale": terms.scale, "softcap": terms.softcap, "sinks": terms.sinks,
        "dropout": terms.dropout, "query_offset": terms.query_offset, "key_offset": terms.key_offset,
        "cache": terms.cache,
    }  # fmt: skip
    if torch.compiler.is_compiling() or not (observers() or changes()):
        return attention(q, k, v, **named)
    query_offset = 0 if terms.query_offset is None else terms.query_offset
    key_offset = terms.key_offset
    if terms.cache is not None:
        query_offset = terms.cache.position
    stats = attention_with_stats(q, k, v, **named)
    if terms.cache is not None:
        k, v, key_offset = terms.cache.keys, terms.cache.values, terms.cache.key_offset
    frame = Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset, key_offset)
    dense = diagonal = None
    if terms.bias is not None:
        dense, diagonal = as_bias(terms.bias, _NAME, q.dtype).resolve(frame, q.dtype, q.device)
    call = Call(
        module=module,
        name=name_of(module),
        layer_index=layer_index(module),
        is_cross=is_cross,
        q=q,
        k=k,
        v=v,
        mask=None if terms.mask is None else as_mask(terms.mask, _NAME),
        bias=dense,
        diagonal=diagonal,
        sinks=terms.sinks,
        scale=q.shape[3] ** -0.5 if terms.scale is None else terms.scale,
        softcap=terms.softcap,
        query_offset=query_offset,
        key_offset=key_offset,
        out=stats.out,
        lse=stats.lse,
    )
    for change in changes():
        call = replace(call, out=change(call))
    seen = call.detached()
    for callback in observers():
        callback(seen)
    return call.out


def additive(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, terms: Terms) -> Tensor:
    """softmax_j(weight[h]ᵀ tanh(q_i + k_j)) v_j, head by head; weight `(num_heads, head_dim)`."""
    _only_masked("additive", terms)
    (query_offset, key_offset), k, v = _held(k, v, terms)
    group = q.shape[1] // k.shape[1]
    mask = None if terms.mask is None else as_mask(terms.mask, _NAME)
    aligned = query_offset is None or (isinstance(query_offset, int) and query_offset == 0)
    as_it_is = isinstance(key_offset, int) and key_offset == 0 and aligned
    seen: Tensor | None = None
    if mask is not None and (
        mask.depends_on_head() or (mask.needs_query_positions() and not (as_it_is and q.shape[2] == k.shape[2]))
    ):
        seen = mask.dense(Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset or 0, key_offset))
    outs = []
    for head in range(q.shape[1]):
        own = mask if seen is None else seen[:, head if seen.shape[1] > 1 else 0]
        key_head = head // group
        outs.append(additive_attention(q[:, head], k[:, key_head], v[:, key_head], weight[head], mask=own))
    return torch.stack(outs, 2).transpose(1, 2)


def linear(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j), φ = elu + 1, over all keys or those up to the query's own."""
    _only_masked("linear", terms)
    if terms.cache is not None:
        raise ValueError(
            f"{_NAME}: cache must be None for score 'linear'; got {terms.cache!r}. Linear attention has a state: use "
            "regard.linear_attention."
        )
    causal, rest = _causal_and_rest(None if terms.mask is None else as_mask(terms.mask, _NAME))
    q, k = elu_plus_one(q), elu_plus_one(k)
    if rest is not None:
        frame = Frame(q.shape[0], 1, 1, k.shape[2], 0, terms.key_offset)
        if rest.needs_query_positions() or rest.depends_on_head():
            raise ValueError(
                f"{_NAME}: mask must be causal(), padding or both for score 'linear'; got {rest!r}. Use 'softmax'."
            )
        seen = rest.dense(frame)[:, :, 0, :, None]
        k, v = torch.where(seen, k, 0.0), torch.where(seen, v, 0.0)
    counted = torch.cat((v, v.new_ones(*v.shape[:3], 1)), -1)
    if causal:
        both, _ = linear_attention(q, k, counted, scale=1.0)
    else:
        both = q.unflatten(1, (k.shape[1], -1)) @ (k.mT @ counted)[:, :, None]
        both = both.flatten(1, 2)
    total = both[..., -1:]
    return torch.where(total == 0.0, 0.0, both[..., :-1] / torch.where(total == 0.0, 1.0, total))


def _only_masked(score: str, terms: Terms) -> None:
    given = {"bias": terms.bias, "softcap": terms.softcap, "sinks": terms.sinks, "dropout": terms.dropout or None}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{_NAME}: {name} must be left out for score {score!r}; got {type(value).__name__}. Use 'softmax'."
            )


def _held(k: Tensor, v: Tensor, terms: Terms) -> tuple[tuple[int | Tensor | None, int | Tensor], Tensor, Tensor]:
    """Both offsets, and the keys and values with those of the cache."""
    if terms.cache is None:
        return (terms.query_offset, terms.key_offset), k, v
    query_offset = terms.cache.position
    k, v = terms.cache.append(k, v)
    return (query_offset, terms.cache.key_offset), k, v


def _causal_and_rest(mask: Mask | None) -> tuple[bool, Mask | None]:
    """Whether causal() is joined into a mask by &, and what else is."""
    if mask is None:
        return False, None
    if isinstance(mask, Causal):
        return True, None
    if not isinstance(mask, And):
        return False, mask
    (left, one), (right, other) = _causal_and_rest(mask.left), _causal_and_rest(mask.right)
    if one is None or other is None:
        return left or right, other if one is None else one
    return left or right, one & other
