"""Sequence to sequence: an encoder reads a text, a decoder writes another and looks back at the first.

Enters: source and target token ids, padded on the right, and their lengths.
Leaves: logits; a loss; translations, greedy or by beams.
Floor 5.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from regard import masks
from regard.models.pretrained import Pretrained, as_config
from regard.models.transformer import Shape, Transformer, check_tokens
from regard.nn import Packing, beam_search, generate
from regard.nn.beam import Beams
from regard.nn.generate import Decoding, Generated

_NAME = "Seq2Seq"


class EncoderDecoder(Pretrained):
    """What every model that writes one text for another can do; `Seq2Seq` and `RecurrentSeq2Seq` are two.

    `start_token` begins every target, `end_token` ends it.
    """

    start_token: int
    end_token: int

    def decoding(self, source: Tensor, source_lengths: Tensor | None = None) -> Decoding:
        """A target about to be written, as `regard.nn.generate` and `beam_search` take it."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self, source: Tensor, source_lengths: Tensor | None = None, *, max_new_tokens: int, **named: Any
    ) -> Generated:
        """Write a target for each source.

        Args:
            source: int64 `(batch, seq_len)`.
            source_lengths: int64 `(batch,)`, real tokens of each row. Default None: all.
            max_new_tokens: most tokens of a target, the end included.
            named: as in `regard.nn.generate`: temperature, top_k, top_p, generator.
        """
        first = source.new_full((len(source), 1), self.start_token)
        return generate(
            self.decoding(source, source_lengths), first, max_new_tokens=max_new_tokens, end=self.end_token, **named
        )

    @torch.no_grad()
    def beam_search(
        self, source: Tensor, source_lengths: Tensor | None = None, *, num_beams: int, max_new_tokens: int,
        length_penalty: float = 1.0,
    ) -> Beams:  # fmt: skip
        """The best targets for each source, as in `regard.nn.beam_search`."""
        first = source.new_full((len(source), 1), self.start_token)
        return beam_search(
            self.decoding(source, source_lengths), first, num_beams=num_beams, max_new_tokens=max_new_tokens,
            end=self.end_token, length_penalty=length_penalty,
        )  # fmt: skip

    def shifted(self, target: Tensor) -> Tensor:
        """What the decoder reads while it writes target `(batch, seq_len)`: the start, then all but the last."""
        return torch.cat((target.new_full((len(target), 1), self.start_token), target[:, :-1]), 1)


