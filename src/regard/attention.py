"""The public functions: attention, its statistics, its exact weights, and the joining of partial results.

Enters: q, k, v as torch tensors or DLPack arrays, and everything that the contract of attention names.
Leaves: the answer, in kind.
Floor 4: above the operator; `call` has checked every argument by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard import arrays, check, lowering, op, reference
from regard.biases import Bias
from regard.cache import KVCache
from regard.call import Call, ready
from regard.mask_algebra import Mask


class AttentionStats(NamedTuple):
    """What `attention_with_stats` returns; what was not asked for is None.

    Everything but `out` and `top_keys` is float32 (float64 for float64).
    """

    out: Tensor
    """`(batch, num_heads, seq_len_q, head_dim_v)`, the bits of `attention`."""
    lse: Tensor
    """`(batch, num_heads, seq_len_q)`, log of the softmax's denominator, sink included; −inf for an empty row."""
    top_keys: Tensor | None
    """int64 `(batch, num_heads, seq_len_q, top_k)`, key indices by descending score, of equals the lower key first;
    −1 past the visible keys."""
    top_weights: Tensor | None
    """`(batch, num_heads, seq_len_q, top_k)`, their weights; 0 past the visible keys."""
    received: Tensor | None
    """`(batch, num_heads, seq_len_kv)`, the weights of each key, summed over the queries."""
    entropy: Tensor | None
    """`(batch, num_heads, seq_len_q)`, −Σ w ln w over the keys, in nats; 0 for an empty row."""
    max_score: Tensor | None
    """`(batch, num_heads, seq_len_q)`, largest score after bias and mask; −inf for an empty row."""
    block_mass: Tensor | None
    """`(batch, num_heads, ⌈seq_len_q / rows⌉, ⌈seq_len_kv / cols⌉)`, sum of the weights of a block."""
    block_max: Tensor | None
    """Likewise, the largest weight of a block."""


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    query_offset: int | Tensor | None = None,
    key_offset: int | Tensor = 0,
    cache: KVCache | None = None,
    backend: str | None = None,
) -> Any:
    """Exact attention.

    out = softmax(mask(softcap · tanh(scale · q kᵀ / softcap) + bias)) · v, with dropout between softmax and v.

    Query i stands at position `i + query_offset`, key j at `j + key_offset`. A query that sees no key gives 0.

    Args:
        q: float32, bfloat16, float16 or float64 `(batch, num_heads, seq_len_q, head_dim)`, any strides; a torch tensor
            on any device, or anything on the CPU that speaks DLPack.
        k: `(batch, num_kv_heads, seq_len_kv, head_dim)`, same dtype; num_heads is a multiple of num_kv_heads, and query
            head h reads k/v head `h // (num_heads // num_kv_heads)`.
        v: `(batch, num_kv_heads, seq_len_kv, head_dim_v)`, same dtype.
        mask: a mask of `regard.masks`, or bool, broadcastable to `(batch, num_heads, seq_len_q, seq_len_kv)`, True =
            may attend. Default None: every query sees every key.
        bias: a bias of `regard.biases`, or a tensor in q's dtype, broadcastable likewise; −inf excludes its key.
            Default None.
        scale: factor of q kᵀ, finite. Default 1/√head_dim.
        softcap: bound of the scores, above 0. Default None: no bound.
        sinks: `(num_heads,)` in q's dtype; adds exp(sink) to the softmax's denominator. Default None.
        dropout: probability that a weight is dropped, drawn from torch's generator. Default 0.
        query_offset: position of the first query, an int or int64 `(batch,)`. Default None, which is 0, and refused
            where a positional mask or bias meets seq_len_q ≠ seq_len_kv.
        key_offset: position of the first key, an int or int64 `(batch,)`. Default 0.
        cache: a `KVCache`; k and v are appended to it, all it holds is attended to, and it supplies both offsets.
            Default None.
        backend: "native", the compiled kernels; "reference", plain float64 operations with n² memory; "flex" or "sdpa",
            PyTorch's FlexAttention and scaled_dot_product_attention, which run on other devices too but let NaN of a
            masked key through. Default None: "native" on the CPU; elsewhere "sdpa" where it needs no mask of its own,
            "flex" otherwise.

    Returns:
        `(batch, num_heads, seq_len_q, head_dim_v)`, in q's dtype and kind. Differentiable twice in q, k, v, bias and
        sinks, both times at O(n) memory; under torch.compile once, as all is there.

    Raises:
        ValueError, TypeError: where an argument breaks one of the conditions above.

    Example:
        >>> import regard
        >>> q, k, v = torch.randn(3, 1, 8, 5, 16).unbind()  # batch 1, 8 heads, 5 tokens
        >>> regard.attention(q, k[:, :2], v[:, :2], mask=regard.masks.causal()).shape  # 2 k/v heads
        torch.Size([1, 8, 5, 16])

    Source: Vaswani et al. 2017, equation 1; ONNX `Attention`, opset 25; Dao 2023 for the algorithm.
    """
    call = ready(
        "attention", q, k, v, mask, bias, scale, softcap, sinks, dropout, query_offset, key_offset, cache, backend
    )
    out = _attended(call)[0]
    return out if call.give is None else call.give(out)


