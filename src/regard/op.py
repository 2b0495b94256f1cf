"""The operator: one kernel behind plain calls, autograd, `torch.compile` and `torch.export`.

Enters: arguments that `attention` has checked; a mask, resolved biases, offsets.
Leaves: out and lse; statistics and exact tiles of the same scores.
Floor 3. A call that needs no gradient and is not traced goes straight to the kernel: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, plan
from .gradient import gradients
from .masks import Mask, decode
from .positions import Frame

_CHUNKS = 8  # column sums are gathered in at most so many parts, by the number of rows alone


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    bias: Tensor | None,
    diagonal: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    query_offset: int | Tensor,
    key_offset: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention by the native kernel, differentiable in q, k, v, bias, diagonal and sinks.

    Returns:
        out: (batch, num_heads, seq_len_q, head_dim_v), laid out with the heads next to head_dim_v, as the layers that
            follow want it; lse: (batch, num_heads, seq_len_q), float32 (float64 for float64).
    """
    seed = torch.randint(0, 2**62, (1,)) if dropout else None
    tensors = [t for t in (q, k, v, bias, diagonal, sinks) if t is not None]
    if _plain(tensors):
        frame = Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset, key_offset)
        return _forward(
            q,
            k,
            v,
            bias,
            diagonal,
            sinks,
            mask,
            frame,
            scale,
            softcap or 0.0,
            dropout,
            0 if seed is None else int(seed),
        )
    ops, ints, mask_tensors = ("", [], []) if mask is None else mask.encode()
    query_offset, query_offsets = _offset(query_offset)
    key_offset, key_offsets = _offset(key_offset)
    return torch.ops.regard.attention(
        q,
        k,
        v,
        bias,
        diagonal,
        sinks,
        ops,
        ints,
        mask_tensors,
        scale,
        softcap or 0.0,
        dropout,
        seed,
        query_offset,
        key_offset,
        query_offsets,
        key_offsets,
    )


def _plain(tensors: list[Tensor]) -> bool:
    """Whether nothing watches: no tracing, no mode, no subclass, no gradient."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore  # vmap, grad and the like
        return False
    recording = torch.is_grad_enabled()
    return all(type(t) in (Tensor, torch.nn.Parameter) and not (recording and t.requires_grad) for t in tensors)


def _offset(offset: int | Tensor) -> tuple[int, Tensor | None]:
    return (0, offset) if isinstance(offset, Tensor) else (offset, None)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    diagonal: Tensor | None,
    sinks: Tensor | None,
    mask: Mask | None,
    frame: Frame,
    scale: float,
    softcap: float,
    dropout: float,
    seed: int,
    results: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse, written into `results` where a caller has laid them out."""
    out, lse = results or _results(q, v)
    shape = _shape(q, k, v.shape[3])
    threads = native.threads(shape[0] * shape[1] * shape[3] * shape[4] * (shape[5] + shape[6]))
    sinks = None if sinks is None else sinks.contiguous()
    kernels, isa, dtype = native.kernels(), native.isa_number(), native.DTYPES[q.dtype]
    precision = native.precision()
    q_view, k_view, v_view, out_view = native.operand(q), native.operand(k), native.operand(v), native.operand(out)
    for panel in plan.panels(mask, frame):
        first, count = panel.rows.start, len(panel.rows)
        kernels.forward(
            isa,
            dtype,
            (*shape[:3], count, *shape[4:]),
            native.down(q_view, q, first),
            k_view,
            v_view,
            native.down(out_view, out, first),
            native.rows_view(lse, first),
            native.bias_view(bias, diagonal, first, frame.seq_len_q),
            0 if sinks is None else sinks.data_ptr(),
            panel.argument(),
            scale,
            softcap,
            dropout,
            seed,
            first,
            precision,
            threads,
        )
    return out, lse


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shape(q: Tensor, k: Tensor, head_dim_v: int) -> tuple[int, ...]:
    batch, num_heads, seq_len_q, head_dim = q.shape
    return (batch, num_heads, k.shape[1], seq_len_q, k.shape[2], head_dim, head_dim_v)


# ---- torch.library ----