class Seq2Seq(EncoderDecoder):
    """An encoder-decoder Transformer.

    p(y_i | y_<i, x) = softmax(W Decoder(E_t y_<i, Encoder(E_s x))_i + b)

    Args:
        vocab_size: how many source tokens there are.
        target_vocab_size: how many target tokens. Default None: both sides share vocabulary and table.
        start_token: begins every target. Default 1.
        end_token: ends it. Default 2.
        decoder_layers: blocks of the decoder. Default num_layers.
        embedding_scale: factor of embeddings. Default √dim, as in 2017.
        embedding_norm: whether embeddings with positions go through a norm, as in BART. Default False.
        head_bias: whether logits have a bias. Default False.
        shape: the arguments of `Transformer`, of both sides; positions default to "sinusoidal".

    Example:
        >>> model = Seq2Seq(50, dim=32, num_layers=1)
        >>> source, target = torch.randint(3, 50, (2, 9)), torch.randint(3, 50, (2, 7))
        >>> model(source, target, torch.tensor([9, 4])).shape
        torch.Size([2, 7, 50])

    Source: Vaswani et al. 2017; Press and Wolf 2017 (W is the target's table).
    """

    def __init__(
        self,
        vocab_size: int,
        target_vocab_size: int | None = None,
        *,
        start_token: int = 1,
        end_token: int = 2,
        decoder_layers: int | None = None,
        embedding_scale: float | None = None,
        embedding_norm: bool = False,
        head_bias: bool = False,
        **shape: Unpack[Shape],
    ) -> None:
        super().__init__()
        shape.setdefault("positions", "sinusoidal")
        own = {
            "vocab_size": vocab_size, "target_vocab_size": target_vocab_size, "start_token": start_token,
            "end_token": end_token, "decoder_layers": decoder_layers, "embedding_scale": embedding_scale,
            "embedding_norm": embedding_norm, "head_bias": head_bias,
        }  # fmt: skip
        self.config = as_config({**own, **shape})
        self.vocab_size = vocab_size
        self.target_vocab_size = vocab_size if target_vocab_size is None else target_vocab_size
        self.start_token, self.end_token = start_token, end_token
        for_decoder: Shape = {**shape}
        if decoder_layers is not None:
            for_decoder["num_layers"] = decoder_layers
        if shape.get("positions") == "relative":
            for_decoder["position_options"] = {**shape.get("position_options", {}), "bidirectional": False}
        self.encoder, self.decoder = Transformer(**shape), Transformer(**for_decoder, cross=True)
        dim = self.encoder.dim
        self.embedding_scale = dim**0.5 if embedding_scale is None else embedding_scale
        self.source_embedding = nn.Embedding(vocab_size, dim)
        self.target_embedding = None if target_vocab_size is None else nn.Embedding(target_vocab_size, dim)
        self.source_norm = nn.LayerNorm(dim) if embedding_norm else None
        self.target_norm = nn.LayerNorm(dim) if embedding_norm else None
        self.head_bias = nn.Parameter(torch.zeros(self.target_vocab_size)) if head_bias else None
        start_weights(self)

    def forward(
        self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of each target token, given those before it.

        Args:
            source: int64 `(batch, seq_len_kv)`.
            target: int64 `(batch, seq_len_q)`, without the start: it is put before, and the last is left out.
            source_lengths, target_lengths: int64 `(batch,)`, real tokens of each row. Default None: all.

        Returns:
            `(batch, seq_len_q, vocab_size)`; past a row's length they mean nothing.
        """
        memory = self.encode(source, source_lengths)
        mask = masks.causal()
        if target_lengths is not None:
            mask = mask & masks.padding(target_lengths)
        y = self.embed_target(self.shifted(target))
        memory_mask = None if source_lengths is None else masks.padding(source_lengths)
        return self.logits(self.decoder(y, memory, mask=mask, memory_mask=memory_mask, embedded=True))

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """What the decoder looks at, `(batch, seq_len_kv, dim)`."""
        mask = None if source_lengths is None else masks.padding(source_lengths)
        return self.encoder(self.embed_source(source), mask=mask, embedded=True)

    def loss(
        self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None, *, label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Mean of −log p of each real target token, in nats; the sentences are packed, so that padding costs nothing.

        Args:
            source, target, source_lengths, target_lengths: as in `forward`; target ends with `end_token`.
            label_smoothing: share of probability that the wanted token gives to all. Default 0.
        """
        packings = []
        for tokens, lengths in ((source, source_lengths), (target, target_lengths)):
            if lengths is None:
                lengths = tokens.new_full((len(tokens),), tokens.shape[1])
            packings.append(Packing(lengths, tokens.shape[1]))
        from_source, from_target = packings
        x = self.embed_source(from_source.pack(source), from_source.positions)
        memory = self.encoder(x, mask=from_source.mask(), embedded=True)
        y = self.embed_target(from_target.pack(self.shifted(target)), from_target.positions)
        hidden = self.decoder(
            y, memory, mask=masks.causal() & from_target.mask(), memory_mask=from_target.mask_onto(from_source),
            embedded=True,
        )  # fmt: skip
        logits = self.logits(hidden)[0].float()
        return nn.functional.cross_entropy(logits, from_target.pack(target)[0], label_smoothing=label_smoothing)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., dim)` → `(..., vocab_size)` by the target's table."""
        return nn.functional.linear(hidden, (self.target_embedding or self.source_embedding).weight, self.head_bias)

    def embed_source(self, tokens: Tensor, positions: int | Tensor = 0) -> Tensor:
        """Source embeddings with their positions, `(batch, seq_len, dim)`."""
        check_tokens(_NAME, "source", tokens, self.vocab_size)
        return self._embed(self.encoder, self.source_embedding, self.source_norm, tokens, positions)

    def embed_target(self, tokens: Tensor, positions: int | Tensor = 0) -> Tensor:
        """Target embeddings with their positions, `(batch, seq_len, dim)`."""
        check_tokens(_NAME, "target", tokens, self.target_vocab_size)
        table = self.target_embedding or self.source_embedding
        return self._embed(self.decoder, table, self.target_norm, tokens, positions)

    def decoding(self, source: Tensor, source_lengths: Tensor | None = None) -> _Decoding:
        """A target about to be written; arguments as in `forward`."""
        return _Decoding(self, source, source_lengths)

    def _embed(
        self, side: Transformer, table: nn.Embedding, norm: nn.Module | None, tokens: Tensor, positions: int | Tensor
    ) -> Tensor:
        x = side.positions.add(table(tokens) * self.embedding_scale, positions)
        return side.drop(x if norm is None else norm(x))


class _Decoding:
    def __init__(self, model: Seq2Seq, source: Tensor, source_lengths: Tensor | None) -> None:
        self.model, self.lengths = model, source_lengths
        memory = model.encode(source, source_lengths)
        self.memories = model.decoder.stack.project_memory(memory)  # pyright: ignore
        self.caches = model.decoder.caches()

    def step(self, tokens: Tensor) -> Tensor:
        y = self.model.embed_target(tokens, self.caches[0].position)
        memory_mask = None if self.lengths is None else masks.padding(self.lengths)
        hidden = self.model.decoder(
            y, self.memories, mask=masks.causal(), memory_mask=memory_mask, caches=self.caches, embedded=True
        )
        return self.model.logits(hidden[:, -1])

    def select(self, rows: Tensor) -> None:
        self.memories = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.memories]
        self.lengths = None if self.lengths is None else self.lengths[rows]
        for cache in self.caches:
            cache.select(rows)


def start_weights(model: Seq2Seq) -> None:
    """Glorot's uniform weights, embeddings of deviation dim^−½, as in 2017; no biases.

    Source: Glorot and Bengio 2010, equation 16; Vaswani et al. 2017, section 3.4.
    """
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter, std=model.encoder.dim**-0.5)
        elif parameter.ndim > 1 and "positions" not in name:
            nn.init.xavier_uniform_(parameter)
