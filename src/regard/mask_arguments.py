"""What masks are made of: arguments as tensors, whether they fit a call, and positions as arrays.

Enters: what a caller gave to a constructor of `masks`; a rule's tensors and the `Frame` of a call.
Leaves: tensors and int64 arrays, or one clear error.
Floor 0: pure, imports torch and numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from regard.check import on_cpu
from regard.positions import Frame

INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_tensor(caller: str, value: object) -> Tensor:
    """A tensor, an array, whatever speaks DLPack, or a list of ints, as a tensor."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) or (isinstance(value, Sequence) and all(isinstance(one, int) for one in value)):
        return torch.tensor(value)
    if hasattr(value, "__dlpack__"):
        return torch.from_dlpack(value)
    raise TypeError(
        f"{caller}: the argument must be a tensor; got {type(value).__name__}. Make it with torch.tensor(...)."
    )


def described(tensor: Tensor) -> str:
    """Dtype and shape, for an error."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def not_bool(what: str, tensor: Tensor) -> str:
    """The error about a tensor that should say yes or no."""
    if tensor.is_floating_point():
        return f"{what} must be bool, True = may attend; got {tensor.dtype}. Pass it as bias=."
    return f"{what} must be bool, True = may attend; got {tensor.dtype}. Turn 0/1 into bool with `!= 0`."


def at_least(caller: str, name: str, value: object, least: int, fix: str) -> int:
    """`value`, where it is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{caller}: {name} must be an int; got {type(value).__name__}. {fix}")
    if value < least:
        raise ValueError(f"{caller}: {name} must be at least {least}; got {value}. {fix}")
    return value  # pyright: ignore[reportReturnType]


def check_batch(caller: str, name: str, tensor: Tensor, frame: Frame) -> None:
    """A row for each batch row, or one for all."""
    on_cpu(caller, name, tensor)
    if tensor.shape[0] != 1 and tensor.shape[0] != frame.batch:
        raise ValueError(
            f"{caller}: {name} must have one row per batch row ({frame.batch}) or one in all; got {tensor.shape[0]}. "
            "Give each batch row its own."
        )


def check_length(caller: str, name: str, tensor: Tensor, length: int, what: str) -> None:
    """An entry for each query or key of the call."""
    if tensor.shape[1] != length:
        raise ValueError(
            f"{caller}: {name} must have {what} = {length} entries a row; got {tensor.shape[1]}. "
            "They index this call's queries and keys: with a cache, give the cached ones too."
        )


def check_positions(
    caller: str, name: str, what: str, count: int, frame: Frame, fix: str, sides: str = "query key", *, first: int = 0
) -> None:
    """Every position of the call's queries and keys lies in [first, count)."""
    if torch.compiler.is_compiling():
        return
    for side, length, given in (
        ("query", frame.seq_len_q, frame.query_offset),
        ("key", frame.seq_len_kv, frame.key_offset),
    ):
        if not length or side not in sides:
            continue
        low = int(given.min()) if isinstance(given, Tensor) else given
        last = (int(given.max()) if isinstance(given, Tensor) else given) + length - 1
        if low < first or last >= count:
            raise ValueError(
                f"{caller}: {name} must cover every position; got {count} {what} and {side} positions {low} to {last}. "
                f"{fix}"
            )


def query_indices(frame: Frame) -> np.ndarray:
    """Index of the key that stands at each query's position, (1 or batch, seq_len_q)."""
    return np.arange(frame.seq_len_q)[None] + (offset(frame.query_offset) - offset(frame.key_offset))


def offset(given: int | Tensor) -> np.ndarray:
    """An offset as an array (1 or batch, 1)."""
    return array(given)[:, None] if isinstance(given, Tensor) else np.full((1, 1), given, np.int64)


def offsets(frame: Frame) -> list[tuple[int, int]]:
    """Query offset and key offset of each batch row, one pair where all agree."""
    query, key = np.broadcast_arrays(offset(frame.query_offset), offset(frame.key_offset))
    return list(zip(query[:, 0].tolist(), key[:, 0].tolist(), strict=True))


def array(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers; whole ones as int64."""
    held = tensor.detach().numpy()
    return held.astype(np.int64, copy=False) if held.dtype.kind in "iu" else held


def row_of(tensor: Tensor, batch: Tensor) -> Tensor:
    """The row of `tensor` that serves each batch row."""
    return batch if tensor.shape[0] > 1 else torch.zeros_like(batch[:1])
