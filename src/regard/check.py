"""What a call's arguments must be, one clear sentence where they are not.

Enters: arguments of the public functions.
Leaves: nothing, or plain values made of them; ValueError and TypeError `function: argument must condition; got value.
Fix.` Checks are cheap, and messages are built on failure alone: a call passes here in a few microseconds.
Floor 0: pure, imports torch alone.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("native", "reference", "flex", "sdpa")
STAGES = ("scaled", "capped", "biased", "weights")
_NAMES = ("batch", "num_heads", "seq_len_q", "head_dim")


def inputs(caller: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v fit each other."""
    if q.dim() == k.dim() == v.dim() == 4:
        batch, num_heads, _, head_dim = q.shape
        k_batch, num_kv_heads, seq_len_kv, k_dim = k.shape
        v_batch, v_heads, v_len, head_dim_v = v.shape
        if (
            batch == k_batch == v_batch
            and head_dim == k_dim
            and num_kv_heads == v_heads
            and seq_len_kv == v_len
            and num_kv_heads > 0
            and num_heads > 0
            and num_heads % num_kv_heads == 0
            and head_dim > 0
            and head_dim_v > 0
            and q.dtype == k.dtype == v.dtype
            and q.dtype in DTYPES
            and ((q.is_cpu and k.is_cpu and v.is_cpu) or q.device == k.device == v.device)
        ):
            return
    _refuse_inputs(caller, {"q": q, "k": k, "v": v})


def _refuse_inputs(caller: str, named: dict[str, Tensor]) -> NoReturn:
    q, k, v = named.values()
    for name, tensor in named.items():
        if tensor.dim() != 4:
            heads = "num_heads, seq_len_q, head_dim" if name == "q" else "num_kv_heads, seq_len_kv, head_dim"
            raise ValueError(f"{caller}: {name} must have 4 axes (batch, {heads}); got {_shape(tensor)}. Reshape it.")
    if len({tensor.device for tensor in named.values()}) > 1:
        raise ValueError(
            f"{caller}: q, k and v must be on one device; got {q.device}, {k.device} and {v.device}. "
            "Move them with .to(q.device)."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"{caller}: q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}. "
            "Convert them with .to(q.dtype)."
        )
    if q.dtype not in DTYPES:
        listed = "float32, bfloat16, float16 or float64"
        raise TypeError(f"{caller}: q, k and v must be {listed}; got {q.dtype}. Convert them with .float().")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"{caller}: q, k and v must have one batch; got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}. "
            "Expand the smaller ones."
        )
    if k.shape[1] != v.shape[1]:
        raise ValueError(
            f"{caller}: k and v must have one number of heads; got {k.shape[1]} and {v.shape[1]}. "
            "Give both num_kv_heads."
        )
    if not q.shape[1] or not k.shape[1]:
        raise ValueError(
            f"{caller}: num_heads must be at least 1; got {q.shape[1]} and {k.shape[1]}. Give each a head."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{caller}: num_heads must be a multiple of num_kv_heads; got {q.shape[1]} and {k.shape[1]}. "
            "Change the number of k/v heads."
        )
    if k.shape[2] != v.shape[2]:
        raise ValueError(
            f"{caller}: k and v must have one seq_len_kv; got {k.shape[2]} and {v.shape[2]}. Give a value for each key."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{caller}: q and k must have one head_dim; got {q.shape[3]} and {k.shape[3]}. Project them alike."
        )
    raise ValueError(
        f"{caller}: head_dim and head_dim_v must be at least 1; got {q.shape[3]} and {v.shape[3]}. "
        "Give each head some numbers."
    )


def scale(caller: str, value: Any, head_dim: int) -> float:
    """The factor of q kᵀ: 1/√head_dim where none is given."""
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    _number(caller, "scale", value)
    if not math.isfinite(value):
        raise ValueError(f"{caller}: scale must be finite; got {value}. Leave it out for 1/sqrt(head_dim).")
    return float(value)


