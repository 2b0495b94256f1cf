"""The gradient of additive attention's gradient, tile by tile.

Enters: what the backward kernel took, and an upstream gradient of each of its results.
Leaves: gradients of all that it took, at O(n · tile) memory.
Floor 3: torch operations over tiles of queries by keys by dim.

With t = tanh(q_i + k_j), g = 1 - t², p = exp(weight · t - lse_i), D_i = do_i · out_i - dlse_i and
ds = p (do_i · v_j - D_i), the results are dq = Σ_j ds weight g, dk = Σ_i of the same, dv = pᵀ do, dweight = Σ_ij ds t.
With their upstream gradients A, B, C and W:

    u = Σ_d (A_i + B_j) weight g + W t     h = p (u (do · v - D) + do · C)
    x = g (h weight + ds (W - 2 t weight (A + B)))

    q: Σ_j x     k: Σ_i x     weight: Σ_ij h t + ds g (A + B)     v: (p u)ᵀ do     lse: -Σ_j h
    do: (p u) v + p C - b out     out: -b do     dlse: b = Σ_j p u
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import plan
from .masks import Mask
from .positions import Frame

# letters of shapes: B batch, R queries and C keys of a tile, D dim
_ROWS = 64  # queries of one tile, at most
_VALUES = 1 << 20  # values of tanh of one tile, all batch rows together


@torch.autocast("cpu", enabled=False)  # a backward pass may run inside one
def second_gradients(
    upstream: Sequence[Tensor | None],
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Mask | None,
) -> list[Tensor]:
    """Gradients of grad_out, grad_lse, q, k, v, weight, out and lse, each in its own dtype.

    Args:
        upstream: of the gradients of q, k, v and weight; None counts as zeros.
    """
    wide = lse.dtype
    do, q_, k_, v_, w, out_ = (t.to(wide) for t in (grad_out, q, k, v, weight, out))
    a, b, c, of_weight = (
        torch.zeros(t.shape, dtype=wide) if given is None else given.to(wide)
        for given, t in zip(upstream, (q, k, v, weight), strict=True)
    )
    no_key = lse == -math.inf
    shift = torch.where(no_key, 0.0, lse)
    common = torch.where(no_key, 0.0, (do * out_).sum(-1) - grad_lse)
    of_do, of_dlse, of_q, of_k, of_v, of_w, of_lse = (torch.zeros_like(t) for t in (do, shift, q_, k_, v_, w, shift))
    batch, _, dim = q.shape
    width = max(16, _VALUES // max(1, batch * _ROWS * dim))
    frame = Frame(batch, 1, q.shape[1], k.shape[1])
    for panel in plan.panels(mask, frame, most=_ROWS):
        r = slice(panel.rows.start, panel.rows.stop)
        span = panel.columns(k.shape[1])
        for start in range(span.start, span.stop, width):
            columns = range(start, min(start + width, span.stop))
            visible = panel.visible(columns)
            if visible is not None and not bool(visible.any()):
                continue
            n = slice(columns.start, columns.stop)
            hidden = None if visible is None else ~visible[:, 0]
            t_BRCD = torch.tanh(q_[:, r, None] + k_[:, None, n])
            p_BRC = (t_BRCD @ w).sub_(shift[:, r, None]).exp_()
            if hidden is not None:
                p_BRC.masked_fill_(hidden, 0.0)
                t_BRCD = t_BRCD.masked_fill_(hidden[..., None], 0.0)  # NaN of a hidden key
            v_BCE = v_[:, n] if hidden is None else _finite(v_[:, n])
            g_BRCD = 1 - t_BRCD.square()
            ab_BRCD = a[:, r, None] + b[:, None, n]
            excess = (do[:, r] @ v_BCE.mT).sub_(common[:, r, None])
            ds_BRC = p_BRC * excess
            u_BRC = (ab_BRCD * g_BRCD) @ w + t_BRCD @ of_weight
            pu_BRC = p_BRC * u_BRC
            h_BRC = pu_BRC * excess + p_BRC * (do[:, r] @ c[:, n].mT)
            x_BRCD = (
                (ds_BRC[..., None] * (of_weight - 2 * t_BRCD * w * ab_BRCD)).add_(h_BRC[..., None] * w).mul_(g_BRCD)
            )
            of_q[:, r] += x_BRCD.sum(2)
            of_k[:, n] += x_BRCD.sum(1)
            of_w += torch.einsum("brc,brcd->d", h_BRC, t_BRCD) + torch.einsum(
                "brc,brcd->d", ds_BRC, g_BRCD.mul_(ab_BRCD)
            )
            of_v[:, n] += pu_BRC.mT @ do[:, r]
            of_do[:, r] += pu_BRC @ v_BCE + p_BRC @ c[:, n]
            of_lse[:, r] -= h_BRC.sum(-1)
            of_dlse[:, r] += pu_BRC.sum(-1)
    of_do -= of_dlse[..., None] * out_
    of_out = -of_dlse[..., None] * do
    found = (of_do, of_dlse, of_q, of_k, of_v, of_w, of_out, of_lse)
    like = (grad_out, grad_lse, q, k, v, weight, out, lse)
    return [t.to(own.dtype) for t, own in zip(found, like, strict=True)]


def _finite(v: Tensor) -> Tensor:
    """Rows with NaN or inf as zeros: 0 · NaN would pass the mask, and who may see them has a NaN already."""
    return torch.where(v.isfinite().all(-1, keepdim=True), v, 0.0)
