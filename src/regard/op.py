"""The operator: one kernel behind plain calls, autograd, `torch.compile` and `torch.export`.

Enters: arguments that `attention` has checked; a mask, resolved biases, offsets.
Leaves: out and lse; statistics and exact tiles of the same scores.
Floor 3. A call that needs no gradient and is not traced goes straight to the kernel: the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import decode as few_queries
from . import library, native, plan
from .gradient import Gradients, gradients
from .gradient_twice import second_gradients
from .held import Held
from .masks import Mask, decode
from .positions import Frame

_OWN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))
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
    received: Tensor | None = None,
    whole: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by the native kernel, differentiable in q, k, v, bias, diagonal and sinks.

    Args:
        received: (batch, num_heads, seq_len_kv) in lse's dtype, contiguous, where `weighs(q, num_kv_heads)`: the weight
            of each key is written there on the way.
        whole: seq_len_q of the call whose bits are wanted, where q holds some of its rows. The rest are `attention`'s.

    Returns:
        out: (batch, num_heads, seq_len_q, head_dim_v), laid out with the heads next to head_dim_v, as the layers that
            follow want it; lse: (batch, num_heads, seq_len_q), float32 (float64 for float64).
    """
    seed = torch.randint(0, 2**62, (1,)) if dropout else None
    tensors = [t for t in (q, k, v, bias, diagonal, sinks) if t is not None]
    if not _watched(tensors):
        frame = Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset, key_offset)
        number = 0 if seed is None else int(seed)
        inputs = (q, k, v, bias, diagonal, sinks, mask, frame, scale, softcap or 0.0, dropout, number)
        if not _wants_gradient(tensors):
            return _forward(*inputs, received=received, whole=whole)
        if received is not None:
            _forward(*inputs[:-2], 0.0, 0, received=received)
        return _Attention.apply(*inputs)
    if received is not None:
        with torch.no_grad():
            frame = Frame(q.shape[0], q.shape[1], q.shape[2], k.shape[2], query_offset, key_offset)
            plain = (None if t is None else t.detach() for t in (q, k, v, bias, diagonal, sinks))
            _forward(*plain, mask, frame, scale, softcap or 0.0, 0.0, 0, received=received)  # type: ignore[arg-type]
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