def attention_with_stats(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    query_offset: int | Tensor | None = None,
    key_offset: int | Tensor = 0,
    cache: KVCache | None = None,
    backend: str | None = None,
    top_k: int = 0,
    received: bool = False,
    entropy: bool = False,
    max_score: bool = False,
    block: tuple[int, int] | None = None,
) -> AttentionStats:
    """Attention, and exact statistics of its weights, at O(n) memory.

    weight = exp(score − lse), before dropout.

    Args:
        q, k, v, mask, bias, scale, softcap, sinks, dropout, query_offset, key_offset, cache, backend: as in
            `attention`; statistics are taken by "native" and "reference" alone, and "sdpa" has no lse.
        top_k: how many of the largest weights of each query to report, with their keys. Default 0: none.
        received: whether to sum each key's weights over the queries. Default False.
        entropy: whether to report −Σ w ln w of each query. Default False.
        max_score: whether to report each query's largest score. Default False.
        block: `(rows, cols)`, sizes of blocks whose sum and largest weight to report. Default None.

    Returns:
        AttentionStats: out and lse are differentiable, statistics are not.

    Raises:
        ValueError, TypeError: as `attention` does, and for a top_k below 0 or a block that is not two sizes above 0.

    Example:
        >>> import regard
        >>> q = k = v = torch.eye(3)[None, None] * 9
        >>> regard.attention_with_stats(q, k, v, top_k=1).top_keys.flatten()
        tensor([0, 1, 2])

    Source: Dao 2023, Alg. 1, line 12 (lse).
    """
    top_k = check.count("attention_with_stats", "top_k", top_k, 0)
    block = check.block("attention_with_stats", block)
    asked = {"top_k": top_k, "received": received, "entropy": entropy, "max_score": max_score, "block": block}
    wanted = "statistics" if any(asked.values()) else "lse"
    call = ready(
        "attention_with_stats", q, k, v, mask, bias, scale, softcap, sinks, dropout, query_offset, key_offset, cache,
        backend, wanted=wanted,
    )  # fmt: skip
    weights = None
    if received and call.native and op.weighs(call.q, call.num_kv_heads):
        weights = call.q.new_empty(*call.q.shape[:2], call.seq_len_kv, dtype=_wide(call.q.dtype))
        asked["received"] = False
    found: dict[str, Any] = {}
    if call.native and any(asked.values()) and weights is None and call.held is None:
        out, lse, found = op.attend_with_statistics(
            call.q, call.k, call.v, **call.terms, sinks=call.sinks, dropout=call.dropout, **asked
        )
    else:
        out, lse = _attended(call, weights)
        found = _statistics(call.written_out(), lse, asked) if any(asked.values()) else {}
    if weights is not None:
        found["received"] = weights
    stats = AttentionStats(out, lse, *(found.get(name) for name in AttentionStats._fields[2:]))
    give = call.give
    return stats if give is None else AttentionStats._make(None if t is None else give(t) for t in stats)


