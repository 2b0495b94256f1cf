"""Attention spelt out: the oracle that every backend is measured against.

Enters: checked tensors, a mask and a resolved bias.
Leaves: out, lse, the four stages and all statistics in float64, by plain torch operations on the whole score matrix (n²
memory), differentiable by autograd. It follows the contract of attention sentence by sentence.
Floor 1: above masks, below the operator.
"""

# B batch, H num_heads, K num_kv_heads, G queries heads per k/v head, Q seq_len_q, S seq_len_kv, D head_dim

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.masks import Mask
from regard.positions import Frame

STAGES = ("scaled", "capped", "biased", "weights")


@dataclass(frozen=True)
class Terms:
    """What stands between q kᵀ and the weights.

    Args:
        mask: which keys each query may see; None = all.
        bias: broadcastable to (B, H, Q, S), or None.
        diagonal: (1 or B, 1 or H, Q + S − 1), entry j − i + Q − 1 for query i and key j, or None.
        sinks: (H,), or None.
        scale: factor of q kᵀ.
        softcap: bound of the scores, or None.
        query_offset: position of the first query, int or (B,).
        key_offset: position of the first key, int or (B,).
    """

    mask: Mask | None = None
    bias: Tensor | None = None
    diagonal: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    query_offset: int | Tensor = 0
    key_offset: int | Tensor = 0


