"""The gradient of attention's gradient, tile by tile: gradient penalties, Hessian-vector products.

Enters: what `gradient.gradients` took, and an upstream gradient of each of its results.
Leaves: gradients of grad_out, grad_lse and all else that it took, at O(n · tile) memory.
Floor 3: torch products over tiles of queries by keys; above `gradient`.

For query i and key j, with z = scale q_i · k_j, σ = dscore / dz (1 without softcap), K = keep / (1 - dropout),

    p = exp(score - lse_i)     D_i = do_i · out_i - dlse_i     ds = p (K do_i · v_j - D_i)     dz = σ ds

and the results are dq = scale dz k, dk = scale dzᵀ q, dv = (p K)ᵀ do, dbias = ds, dsink = -Σ_i exp(sink - lse_i) D_i.
With their upstream gradients A, B, C, E and G, all derivatives go through

    u = scale (A kᵀ + q Bᵀ)     w = σ u + E     h = p (w (K do · v - D) + K do · C)     e = σ h + dσ/dz u ds

    q: scale (e k + dz B)     k: scale (eᵀ q + dzᵀ A)     v: (p K w)ᵀ do     bias: h     lse: -Σ_j h
    do: (p K w) v + (p K) C - b out     out: -b do     dlse: b = Σ_j p w, and G exp(sink - lse) more with a sink
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import native, plan
from .gradient import Gradients, row_terms
from .masks import Mask
from .positions import Frame

# Letters of shapes: B batch, H num_heads, K num_kv_heads, X rows of all heads of a group, R rows of a panel, C its
# columns, D head_dim.
_ROWS = 256  # queries of one tile, at most
_PAIRS = 1 << 21  # scores of one tile, all heads together


class SecondGradients(NamedTuple):
    """Gradients in the dtypes of what they belong to; None where there is no such input."""

    grad_out: Tensor
    grad_lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    bias: Tensor | None
    diagonal: Tensor | None
    sinks: Tensor | None


@torch.autocast("cpu", enabled=False)  # a backward pass may run inside one
def second_gradients(
    upstream: Gradients,
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None,
    diagonal: Tensor | None,
    sinks: Tensor | None,
    mask: Mask | None,
    frame: Frame,
    scale: float,
    softcap: float,
    dropout: float,
    seed: int,
) -> SecondGradients:
    """Gradients of Σ ⟨upstream, gradient.gradients(...)⟩, out and lse taken as inputs like the others.

    Args:
        upstream: for each result of `gradients` its upstream gradient; None counts as zeros.
    """
    wide = lse.dtype
    heads, group = k.shape[1], q.shape[1] // max(1, k.shape[1])
    no_key = lse == -math.inf
    shift = torch.where(no_key, 0.0, lse)
    common = row_terms(grad_out, grad_lse, out, lse)

    def zeros(t: Tensor) -> Tensor:
        return torch.zeros(t.shape, dtype=wide)

    of_do, of_q, of_k, of_v = zeros(grad_out), zeros(q), zeros(k), zeros(v)
    of_lse, of_dlse = zeros(lse), zeros(lse)
    of_bias = None if bias is None else zeros(bias)
    of_diagonal = None if diagonal is None else zeros(diagonal)
    up_bias = None if upstream.bias is None else upstream.bias.to(wide)
    up_diagonal = None if upstream.diagonal is None else upstream.diagonal.to(wide)

    for panel, columns, keep in _tiles(mask, frame, dropout, seed, wide):
        visible = panel.visible(columns)
        if visible is not None and not bool(visible.any()):
            continue
        hidden = None if visible is None else ~visible
        r, c = slice(panel.rows.start, panel.rows.stop), slice(columns.start, columns.stop)
        q_BKXD, do_BKXD, a_BKXD = (
            None if t is None else _grouped(t[:, :, r].to(wide), heads) for t in (q, grad_out, upstream.q)
        )
        k_BKCD, v_BKCD, b_BKCD, c_BKCD = (
            None if t is None else t[:, :, c].to(wide) for t in (k, v, upstream.k, upstream.v)
        )
        assert q_BKXD is not None and do_BKXD is not None and k_BKCD is not None and v_BKCD is not None

        score_BHRC = _ungrouped(q_BKXD @ k_BKCD.mT, group).mul_(scale)
        tanh = slope = None
        if softcap:
            tanh = torch.tanh_(score_BHRC.div_(softcap))
            score_BHRC = tanh * softcap
            slope = 1 - _without(tanh, hidden).square()
        if bias is not None:
            score_BHRC += _part(bias, r, c).to(wide)
        if diagonal is not None:
            score_BHRC += _diagonals(diagonal.to(wide), panel.rows, columns, frame.seq_len_q)
        p_BHRC = _without(score_BHRC.sub_(shift[:, :, r, None]).exp_(), hidden)
        kept_BHRC = p_BHRC if keep is None else p_BHRC * keep

        # From here on a row with NaN matters to whoever sees it through p alone; to the others it must not.
        q_BKXD, k_BKCD, v_BKCD = _finite(q_BKXD), _finite(k_BKCD), _finite(v_BKCD)
        excess = _ungrouped(do_BKXD @ v_BKCD.mT, group)  # K do · v - D
        excess = (excess if keep is None else excess.mul_(keep)).sub_(common[:, :, r, None])
        ds_BHRC = p_BHRC * excess
        dz_BKXC = _grouped(ds_BHRC if slope is None else ds_BHRC * slope, heads)

        u_BHRC = None
        for left, right in ((a_BKXD, k_BKCD), (q_BKXD, b_BKCD)):
            if left is not None and right is not None:
                product = _ungrouped(left @ right.mT, group).mul_(scale)
                u_BHRC = product if u_BHRC is None else u_BHRC.add_(product)
        w_BHRC = torch.zeros_like(p_BHRC) if u_BHRC is None else u_BHRC if slope is None else u_BHRC * slope
        if up_bias is not None:
            w_BHRC = w_BHRC + _part(up_bias, r, c)
        if up_diagonal is not None:
            w_BHRC = w_BHRC + _diagonals(up_diagonal, panel.rows, columns, frame.seq_len_q)
        h_BHRC = w_BHRC * ds_BHRC
        pkw_BHRC = w_BHRC * kept_BHRC
        of_dlse[:, :, r] += (w_BHRC * p_BHRC).sum(-1)

        pkw_BKXC = _grouped(pkw_BHRC, heads)
        of_do_part = pkw_BKXC @ v_BKCD
        of_v[:, :, c] += pkw_BKXC.mT @ do_BKXD
        if c_BKCD is not None:
            h_BHRC += _ungrouped(do_BKXD @ c_BKCD.mT, group).mul_(kept_BHRC)
            of_do_part += _grouped(kept_BHRC, heads) @ c_BKCD
        of_do[:, :, r] += _ungrouped(of_do_part, group)
        of_lse[:, :, r] -= h_BHRC.sum(-1)
        if of_bias is not None:
            part = _part(of_bias, r, c)
            part += h_BHRC.sum_to_size(part.shape)
        if of_diagonal is not None:
            _add_diagonals(of_diagonal, h_BHRC, panel.rows, columns, frame.seq_len_q)

        if slope is not None and tanh is not None:
            if u_BHRC is not None:
                h_BHRC -= tanh.mul_(2 / softcap).mul_(u_BHRC).mul_(ds_BHRC)
            h_BHRC *= slope
        e_BKXC = _grouped(h_BHRC, heads)
        of_q_part, of_k_part = e_BKXC @ k_BKCD, e_BKXC.mT @ q_BKXD
        if b_BKCD is not None:
            of_q_part += dz_BKXC @ b_BKCD
        if a_BKXD is not None:
            of_k_part += dz_BKXC.mT @ a_BKXD
        of_q[:, :, r] += _ungrouped(of_q_part, group).mul_(scale)
        of_k[:, :, c] += of_k_part.mul_(scale)

    of_sinks = None
    if sinks is not None:
        of_sinks = zeros(sinks)
        if upstream.sinks is not None:
            share = torch.exp(sinks.to(wide).view(1, -1, 1) - shift) * upstream.sinks.to(wide).view(1, -1, 1)
            share = share.where(~no_key, 0.0)
            of_sinks -= (share * common).sum((0, 2))
            of_lse += share * common
            of_dlse += share
    of_do -= of_dlse[..., None] * out.to(wide)
    of_out = -of_dlse[..., None] * grad_out.to(wide)
    return SecondGradients(
        of_do.to(grad_out.dtype), of_dlse, of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), of_out.to(out.dtype),
        of_lse,
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
        None if of_diagonal is None or diagonal is None else of_diagonal.to(diagonal.dtype),
        None if of_sinks is None or sinks is None else of_sinks.to(sinks.dtype),
    )  # fmt: skip


def _tiles(
    mask: Mask | None, frame: Frame, dropout: float, seed: int, wide: torch.dtype
) -> Iterator[tuple[plan.Panel, range, Tensor | None]]:
    """Every tile of the scores that may hold a visible pair: its queries, its keys, and K."""
    maps = max(1, frame.batch * frame.num_heads)
    for panel in plan.panels(mask, frame, most=max(16, min(_ROWS, _PAIRS // (maps * _ROWS)))):
        span = panel.columns(frame.seq_len_kv)
        width = max(64, _PAIRS // max(1, maps * len(panel.rows)))
        keep = None
        if dropout and len(span):
            keep = _kept(frame, panel.rows, span, seed, dropout)
        for start in range(span.start, span.stop, width):
            columns = range(start, min(start + width, span.stop))
            part = None
            if keep is not None:
                part = keep[..., start - span.start : columns.stop - span.start].to(wide).div_(1 - dropout)
            yield panel, columns, part


def _without(t: Tensor, hidden: Tensor | None) -> Tensor:
    return t if hidden is None else t.masked_fill_(hidden, 0.0)


def _grouped(t_BHRD: Tensor, num_kv_heads: int) -> Tensor:
    """(B, H, R, D) -> (B, K, G R, D): the rows that read one k/v head, under one another."""
    b, h, r, d = t_BHRD.shape
    return t_BHRD.reshape(b, num_kv_heads, h // num_kv_heads * r, d)


def _ungrouped(t_BKXD: Tensor, group: int) -> Tensor:
    b, k, x, d = t_BKXD.shape
    return t_BKXD.view(b, k * group, x // group, d)


def _finite(t: Tensor) -> Tensor:
    """Rows with NaN or inf as zeros: 0 · NaN would pass the mask, and who may see them has a NaN weight already."""
    finite = t.isfinite().all(-1, keepdim=True)
    return t if bool(finite.all()) else torch.where(finite, t, 0.0)


def _part(t: Tensor, rows: slice, columns: slice) -> Tensor:
    """A panel of a bias; axes of size 1 broadcast."""
    t = t[:, :, rows] if t.shape[2] > 1 else t
    return t[:, :, :, columns] if t.shape[3] > 1 else t


def _diagonals(diagonal: Tensor, rows: range, columns: range, seq_len_q: int) -> Tensor:
    """Bias (b, h, R, C) of a panel from entries j - i + seq_len_q - 1, as a view of the span that the panel touches."""
    low = columns.start - (rows.stop - 1) + seq_len_q - 1
    span = diagonal[..., low : low + len(rows) + len(columns) - 1]
    return span.unfold(-1, len(columns), 1).flip(-2)


def _add_diagonals(grad: Tensor, ds_BHRC: Tensor, rows: range, columns: range, seq_len_q: int) -> None:
    """Adds the sums along the diagonals of a panel: rows flipped and shifted by one each, they add up downwards."""
    b, h, r, c = ds_BHRC.shape
    wide = torch.nn.functional.pad(ds_BHRC.flip(-2), (0, r))
    sheared = wide.flatten(-2)[..., : r * (r + c) - r].view(b, h, r, r + c - 1)
    low = columns.start - (rows.stop - 1) + seq_len_q - 1
    part = grad[..., low : low + r + c - 1]
    part += sheared.sum(-2).sum_to_size(part.shape)


def _kept(frame: Frame, rows: range, columns: range, seed: int, dropout: float) -> Tensor:
    """The forward pass's dropout pattern of a panel, bool (B, H, R, C)."""
    keep = torch.empty(frame.batch, frame.num_heads, len(rows), frame.seq_len_kv, dtype=torch.uint8)
    for b in range(frame.batch):
        for h in range(frame.num_heads):
            native.kernels().dropout(
                seed, b, h, rows.start, len(rows), frame.seq_len_kv, dropout, keep[b, h].data_ptr()
            )
    return keep[..., columns.start : columns.stop] != 0
