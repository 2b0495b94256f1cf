"""An encoder of text: every token sees every other, and a head reads what became of them.

Enters: token ids `(batch, seq_len)` padded on the right, lengths, and which of two texts a token belongs to.
Leaves: logits of hidden tokens, of a class, of a tag for each token, or of where a span begins and ends; losses.
Floor 5.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from regard import masks
from regard.models.pretrained import Pretrained, as_config, tied_logits
from regard.models.transformer import Shape, Transformer, at_least_float32, check_tokens, start

HEADS = ("masked", "classify", "tag", "span")
_NAME = "BERT"


class BERT(Pretrained):
    """A bidirectional Transformer over tokens, with one of four heads.

    h = Transformer(norm(E t + P + S types)); logits are, by head,

    - masked: E norm(gelu(W h_i)) + b, for each token
    - classify: W tanh(V h_0), for the text
    - tag: W h_i, for each token
    - span: W h_i, two for each token: begins here, ends here

    Args:
        vocab_size: how many tokens there are.
        head: "masked", "classify", "tag" or "span". Default "masked".
        num_labels: how many classes or tags. Default 2, and 2 for spans.
        num_types: how many kinds of text. Default 2.
        shape: the arguments of `Transformer`; norm_first defaults to False, norm_eps to 1e-12.

    Raises:
        ValueError: for a head that is not among those above.

    Example:
        >>> model = BERT(50, head="tag", num_labels=3, dim=32, num_layers=1)
        >>> model(torch.randint(50, (2, 9)), torch.tensor([9, 4])).shape
        torch.Size([2, 9, 3])

    Source: Devlin et al. 2019, section 3 and figure 4.
    """

    def __init__(
        self, vocab_size: int, *, head: str = "masked", num_labels: int = 2, num_types: int = 2, **shape: Unpack[Shape]
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"{_NAME}: head must be one of {', '.join(HEADS)}; got {head!r}. Choose one.")
        shape.setdefault("norm_first", False)
        shape.setdefault("norm_eps", 1e-12)
        own = {"vocab_size": vocab_size, "head": head, "num_labels": num_labels, "num_types": num_types}
        self.config = as_config({**own, **shape})
        self.vocab_size, self.kind = vocab_size, head
        self.transformer = Transformer(**shape)
        dim, eps = self.transformer.dim, shape.get("norm_eps", 1e-12)
        self.embedding, self.types = nn.Embedding(vocab_size, dim), nn.Embedding(num_types, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.drop = nn.Dropout(shape.get("dropout", 0.0))
        if head == "masked":
            self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=eps))
            self.head_bias = nn.Parameter(torch.zeros(vocab_size))
        elif head == "classify":
            self.head = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), self.drop, nn.Linear(dim, num_labels))
        else:
            self.head = nn.Linear(dim, 2 if head == "span" else num_labels)
        start(self, self.transformer.num_layers)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            tokens: int64 `(batch, seq_len)`.
            lengths: int64 `(batch,)`, real tokens of each row; or bool `(batch, seq_len)`. Default None: all.
            types: int64 `(batch, seq_len)`, from 0. Default None: 0.

        Returns:
            `(batch, seq_len, vocab_size)`, `(batch, num_labels)`, `(batch, seq_len, num_labels)` or
            `(batch, seq_len, 2)`, by the head.
        """
        return self.logits(self.hidden(tokens, lengths, types))

    def hidden(self, tokens: Tensor, lengths: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """What the head reads, `(batch, seq_len, dim)`."""
        check_tokens(_NAME, "tokens", tokens, self.vocab_size)
        kinds = self.types.weight[0] if types is None else self.types(types)
        x = self.norm(self.transformer.positions.add(self.embedding(tokens) + kinds))
        mask = None if lengths is None else masks.padding(lengths)
        return self.transformer(self.drop(x), mask=mask, embedded=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., seq_len, dim)` → logits, by the head."""
        if self.kind == "masked":
            return tied_logits(self.head(hidden), self.embedding.weight, self.head_bias)
        return self.head(hidden[:, 0] if self.kind == "classify" else hidden)

    def loss(
        self, tokens: Tensor, wanted: Tensor, lengths: Tensor | None = None, types: Tensor | None = None
    ) -> Tensor:
        """Mean of −log p of what is wanted, in nats; −100 is not counted, and costs no logits where it is masked.

        Args:
            tokens, lengths, types: as in `forward`.
            wanted: int64: `(batch, seq_len)` tokens or tags, `(batch,)` classes, or `(batch, 2)` where spans begin and
                end.
        """
        hidden = self.hidden(tokens, lengths, types)
        if self.kind == "masked":
            asked = wanted != -100
            return nn.functional.cross_entropy(at_least_float32(self.logits(hidden[asked])), wanted[asked])
        logits = at_least_float32(self.logits(hidden))
        if self.kind == "span":
            if lengths is not None and lengths.ndim == 1:
                past = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
                logits = logits.masked_fill(past[..., None], -torch.inf)
            return nn.functional.cross_entropy(logits.transpose(1, 2).flatten(0, 1), wanted.flatten())
        return nn.functional.cross_entropy(logits.flatten(0, -2), wanted.flatten())

    def with_head(self, head: str, num_labels: int = 2) -> BERT:
        """A new model with this one's body and a fresh head, for fine-tuning.

        Example:
            >>> model = BERT(50, dim=32, num_layers=1).with_head("classify", 3)
            >>> model(torch.randint(50, (2, 9))).shape
            torch.Size([2, 3])
        """
        arguments: dict[str, Any] = {**self.config, "head": head, "num_labels": num_labels}
        other = BERT(**arguments)
        for name in ("transformer", "embedding", "types", "norm"):
            getattr(other, name).load_state_dict(getattr(self, name).state_dict())
        return other