def attention(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, *, keep: Tensor | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp.

    softmax(where(mask, cap(scale · q kᵀ) + bias, −inf)) · v, a sink adding exp(sink) to the denominator only.

    Args:
        q: (B, H, Q, D).
        k: (B, K, S, D).
        v: (B, K, S, Dv).
        terms: mask, bias, sinks and numbers.
        keep: bool, broadcastable to (B, H, Q, S): weights that dropout leaves, scaled by 1 / (1 − dropout). Default
            all.
        dropout: probability that a weight is dropped. Default 0.

    Returns:
        out (B, H, Q, Dv) and lse (B, H, Q), float64.
    """
    visible_BHQS = _visible(q, k, terms)
    weights_BHQS, lse_BHQ = _softmax(_biased(q, k, terms, visible_BHQS), visible_BHQS, terms.sinks)
    if keep is not None:
        weights_BHQS = torch.where(keep, weights_BHQS / (1.0 - dropout), 0.0)
    return _mixed(weights_BHQS, v, visible_BHQS), lse_BHQ


def stage(q: Tensor, k: Tensor, terms: Terms, name: str, lse: Tensor | None = None) -> Tensor:
    """The whole matrix (B, H, Q, S), float64, at one of `STAGES`; `lse` (B, H, Q) is used where it is given."""
    if name in ("scaled", "capped"):
        return _capped(_products(q, k, None) * terms.scale, terms.softcap if name == "capped" else None)
    visible_BHQS = _visible(q, k, terms)
    biased_BHQS = _biased(q, k, terms, visible_BHQS)
    if name == "biased":
        return biased_BHQS
    if lse is None:
        return _softmax(biased_BHQS, visible_BHQS, terms.sinks)[0]
    weights_BHQS = (biased_BHQS - lse.double()[..., None]).exp()
    return torch.where(biased_BHQS == -math.inf, 0.0, weights_BHQS)


@torch.no_grad()
def statistics(
    q: Tensor,
    k: Tensor,
    terms: Terms,
    *,
    top_k: int = 0,
    received: bool = False,
    entropy: bool = False,
    max_score: bool = False,
    block: tuple[int, int] | None = None,
) -> dict[str, Tensor | None]:
    """Statistics of the weights before dropout, float64; what was not asked for is None.

    Returns:
        top_keys, top_weights (B, H, Q, top_k): largest first, on a tie the lower key; -1 and 0 past the visible keys.
        received (B, H, S): sum of a key's weights. entropy (B, H, Q): −Σ w ln w. max_score (B, H, Q): after bias and
        mask. block_mass, block_max (B, H, ⌈Q / rows⌉, ⌈S / cols⌉): sum and maximum of the weights of a block.
    """
    visible_BHQS = _visible(q, k, terms)
    biased_BHQS = _biased(q, k, terms, visible_BHQS)
    weights_BHQS = _softmax(biased_BHQS, visible_BHQS, terms.sinks)[0]
    asked: dict[str, Tensor | None] = dict.fromkeys(
        ("top_keys", "top_weights", "received", "entropy", "max_score", "block_mass", "block_max")
    )
    if top_k:
        order = torch.sort(biased_BHQS, dim=-1, descending=True, stable=True).indices[..., :top_k]
        past = biased_BHQS.gather(-1, order) == -math.inf
        missing = (0, top_k - order.shape[-1])
        asked["top_keys"] = pad(order.masked_fill(past, -1), missing, value=-1)
        asked["top_weights"] = pad(weights_BHQS.gather(-1, order).masked_fill(past, 0.0), missing)
    if received:
        asked["received"] = weights_BHQS.sum(-2)
    if entropy:
        asked["entropy"] = -torch.special.xlogy(weights_BHQS, weights_BHQS).sum(-1)
    if max_score:
        asked["max_score"] = _largest(biased_BHQS)
    if block is not None:
        rows, cols = block
        seq_len_q, seq_len_kv = weights_BHQS.shape[2:]
        whole = pad(weights_BHQS, (0, -seq_len_kv % cols, 0, -seq_len_q % rows))
        blocks = whole.unflatten(3, (-1, cols)).unflatten(2, (-1, rows))
        asked["block_mass"], asked["block_max"] = blocks.sum((3, 5)), blocks.amax((3, 5))
    return asked


def _visible(q: Tensor, k: Tensor, terms: Terms) -> Tensor:
    whole = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if terms.mask is None:
        return torch.ones(whole, dtype=torch.bool)
    return terms.mask.dense(Frame(*whole, terms.query_offset, terms.key_offset)).expand(whole)


def _biased(q: Tensor, k: Tensor, terms: Terms, visible_BHQS: Tensor) -> Tensor:
    """Scores after bias and mask. A query that sees no key is taken as 0, so that its NaN reaches no gradient."""
    q = torch.where(visible_BHQS.any(-1, keepdim=True), q.double(), 0.0)
    scores_BHQS = _capped(_products(q, k, visible_BHQS) * terms.scale, terms.softcap)
    if terms.bias is not None:
        scores_BHQS = scores_BHQS + terms.bias.double()
    if terms.diagonal is not None:
        diagonal = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] + q.shape[2] - 1
        scores_BHQS = scores_BHQS + terms.diagonal.double()[..., diagonal]
    return torch.where(visible_BHQS, scores_BHQS, -math.inf)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _softmax(biased_BHQS: Tensor, visible_BHQS: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    m_BHQ = _largest(biased_BHQS)
    if sinks is not None:
        m_BHQ = torch.maximum(m_BHQ, sinks.double()[:, None])
    m_BHQ = torch.where(m_BHQ == -math.inf, 0.0, m_BHQ).detach()
    p_BHQS = torch.where(visible_BHQS, (biased_BHQS - m_BHQ[..., None]).exp(), 0.0)
    l_BHQ = p_BHQS.sum(-1)
    if sinks is not None:
        l_BHQ = l_BHQ + (sinks.double()[:, None] - m_BHQ).exp()
    empty_BHQ = l_BHQ == 0.0
    l_BHQ = torch.where(empty_BHQ, 1.0, l_BHQ)
    return p_BHQS / l_BHQ[..., None], torch.where(empty_BHQ, -math.inf, m_BHQ + l_BHQ.log())


def _largest(biased_BHQS: Tensor) -> Tensor:
    if not biased_BHQS.shape[-1]:
        return biased_BHQS.new_full(biased_BHQS.shape[:-1], -math.inf)
    return biased_BHQS.detach().amax(-1)


def _products(q: Tensor, k: Tensor, visible_BHQS: Tensor | None) -> Tensor:
    """q kᵀ (B, H, Q, S). Rows of k with NaN or inf are kept from queries that do not see them, gradients too."""
    q_BKGQD = q.double().unflatten(1, (k.shape[1], -1))
    k, strange, columns = _split(k.double(), visible_BHQS)
    scores_BKGQS = q_BKGQD @ k[:, :, None].mT
    if visible_BHQS is not None and columns.numel():
        seen = visible_BHQS.unflatten(1, (k.shape[1], -1))[..., columns, None]
        rows = torch.where(seen, strange[:, :, None, None, columns], 0.0)
        scores_BKGQS = scores_BKGQS.index_add(-1, columns, (q_BKGQD[..., None, :] * rows).sum(-1))
    return scores_BKGQS.flatten(1, 2)


def _mixed(weights_BHQS: Tensor, v: Tensor, visible_BHQS: Tensor) -> Tensor:
    """weights · v (B, H, Q, Dv), NaN and inf handled as in `_products`."""
    v, strange, columns = _split(v.double(), visible_BHQS)
    weights_BKGQS = weights_BHQS.unflatten(1, (v.shape[1], -1))
    out_BKGQD = weights_BKGQS @ v[:, :, None]
    if columns.numel():
        seen = visible_BHQS.unflatten(1, (v.shape[1], -1))[..., columns, None]
        rows = torch.where(seen, strange[:, :, None, None, columns], 0.0)
        out_BKGQD = out_BKGQD + (weights_BKGQS[..., columns, None] * rows).sum(-2)
    return out_BKGQD.flatten(1, 2)


def _split(x: Tensor, visible_BHQS: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The finite rows of k or v, the others (each 0 where the row is not of its kind), and the keys of those others.

    Rows that no query sees are 0 in both.
    """
    none = torch.zeros(0, dtype=torch.int64)
    if visible_BHQS is None:
        return x, x, none
    seen_BKS = visible_BHQS.unflatten(1, (x.shape[1], -1)).flatten(2, 3).any(2)
    x = torch.where(seen_BKS[..., None], x, 0.0)
    strange_BKS = ~x.isfinite().all(-1, keepdim=True)
    columns = strange_BKS.flatten(0, 1).any(0)[:, 0].nonzero()[:, 0]
    if not columns.numel():
        return x, x, none
    return torch.where(strange_BKS, 0.0, x), torch.where(strange_BKS, x, 0.0), columns
