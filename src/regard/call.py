"""One call of attention, checked and made ready for a backend.

Enters: what the caller wrote: tensors or arrays, a mask, a bias, numbers, a cache.
Leaves: a `Call` of torch tensors, resolved biases and plain numbers, or one clear error. Nothing has happened by then:
a cache is appended to last.
Floor 3: above the operator's own floors, below the public functions.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from regard import arrays, check, lowering
from regard.biases import Bias, as_bias
from regard.cache import KVCache, Taking
from regard.held import Held, HeldRows
from regard.mask_algebra import Mask
from regard.masks import as_mask, padding
from regard.places import placed, placed_bias
from regard.positions import Frame


class Terms(TypedDict):
    """What a backend needs beside q, k, v, sinks and dropout."""

    mask: Mask | None
    bias: Tensor | None
    diagonal: Tensor | None
    scale: float
    softcap: float | None
    query_offset: int | Tensor
    key_offset: int | Tensor


class Call(NamedTuple):
    """A checked call; `give` turns a result into the caller's kind of array, None where that is a torch tensor."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None
    bias: Tensor | None
    diagonal: Tensor | None
    sinks: Tensor | None
    scale: float
    softcap: float | None
    dropout: float
    query_offset: int | Tensor
    key_offset: int | Tensor
    seq_len_kv: int
    backend: str
    give: arrays.Give | None
    held: Held | None = None  # what a cache holds that is no plain tensor; k and v are then the new ones alone

    @property
    def num_kv_heads(self) -> int:
        """Number of key heads."""
        return self.k.shape[1]

    def written_out(self) -> Call:
        """The call on plain tensors k and v."""
        if self.held is None:
            return self
        k, v = self.held.written_out()
        return self._replace(k=k, v=v, held=None)

    @property
    def native(self) -> bool:
        """Whether the compiled kernels compute it."""
        return self.backend == "native"

    @property
    def terms(self) -> Terms:
        """Mask, biases, numbers and offsets by name."""
        return {
            "mask": self.mask,
            "bias": self.bias,
            "diagonal": self.diagonal,
            "scale": self.scale,
            "softcap": self.softcap,
            "query_offset": self.query_offset,
            "key_offset": self.key_offset,
        }

    def frame(self) -> Frame:
        """Where the queries and keys of the call stand."""
        batch, num_heads, seq_len_q, _ = self.q.shape
        return Frame(batch, num_heads, seq_len_q, self.seq_len_kv, self.query_offset, self.key_offset)


def ready(
    caller: str,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    scale: Any,
    softcap: Any,
    sinks: Any,
    dropout: Any,
    query_offset: Any,
    key_offset: Any,
    cache: KVCache | Taking | None,
    backend: str | None,
    *,
    append: bool = True,
    wanted: str = "out",
) -> Call:
    """The call, checked, and its backend chosen. With a cache, k and v become all that it holds, unless `append` is
    False. `wanted` is "out", "lse", "statistics" or "weights": what a backend must give."""
    give = None
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        (q, k, v), give = arrays.taken(caller, {"q": q, "k": k, "v": v})
    check.inputs(caller, q, k, v)
    batch, num_heads, seq_len_q, head_dim = q.shape
    seq_len_kv = seq_len_new = k.shape[2]
    scale = check.scale(caller, scale, head_dim)
    if softcap is not None:
        softcap = check.softcap(caller, softcap)
    if dropout != 0.0:
        dropout = check.dropout(caller, dropout)
    if backend is not None:
        check.backend(caller, backend)
    held = k.held if isinstance(k, HeldRows) and isinstance(v, HeldRows) and k.held is v.held else None
    parted, counts, lengths = 0, None, None
    if cache is not None:
        if isinstance(cache, Taking):
            cache, counts = cache.cache, cache.counts
        query_offset, key_offset, seq_len_kv = _cached(caller, cache, k, v, counts, query_offset, key_offset)
        parted = cache.parted_after()
        if isinstance(query_offset, Tensor):
            lengths = query_offset + (seq_len_new if counts is None else counts)
    diagonal = None
    if mask is not None:
        if not isinstance(mask, Mask):
            mask = as_mask(arrays.tensor(caller, "mask", mask), caller)
        if (query_offset is None or cache is not None) and mask.needs_query_positions():
            check.positions_known(caller, "mask", seq_len_q, seq_len_new)
        if parted:
            mask = placed(mask, parted)
    if lengths is not None:  # a row's own keys, and no more
        mask = padding(lengths) if mask is None else mask & padding(lengths)
    if bias is not None:
        bias = as_bias(arrays.tensor(caller, "bias", bias), caller, q.dtype)
        if (query_offset is None or cache is not None) and bias.needs_query_positions():
            check.positions_known(caller, "bias", seq_len_q, seq_len_new)
    query_offset = 0 if query_offset is None else _offset(caller, "query_offset", query_offset, batch)
    key_offset = _offset(caller, "key_offset", key_offset, batch)
    if sinks is not None:
        sinks = arrays.tensor(caller, "sinks", sinks)
        check.sinks(caller, sinks, num_heads, q.dtype, q.device)
    if mask is not None or bias is not None:
        frame = Frame(batch, num_heads, seq_len_q, seq_len_kv, query_offset, key_offset)
        if mask is not None:
            if q.is_cpu:
                mask.validate(caller, frame)
            else:
                lowering.validate(caller, mask, frame, q.device)
        if bias is not None:
            if parted:
                bias = placed_bias(bias, parted)
            bias, diagonal = _resolved(caller, bias, frame, q)
    call = Call(
        q, k, v, mask, bias, diagonal, sinks, scale, softcap, dropout, query_offset, key_offset, seq_len_kv,
        backend or "native", give, held,
    )  # fmt: skip
    if call.backend in ("flex", "sdpa") or not q.is_cpu:
        call = call._replace(backend=_chosen(caller, call, backend, wanted))
    if cache.coded if cache is not None else held is not None and held.key_scales is not None:
        _refuse_gradient(caller, call)
    if cache is not None and append:
        cache.take_in(k, v, counts)
        held = cache.held()
        call = call._replace(k=held.keys, v=held.values) if held.plain else call._replace(held=held)
    return call