@torch.library.custom_op("regard::attention", mutates_args=(), device_types="cpu")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    diagonal: Tensor | None,
    sinks: Tensor | None,
    mask_ops: str,
    mask_ints: Sequence[int],
    mask_tensors: Sequence[Tensor],
    scale: float,
    softcap: float,
    dropout: float,
    seed: Tensor | None,
    query_offset: int,
    key_offset: int,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    frame = _frame(q, k, query_offset, key_offset, query_offsets, key_offsets)
    mask = decode(mask_ops, mask_ints, mask_tensors) if mask_ops else None
    number = 0 if seed is None else int(seed)
    return _forward(q, k, v, bias, diagonal, sinks, mask, frame, scale, softcap, dropout, number)


@_attention.register_fake
def _(q: Tensor, _k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _results(q, v)


@torch.library.custom_op("regard::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    diagonal: Tensor | None,
    sinks: Tensor | None,
    mask_ops: str,
    mask_ints: Sequence[int],
    mask_tensors: Sequence[Tensor],
    scale: float,
    softcap: float,
    dropout: float,
    seed: Tensor | None,
    query_offset: int,
    key_offset: int,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    found = gradients(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        bias=bias,
        diagonal=diagonal,
        sinks=sinks,
        mask=decode(mask_ops, mask_ints, mask_tensors) if mask_ops else None,
        frame=_frame(q, k, query_offset, key_offset, query_offsets, key_offsets),
        scale=scale,
        softcap=softcap,
        dropout=dropout,
        seed=0 if seed is None else int(seed),
        wanted=tuple(wanted),
    )
    results = (found.q, found.k, found.v, found.bias, found.diagonal, found.sinks)
    return [t.contiguous() for t in results if t is not None]


@_attention_backward.register_fake
def _(*inputs) -> list[Tensor]:  # type: ignore[no-untyped-def]
    differentiable, wanted = (*inputs[2:5], *inputs[7:10]), inputs[-1]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, want in zip(differentiable, wanted, strict=True)
        if want
    ]


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, bias, diagonal, sinks, ops, ints, mask_tensors, scale, softcap, dropout, seed, q0, k0, q0s, k0s = inputs
    ctx.save_for_backward(q, k, v, *output, bias, diagonal, sinks, seed, q0s, k0s, *mask_tensors)
    ctx.numbers = (ops, ints, scale, softcap, dropout, q0, k0)
    ctx.nothing = (None if ints else [], [None] * len(mask_tensors))  # the shape that torch asks for
    ctx.set_materialize_grads(True)


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, bias, diagonal, sinks, seed, q0s, k0s, *mask_tensors = ctx.saved_tensors
    ops, ints, scale, softcap, dropout, q0, k0 = ctx.numbers
    inputs = (q, k, v, bias, diagonal, sinks)
    wanted = [bool(need) and t is not None for need, t in zip(ctx.needs_input_grad[:6], inputs, strict=True)]
    found = iter(
        torch.ops.regard.attention_backward(
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            bias,
            diagonal,
            sinks,
            ops,
            ints,
            mask_tensors,
            scale,
            softcap,
            dropout,
            seed,
            q0,
            k0,
            q0s,
            k0s,
            wanted,
        )
    )
    return (*(next(found) if want else None for want in wanted), None, *ctx.nothing, *[None] * 8)


_attention.register_autograd(_backward, setup_context=_setup)


def _frame(q: Tensor, k: Tensor, q0: int, k0: int, q0s: Tensor | None, k0s: Tensor | None) -> Frame:
    return Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q0 if q0s is None else q0s, k0 if k0s is None else k0s)


# ---- what attention did ----


