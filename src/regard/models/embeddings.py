"""The domains: each is an embedding and a mask, and everything after that is the same Transformer.

Enters: tokens, images, audio frames, a graph, points, table rows.
Leaves: `Embedded`: what the Transformer reads, who may see whom, what is added to scores, and which places are real.
Floor 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from regard import check, masks
from regard.mask_algebra import Mask


class Embedded(NamedTuple):
    """One batch, ready for the Transformer."""

    x: Tensor
    """`(batch, seq_len, dim)`."""
    mask: Mask | None = None
    """Who may see whom; None: all."""
    bias: Tensor | None = None
    """Added to scores, broadcastable to `(batch, num_heads, seq_len, seq_len)`; None: nothing."""
    keep: Tensor | None = None
    """Bool `(batch, seq_len)`, True where there is no padding; None: everywhere."""


class Tokens(nn.Module):
    """Words: a vector for each token; padding is masked.

    Args:
        dim: numbers in one embedding.
        vocab_size: how many tokens there are.

    Example:
        >>> Tokens(8, vocab_size=50)(torch.tensor([[3, 4, 0]]), torch.tensor([2])).keep
        tensor([[ True,  True, False]])
    """

    def __init__(self, dim: int, *, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, dim)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Embedded:
        """Tokens int64 `(batch, seq_len)`, lengths int64 `(batch,)`."""
        mask, keep = _padded(lengths, tokens.shape[1])
        return Embedded(self.table(tokens), mask, keep=keep)


class Patches(nn.Module):
    """Images: cut into squares, each projected; a learned token that stands for the whole comes first.

    Args:
        dim: numbers in one embedding.
        image_size: height and width.
        patch: height and width of a square, a divisor of image_size.
        channels: Default 3.

    Example:
        >>> Patches(8, image_size=28, patch=7, channels=1)(torch.zeros(2, 1, 28, 28)).x.shape
        torch.Size([2, 17, 8])

    Source: Dosovitskiy et al. 2021, equation 1.
    """

    def __init__(self, dim: int, *, image_size: int, patch: int, channels: int = 3) -> None:
        super().__init__()
        if image_size % check.count("Patches", "patch", patch, 1):
            raise ValueError(
                f"Patches: image_size must be a multiple of patch; got {image_size} and {patch}. Resize it."
            )
        self.shape = (channels, image_size, image_size)
        self.first = nn.Parameter(torch.zeros(1, 1, dim))
        self.projection = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, images: Tensor) -> Embedded:
        """Images `(batch, channels, height, width)`."""
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"Patches: images must be (batch, {', '.join(map(str, self.shape))}); got {tuple(images.shape)}. "
                "Resize them."
            )
        patches = self.projection(images).flatten(2).transpose(1, 2)
        return Embedded(torch.cat((self.first.expand(len(images), -1, -1), patches), 1))


class Frames(nn.Module):
    """Sound: frames of a spectrogram through two convolutions, of which the second halves their number.

    Args:
        dim: numbers in one embedding.
        num_features: numbers in one frame, such as mel bands.

    Example:
        >>> Frames(8, num_features=40)(torch.zeros(2, 101, 40), torch.tensor([101, 60])).keep.sum(1)
        tensor([51, 30])

    Source: Radford et al. 2023 (Whisper), section 2.2.
    """

    def __init__(self, dim: int, *, num_features: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(num_features, dim, 3, padding=1)
        self.second = nn.Conv1d(dim, dim, 3, stride=2, padding=1)

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Embedded:
        """Frames `(batch, seq_len, num_features)`, lengths int64 `(batch,)` in frames."""
        x = frames.transpose(1, 2)
        real = None
        if lengths is not None:  # what lies past the end is what a convolution finds past the end of its input: zeros
            real = (torch.arange(frames.shape[1], device=frames.device) < lengths[:, None])[:, None]
            x = torch.where(real, x, 0.0)
        x = gelu(self.first(x))
        if real is not None and lengths is not None:
            x, lengths = torch.where(real, x, 0.0), (lengths + 1) // 2
        x = gelu(self.second(x)).transpose(1, 2)
        mask, keep = _padded(lengths, x.shape[1])
        return Embedded(x, mask, keep=keep)


class Nodes(nn.Module):
    """Graphs: a node's features, projected; a node sees those from which an edge leads to it, and itself.

    Args:
        dim: numbers in one embedding.
        num_features: numbers of one node.
        dropout: probability that a feature is dropped in training. Default 0.

    Example:
        >>> embedded = Nodes(8, num_features=5)(torch.zeros(3, 5), torch.tensor([[0, 1], [2, 2]]))
        >>> print(embedded.mask.draw(3))
        █··
        ·█·
        ███

    Source: Veličković et al. 2018, section 2.1.
    """

    def __init__(self, dim: int, *, num_features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.projection = nn.Linear(num_features, dim)

    def forward(self, features: Tensor, edges: Tensor) -> Embedded:
        """Features `(num_nodes, num_features)`; edges int64 `(2, num_edges)`, each from `[0]` to `[1]`."""
        loops = torch.arange(len(features), device=edges.device).expand(2, -1)
        index = torch.cat((edges.flip(0), loops), 1)  # a query is where an edge ends
        return Embedded(self.projection(self.drop(features))[None], masks.edges(index))


class Points(nn.Module):
    """Points in space: coordinates through a small network; a point sees its nearest neighbours.

    The difference of two points' coordinates, through another small network, is added to their score. Points have no
    order: permuted points give permuted results.

    Args:
        dim: numbers in one embedding.
        num_heads: query heads of the Transformer, each with a bias of its own.
        neighbors: how many points a point sees, itself among them, and whoever is as near as the last.
        num_coordinates: Default 3.
        num_features: further numbers of a point, such as a colour. Default 0.

    Example:
        >>> embedded = Points(8, num_heads=2, neighbors=3)(torch.randn(4, 20, 3))
        >>> embedded.x.shape, embedded.bias.shape, embedded.mask.density(20) >= 3 / 20
        (torch.Size([4, 20, 8]), torch.Size([4, 2, 20, 20]), True)

    Source: Zhao et al. 2021 (Point Transformer), section 3.2.
    """

    def __init__(
        self, dim: int, *, num_heads: int, neighbors: int, num_coordinates: int = 3, num_features: int = 0
    ) -> None:
        super().__init__()
        self.neighbors = check.count("Points", "neighbors", neighbors, 1)
        self.num_coordinates = num_coordinates
        self.network = nn.Sequential(nn.Linear(num_coordinates + num_features, dim), nn.GELU(), nn.Linear(dim, dim))
        self.relative = nn.Sequential(nn.Linear(num_coordinates, 16), nn.GELU(), nn.Linear(16, num_heads))

    def forward(self, points: Tensor, lengths: Tensor | None = None) -> Embedded:
        """Points `(batch, num_points, num_coordinates + num_features)`, lengths int64 `(batch,)`."""
        at = points[..., : self.num_coordinates]
        offsets = at[:, None, :, :] - at[:, :, None, :]  # (batch, query, key, coordinates)
        distances = offsets.square().sum(-1)
        mask, keep = _padded(lengths, points.shape[1])
        if keep is not None:
            distances = distances.masked_fill(~keep[:, None, :], torch.inf)
        furthest = distances.topk(min(self.neighbors, points.shape[1]), -1, largest=False).values[..., -1:]
        near = masks.from_tensor((distances <= furthest)[:, None])
        bias = self.relative(offsets).permute(0, 3, 1, 2)
        return Embedded(self.network(points), near if mask is None else near & mask, bias, keep)


class Columns(nn.Module):
    """Tables: each column a token; a number scales its column's vector, a category has a vector of its own.

    A learned token that stands for the whole row comes first.

    Args:
        dim: numbers in one embedding.
        num_numeric: how many columns hold numbers.
        categories: how many categories each of the other columns has.

    Example:
        >>> table = Columns(8, num_numeric=2, categories=[3, 5])
        >>> table(torch.randn(4, 2), torch.tensor([[0, 4]] * 4)).x.shape
        torch.Size([4, 5, 8])

    Source: Gorishniy et al. 2021 (FT-Transformer), section 3.3.
    """

    def __init__(self, dim: int, *, num_numeric: int, categories: Sequence[int] = ()) -> None:
        super().__init__()
        bound = dim**-0.5
        self.num_numeric, self.categories = num_numeric, tuple(categories)
        self.first = nn.Parameter(torch.empty(1, dim).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.empty(num_numeric, dim).uniform_(-bound, bound))
        self.table = nn.Parameter(torch.empty(sum(categories), dim).uniform_(-bound, bound))
        self.offset = nn.Parameter(torch.empty(num_numeric + len(self.categories), dim).uniform_(-bound, bound))

    def forward(self, numeric: Tensor, categorical: Tensor) -> Embedded:
        """Numbers `(batch, num_numeric)`, categories int64 `(batch, len(categories))`, each from 0."""
        if numeric.shape[1] != self.num_numeric or categorical.shape[1] != len(self.categories):
            raise ValueError(
                f"Columns: numeric and categorical must have {self.num_numeric} and {len(self.categories)} columns; "
                f"got {numeric.shape[1]} and {categorical.shape[1]}. Pass an empty tensor where there are none."
            )
        sizes = torch.tensor(self.categories, dtype=torch.int64, device=categorical.device)
        if categorical.numel() and bool(((categorical < 0) | (categorical >= sizes)).any()):
            raise ValueError(
                f"Columns: categories must be from 0 to {[size - 1 for size in self.categories]}; got "
                f"{categorical.amin(0).tolist()} to {categorical.amax(0).tolist()}. Number unknown ones too."
            )
        scaled = numeric[..., None] * self.scale
        looked_up = nn.functional.embedding(categorical + sizes.cumsum(0) - sizes, self.table)
        columns = torch.cat((scaled, looked_up), 1) + self.offset
        return Embedded(torch.cat((self.first.expand(len(numeric), 1, -1), columns), 1))


DOMAINS: dict[str, type[nn.Module]] = {
    "tokens": Tokens, "patches": Patches, "frames": Frames, "nodes": Nodes, "points": Points, "columns": Columns,
}  # fmt: skip


def _padded(lengths: Tensor | None, seq_len: int) -> tuple[Mask | None, Tensor | None]:
    """The mask of a batch padded on the right, and which places are real."""
    if lengths is None:
        return None, None
    return masks.padding(lengths), torch.arange(seq_len, device=lengths.device) < lengths[:, None]
