"""The gradient of attention, recomputed from q, k, v and lse tile by tile.

Enters: the inputs, out, lse and their upstream gradients.
Leaves: gradients of q, k, v, bias and sinks, summed in float32 (float64 for float64), at O(n) memory.
Floor 2: the backward kernel; torch products over panels of rows where a dense bias wants its gradient.

For query i and key j, with p = exp(score - lse) (FlashAttention-2, Dao 2023, Alg. 2):

    dv_j = sum_i p~_ij do_i      p~: p after dropout
    dp_ij = keep_ij / (1 - dropout) do_i . v_j
    ds_ij = p_ij (dp_ij - do_i . out_i + dlse_i)
    dsink = sum_i exp(sink - lse_i) (dlse_i - do_i . out_i)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native, plan
from .masks import Mask
from .positions import Frame

# Letters of shapes: B batch, H num_heads, K num_kv_heads, X rows of all heads of a group, R rows of a panel, C its
# columns, D head_dim.
_PAIRS = 1 << 22  # scores of one panel, all heads together


@dataclass(frozen=True)
class Gradients:
    """Gradients in the inputs' dtypes; None where they were not wanted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    diagonal: Tensor | None
    sinks: Tensor | None


def gradients(
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
    wanted: tuple[bool, ...],
) -> Gradients:
    """Gradients of `op.attend`'s two results.

    Args:
        wanted: for q, k, v, bias, diagonal, sinks: whether its gradient is.
    """
    dense = bias is not None and wanted[3]
    common = row_terms(grad_out, grad_lse, out, lse) if dense or (sinks is not None and wanted[5]) else None
    grad_sinks = None
    if sinks is not None and wanted[5] and common is not None:
        per_row = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse).where(lse != -math.inf, 0.0) * common
        grad_sinks = per_row.sum((0, 2)).neg_().to(sinks.dtype)
    terms = {
        "bias": bias, "diagonal": diagonal, "mask": mask, "frame": frame, "scale": scale, "softcap": softcap,
        "dropout": dropout, "seed": seed, "wanted": wanted,
    }  # fmt: skip
    if dense and common is not None:
        found = _by_panels(grad_out, common, q, k, v, lse, **terms)
    else:
        found = _by_kernel(grad_out, grad_lse, q, k, v, out, lse, **terms)
    return dataclasses.replace(found, sinks=grad_sinks)


