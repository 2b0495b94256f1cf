"""The gradient of attention, recomputed from q, k, v and lse tile by tile.

Enters: the inputs, out, lse and their upstream gradients.
Leaves: gradients of q, k, v, bias and sinks, summed in float32 (float64 for float64), at O(n) memory.
Floor 2: the backward kernel.

For query i and key j, with p = exp(score - lse) (FlashAttention-2, Dao 2023, Alg. 2):

    dv_j = sum_i p~_ij do_i      p~: p after dropout
    dp_ij = keep_ij / (1 - dropout) do_i . v_j
    ds_ij = p_ij (dp_ij - do_i . out_i + dlse_i)
    dsink = sum_i exp(sink - lse_i) (dlse_i - do_i . out_i)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native, plan
from .masks import Mask
from .positions import Frame


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
    grad_sinks = None
    if sinks is not None and wanted[5]:
        common = row_terms(grad_out, grad_lse, out, lse)
        per_row = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse).where(lse != -math.inf, 0.0) * common
        grad_sinks = per_row.sum((0, 2)).neg_().to(sinks.dtype)
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
    grad_bias = None if bias is None or not wanted[3] else torch.zeros(bias.shape, dtype=lse.dtype)
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
            native.ABSENT if grad_bias is None else native.down(native.view(grad_bias), grad_bias, first),
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
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        of_diagonal,
        grad_sinks,
    )


def row_terms(grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """do_i · out_i - dlse_i, which all score gradients of a row have in common; 0 for a row without keys."""
    common = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1) - grad_lse
    return torch.where(lse == -math.inf, 0.0, common)
