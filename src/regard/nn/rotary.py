"""Rotary positions: queries and keys are turned by an angle that grows with their position.

Enters: queries or keys `(batch, heads, seq_len, head_dim)` and where they stand.
Leaves: the same, turned, so that a product of two depends on their distance alone.
Floor 5. A scaling says how the frequencies change so that a model reads further than it was trained to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from regard import check
from regard.nn.positions import Offset, Positions, places


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`: frequency / factor. Source: Chen et al. 2023, equation 4."""

    factor: float

    def frequencies(self, dim: int, base: float, seq_len: int) -> Tensor:  # noqa: ARG002
        """Frequencies `(dim / 2,)`, float32."""
        return plain(dim, base) / self.factor

    def magnitude(self) -> float:
        """Factor of the turned vectors."""
        return 1.0


@dataclass(frozen=True)
class Dynamic:
    """A larger base as the text grows past `original_length`: neural-tangent-kernel scaling, dynamic.

    base · (factor · seq_len / original_length − (factor − 1))^(dim / (dim − 2))

    Source: Peng et al. 2024 (YaRN), section 3.3 and appendix B.1.
    """

    factor: float
    original_length: int

    def frequencies(self, dim: int, base: float, seq_len: int) -> Tensor:
        """Frequencies `(dim / 2,)`, float32."""
        stretch = self.factor * max(seq_len, self.original_length) / self.original_length - (self.factor - 1)
        return plain(dim, base * stretch ** (dim / (dim - 2)))

    def magnitude(self) -> float:
        """Factor of the turned vectors."""
        return 1.0


@dataclass(frozen=True)
class YaRN:
    """Slow waves are stretched, fast ones are not, with a ramp between `beta_slow` and `beta_fast` turns.

    frequency · (1 − r) / factor + frequency · r; vectors grow by 0.1 ln(factor) + 1, so that the softmax stays sharp.

    Source: Peng et al. 2024 (YaRN), equations 17 to 22.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def frequencies(self, dim: int, base: float, seq_len: int) -> Tensor:  # noqa: ARG002
        """Frequencies `(dim / 2,)`, float32."""
        fast, slow = (
            dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low if high > low else 0.001)
        kept = 1 - ramp.clamp(0, 1)
        frequencies = plain(dim, base)
        return frequencies / self.factor * (1 - kept) + frequencies * kept

    def magnitude(self) -> float:
        """Factor of the turned vectors."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Llama3:
    """Waves longer than original_length / low_frequency are stretched, those shorter than original_length /
    high_frequency are not, with a ramp between. Source: Llama Team 2024, section 3.4.2, and its published code.
    """

    factor: float
    original_length: int
    low_frequency: float = 1.0
    high_frequency: float = 4.0

    def frequencies(self, dim: int, base: float, seq_len: int) -> Tensor:  # noqa: ARG002
        """Frequencies `(dim / 2,)`, float32."""
        frequencies = plain(dim, base)
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        return frequencies / self.factor * (1 - kept) + frequencies * kept

    def magnitude(self) -> float:
        """Factor of the turned vectors."""
        return 1.0


Scaling = Linear | Dynamic | YaRN | Llama3
SCALINGS: dict[str, type[Any]] = {"linear": Linear, "dynamic": Dynamic, "yarn": YaRN, "llama3": Llama3}


class Rotary(Positions):
    """Pairs of numbers of q and k, turned by position · frequency.

    (a, b) → (a cos θ − b sin θ, a sin θ + b cos θ), θ = p · base^(−2 i / dim) for pair i at position p

    Args:
        head_dim: numbers in one query; even.
        base: what the frequencies are powers of. Default 10,000.
        scaling: a `Scaling` of this module, or the dict that `scaling_as_dict` makes of one. Default None.
        dim: how many of the numbers are turned, from the first; even. Default all.
        interleaved: pairs are neighbours (0, 1), (2, 3), …, as in the paper. Default False: number i pairs with
            i + dim / 2, as in most published models.

    Raises:
        ValueError: where dim is not even, or above head_dim.

    Example:
        >>> rotary = Rotary(8, scaling=Linear(factor=2.0))
        >>> q, k = torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8)
        >>> scores = rotary.rotate(q) @ rotary.rotate(k).mT  # the same along each diagonal
        >>> torch.allclose(scores[0, 0, 1:, :-1].diagonal(), scores[0, 0, 1, 0])
        True

    Source: Su et al. 2021, equation 34.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10_000.0,
        scaling: Scaling | Mapping[str, Any] | None = None,
        dim: int | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.dim = check.count("Rotary", "dim", head_dim if dim is None else dim, 2)
        if self.dim % 2 or self.dim > head_dim:
            raise ValueError(
                f"Rotary: dim must be even and at most head_dim = {head_dim}; got {self.dim}. Turn fewer numbers."
            )
        self.base, self.interleaved = float(base), interleaved
        self.scaling = scaling_from_dict(scaling) if isinstance(scaling, Mapping) else scaling

    @override
    def rotate(self, x: Tensor, offset: Offset = 0) -> Tensor:
        """Queries or keys `(batch, heads, seq_len, head_dim)`, turned by their positions, in their dtype."""
        at = places(offset, x.shape[2], x.device)
        cos, sin = self.waves(at, torch.float64 if x.dtype == torch.float64 else torch.float32)
        if self.interleaved:
            pairs = x[..., : self.dim].unflatten(-1, (-1, 2))
            a, b = pairs.unbind(-1)
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = x[..., : self.dim].chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        turned = turned.to(x.dtype)
        return turned if self.dim == x.shape[-1] else torch.cat((turned, x[..., self.dim :]), -1)

    def waves(self, at: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions int64 `(batch, seq_len)`, each `(batch, 1, seq_len, dim / 2)`."""
        if self.scaling is None:
            frequencies, magnitude = plain(self.dim, self.base), 1.0
        else:
            grown = isinstance(self.scaling, Dynamic) and at.numel() > 0
            seq_len = int(at.max()) + 1 if grown else 0
            frequencies = self.scaling.frequencies(self.dim, self.base, seq_len)
            magnitude = self.scaling.magnitude()
        angles = (at[..., None].to(dtype) * frequencies.to(at.device, dtype))[:, None]
        return angles.cos() * magnitude, angles.sin() * magnitude


def plain(dim: int, base: float) -> Tensor:
    """base^(−2 i / dim) for i = 0 … dim / 2 − 1, float32."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def scaling_as_dict(scaling: Scaling) -> dict[str, Any]:
    """A scaling as plain words and numbers, for a JSON file."""
    return {"kind": next(kind for kind, own in SCALINGS.items() if type(scaling) is own), **asdict(scaling)}


def scaling_from_dict(words: Mapping[str, Any]) -> Scaling:
    """The scaling that `scaling_as_dict` wrote down.

    Raises:
        ValueError: where the kind is unknown, or its numbers are not those that it takes.

    Example:
        >>> scaling_from_dict({"kind": "linear", "factor": 2.0})
        Linear(factor=2.0)
    """
    kind = words.get("kind")
    if kind not in SCALINGS:
        raise ValueError(f"Rotary: scaling's kind must be one of {', '.join(SCALINGS)}; got {kind!r}. Choose one.")
    numbers = {name: value for name, value in words.items() if name != "kind"}
    try:
        return SCALINGS[kind](**numbers)
    except TypeError as unfit:
        raise ValueError(
            f"Rotary: scaling must have the numbers of {kind!r}; got {', '.join(numbers) or 'none'}. "
            f"See regard.nn.rotary.{SCALINGS[kind].__name__}."
        ) from unfit