def attention_weights(
    q: Any,
    k: Any,
    *,
    rows: slice | range = slice(None),
    cols: slice | range = slice(None),
    lse: Tensor | None = None,
    stage: str = "weights",
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    query_offset: int | Tensor | None = None,
    key_offset: int | Tensor = 0,
    cache: KVCache | None = None,
    backend: str | None = None,
) -> Any:
    """An exact tile of the weights, or of the scores on their way there.

    scaled = scale · q kᵀ; capped = softcap · tanh(scaled / softcap); biased = capped + bias, excluded = −inf;
    weights = exp(biased − lse).

    Args:
        q, k, mask, bias, scale, softcap, sinks, query_offset, key_offset: as in `attention`, on the CPU.
        backend: "native" or "reference". Default None: "native".
        rows: queries of the tile, a slice or range of step 1. Default all.
        cols: keys of the tile, likewise. Default all.
        lse: float32 (float64 for float64) `(batch, num_heads, seq_len_q)`, from `attention_with_stats` on the same
            arguments; saves computing it again. Default None.
        stage: "scaled", "capped", "biased" or "weights". Default "weights".
        dropout: accepted so that a call's arguments can be handed on; the weights are those before dropout.
        cache: refused: hand in what the cache holds, `k=cache.keys`, and both offsets.

    Returns:
        float32 (float64 for float64) `(batch, num_heads, len(rows), len(cols))`, in q's kind, without gradient. Memory
        is that of the tile.

    Raises:
        ValueError, TypeError: as `attention` does, and for rows, cols, lse or a stage that there is not.

    Example:
        >>> import regard
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> regard.attention_weights(q, k, mask=regard.masks.causal(), rows=slice(2, 4))
        tensor([[[[0.3333, 0.3333, 0.3333, 0.0000],
                  [0.2500, 0.2500, 0.2500, 0.2500]]]])

    Source: Vaswani et al. 2017, equation 1.
    """
    name = "attention_weights"
    if cache is not None:
        raise ValueError(
            f"{name}: cache must be None, for looking appends nothing; got {cache!r}. Pass k=cache.keys, "
            "key_offset=cache.key_offset and the query_offset of the queries."
        )
    check.stage(name, stage)
    values = k[..., :1] if isinstance(k, Tensor) and k.dim() == 4 else k  # stands in for v, which has no part in it
    call = ready(
        name, q, k, values, mask, bias, scale, softcap, sinks, dropout, query_offset, key_offset, None, backend,
        wanted="weights",
    )  # fmt: skip
    batch, num_heads, seq_len_q, _ = call.q.shape
    wanted_rows = check.span(name, "rows", rows, seq_len_q)
    wanted_cols = check.span(name, "cols", cols, call.seq_len_kv)
    if lse is not None:
        lse = arrays.tensor(name, "lse", lse)
        check.lse(name, lse, (batch, num_heads, seq_len_q), call.q.dtype)
    with torch.no_grad():
        if call.native:
            if stage == "weights" and lse is None:
                lse = _lse_of_rows(call, wanted_rows)
            tile = op.tile(call.q, call.k, lse, **call.terms, rows=wanted_rows, cols=wanted_cols, stage=stage)
        else:
            terms = reference.Terms(**call.terms, sinks=call.sinks)
            whole = reference.stage(call.q, call.k, terms, stage, lse)
            inside = (slice(None), slice(None), _slice(wanted_rows), _slice(wanted_cols))
            tile = whole[inside].to(_wide(call.q.dtype)).contiguous()
    return tile if call.give is None else call.give(tile)


