"""How a layer knows where its tokens stand: positions enter a Transformer at one of three places.

Enters: embeddings `(batch, seq_len, dim)`; queries and keys of the heads; nothing.
Leaves: embeddings with positions added (`add`), rotated queries and keys (`rotate`, in `rotary`), or a bias (`bias`).
Floor 5. A kind of positions overrides one of the three and leaves the others as they are, so that models ask for all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from typing_extensions import override

from regard import biases, check
from regard.biases import Bias

Offset = int | Tensor


class Positions(nn.Module):
    """No positions at all: what every kind starts from."""

    def add(self, x: Tensor, offset: Offset = 0) -> Tensor:  # noqa: ARG002
        """Embeddings `(batch, seq_len, dim)` with their positions added; here as they are.

        Args:
            x: the embeddings.
            offset: position of the first token, an int or int64 `(batch,)`; or of each, int64 `(batch, seq_len)`.
        """
        return x

    def rotate(self, x: Tensor, offset: Offset = 0) -> Tensor:  # noqa: ARG002
        """Queries or keys `(batch, heads, seq_len, head_dim)`, turned by their positions; here as they are."""
        return x

    def bias(self) -> Bias | None:
        """What is added to the scores; here nothing."""
        return None


class Sinusoidal(Positions):
    """Waves of falling frequency, added to the embeddings.

    pe[p, 2 i] = sin(p / 10000^(2 i / dim)), pe[p, 2 i + 1] = cos(the same).

    Args:
        dim: numbers in one embedding.
        halves: all sines first, then all cosines, as in tensor2tensor and Marian. Default False: one after the other.

    Example:
        >>> Sinusoidal(4).add(torch.zeros(1, 2, 4))
        tensor([[[0.0000, 1.0000, 0.0000, 1.0000],
                 [0.8415, 0.5403, 0.0100, 0.9999]]])

    Source: Vaswani et al. 2017, section 3.5.
    """

    def __init__(self, dim: int, *, halves: bool = False) -> None:
        super().__init__()
        self.dim, self.halves = check.count("Sinusoidal", "dim", dim, 1), halves

    @override
    def add(self, x: Tensor, offset: Offset = 0) -> Tensor:
        _fits("Sinusoidal", x, self.dim)
        steps = torch.arange(0, self.dim, 2, dtype=torch.float64, device=x.device)
        # float64: float32 positions times frequencies lose digits that the waves show
        angles = places(offset, x.shape[1], x.device)[..., None] * torch.exp(steps * (-math.log(1e4) / self.dim))
        waves = (angles.sin(), angles.cos())
        table = torch.cat(waves, -1) if self.halves else torch.stack(waves, -1).flatten(-2)
        if self.dim % 2:  # one sine more than cosines
            table = torch.cat((waves[0], waves[1][..., :-1]), -1) if self.halves else table[..., :-1]
        return x + table.to(x.dtype)


class Learned(Positions):
    """A learned vector for each position, added to the embeddings.

    out[b, i] = x[b, i] + weight[i + offset]

    Args:
        max_length: how many positions there are.
        dim: numbers in one embedding.

    Example:
        >>> Learned(16, 4).add(torch.zeros(1, 3, 4)).shape
        torch.Size([1, 3, 4])

    Source: Gehring et al. 2017, section 3.1; Devlin et al. 2019, figure 2.
    """

    def __init__(self, max_length: int, dim: int) -> None:
        super().__init__()
        self.max_length = check.count("Learned", "max_length", max_length, 1)
        self.weight = nn.Parameter(torch.randn(max_length, check.count("Learned", "dim", dim, 1)) * 0.02)

    @override
    def add(self, x: Tensor, offset: Offset = 0) -> Tensor:
        _fits("Learned", x, self.weight.shape[1])
        if isinstance(offset, int):
            stop = offset + x.shape[1]
            if not 0 <= offset <= stop <= self.max_length:
                self._refuse(offset, stop)
            return x + self.weight[offset:stop].to(x.dtype)
        at = places(offset, x.shape[1], x.device)
        if at.numel() and not torch.compiler.is_compiling() and int(at.max()) >= self.max_length:
            self._refuse(int(at.min()), int(at.max()) + 1)
        # what stands before the start is padding, which no mask lets through
        return x + nn.functional.embedding(at.clamp(min=0), self.weight).to(x.dtype)

    def _refuse(self, start: int, stop: int) -> None:
        raise ValueError(
            f"Learned: positions must lie within 0 and max_length - 1 = {self.max_length - 1}; got {start} to "
            f"{stop - 1}. Shorten the input, or make the layer with a larger max_length."
        )


class RelativePosition(Positions):
    """A learned number for each head and bucket of distances, added to the scores.

    score[b, h, i, j] + weight[h, bucket(j − i)], where near distances have a bucket each and far ones share them, ever
    more to a bucket.

    Args:
        num_heads: query heads.
        num_buckets: how many buckets. Default 32.
        max_distance: from here on all distances share one bucket. Default 128.
        bidirectional: whether keys ahead have buckets of their own. Default True; False for causal attention.

    Example:
        >>> RelativePosition(8).bucket(torch.tensor([-200, -9, -1, 0, 1, 9, 200]))
        tensor([15,  8,  1,  0, 17, 24, 31])

    Source: Raffel et al. 2020, section 2.1.
    """

    def __init__(
        self, num_heads: int, *, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        self.num_buckets = check.count("RelativePosition", "num_buckets", num_buckets, 4 if bidirectional else 2)
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(check.count("RelativePosition", "num_heads", num_heads, 1), num_buckets))
        if max_distance <= self._exact:
            raise ValueError(
                f"RelativePosition: max_distance must be above {self._exact}, the distances with a bucket each; got "
                f"{max_distance}. Raise it, or use fewer buckets."
            )

    @property
    def _exact(self) -> int:
        return self.num_buckets // (4 if self.bidirectional else 2)

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket numbers of distances, key position − query position, int64 of any shape."""
        buckets = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        side = (distance > 0) * buckets if self.bidirectional else 0
        far = distance.abs() if self.bidirectional else (-distance).clamp(min=0)
        # float32 and truncation as in the published code, whose borders of buckets trained tables go by
        growth = torch.log(far.clamp(min=1).float() / self._exact) / math.log(self.max_distance / self._exact)
        shared = (self._exact + (growth * (buckets - self._exact)).long()).clamp(max=buckets - 1)
        return side + torch.where(far < self._exact, far, shared)

    @override
    def bias(self) -> Bias:
        return biases.relative_position(self.weight, self.bucket)


class Alibi(Positions):
    """The further a key, the lower its score, at a slope of each head's own.

    score[b, h, i, j] − slope[h] · |i − j|

    Args:
        slopes: float `(num_heads,)`, fixed. Default None: the paper's, for as many heads as there are.

    Example:
        >>> type(Alibi().bias()).__name__
        'Alibi'

    Source: Press et al. 2022, section 3.
    """

    def __init__(self, slopes: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("slopes", slopes, persistent=False)

    @override
    def bias(self) -> Bias:
        return biases.alibi(self.slopes)  # pyright: ignore[reportArgumentType]


def places(offset: Offset, length: int, device: torch.device | None = None) -> Tensor:
    """Positions, int64 `(1 or batch, length)`, from the first one or from all of them."""
    if isinstance(offset, Tensor) and offset.ndim == 2:
        return offset.to(device)
    index = torch.arange(length, device=device)[None]
    return index + (offset.to(device)[:, None] if isinstance(offset, Tensor) else offset)


def _fits(caller: str, x: Tensor, dim: int) -> None:
    if x.ndim != 3 or x.shape[2] != dim:
        raise ValueError(
            f"{caller}: x must be (batch, seq_len, dim = {dim}); got {tuple(x.shape)}. Make the positions for x's dim."
        )