def softcap(caller: str, value: Any) -> float | None:
    """The bound of the scores, or None."""
    if value is None:
        return None
    _number(caller, "softcap", value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{caller}: softcap must be above 0 and finite; got {value}. Use None for no cap.")
    return float(value)


def dropout(caller: str, value: Any) -> float:
    """The probability that a weight is dropped."""
    _number(caller, "dropout", value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{caller}: dropout must be at least 0 and below 1; got {value}. Use 0.0 for none.")
    return float(value)


def offset(caller: str, name: str, value: Any, batch: int) -> int | Tensor:
    """A query or key offset: an int, or int64 (batch,)."""
    if type(value) is int:
        return value
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim() != 1 or value.shape[0] != batch or not value.is_cpu:
            raise ValueError(
                f"{caller}: {name} must be an int or int64 (batch,) = ({batch},) on the CPU; got {value.dtype} "
                f"{_shape(value)} on {value.device}. Give one position per batch row."
            )
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # a trace's int, taken for the int that it stands for
    if not hasattr(value, "__index__") or isinstance(value, bool):
        raise TypeError(
            f"{caller}: {name} must be an int or int64 (batch,); got {type(value).__name__}. Give the first position."
        )
    return value.__index__()


def positions_known(caller: str, what: str, seq_len_q: int, seq_len_kv: int) -> None:
    """A positional mask or bias without a query offset needs equal lengths."""
    if seq_len_q != seq_len_kv:
        raise ValueError(
            f"{caller}: query_offset must be given where a positional {what} meets seq_len_q != seq_len_kv; got "
            f"{seq_len_q} and {seq_len_kv}. Pass query_offset={seq_len_kv - seq_len_q} if the last query stands at the "
            "last key, 0 if the first ones meet, or use a KVCache."
        )


def sinks(caller: str, value: Any, num_heads: int, dtype: torch.dtype, device: torch.device) -> None:
    """Sinks are one number per query head, in q's dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{caller}: sinks must be a tensor (num_heads,); got {type(value).__name__}. Use torch.tensor([...])."
        )
    if value.dim() != 1 or value.shape[0] != num_heads:
        raise ValueError(
            f"{caller}: sinks must be (num_heads,) = ({num_heads},); got {_shape(value)}. Give one per query head."
        )
    if value.dtype != dtype:
        raise TypeError(
            f"{caller}: sinks must be in q's dtype, {dtype}; got {value.dtype}. Convert it with .to(q.dtype)."
        )
    on_device(caller, "sinks", value, device)


def on_cpu(caller: str, name: str, value: Tensor) -> None:
    """A further tensor stands where q, k and v stand: on the CPU."""
    if not value.is_cpu:
        raise ValueError(f"{caller}: {name} must be on q's device, cpu; got {value.device}. Move it with .cpu().")


def on_device(caller: str, name: str, value: Tensor, device: torch.device) -> None:
    """A further tensor stands where q, k and v stand."""
    if value.device != device:
        fix = "Move it with .cpu()." if device.type == "cpu" else "Move it with .to(q.device)."
        raise ValueError(f"{caller}: {name} must be on q's device, {device}; got {value.device}. {fix}")


def backend(caller: str, value: Any) -> None:
    """A backend that exists; a named one never falls back."""
    if value is not None and value not in BACKENDS:
        raise ValueError(
            f"{caller}: backend must be 'native', 'reference', 'flex', 'sdpa' or None; got {value!r}. "
            "Leave it out for the best."
        )


def stage(caller: str, value: Any) -> None:
    """One of the four points of the order."""
    if value not in STAGES:
        raise ValueError(
            f"{caller}: stage must be one of {', '.join(STAGES)}; got {value!r}. Leave it out for the weights."
        )


def span(caller: str, name: str, value: Any, length: int) -> range:
    """Rows or columns of a tile: a slice without a step, or a range, within the length."""
    if isinstance(value, slice) and value.step in (None, 1):
        found = range(*value.indices(length))
    elif isinstance(value, range) and value.step == 1:
        found = value
    else:
        raise TypeError(
            f"{caller}: {name} must be a slice or range of step 1; got {value!r}. Ask for slice(i, i + 1) to see one."
        )
    if len(found) and not 0 <= found.start < found.stop <= length:
        raise ValueError(f"{caller}: {name} must lie within 0 and {length}; got {value!r}. Ask for what there is.")
    return found if len(found) else range(0)


def lse(caller: str, value: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A log-sum-exp handed in by the caller is the full-length one of the same call."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != wide:
        got = f"{value.dtype} {_shape(value)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{caller}: lse must be the full-length {wide} (batch, num_heads, seq_len_q) = {shape}; got {got}. "
            "Take it from attention_with_stats, or leave it out."
        )


def partial(caller: str, out: Tensor, lse: Tensor, dtype: torch.dtype) -> None:
    """out and lse of one partial result belong together."""
    if lse.dtype not in (torch.float32, torch.float64) or lse.dtype != dtype or out.dtype not in DTYPES:
        raise TypeError(
            f"{caller}: lse must be float32 or float64, the same in all partials, and out floating point; got lse "
            f"{lse.dtype} and out {out.dtype}. Use what attention_with_stats returns."
        )
    if out.dim() != lse.dim() + 1:
        raise ValueError(
            f"{caller}: out must have one axis more than lse, head_dim_v; got {_shape(out)} and {_shape(lse)}. "
            "Use what attention_with_stats returns."
        )


def count(caller: str, name: str, value: Any, least: int) -> int:
    """A whole number, at least `least`."""
    if not hasattr(value, "__index__") or isinstance(value, bool) or value.__index__() < least:
        raise ValueError(f"{caller}: {name} must be an int of at least {least}; got {value!r}. Give a whole number.")
    return value.__index__()


def block(caller: str, value: Any) -> tuple[int, int] | None:
    """Sizes of a block, (rows, cols), or None."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(
            f"{caller}: block must be (rows, cols); got {value!r}. Give the two sizes, as in block=(64, 64)."
        )
    return count(caller, "block's rows", value[0], 1), count(caller, "block's cols", value[1], 1)


def _number(caller: str, name: str, value: Any) -> None:
    if not isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be a number; got {type(value).__name__}. Pass float({name}).")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