def statistics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask | None,
    bias: Tensor | None,
    diagonal: Tensor | None,
    scale: float,
    softcap: float | None,
    query_offset: int | Tensor,
    key_offset: int | Tensor,
    top_k: int = 0,
    received: bool = False,
    entropy: bool = False,
    max_score: bool = False,
    block: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Statistics of the weights exp(score - lse), before dropout, in a second pass; what was not asked for is left out.

    Returns:
        top_keys, top_weights, received, entropy, max_score, block_mass, block_max, shaped as in `AttentionStats`; keys
        past the visible ones are -1.
    """
    frame = Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset, key_offset)
    b, h, n, m = frame.batch, frame.num_heads, frame.seq_len_q, frame.seq_len_kv
    wide = lse.dtype
    found: dict[str, Tensor] = {}
    if top_k:
        found["top_keys"] = torch.empty(b, h, n, top_k, dtype=torch.int64)
        found["top_weights"] = torch.empty(b, h, n, top_k, dtype=wide)
    if entropy:
        found["entropy"] = torch.empty(b, h, n, dtype=wide)
    if max_score:
        found["max_score"] = torch.empty(b, h, n, dtype=wide)
    rows, cols = block or (0, 0)
    if block:
        grid = (b, h, -(-n // rows), -(-m // cols))
        found["block_mass"] = torch.zeros(grid, dtype=wide)
        found["block_max"] = torch.zeros(grid, dtype=wide)
    column_sums = torch.zeros(b, h, m, dtype=torch.float64) if received else None

    shape = _shape(q, k, 1)
    threads = native.threads(b * h * n * m * shape[5])
    kernels, isa, dtype = native.kernels(), native.isa_number(), native.DTYPES[q.dtype]
    for panel in plan.panels(mask, frame, align=rows or 1):
        first, count = panel.rows.start, len(panel.rows)
        chunk = _chunk_rows(count, rows)
        parts = torch.zeros(-(-count // chunk), b, h, m, dtype=torch.float64) if received else None
        # The kernel writes the top keys of its rows side by side: a panel that is not the whole gets its own.
        whole = count == n
        keys = weights = None
        if top_k:
            keys = found["top_keys"] if whole else torch.empty(b, h, count, top_k, dtype=torch.int64)
            weights = found["top_weights"] if whole else torch.empty(b, h, count, top_k, dtype=wide)
        block_row = first // rows if rows else 0
        kernels.stats(
            isa,
            dtype,
            (*shape[:3], count, *shape[4:]),
            native.down(native.operand(q), q, first),
            native.operand(k),
            native.rows_view(lse, first),
            native.bias_view(bias, diagonal, first, n),
            panel.argument(),
            scale,
            softcap or 0.0,
            top_k,
            0 if keys is None else keys.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            0 if parts is None else parts.data_ptr(),
            *(
                native.rows_view(found[name], first) if name in found else native.ABSENT
                for name in ("entropy", "max_score")
            ),
            rows,
            cols,
            *(
                native.down(native.operand(found[name]), found[name], block_row) if block else native.ABSENT
                for name in ("block_mass", "block_max")
            ),
            chunk,
            threads,
        )
        if keys is not None and weights is not None and not whole:
            found["top_keys"][:, :, first : first + count] = keys
            found["top_weights"][:, :, first : first + count] = weights
        if column_sums is not None and parts is not None:
            column_sums += parts.sum(0)
    if column_sums is not None:
        found["received"] = column_sums.to(wide)
    return found


def _chunk_rows(rows: int, block_rows: int) -> int:
    """Rows of one part of the column sums: a multiple of the tile and of the block."""
    chunk = -(-max(rows, 1) // (_CHUNKS * native.LANES)) * native.LANES
    return -(-chunk // block_rows) * block_rows if block_rows else chunk


def tile(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    *,
    mask: Mask | None,
    bias: Tensor | None,
    diagonal: Tensor | None,
    scale: float,
    softcap: float | None,
    query_offset: int | Tensor,
    key_offset: int | Tensor,
    rows: range,
    cols: range,
    stage: str,
) -> Tensor:
    """An exact tile of the scores at a stage, or of the weights: (batch, num_heads, len(rows), len(cols))."""
    frame = Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset, key_offset)
    out = torch.empty(frame.batch, frame.num_heads, len(rows), len(cols), dtype=_wide(q.dtype))
    if out.numel() == 0:
        return out
    shape = _shape(q, k, 1)
    threads = native.threads(out.numel() * shape[5])
    out_view = native.operand(out)
    for panel in plan.panels(mask, frame, rows):
        first, count = panel.rows.start, len(panel.rows)
        native.kernels().tile(
            native.isa_number(),
            native.DTYPES[q.dtype],
            (*shape[:3], count, *shape[4:]),
            native.down(native.operand(q), q, first),
            native.operand(k),
            native.ABSENT if lse is None else native.rows_view(lse, first),
            native.down(out_view, out, first - rows.start),
            native.bias_view(bias, diagonal, first, frame.seq_len_q),
            panel.argument(),
            scale,
            softcap or 0.0,
            cols.start,
            len(cols),
            native.STAGES[stage],
            threads,
        )
    return out
