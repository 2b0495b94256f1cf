"""What is added to a score because of where, or which, its query and key are.

Enters: a tensor, slopes, or a table and a bucket function; later the `Frame` of a call.
Leaves: `Bias.resolve` gives a dense tensor, or one number per diagonal of the score matrix (O(n) memory), never both;
both carry gradients.
Floor 0: pure, imports torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding
from typing_extensions import override

from regard.positions import Frame

__all__ = ["Bias", "alibi", "as_bias", "dense", "relative_position"]


class Bias:
    """A number for every pair of query and key. Make one with the functions of `regard.biases`."""

    def needs_query_positions(self) -> bool:
        """Whether it depends on where the queries stand, so that unequal lengths need a `query_offset`."""
        return True

    def tensors(self) -> list[Tensor]:
        """The tensors that it was made of."""
        raise NotImplementedError

    def validate(self, caller: str, frame: Frame) -> None:
        """Raise a ValueError, naming `caller`, where the bias does not fit the call."""
        raise NotImplementedError

    def resolve(self, frame: Frame, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The bias as numbers, differentiable.

        Returns:
            `(dense, diagonal)`, one of them None. dense: 4 axes, broadcastable to `(batch, num_heads, seq_len_q,
            seq_len_kv)`. diagonal: `(1 or batch, 1 or num_heads, seq_len_q + seq_len_kv − 1)`, of which entry
            `j − i + seq_len_q − 1` is the bias of query index i and key index j; float32 where `dtype` is a half type.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Dense(Bias):
    """bias[batch, head, query index, key index], each axis 1 or full."""

    bias: Tensor

    @override
    def tensors(self) -> list[Tensor]:
        return [self.bias]

    @override
    def needs_query_positions(self) -> bool:
        return False

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        whole = (frame.batch, frame.num_heads, frame.seq_len_q, frame.seq_len_kv)
        if any(own != 1 and own != full for own, full in zip(self.bias.shape, whole, strict=True)):
            raise ValueError(
                f"{caller}: bias must be broadcastable to (batch, num_heads, seq_len_q, seq_len_kv) = {whole}; "
                f"got {tuple(self.bias.shape)}. Give each axis its full length or 1."
            )

    @override
    def resolve(self, frame: Frame, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        return self.bias.to(device=device, dtype=dtype), None


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """−slopes[head] · |query position − key position|."""

    slopes: Tensor | None

    @override
    def tensors(self) -> list[Tensor]:
        return [] if self.slopes is None else [self.slopes]

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        if self.slopes is not None and self.slopes.shape[0] != frame.num_heads:
            raise ValueError(
                f"{caller}: alibi's slopes must be one per query head ({frame.num_heads}); got {self.slopes.shape[0]}. "
                "Give num_heads slopes, or none for the usual ones."
            )

    @override
    def resolve(self, frame: Frame, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self.slopes is None:
            slopes = torch.tensor(alibi_slopes(frame.num_heads), dtype=wide, device=device)
        else:
            slopes = self.slopes.to(device=device, dtype=wide)
        distance = frame.relative_positions().to(device).abs().to(wide)
        return None, -slopes[None, :, None] * distance[:, None]


@dataclass(frozen=True, eq=False)
class RelativePosition(Bias):
    """table[head, bucket(key position − query position)]."""

    table: Tensor
    bucket: Callable[[Tensor], Tensor]

    @override
    def tensors(self) -> list[Tensor]:
        return [self.table]

    @override
    def validate(self, caller: str, frame: Frame) -> None:
        if self.table.shape[0] not in (1, frame.num_heads):
            raise ValueError(
                f"{caller}: relative_position's table must have one row per query head ({frame.num_heads}) or one; "
                f"got {self.table.shape[0]}. Give it as (num_heads, num_buckets)."
            )

    @override
    def resolve(self, frame: Frame, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        distance = frame.relative_positions().to(device)
        buckets = self.bucket(distance)
        if not isinstance(buckets, Tensor) or buckets.dtype not in _INTS or buckets.shape != distance.shape:
            got = f"{buckets.dtype} {tuple(buckets.shape)}" if isinstance(buckets, Tensor) else type(buckets).__name__
            raise ValueError(
                "biases.relative_position: bucket must return an integer tensor of its argument's shape "
                f"{tuple(distance.shape)}; got {got}. Use elementwise operations."
            )
        if not torch.compiler.is_compiling() and buckets.numel():
            least, most = int(buckets.min()), int(buckets.max())
            if least < 0 or most >= self.table.shape[1]:
                raise ValueError(
                    f"biases.relative_position: bucket must return numbers from 0 to {self.table.shape[1] - 1}; "
                    f"got {least} to {most}. Clamp them, or give the table more buckets."
                )
        # embedding, not indexing: its backward sums in a fixed order
        return None, embedding(buckets, self.table.t()).permute(0, 2, 1).to(device=device, dtype=dtype)


def dense(bias: Tensor) -> Bias:
    """A bias spelt out as a tensor.

    score[b, h, i, j] + bias[b, h, i, j]; −inf excludes the key as a mask does.

    Args:
        bias: float, in q's dtype, broadcastable to `(batch, num_heads, seq_len_q, seq_len_kv)`, at most 4 axes.

    Returns:
        Bias: carries the tensor's gradient.

    Raises:
        TypeError, ValueError: where it is not a float tensor, or has more than 4 axes.

    Example:
        >>> dense(torch.zeros(3, 5)).resolve(Frame(1, 1, 3, 5), torch.float32, torch.device("cpu"))[0].shape
        torch.Size([1, 1, 3, 5])
    """
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"biases.dense: bias must be a tensor; got {type(bias).__name__}. Make it with torch.tensor(...)."
        )
    if not bias.is_floating_point():
        raise TypeError(f"biases.dense: bias must be floating point; got {bias.dtype}. {_fix(bias)}")
    if bias.ndim > 4:
        raise ValueError(
            "biases.dense: bias must have at most 4 axes (batch, num_heads, seq_len_q, seq_len_kv); "
            f"got {tuple(bias.shape)}. Reshape it."
        )
    return Dense(bias[(None,) * (4 - bias.ndim)])


def alibi(slopes: Tensor | None = None) -> Bias:
    """Attention with linear biases: the further a key, the lower its score.

    −slope[h] · |query position − key position|.

    Args:
        slopes: float `(num_heads,)`. Default: the paper's, 2^(−8 h / num_heads) for h = 1 … num_heads, and for a number
            of heads that is no power of two those of the next smaller one, then every other one of the next larger.

    Returns:
        Bias: positional, O(n) memory, carries the gradient of the slopes.

    Raises:
        TypeError, ValueError: where the slopes are not float `(num_heads,)`.

    Example:
        >>> alibi().resolve(Frame(1, 1, 2, 3), torch.float32, torch.device("cpu"))[1]
        tensor([[[-0.0039, -0.0000, -0.0039, -0.0078]]])

    Source: Press et al. 2022, section 3.
    """
    if slopes is not None:
        if not isinstance(slopes, Tensor):
            raise TypeError(
                f"biases.alibi: slopes must be a tensor; got {type(slopes).__name__}. Use torch.tensor([...])."
            )
        if not slopes.is_floating_point() or slopes.ndim != 1:
            raise ValueError(
                f"biases.alibi: slopes must be float (num_heads,); got {slopes.dtype} {tuple(slopes.shape)}. "
                "Give one per head."
            )
    return Alibi(slopes)


def relative_position(table: Tensor, bucket: Callable[[Tensor], Tensor]) -> Bias:
    """A learned number for each bucket of distances, as in T5.

    table[h, bucket(key position − query position)].

    Args:
        table: float `(num_heads, num_buckets)`.
        bucket: elementwise; from int64 distances, key position − query position, to bucket numbers.

    Returns:
        Bias: positional, O(n) memory, carries the table's gradient.

    Raises:
        TypeError, ValueError: where table is not float with 2 axes, or bucket is not callable or leaves the table.

    Example:
        >>> nearby = relative_position(torch.tensor([[0.0, 1.0, 2.0]]), lambda distance: distance.clamp(-1, 1) + 1)
        >>> nearby.resolve(Frame(1, 1, 2, 3), torch.float32, torch.device("cpu"))[1]
        tensor([[[0., 1., 2., 2.]]])

    Source: Raffel et al. 2020, section 2.1.
    """
    if not isinstance(table, Tensor) or not table.is_floating_point() or table.ndim != 2:
        got = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(
            f"biases.relative_position: table must be float (num_heads, num_buckets); got {got}. Reshape it."
        )
    if not callable(bucket):
        raise TypeError(
            f"biases.relative_position: bucket must be callable; got {type(bucket).__name__}. Pass a function."
        )
    return RelativePosition(table, bucket)


def alibi_slopes(num_heads: int) -> list[float]:
    """The default slopes of `alibi` for `num_heads` heads (Press et al. 2022, section 3 and its published code)."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4.0 * (head + 1) / power) for head in range(0, 2 * (num_heads - power), 2)]


def as_bias(value: object, caller: str, dtype: torch.dtype) -> Bias:
    """`value` as a bias: a bias itself, or a float tensor in `dtype`; `caller` refuses anything else."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{caller}: bias must be floating point; got {value.dtype}. {_fix(value)}")
        value = dense(value)
    if not isinstance(value, Bias):
        raise TypeError(
            f"{caller}: bias must be a bias of regard.biases or a float tensor; got {type(value).__name__}. "
            "Make one, as in regard.biases.alibi()."
        )
    if isinstance(value, Dense) and value.bias.dtype != dtype:
        raise TypeError(
            f"{caller}: bias must be in q's dtype, {dtype}; got {value.bias.dtype}. Convert it with .to(q.dtype)."
        )
    return value


_INTS = (torch.int64, torch.int32)


def _fix(bias: Tensor) -> str:
    return "Pass it as mask=." if bias.dtype == torch.bool else "Convert it with .to(q.dtype)."
