"""Attention of few queries over many keys: the decode kernel, and when it is the one to ask.

Enters: q, and what is held: k and v, a cache's pages, int8 codes; mask, biases and numbers as `op` has them.
Leaves: out and lse, and the weight of every key on request.
Floor 2: above the plan, below the operator. Which kernel serves a call depends on its shape alone, so that
a call with a gradient takes the same one.
"""

from __future__ import annotations

from torch import Tensor

from . import native, plan
from .held import Held
from .masks import Mask
from .positions import Frame

QUERIES = 8  # the most a call may have: past them tiles of 64 queries, each key packed once, win
_PART = 1024  # keys of one part, at least
_PARTS = 128  # of one row, at most


def few(q: Tensor, num_kv_heads: int, whole: int | None = None) -> bool:
    """Whether the decode kernel serves the call; `whole` is the seq_len_q of the call that q is a part of."""
    _, num_heads, seq_len_q, _ = q.shape
    seq_len_q = seq_len_q if whole is None else whole
    rows = num_heads // num_kv_heads * seq_len_q
    return 0 < seq_len_q <= QUERIES and rows <= native.LANES


def part_keys(seq_len_kv: int) -> int:
    """Keys of one part: decided by the length alone, so that bits do not depend on threads or batch."""
    return max(_PART, -(-seq_len_kv // (_PARTS * native.KEYS)) * native.KEYS)


def run(
    q: Tensor,
    held: Held,
    out: Tensor,
    lse: Tensor,
    *,
    mask: Mask | None,
    bias: Tensor | None,
    diagonal: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    query_offset: int | Tensor,
    key_offset: int | Tensor,
    dropout: float = 0.0,
    seed: int = 0,
    received: Tensor | None = None,
) -> None:
    """Attention written into `out` and `lse`, and each key's weight into `received`, where seq_len_q is 1."""
    frame = Frame(q.shape[0], q.shape[1], q.shape[2], held.length, query_offset, key_offset)
    (panel,) = plan.panels(mask, frame)  # so few rows make one
    ask(
        q, held, out, lse, panel, bias=bias, diagonal=diagonal, sinks=sinks, scale=scale, softcap=softcap,
        dropout=dropout, seed=seed, received=received,
    )  # fmt: skip


def ask(
    q: Tensor,
    held: Held,
    out: Tensor,
    lse: Tensor,
    panel: plan.Panel,
    *,
    bias: Tensor | None,
    diagonal: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float = 0.0,
    seed: int = 0,
    received: Tensor | None = None,
) -> None:
    """`run` with the mask worked out already."""
    batch, num_heads, seq_len_q, head_dim = q.shape
    keys, table, key_scales, n = held.keys, held.table, held.key_scales, held.length
    head_dim_v = held.values.shape[3]
    sinks = None if sinks is None else sinks.contiguous()
    assert received is None or (seq_len_q == 1 and received.is_contiguous())
    native.kernels().decode(
        native.isa_number(),
        native.DTYPES[q.dtype],
        (batch, num_heads, keys.shape[1], seq_len_q, n, head_dim, head_dim_v),
        native.operand(q),
        native.operand(keys),
        native.operand(held.values),
        native.operand(out),
        native.rows_view(lse),
        native.bias_view(bias, diagonal, 0, seq_len_q),
        0 if sinks is None else sinks.data_ptr(),
        panel.argument(),
        scale,
        softcap,
        dropout,
        seed,
        key_scales is not None,
        native.ABSENT if key_scales is None else native.rows_view(key_scales),
        native.ABSENT if held.value_scales is None else native.rows_view(held.value_scales),
        0 if table is None else table.data_ptr(),
        0 if table is None else table.stride(0),
        native.KEYS if table is None else keys.shape[2],
        0 if received is None else received.data_ptr(),
        part_keys(n),
        native.threads(batch * num_heads * seq_len_q * n * (head_dim + head_dim_v)),
    )
