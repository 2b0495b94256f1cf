"""Sequence to sequence: an encoder reads a text, a decoder writes another and looks back at the first.

Enters: source and target token ids, padded on the right, and their lengths.
Leaves: logits; a loss; translations, greedy or by beams.
Floor 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from regard import masks
from regard.mask_algebra import Mask
from regard.models.embeddings import DOMAINS
from regard.models.pretrained import Pretrained, as_config
from regard.models.transformer import Shape, Transformer, at_least_float32, check_tokens
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
            source: what the encoder reads, as `forward` takes it.
            source_lengths: int64 `(batch,)`, how much of each row is real. Default None: all.
            max_new_tokens: most tokens of a target, the end included.
            named: as in `regard.nn.generate`: temperature, top_k, top_p, generator.
        """
        first = torch.full((len(source), 1), self.start_token, device=source.device)
        return generate(
            self.decoding(source, source_lengths), first, max_new_tokens=max_new_tokens, end=self.end_token, **named
        )

    @torch.no_grad()
    def beam_search(
        self, source: Tensor, source_lengths: Tensor | None = None, *, num_beams: int, max_new_tokens: int,
        length_penalty: float = 1.0,
    ) -> Beams:  # fmt: skip
        """The best targets for each source, as in `regard.nn.beam_search`."""
        first = torch.full((len(source), 1), self.start_token, device=source.device)
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
        vocab_size: how many source tokens there are; 0 where the source is no text.
        target_vocab_size: how many target tokens. Default None: both sides share vocabulary and table.
        start_token: begins every target. Default 1.
        end_token: ends it. Default 2.
        domain: what the source is: "tokens", or "frames" or "patches" of `regard.models.embeddings`. Default "tokens".
        options: the arguments of that embedding, but dim. Default {}.
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
        domain: str = "tokens",
        options: Mapping[str, Any] | None = None,
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
            "end_token": end_token, "domain": domain, "options": dict(options or {}),
            "decoder_layers": decoder_layers, "embedding_scale": embedding_scale,
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
        if domain not in ("tokens", "frames", "patches"):
            raise ValueError(f"{_NAME}: domain must be 'tokens', 'frames' or 'patches'; got {domain!r}. Choose one.")
        if domain != "tokens" and target_vocab_size is None:
            raise ValueError(
                f"{_NAME}: target_vocab_size must be given where the source is no text; got None. Say how many tokens "
                "the target has."
            )
        self.domain = domain
        if domain == "tokens":
            self.source_embedding = nn.Embedding(vocab_size, dim)
        else:
            self.source_embedding = DOMAINS[domain](dim, **(options or {}))
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
            source: int64 `(batch, seq_len_kv)`; frames or images, where that is the domain.
            target: int64 `(batch, seq_len_q)`, without the start: it is put before, and the last is left out.
            source_lengths, target_lengths: int64 `(batch,)`, real tokens of each row. Default None: all.

        Returns:
            `(batch, seq_len_q, vocab_size)`; past a row's length they mean nothing.
        """
        memory, memory_mask = self.encode(source, source_lengths)
        mask = masks.causal()
        if target_lengths is not None:
            mask = mask & masks.padding(target_lengths)
        y = self.embed_target(self.shifted(target))
        return self.logits(self.decoder(y, memory, mask=mask, memory_mask=memory_mask, embedded=True))

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> tuple[Tensor, Mask | None]:
        """What the decoder looks at, `(batch, seq_len_kv, dim)`, and the mask of its padding."""
        x, lengths = self.embed_source(source, source_lengths)
        mask = None if lengths is None else masks.padding(lengths)
        return self.encoder(x, mask=mask, embedded=True), mask

    def loss(
        self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None, *, label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """Mean of −log p of each real target token, in nats; the sentences are packed, so that padding costs nothing.

        Args:
            source, target, source_lengths, target_lengths: as in `forward`; target ends with `end_token`.
            label_smoothing: share of probability that the wanted token gives to all. Default 0.
        """
        x, source_lengths = self.embed_source(source, source_lengths)
        from_source, from_target = _packing(x, source_lengths), _packing(target, target_lengths)
        memory = self.encoder(from_source.pack(x), mask=from_source.mask(), embedded=True)
        y = self.embed_target(from_target.pack(self.shifted(target)), from_target.positions)
        hidden = self.decoder(
            y, memory, mask=masks.causal() & from_target.mask(), memory_mask=from_target.mask_onto(from_source),
            embedded=True,
        )  # fmt: skip
        logits, wanted = at_least_float32(self.logits(hidden))[0], from_target.pack_wanted(target)[0]
        return nn.functional.cross_entropy(logits, wanted, label_smoothing=label_smoothing)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., dim)` → `(..., vocab_size)` by the target's table."""
        return nn.functional.linear(hidden, self._target_table.weight, self.head_bias)

    def embed_source(self, source: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Source embeddings with their positions, `(batch, seq_len, dim)`, and how many of each row are real."""
        if isinstance(self.source_embedding, nn.Embedding):
            check_tokens(_NAME, "source", source, self.vocab_size)
            x = self.source_embedding(source) * self.embedding_scale
        else:
            embedded = self.source_embedding(source) if lengths is None else self.source_embedding(source, lengths)
            x, lengths = embedded.x, None if embedded.keep is None else embedded.keep.sum(1)
        return self._placed(self.encoder, self.source_norm, x, 0), lengths

    def embed_target(self, tokens: Tensor, positions: int | Tensor = 0) -> Tensor:
        """Target embeddings with their positions, `(batch, seq_len, dim)`."""
        check_tokens(_NAME, "target", tokens, self.target_vocab_size)
        return self._placed(
            self.decoder, self.target_norm, self._target_table(tokens) * self.embedding_scale, positions
        )

    def decoding(self, source: Tensor, source_lengths: Tensor | None = None) -> _Decoding:
        """A target about to be written; arguments as in `forward`."""
        return _Decoding(self, source, source_lengths)

    @property
    def _target_table(self) -> nn.Embedding:
        table = self.source_embedding if self.target_embedding is None else self.target_embedding
        assert isinstance(table, nn.Embedding)
        return table

    def _placed(self, side: Transformer, norm: nn.Module | None, x: Tensor, positions: int | Tensor) -> Tensor:
        x = side.positions.add(x, positions)
        return side.drop(x if norm is None else norm(x))


class _Decoding:
    def __init__(self, model: Seq2Seq, source: Tensor, source_lengths: Tensor | None) -> None:
        self.model = model
        memory, mask = model.encode(source, source_lengths)
        self.lengths = None if mask is None else mask.lengths  # pyright: ignore[reportAttributeAccessIssue]
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
            cache.reorder(rows)


def _packing(x: Tensor, lengths: Tensor | None) -> Packing:
    if lengths is None:
        lengths = torch.full((len(x),), x.shape[1], dtype=torch.int64, device=x.device)
    return Packing(lengths, x.shape[1], multiple=64)


def start_weights(model: Seq2Seq) -> None:
    """Glorot's uniform weights, embeddings of deviation dim^−½, as in 2017; no biases.

    Source: Glorot and Bengio 2010, equation 16; Vaswani et al. 2017, section 3.4.
    """
    for name, parameter in model.named_parameters():
        if name in ("source_embedding.weight", "target_embedding.weight"):
            nn.init.normal_(parameter, std=model.encoder.dim**-0.5)
        elif parameter.ndim == 2 and "positions" not in name:
            nn.init.xavier_uniform_(parameter)