def refusals(call: Call, wanted: str = "out") -> dict[str, lowering.Refusal]:
    """The backends that cannot do a call, and why."""
    tensors = (call.q, call.k, call.v, call.bias, call.diagonal, call.sinks)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    found = {
        name: lowering.refusal(
            name, call.q, call.v, gradient=gradient, softcap=call.softcap, sinks=call.sinks, dropout=call.dropout,
            wanted=wanted,
        )
        for name in check.BACKENDS
    }  # fmt: skip
    return {name: refusal for name, refusal in found.items() if refusal is not None}


def _chosen(caller: str, call: Call, named: str | None, wanted: str) -> str:
    """The backend of a call off the CPU, or of one whose backend was named; where none can do it, why."""
    unable = refusals(call, wanted)
    if named is not None:
        if named in unable:
            why, fix = unable[named]
            raise ValueError(
                f"{caller}: backend must be one that can do the call, or None; got {named!r}, and {why}. {fix}"
            )
        return named
    simple = lowering.suffices(call.mask, call.bias, call.diagonal, call.frame())
    for name in ("sdpa", "flex") if simple else ("flex", "sdpa"):
        if name not in unable:
            return name
    reasons = "; ".join(f"{name!r}, and {unable[name].why}" for name in ("flex", "sdpa"))
    raise ValueError(
        f"{caller}: some backend must be able to do the call on {call.q.device}; got {reasons}. "
        "Move q, k and v with .cpu()."
    )


def _offset(caller: str, name: str, value: Any, batch: int) -> int | Tensor:
    return value if type(value) is int else check.offset(caller, name, arrays.tensor(caller, name, value), batch)


def _resolved(caller: str, bias: Bias, frame: Frame, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    for tensor in bias.tensors():
        check.on_device(caller, "bias", tensor, q.device)
    bias.validate(caller, frame)
    return bias.resolve(frame, q.dtype, q.device)


def _cached(
    caller: str, cache: object, k: Tensor, v: Tensor, counts: Tensor | None, query_offset: object, key_offset: object
) -> tuple[int | Tensor, int, int]:
    """Both offsets and seq_len_kv as they will be once k and v are appended."""
    if not isinstance(cache, KVCache):
        raise TypeError(
            f"{caller}: cache must be a KVCache; got {type(cache).__name__}. Make one with regard.KVCache()."
        )
    if query_offset is not None or not (isinstance(key_offset, int) and key_offset == 0):
        raise ValueError(
            f"{caller}: query_offset and key_offset must be left out with a cache; got {query_offset} and "
            f"{key_offset}. The cache supplies both."
        )
    seq_len_kv = cache.after(k, v, counts)
    position = cache.position
    if isinstance(position, Tensor):
        return position, 0, seq_len_kv
    if counts is not None:
        return torch.full((k.shape[0],), position), 0, seq_len_kv
    return position, position + k.shape[2] - seq_len_kv, seq_len_kv


def _refuse_gradient(caller: str, call: Call) -> None:
    """Codes are read by a kernel that knows no gradient: the same bits with and without one are promised."""
    tensors = (call.q, call.bias, call.diagonal, call.sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            f"{caller}: nothing must require a gradient with an int8 cache; got a tensor that does. Decode under "
            "torch.no_grad()."
        )
