"""How close is close enough, stated once; and attention spelt out a second time, number by number.

Enters: what a call was given.
Leaves: the answer that it must give, in NumPy float64, and the error that rounding allows.
Floor: below the tests; knows nothing of regard.
"""

import math

import numpy as np
import torch
from torch import Tensor


def tolerance(dtype: torch.dtype, length: int, largest: float = 4.0) -> float:
    """Error that rounding allows in a sum of `length` weighted numbers up to `largest`.

    The wide type (float32 or float64) rounds scores and sums: about √length roundings add up, times a margin of 8. A
    half type rounds each weight and the result once more.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return largest * (
        8.0 * torch.finfo(wide).eps * math.sqrt(length + 16.0) + (dtype != wide) * 2 * torch.finfo(dtype).eps
    )


def assert_close(got: Tensor, want: Tensor | np.ndarray, dtype: torch.dtype, length: int, largest: float = 4.0) -> None:
    """Infinities in the same places, everything else within `tolerance`; no NaN."""
    given, wanted = (
        got.detach().double().numpy(),
        np.asarray(want if isinstance(want, np.ndarray) else want.detach().double()),
    )
    assert given.shape == wanted.shape
    assert not np.isnan(given).any()
    np.testing.assert_array_equal(np.isinf(given), np.isinf(wanted))
    finite = np.isfinite(wanted)
    assert (given == wanted)[~finite].all()
    error = np.abs(given[finite] - wanted[finite]).max(initial=0.0)
    assert error <= tolerance(dtype, length, largest), (
        f"off by {error:.3g}, allowed {tolerance(dtype, length, largest):.3g}"
    )


def causal_in_long_double(q: Tensor, k: Tensor, v: Tensor) -> np.ndarray:
    """Causal attention over as many heads in q as in k, in more digits than float64 where the machine has them."""
    q_, k_, v_ = (t.detach().double().numpy().astype(np.longdouble) for t in (q, k, v))
    scores = q_ @ np.swapaxes(k_, -1, -2) / np.sqrt(np.longdouble(q.shape[-1]))
    scores = np.where(np.tri(q.shape[2], k.shape[2], dtype=bool), scores, -np.inf)
    terms = np.exp(scores - scores.max(-1, keepdims=True))
    return terms / terms.sum(-1, keepdims=True) @ v_


def qkv(
    batch: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seq_len_q: int = 5,
    seq_len_kv: int = 7,
    head_dim: int = 8,
    head_dim_v: int = 6,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values."""
    q = torch.randn(batch, num_heads, seq_len_q, head_dim).to(dtype)
    k = torch.randn(batch, num_kv_heads, seq_len_kv, head_dim).to(dtype)
    return q, k, torch.randn(batch, num_kv_heads, seq_len_kv, head_dim_v).to(dtype)


def spelt_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """The contract's order of operations, one query and one key at a time."""
    q_, k_, v_ = (t.detach().double().numpy() for t in (q, k, v))
    batch, num_heads, seq_len_q, head_dim = q_.shape
    seq_len_kv, head_dim_v = k_.shape[2], v_.shape[3]
    whole = (batch, num_heads, seq_len_q, seq_len_kv)
    visible = np.broadcast_to(np.True_ if visible is None else visible, whole)
    bias = np.broadcast_to(0.0 if bias is None else bias, whole)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    answer = {name: np.zeros(whole) for name in ("scaled", "capped", "biased", "weights")}
    answer["out"] = np.zeros((batch, num_heads, seq_len_q, head_dim_v))
    answer["lse"] = np.full((batch, num_heads, seq_len_q), -np.inf)
    for b, h, i in np.ndindex(batch, num_heads, seq_len_q):
        kv_head = h // (num_heads // k_.shape[1])
        for j in range(seq_len_kv):
            score = scale * float(q_[b, h, i] @ k_[b, kv_head, j])
            answer["scaled"][b, h, i, j] = score
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            answer["capped"][b, h, i, j] = score
            answer["biased"][b, h, i, j] = score + bias[b, h, i, j] if visible[b, h, i, j] else -math.inf
        terms = [math.exp(score) for score in answer["biased"][b, h, i]]
        total = sum(terms) + (0.0 if sinks is None else math.exp(float(sinks[h])))
        if total > 0.0:
            answer["lse"][b, h, i] = math.log(total)
            answer["weights"][b, h, i] = np.array(terms) / total
            answer["out"][b, h, i] = answer["weights"][b, h, i] @ v_[b, kv_head]
    return answer