def attend_held(
    q: Tensor,
    held: Held,
    *,
    mask: Mask | None,
    bias: Tensor | None,
    diagonal: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    query_offset: int | Tensor,
    key_offset: int | Tensor,
    received: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of few queries to what a cache holds, read where it lies; nothing is to be differentiated."""
    out, lse = _results(q, held.values)
    few_queries.run(
        q, held, out, lse, mask=mask, bias=bias, diagonal=diagonal, sinks=sinks, scale=scale, softcap=softcap or 0.0,
        query_offset=query_offset, key_offset=key_offset, received=received,
    )  # fmt: skip
    return out, lse


def in_place(q: Tensor, held: Held, dropout: float, *others: Tensor | None) -> bool:
    """Whether `attend_held` serves a call."""
    tensors = [t for t in (q, *others) if t is not None]
    return dropout == 0.0 and few_queries.few(q, held.num_kv_heads) and _plain(tensors)


def weighs(q: Tensor, num_kv_heads: int) -> bool:
    """Whether the forward pass can tell each key's weight on the way: one query, by the decode kernel."""
    return q.shape[2] == 1 and few_queries.few(q, num_kv_heads)


def _plain(tensors: list[Tensor]) -> bool:
    """Whether nothing watches and no gradient is wanted: the kernel may be called straight away."""
    return not _wants_gradient(tensors) and not _watched(tensors)


def _wants_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _watched(tensors: list[Tensor]) -> bool:
    """Whether somebody looks on who must see an operator: a trace, a mode, a transform, a subclass of Tensor."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing():
        return True
    if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore  # vmap, grad and the like
        return True
    return any(type(t) not in _OWN for t in tensors)


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
    received: Tensor | None = None,
    whole: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse, written into `results` where a caller has laid them out."""
    out, lse = results or _room(q, v)
    if few_queries.few(q, k.shape[1], whole):
        few_queries.run(
            q, Held(k, v, k.shape[2]), out, lse, mask=mask, bias=bias, diagonal=diagonal, sinks=sinks, scale=scale,
            softcap=softcap, query_offset=frame.query_offset, key_offset=frame.key_offset, dropout=dropout, seed=seed,
            received=received,
        )  # fmt: skip
        return out, lse
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


def _room(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`_results` in fewer steps, and no views: what is a view may not be changed in place outside a Function."""
    batch, num_heads, seq_len_q, _ = q.shape
    dim, rows = v.shape[3], max(seq_len_q, 1)
    strides = (rows * num_heads * dim, dim, num_heads * dim, 1)
    return (
        torch.empty_strided((batch, num_heads, seq_len_q, dim), strides, dtype=q.dtype),
        torch.empty((batch, num_heads, seq_len_q), dtype=_wide(q.dtype)),
    )


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shape(q: Tensor, k: Tensor, head_dim_v: int) -> tuple[int, ...]:
    batch, num_heads, seq_len_q, head_dim = q.shape
    return (batch, num_heads, k.shape[1], seq_len_q, k.shape[2], head_dim, head_dim_v)


# ---- autograd ----


class _Attention(torch.autograd.Function):
    """The operator where nobody traces: a node of the graph without torch.library's way there, some 150 µs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, lse = _forward(*inputs)
        tensors, ctx.others = inputs[:6], inputs[6:]
        mask, frame = inputs[6:8]
        ctx.program = ("", [], []) if mask is None else mask.encode()
        offsets = [t if isinstance(t, Tensor) else None for t in (frame.query_offset, frame.key_offset)]
        # The last ones for autograd to notice where they are changed in place.
        ctx.save_for_backward(*tensors, out, lse, *offsets, *ctx.program[2])
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, bias, diagonal, sinks, out, lse, q0s, k0s, *mask_tensors = ctx.saved_tensors
        mask, frame, scale, softcap, dropout, seed = ctx.others
        inputs = (q, k, v, bias, diagonal, sinks)
        wanted = [need and t is not None for need, t in zip(ctx.needs_input_grad[:6], inputs, strict=True)]
        if _plain([grad_out, grad_lse, *(t for t in inputs if t is not None)]):
            found = gradients(
                grad_out, grad_lse, q, k, v, out, lse, bias=bias, diagonal=diagonal, sinks=sinks, mask=mask,
                frame=frame, scale=scale, softcap=softcap, dropout=dropout, seed=seed, wanted=tuple(wanted),
            )  # fmt: skip
            each = (found.q, found.k, found.v, found.bias, found.diagonal, found.sinks)
        else:
            ops, ints, _ = ctx.program
            q0, k0 = (0 if isinstance(t, Tensor) else t for t in (frame.query_offset, frame.key_offset))
            number = torch.tensor(seed) if dropout else None
            several = iter(
                torch.ops.regard.attention_backward(
                    grad_out, grad_lse, q, k, v, out, lse, bias, diagonal, sinks, ops, ints, mask_tensors, scale,
                    softcap, dropout, number, q0, k0, q0s, k0s, wanted,
                )
            )  # fmt: skip
            each = [next(several) if want else None for want in wanted]
        return (*each, *[None] * len(ctx.others))


# ---- torch.library ----

# What the operators of the gradients take after q, k and v, and the first operator too.
_TERMS = f"""Tensor? bias, Tensor? diagonal, Tensor? sinks, {library.MASK}, float scale, float softcap, float dropout,
    Tensor? seed, SymInt query_offset, SymInt key_offset, Tensor? query_offsets, Tensor? key_offsets"""
_GRADS = "Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse"


class _Terms(NamedTuple):
    """The inputs of `_TERMS`."""

    bias: Tensor | None
    diagonal: Tensor | None
    sinks: Tensor | None
    mask_ops: str
    mask_ints: Sequence[int]
    mask_tensors: Sequence[Tensor]
    scale: float
    softcap: float
    dropout: float
    seed: Tensor | None
    query_offset: int
    key_offset: int
    query_offsets: Tensor | None
    key_offsets: Tensor | None

    def of(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        """By name, as `gradient` takes them."""
        found = {name: getattr(self, name) for name in ("bias", "diagonal", "sinks", "scale", "softcap", "dropout")}
        found["mask"] = self.mask()
        found["frame"] = self.frame(q, k)
        found["seed"] = self.number()
        return found

    def mask(self) -> Mask | None:
        return decode(self.mask_ops, self.mask_ints, self.mask_tensors) if self.mask_ops else None

    def number(self) -> int:
        return 0 if self.seed is None else int(self.seed)

    def frame(self, q: Tensor, k: Tensor) -> Frame:
        return Frame(
            q.shape[0], q.shape[1], q.shape[2], k.shape[2],
            self.query_offset if self.query_offsets is None else self.query_offsets,
            self.key_offset if self.key_offsets is None else self.key_offsets,
        )  # fmt: skip


def _attention(q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    t = _Terms(*inputs)
    return _forward(
        q, k, v, t.bias, t.diagonal, t.sinks, t.mask(), t.frame(q, k), t.scale, t.softcap, t.dropout, t.number()
    )


def _fake_attention(q: Tensor, _k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _results(q, v)


def _gradient(saved: library.Saved, grad_out: Tensor, grad_lse: Tensor) -> list[Tensor | None]:
    inputs = saved.inputs
    differentiable = (*inputs[:3], *inputs[3:6])
    wanted = [bool(need) and t is not None for need, t in zip(saved.needs[:6], differentiable, strict=True)]
    found = iter(
        torch.ops.regard.attention_backward(grad_out, grad_lse, *inputs[:3], *saved.outputs, *inputs[3:], wanted)
    )
    return [next(found) if want else None for want in wanted]


def _attention_backward(*inputs: Any) -> list[Tensor]:
    given, terms, wanted = inputs[:7], _Terms(*inputs[7:-1]), inputs[-1]
    _, _, q, k, *_ = given
    found = gradients(*given, **terms.of(q, k), wanted=tuple(wanted))
    results = (found.q, found.k, found.v, found.bias, found.diagonal, found.sinks)
    return [t.contiguous() for t in results if t is not None]


def _fake_attention_backward(*inputs: Any) -> list[Tensor]:
    differentiable, wanted = (*inputs[2:5], *inputs[7:10]), inputs[-1]
    return [_like(t) for t, want in zip(differentiable, wanted, strict=True) if want]


def _second_gradient(saved: library.Saved, upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
    *inputs, wanted = saved.inputs
    given = iter(upstream)
    each = [next(given) if want else None for want in wanted]
    found = iter(torch.ops.regard.attention_twice(each, *inputs))
    return [None if t is None else next(found) for t in inputs[:10]]


def _attention_twice(upstream: Sequence[Tensor | None], *inputs: Any) -> list[Tensor]:
    given, terms = inputs[:7], _Terms(*inputs[7:])
    _, _, q, k, *_ = given
    return [t for t in second_gradients(Gradients(*upstream), *given, **terms.of(q, k)) if t is not None]


def _fake_attention_twice(_upstream: Sequence[Tensor | None], *inputs: Any) -> list[Tensor]:
    return [_like(t) for t in inputs[:10] if t is not None]


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


library.operator(
    "attention", f"(Tensor q, Tensor k, Tensor v, {_TERMS}) -> (Tensor, Tensor)", _attention, fake=_fake_attention,
    gradient=_gradient, with_outputs=True,
)  # fmt: skip
library.operator(
    "attention_backward", f"({_GRADS}, {_TERMS}, bool[] wanted) -> Tensor[]", _attention_backward,
    fake=_fake_attention_backward, gradient=_second_gradient, zeros=False,
)  # fmt: skip
library.operator(
    "attention_twice", f"(Tensor?[] upstream, {_GRADS}, {_TERMS}) -> Tensor[]", _attention_twice,
    fake=_fake_attention_twice,
    gradient=library.none_further("attention", "of order 1 or 2", 'Pass backend="reference".'),
)  # fmt: skip


# ---- what attention did ----


def attend_with_statistics(
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
    **asked: Any,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`attend` and `statistics` with the bits of both: in one pass where there is neither gradient nor dropout.

    Few queries stay with two passes: the first reads each key once for all heads of a group.
    """
    terms = {"mask": mask, "bias": bias, "diagonal": diagonal, "scale": scale, "softcap": softcap}
    terms |= {"query_offset": query_offset, "key_offset": key_offset}
    tensors = [t for t in (q, k, v, bias, diagonal, sinks) if t is not None]
    fused = dropout == 0 and q.shape[2] >= native.LANES and native.statistics_repeat_forward()
    if not (fused and _plain(tensors)):
        out, lse = attend(q, k, v, **terms, sinks=sinks, dropout=dropout)
        return out, lse, statistics(q, k, lse.detach(), **terms, **asked)
    out, lse = _results(q, v)
    sinks = None if sinks is None else sinks.contiguous()
    return out, lse, statistics(q, k, lse, **terms, **asked, values=(v, out, sinks))


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
    values: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Statistics of the weights exp(score - lse), before dropout; what was not asked for is left out.

    `values` holds v, out and sinks: out and lse are then written in the same pass, and lse is not read.

    Returns:
        top_keys, top_weights, received, entropy, max_score, block_mass, block_max, shaped as in `AttentionStats`; keys
        past the visible ones are -1, and of equal scores the earlier key comes first.
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

    v, out, sinks = values or (None, None, None)
    shape = _shape(q, k, 0 if v is None else v.shape[3])
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
            native.ABSENT if v is None else native.operand(v),
            native.ABSENT if out is None else native.down(native.operand(out), out, first),
            native.rows_view(lse, first),
            native.bias_view(bias, diagonal, first, n),
            0 if sinks is None else sinks.data_ptr(),
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
