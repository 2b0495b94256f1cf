"""A language model: a causal Transformer over tokens that predicts the next one.

Enters: token ids `(batch, seq_len)`.
Leaves: logits of the token that follows each; a loss; text that goes on.
Floor 5.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from regard import masks
from regard.cache import KVCache
from regard.mask_algebra import Mask
from regard.models.pretrained import Pretrained, as_config
from regard.models.transformer import Shape, Transformer, at_least_float32, check_tokens, start
from regard.nn import generate
from regard.nn.generate import Generated

_NAME = "GPT"


class GPT(Pretrained):
    """Tokens in, the next token's logits out.

    p(t_{i+1} | t_0 … t_i) = softmax(W Transformer(E t, causal)_i)

    Args:
        vocab_size: how many tokens there are.
        window: keys before its own position that a token sees. Default None: all.
        tied: whether W is the embedding table E. Default True.
        shape: the arguments of `Transformer`; positions default to "rotary".

    Example:
        >>> model = GPT(50, dim=32, num_layers=2)
        >>> model(torch.randint(50, (2, 9))).shape
        torch.Size([2, 9, 50])

    Source: Radford et al. 2019; Touvron et al. 2023, section 2.2 (rotary, rms, swiglu, by `shape`).
    """

    def __init__(
        self, vocab_size: int, *, window: int | None = None, tied: bool = True, **shape: Unpack[Shape]
    ) -> None:
        super().__init__()
        shape.setdefault("positions", "rotary")
        self.config = as_config({"vocab_size": vocab_size, "window": window, "tied": tied, **shape})
        self.vocab_size, self.window = vocab_size, window
        self.transformer = Transformer(**shape)
        self.embedding = nn.Embedding(vocab_size, self.transformer.dim)
        self.head = None if tied else nn.Linear(self.transformer.dim, vocab_size, bias=False)
        start(self, self.transformer.num_layers)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Mask | None = None,
        caches: list[KVCache] | None = None,
        offset: int | Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each.

        Args:
            tokens: int64 `(batch, seq_len)`.
            mask: joined to the causal one, as `masks.padding(lengths)` or `masks.documents(ids)`. Default None.
            caches: of earlier tokens, from `transformer.caches()`. Default None.
            offset: where the first token stands, for added positions. Default what the caches hold, or 0.

        Returns:
            `(batch, seq_len, vocab_size)`.
        """
        return self.logits(self.hidden(tokens, mask=mask, caches=caches, offset=offset))

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Mask | None = None,
        caches: list[KVCache] | None = None,
        offset: int | Tensor | None = None,
    ) -> Tensor:
        """What the head reads, `(batch, seq_len, dim)`; arguments as in `forward`."""
        check_tokens(_NAME, "tokens", tokens, self.vocab_size)
        own = masks.causal() if self.window is None else masks.sliding_window(self.window, 0)
        if offset is None:
            offset = caches[0].position if caches else 0
        return self.transformer(
            self.embedding(tokens), mask=own if mask is None else own & mask, caches=caches, offset=offset
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., dim)` → `(..., vocab_size)`."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return nn.functional.linear(hidden, weight)

    def loss(self, tokens: Tensor, *, mask: Mask | None = None, ignore: int = -100) -> Tensor:
        """Mean of −log p of each token but the first, in nats.

        Args:
            tokens: int64 `(batch, seq_len)`; those equal to `ignore` are padding on the right, and not counted.
            mask: as in `forward`, for the tokens but the last.
            ignore: Default -100.
        """
        read, wanted = tokens[:, :-1], tokens[:, 1:]
        hidden = self.hidden(read.clamp(min=0) if ignore < 0 else read, mask=mask)
        return nn.functional.cross_entropy(
            at_least_float32(self.logits(hidden)).flatten(0, 1), wanted.flatten(), ignore_index=ignore
        )

    def decoding(self, padding: Tensor | None = None) -> _Decoding:
        """A text to go on with, as `regard.nn.generate` and `beam_search` take it.

        Args:
            padding: int64 `(batch,)`, how many tokens at the left of each row are padding. Default None.
        """
        return _Decoding(self, padding)

    def generate(self, prompt: Tensor, *, lengths: Tensor | None = None, **named: Any) -> Generated:
        """Write on after each prompt.

        Args:
            prompt: int64 `(batch, seq_len)`.
            lengths: int64 `(batch,)`, real tokens of each row, padded on the right. Default None: all.
            named: as in `regard.nn.generate`: max_new_tokens, end, temperature, top_k, top_p, generator.

        Example:
            >>> model = GPT(50, dim=32, num_layers=2).eval()
            >>> model.generate(torch.tensor([[1, 2, 3], [4, 0, 0]]), lengths=torch.tensor([3, 1]), max_new_tokens=5)[
            ...     0
            ... ].shape
            torch.Size([2, 5])
        """
        prompt, padding = to_the_right(prompt, lengths)
        return generate(self.decoding(padding), prompt, **named)


def to_the_right(tokens: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows padded on the right as rows padded on the left, and how much padding each has; None where there is none.

    Example:
        >>> to_the_right(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1]))
        (tensor([[1, 2, 3],
                [0, 0, 4]]), tensor([0, 2]))
    """
    if lengths is None:
        return tokens, None
    if (
        lengths.shape != tokens.shape[:1]
        or (len(lengths) and not int(lengths.min()) >= 1)
        or (len(lengths) and int(lengths.max()) > tokens.shape[1])
    ):
        raise ValueError(
            f"GPT.generate: lengths must be (batch,) = ({len(tokens)},), each from 1 to {tokens.shape[1]}; got "
            f"{lengths.tolist()[:8]}. Begin each row with a token."
        )
    padding = tokens.shape[1] - lengths
    if not bool(padding.any()):
        return tokens, None
    source = torch.arange(tokens.shape[1], device=tokens.device) - padding[:, None]
    return tokens.gather(1, source % tokens.shape[1]), padding


class _Decoding:
    def __init__(self, model: GPT, padding: Tensor | None) -> None:
        self.model, self.padding = model, padding
        # a prompt comes whole: a cache lets go of old keys only in what follows
        self.caches = model.transformer.caches(left=model.window)

    def step(self, tokens: Tensor) -> Tensor:
        offset: int | Tensor = self.caches[0].position
        mask = None
        if self.padding is not None:
            offset, mask = offset - self.padding, ~masks.prefix(self.padding)
        hidden = self.model.hidden(tokens, mask=mask, caches=self.caches, offset=offset)
        return self.model.logits(hidden[:, -1])

    def select(self, rows: Tensor) -> None:
        for cache in self.caches:
            cache.reorder(rows)
        if self.padding is not None:
            self.padding = self.padding[rows]