def row_terms(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """do_i · out_i - dlse_i, which all score gradients of a row have in common; 0 for a row without keys."""
    common = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - grad_lse
    return torch.where(lse == -math.inf, 0.0, common)


def _by_kernel(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    bias: Tensor | None, diagonal: Tensor | None, mask: Mask | None, frame: Frame, scale: float, softcap: float,
    dropout: float, seed: int, wanted: tuple[bool, ...],
) -> Gradients:  # fmt: skip
    """Every gradient but a dense bias's, by kernels/backward.cc."""
    batch, num_heads, seq_len_q, head_dim = q.shape
    num_kv_heads, seq_len_kv, head_dim_v = k.shape[1], k.shape[2], v.shape[3]
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros(k.shape, dtype=lse.dtype)
    grad_v = torch.zeros(v.shape, dtype=lse.dtype)
    # Parts of the keys, each with its own sum for dq: by the number of keys alone, so that no bit depends on threads.
    part_keys = max(512, -(-seq_len_kv // (4 * 256)) * 256)
    parts = -(-seq_len_kv // part_keys)
    diagonals = seq_len_q + seq_len_kv - 1
    grad_diagonal = None
    if diagonal is not None and wanted[4]:
        grad_diagonal = torch.zeros(parts, batch, num_heads, diagonals, dtype=lse.dtype)
    threads = native.threads(batch * num_heads * seq_len_q * seq_len_kv * (head_dim + head_dim_v))
    for panel in plan.panels(mask, frame):
        first, count = panel.rows.start, len(panel.rows)
        native.kernels().backward(
            native.isa_number(), native.DTYPES[q.dtype],
            (batch, num_heads, num_kv_heads, count, seq_len_kv, head_dim, head_dim_v),
            native.down(native.operand(q), q, first), native.operand(k), native.operand(v),
            native.down(native.operand(out), out, first), native.down(native.operand(grad_out), grad_out, first),
            native.rows_view(lse, first), native.rows_view(grad_lse, first),
            native.down(native.operand(grad_q), grad_q, first), grad_k.data_ptr(), grad_v.data_ptr(),
            0 if grad_diagonal is None else grad_diagonal.data_ptr(), diagonals, seq_len_q - 1,
            native.bias_view(bias, diagonal, first, seq_len_q), panel.argument(), scale, softcap, dropout, seed, first,
            part_keys, threads,
        )  # fmt: skip
    of_diagonal = None
    if grad_diagonal is not None and diagonal is not None:
        of_diagonal = grad_diagonal.sum(0).sum_to_size(diagonal.shape).to(diagonal.dtype)
    return Gradients(
        grad_q if wanted[0] else None,
        grad_k.to(k.dtype) if wanted[1] else None,
        grad_v.to(v.dtype) if wanted[2] else None,
        None,
        of_diagonal,
        None,
    )


@torch.autocast("cpu", enabled=False)  # a backward pass may run inside one
def _by_panels(
    grad_out: Tensor, common: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *,
    bias: Tensor | None, diagonal: Tensor | None, mask: Mask | None, frame: Frame, scale: float, softcap: float,
    dropout: float, seed: int, wanted: tuple[bool, ...],
) -> Gradients:  # fmt: skip
    """The same by torch products, a panel of rows at a time."""
    wide = lse.dtype
    num_kv_heads, group = k.shape[1], q.shape[1] // max(1, k.shape[1])
    shift = torch.where(lse == -math.inf, 0.0, lse)

    grad_q = torch.zeros(q.shape, dtype=wide) if wanted[0] else None
    grad_k = torch.zeros(k.shape, dtype=wide)
    grad_v = torch.zeros(v.shape, dtype=wide)
    grad_bias = torch.zeros(bias.shape, dtype=wide) if bias is not None and wanted[3] else None
    grad_diagonal = torch.zeros(diagonal.shape, dtype=wide) if diagonal is not None and wanted[4] else None

    most = max(1, min(256, _PAIRS // max(1, q.shape[0] * q.shape[1] * k.shape[2])))
    for panel in plan.panels(mask, frame, most=most):
        rows, columns = panel.rows, panel.columns(k.shape[2])
        if len(columns) == 0:
            continue
        r, c = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        q_BKXD, do_BKXD = (_grouped(t[:, :, r].to(wide), num_kv_heads) for t in (q, grad_out))
        k_BKCD, v_BKCD = k[:, :, c].to(wide), v[:, :, c].to(wide)

        p_BHRC = _ungrouped(q_BKXD @ k_BKCD.mT, group).mul_(scale)
        slope = None
        if softcap:
            slope = torch.tanh_(p_BHRC.div_(softcap))
            p_BHRC = slope * softcap
        if bias is not None:
            p_BHRC += _part(bias, r, c).to(wide)
        if diagonal is not None:
            p_BHRC += _diagonals(diagonal.to(wide), rows, columns, frame.seq_len_q)
        p_BHRC = p_BHRC.sub_(shift[:, :, r, None]).exp_()
        visible = panel.visible(columns)
        if visible is not None:
            p_BHRC.masked_fill_(~visible, 0.0)  # NaN of a key that the query may not see goes too

        dp_BHRC = _ungrouped(do_BKXD @ v_BKCD.mT, group)
        kept_BHRC = p_BHRC
        if dropout:
            keep = _kept(frame, rows, columns, seed, dropout).to(wide).div_(1 - dropout)
            kept_BHRC = p_BHRC * keep
            dp_BHRC *= keep
        ds_BHRC = dp_BHRC.sub_(common[:, :, r, None]).mul_(p_BHRC)
        if visible is not None:
            ds_BHRC.masked_fill_(~visible, 0.0)

        if wanted[2]:
            grad_v[:, :, c] += _grouped(kept_BHRC, num_kv_heads).mT @ do_BKXD
        if grad_bias is not None:
            part = _part(grad_bias, r, c)
            part += ds_BHRC.sum_to_size(part.shape)
        if grad_diagonal is not None:
            _add_diagonals(grad_diagonal, ds_BHRC, rows, columns, frame.seq_len_q)
        if slope is not None:
            ds_BHRC *= slope.square_().neg_().add_(1)
            if visible is not None:
                ds_BHRC.masked_fill_(~visible, 0.0)
        ds_BKXC = _grouped(ds_BHRC, num_kv_heads)
        if grad_q is not None:
            grad_q[:, :, r] = _ungrouped(ds_BKXC @ _finite(k_BKCD), group).mul_(scale)
        if wanted[1]:
            grad_k[:, :, c] += (ds_BKXC.mT @ _finite(q_BKXD)).mul_(scale)

    return Gradients(
        q=None if grad_q is None else grad_q.to(q.dtype),
        k=grad_k.to(k.dtype) if wanted[1] else None,
        v=grad_v.to(v.dtype) if wanted[2] else None,
        bias=None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        diagonal=None if grad_diagonal is None or diagonal is None else grad_diagonal.to(diagonal.dtype),
        sinks=None,
    )


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
