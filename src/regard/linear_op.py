"""The operator of linear attention: two kernels behind plain calls, autograd and `torch.compile`.

Enters: arguments that `linear` has checked: q, k, v; decay, beta and state in float32 (float64 for float64).
Leaves: out and the last state, differentiable in all of them; the recurrence spelt out, the oracle of both kernels.
Floor 3. A rule is what it is given: decay or none, beta or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library, native, op

# B batch, H num_heads, K num_kv_heads, G query heads per k/v head, N seq_len, D head_dim, E head_dim_v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Linear attention by the native kernel.

    Args:
        q, k, v: (B, H, N, D), (B, K, N, D), (B, K, N, E).
        decay: (B, K, N, 1 or D) in the wide dtype, or None: no decay.
        beta: (B, K, N, 1) in the wide dtype, or None: no delta rule.
        state: (B, K, D, E) in the wide dtype, or None: zero.
        scale: factor of out.
        chunk: the most rows taken at once.

    Returns:
        out: (B, H, N, E), laid out with the heads next to E; state: (B, K, D, E) in the wide dtype.
    """
    if op._plain([t for t in (q, k, v, decay, beta, state) if t is not None]):
        return _forward(q, k, v, decay, beta, state, scale, chunk)
    return torch.ops.regard.linear_attention(q, k, v, decay, beta, state, scale, chunk)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same in float64, one step after the other, by plain torch operations; arguments as in `attend`."""
    q_BHND, k_BKND, v_BKNE = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    state_BKDE = k_BKND.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state.double()
    outs = []
    for t in range(q.shape[2]):
        k_BKD, u_BKE = k_BKND[:, :, t], v_BKNE[:, :, t]
        if decay is not None:
            state_BKDE = decay[:, :, t, :, None].double().exp() * state_BKDE
        if beta is not None:
            u_BKE = beta[:, :, t].double() * (u_BKE - (k_BKD[..., None] * state_BKDE).sum(-2))
        state_BKDE = state_BKDE + k_BKD[..., None] * u_BKE[..., None, :]
        outs.append(scale * (q_BHND[:, :, t, :, None] * state_BKDE.repeat_interleave(group, 1)).sum(-2))
    out = torch.stack(outs, 2) if outs else q_BHND.new_zeros(*q.shape[:3], v.shape[3])
    return out, state_BKDE


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    out, last = _results(q, k, v)
    state = None if state is None else state.contiguous()
    native.kernels().linear_forward(
        *_shape(q, k, v, chunk), native.operand(q), native.operand(k), native.operand(v), native.operand(out),
        *_gates(decay, beta), 0 if state is None else state.data_ptr(), last.data_ptr(), scale, _threads(q, v),
    )  # fmt: skip
    return out, last


def _results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(*k.shape[:2], k.shape[3], v.shape[3], dtype=wide(q.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, decay and beta beside inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shape(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[int, int, tuple[int, ...], int]:
    batch, num_heads, seq_len, head_dim = q.shape
    sizes = (batch, num_heads, k.shape[1], seq_len, seq_len, head_dim, v.shape[3])
    return native.isa_number(), native.DTYPES[q.dtype], sizes, min(chunk, max(seq_len, 1))


def _gates(decay: Tensor | None, beta: Tensor | None) -> tuple[native.View, int, native.View]:
    return (
        native.ABSENT if decay is None else native.operand(decay),
        1 if decay is None else decay.shape[3],
        native.ABSENT if beta is None else native.operand(beta),
    )


def _threads(q: Tensor, v: Tensor) -> int:
    return native.threads(q.numel() * v.shape[3])


# ---- torch.library ----

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? state, float scale, SymInt chunk"


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _results(q, k, v)


def _gradient(saved: library.Saved, grad_out: Tensor, grad_last: Tensor) -> list[Tensor | None]:
    found = iter(torch.ops.regard.linear_attention_backward(grad_out, grad_last, *saved.inputs))
    return [None if t is None else next(found) for t in saved.inputs[:6]]


def _linear_attention_backward(
    grad_out: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk: int,
) -> list[Tensor]:
    held = [_like(t) for t in (q, k, v)]
    grad_decay, grad_beta = (None if t is None else _like(t) for t in (decay, beta))
    state = None if state is None else state.contiguous()
    grad_last = grad_last.contiguous()
    grad_state = torch.empty_like(grad_last)
    shape = _shape(q, k, v, chunk)
    chunks = -(-q.shape[2] // shape[3])
    states = q.new_empty(*k.shape[:2], chunks, k.shape[3], -(-v.shape[3] // native.LANES), native.LANES,
                         dtype=grad_last.dtype)  # fmt: skip
    grad_gates = _gates(grad_decay, grad_beta)
    native.kernels().linear_backward(
        *shape, native.operand(q), native.operand(k), native.operand(v), *_gates(decay, beta),
        0 if state is None else state.data_ptr(), scale, native.operand(grad_out), grad_last.data_ptr(),
        *(native.operand(t) for t in held), grad_gates[0], grad_gates[2], grad_state.data_ptr(), states.data_ptr(),
        _threads(q, v),
    )  # fmt: skip
    others = (grad_decay, grad_beta, None if state is None else grad_state)
    return [*held, *(t for t in others if t is not None)]


def _fake_linear_attention_backward(*inputs: Any) -> list[Tensor]:
    return [_like(t) for t in inputs[2:8] if t is not None]


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


library.operator("linear_attention", f"({_INPUTS}) -> (Tensor, Tensor)", _forward, fake=_fake, gradient=_gradient)
library.operator(
    "linear_attention_backward", f"(Tensor grad_out, Tensor grad_last, {_INPUTS}) -> Tensor[]",
    _linear_attention_backward, fake=_fake_linear_attention_backward,
    gradient=library.none_further(
        "linear_attention", "of order 1", "For a second one spell the recurrence out in torch operations."
    ),
)  # fmt: skip