def merge_attention(partials: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Join partial results over disjoint sets of keys into the result over all of them, exactly.

    lse = ln Σ exp(lseₙ); out = Σ exp(lseₙ − lse) outₙ.

    Ring attention, split decoding and shared prefixes are this one function. The partials are taken without sinks; a
    sink is one more partial with out = 0 and lse = sink.

    Args:
        partials: pairs `(out, lse)`, as `attention_with_stats` gives them: out `(batch, num_heads, seq_len_q,
            head_dim_v)`, lse float32 or float64 `(batch, num_heads, seq_len_q)`; axes of size 1 broadcast.

    Returns:
        `(out, lse)`, both in the dtype of lse and in the partials' kind; differentiable in all partials.

    Raises:
        ValueError, TypeError: where there is no partial, or their shapes or dtypes do not fit.

    Example:
        >>> import regard
        >>> q, k, v = torch.randn(3, 1, 2, 6, 8).unbind()
        >>> parts = [regard.attention_with_stats(q, k[:, :, s], v[:, :, s])[:2] for s in (slice(0, 4), slice(4, 6))]
        >>> out, lse = merge_attention(parts)
        >>> torch.allclose(out, regard.attention(q, k, v), atol=1e-6)
        True

    Source: Dao 2023, section 3.1; Milakov and Gimelshein 2018, equation 4.
    """
    pairs = [tuple(pair) for pair in partials]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"merge_attention: partials must be pairs (out, lse), at least one; got {len(pairs)}. Pass a list."
        )
    named = {f"{what} of partial {n}": pair[i] for n, pair in enumerate(pairs) for i, what in enumerate(("out", "lse"))}
    tensors, give = arrays.taken("merge_attention", named)
    outs, lses = tensors[::2], tensors[1::2]
    for out, lse in zip(outs, lses, strict=True):
        check.partial("merge_attention", out, lse, lses[0].dtype)
    try:
        outs = torch.broadcast_tensors(*(out.to(lses[0].dtype) for out in outs))
        lses = torch.broadcast_tensors(*lses, outs[0][..., 0])[:-1]
    except RuntimeError as unequal:
        shapes = ", ".join(f"{tuple(out.shape)} with {tuple(lse.shape)}" for out, lse in zip(outs, lses, strict=True))
        raise ValueError(
            f"merge_attention: partials must have one shape, but for axes of size 1; got {shapes}. "
            "Merge results for the same queries."
        ) from unequal
    each = torch.stack(list(lses))
    top = each.detach().amax(0)
    top = torch.where(top == -math.inf, 0.0, top)
    mass = (each - top).exp()
    total = mass.sum(0)
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    merged = torch.zeros_like(outs[0])
    for out, own in zip(outs, mass / total, strict=True):
        merged = merged + own[..., None] * torch.where(own[..., None] == 0.0, 0.0, out)
    lse = torch.where(empty, -math.inf, top + total.log())
    return (merged, lse) if give is None else (give(merged), give(lse))


def _statistics(call: Call, lse: Tensor, asked: dict[str, Any]) -> dict[str, Any]:
    """Statistics of a call whose lse is known."""
    if call.native:
        return op.statistics(call.q, call.k, lse.detach(), **call.terms, **asked)
    exact = reference.statistics(call.q, call.k, reference.Terms(**call.terms, sinks=call.sinks), **asked)
    return {name: t if t is None or name == "top_keys" else t.to(lse.dtype) for name, t in exact.items()}


def _attended(call: Call, received: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if call.native:
        held = call.held
        if held is not None and op.in_place(call.q, held, call.dropout, call.bias, call.diagonal, call.sinks):
            return op.attend_held(call.q, held, **call.terms, sinks=call.sinks, received=received)
        call = call.written_out()
        return op.attend(
            call.q, call.k, call.v, mask=call.mask, bias=call.bias, diagonal=call.diagonal, sinks=call.sinks,
            scale=call.scale, softcap=call.softcap, dropout=call.dropout, query_offset=call.query_offset,
            key_offset=call.key_offset, received=received,
        )  # fmt: skip
    call = call.written_out()
    if call.backend == "flex":
        return lowering.flex(call.q, call.k, call.v, **call.terms, sinks=call.sinks)
    if call.backend == "sdpa":
        out = lowering.sdpa(
            call.q, call.k, call.v, mask=call.mask, bias=call.bias, diagonal=call.diagonal, scale=call.scale,
            dropout=call.dropout, query_offset=call.query_offset, key_offset=call.key_offset,
        )  # fmt: skip
        return out, out.new_empty(0)  # nobody asks: `ready` has refused whoever wants lse
    keep = None
    if call.dropout:
        keep = torch.rand(*call.q.shape[:3], call.seq_len_kv) >= call.dropout
    terms = reference.Terms(**call.terms, sinks=call.sinks)
    out, lse = reference.attention(call.q, call.k, call.v, terms, keep=keep, dropout=call.dropout)
    return out.to(call.q.dtype), lse.to(_wide(call.q.dtype))


def _lse_of_rows(call: Call, rows: range) -> Tensor:
    """A full-length lse of which only `rows` are filled, by attention over those rows alone."""
    seq_len_q, own = call.q.shape[2], _slice(rows)
    bias, diagonal = call.bias, call.diagonal
    if bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, own]
    if diagonal is not None:
        first = seq_len_q - rows.stop
        diagonal = diagonal[..., first : first + max(len(rows) + call.seq_len_kv - 1, 0)]
    lse = op.attend(
        call.q[:, :, own], call.k, call.k[..., :1], mask=None if call.mask is None else call.mask.take_rows(rows),
        bias=bias, diagonal=diagonal, sinks=call.sinks, scale=call.scale, softcap=call.softcap, dropout=0.0,
        query_offset=call.query_offset + rows.start, key_offset=call.key_offset, whole=seq_len_q,
    )[1]  # fmt: skip
    if len(rows) == seq_len_q:
        return lse
    whole = lse.new_zeros(*call.q.shape[:3])
    whole[:, :, own] = lse
    return whole


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
