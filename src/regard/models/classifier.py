"""A class for the whole, or for each part, of whatever domain: embedding, Transformer, one linear layer.

Enters: what the domain's embedding takes: images, frames, a graph, points, table rows, tokens.
Leaves: logits of the classes; a loss.
Floor 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from regard.models.embeddings import DOMAINS, Embedded
from regard.models.pretrained import Pretrained, as_config
from regard.models.transformer import Shape, Transformer, at_least_float32

POOLS = ("first", "mean", "each")


class Classifier(Pretrained):
    """Embedding and mask of a domain, the Transformer, and logits of num_classes.

    logits = W pool(Transformer(embed(input), mask, bias)) + b

    Args:
        domain: "tokens", "patches", "frames", "nodes", "points" or "columns"; see `regard.models.embeddings`.
        options: the arguments of that embedding, but dim.
        num_classes: how many logits.
        pool: "first", the token that stands for the whole; "mean", over all that is no padding; "each", logits for
            every place. Default "first".
        shape: the arguments of `Transformer`.

    Raises:
        ValueError: for a word that is not among those above.

    Example:
        >>> model = Classifier("nodes", {"num_features": 5}, 7, pool="each", dim=32, positions="none", score="additive")
        >>> model(torch.randn(4, 5), torch.tensor([[0, 1, 2], [1, 2, 3]])).shape
        torch.Size([1, 4, 7])

    Source: of the domains, see there.
    """

    def __init__(
        self, domain: str, options: Mapping[str, Any], num_classes: int, *, pool: str = "first", **shape: Unpack[Shape]
    ) -> None:
        super().__init__()
        for name, word, known in (("domain", domain, DOMAINS), ("pool", pool, POOLS)):
            if word not in known:
                raise ValueError(f"Classifier: {name} must be one of {', '.join(known)}; got {word!r}. Choose one.")
        own = {"domain": domain, "options": dict(options), "num_classes": num_classes, "pool": pool}
        self.config = as_config({**own, **shape})
        self.pool = pool
        self.transformer = Transformer(**shape)
        heads = {"num_heads": self.transformer.num_heads} if domain == "points" else {}
        self.embedding = DOMAINS[domain](self.transformer.dim, **heads, **options)
        self.head = nn.Linear(self.transformer.dim, num_classes)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits `(batch, num_classes)`, or `(batch, seq_len, num_classes)` where each place has its own.

        Args:
            inputs: what the embedding takes.
        """
        embedded: Embedded = self.embedding(*inputs)
        x = self.transformer(embedded.x, mask=embedded.mask, bias=embedded.bias)
        return self.head(self._pooled(x, embedded.keep))

    def loss(self, *inputs: Tensor, wanted: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean of −log p of the wanted classes, in nats; −100 is not counted."""
        logits = at_least_float32(self(*inputs)).flatten(0, -2)
        return nn.functional.cross_entropy(logits, wanted.flatten(), label_smoothing=label_smoothing)

    def _pooled(self, x: Tensor, keep: Tensor | None) -> Tensor:
        if self.pool == "first":
            return x[:, 0]
        if self.pool == "each":
            return x
        if keep is None:
            return x.mean(1)
        kept = torch.where(keep[..., None], x, 0.0).sum(1)
        return kept / keep.sum(1, keepdim=True).clamp(min=1).to(x.dtype)


class ViT(Classifier):
    """A vision Transformer: a `Classifier` of patches.

    Args:
        image_size: height and width.
        patch: height and width of a patch.
        num_classes: how many logits.
        channels: Default 3.
        shape: the arguments of `Transformer`.

    Example:
        >>> model = ViT(28, 7, 10, channels=1, dim=32, num_layers=1)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Source: Dosovitskiy et al. 2021, equations 1 to 4.
    """

    def __init__(
        self, image_size: int, patch: int, num_classes: int, *, channels: int = 3, **shape: Unpack[Shape]
    ) -> None:
        options = {"image_size": image_size, "patch": patch, "channels": channels}
        places = (image_size // patch) ** 2 + 1
        super().__init__("patches", options, num_classes, **{**shape, "max_length": places})  # pyright: ignore
        self.config = as_config({**options, "num_classes": num_classes, **shape})
